#include "textflag.h"

TEXT handler<>(SB), NOSPLIT|NOFRAME, $0
	RET

TEXT ·returner(SB), NOSPLIT, $0-16
	MOVD $handler<>(SB), R0
	MOVD R0, handler+0(FP)
	MOVD ZR, restorer+8(FP) // the kernel uses its own, in the vDSO
	RET
