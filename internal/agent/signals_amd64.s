#include "textflag.h"

TEXT handler<>(SB), NOSPLIT|NOFRAME, $0
	RET

TEXT restorer<>(SB), NOSPLIT|NOFRAME, $0
	MOVQ $15, AX // rt_sigreturn
	SYSCALL
	INT  $3      // not reached

TEXT ·returner(SB), NOSPLIT, $0-16
	LEAQ handler<>(SB), AX
	MOVQ AX, handler+0(FP)
	LEAQ restorer<>(SB), AX
	MOVQ AX, restorer+8(FP)
	RET
