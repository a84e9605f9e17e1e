// Command cay-runsc is gVisor's runsc and nothing else. Every start of a
// sandbox starts it several times (client, gofer, sandbox, and both again in
// their chroots), so nothing may be linked here that runsc does not need: each
// package's init is paid on every create. It is embedded into cay and unpacked
// under its content hash.
package main

import (
	"os"
	"runtime/debug"
	"strings"
	"time"

	"gvisor.dev/gvisor/runsc/cli/maincli"
)

// entry is where the kernel starts the program (-E of the linker, in the Makefile),
// before Go's runtime. It registers the process for membarrier, which gVisor does in a
// package's init. There it waits for an RCU grace period, 2 to 14 ms in each of the
// three processes that a start runs one after the other, because Go has a second thread
// by then; a process of one thread does not wait. Of a create and of a restore it takes
// 28 to 34 ms. Without it everything works, later.
func entry()

func main() {
	// The processes that stay are named runsc-sandbox and runsc-gofer.
	if strings.HasPrefix(os.Args[0], "runsc-") {
		time.AfterFunc(startGarbage, debug.FreeOSMemory)
	}
	maincli.Main()
}

// startGarbage is when what the start of a sandbox left in its two processes is
// given back to the host: the spec, the seccomp programs and the like, some 3 MB
// together, that a sandbox at rest would keep for ever, since nothing makes it
// collect. Later than any start takes, so that no start pays for it.
const startGarbage = 2 * time.Second
