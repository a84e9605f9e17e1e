#include "textflag.h"

// See entry in main.go.
TEXT ·entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVD $283, R8 // membarrier
	MOVD $16, R0  // MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED
	MOVD $0, R1
	MOVD $0, R2
	SVC           // an error is gVisor's to find, which tries again
	JMP  _rt0_arm64_linux(SB)
