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
