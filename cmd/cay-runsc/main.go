// Command cay-runsc is the part of gVisor's runsc that cay needs: the verbs that start, restore
// and save a sandbox, and those that runsc calls itself. Every start of a sandbox starts it
// several times (client, gofer, sandbox, and both again in their chroots), so it must link
// nothing that they do not need: each package's init is paid on every create. It is embedded into
// cay and unpacked under its content hash.
package main

import (
	"encoding/json"
	"os"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/flag"

	_ "github.com/cayhq/cay/cmd/cay-runsc/early"
	"github.com/cayhq/cay/internal/gctune"
)

// entry is the address at which the kernel starts the program (-E of the linker, in the
// Makefile), before Go's runtime. It does two things that gVisor does again later. By then the
// process has several threads, and the kernel waits for an RCU grace period of 2 to 18 ms; with
// one thread it does not wait, and the second time there is nothing left to do:
//
//   - It registers the process for membarrier, which gVisor does in a package's init, in each
//     of the three processes that a start runs one after the other: 30 ms of 240.
//   - It makes the table of files large enough for the descriptors from 256 on, to which
//     the sentry moves the sandbox's standard streams: 14 ms more.
//
// Without it everything works, but later.
//
//lint:ignore U1000 the linker uses it
func entry()

func main() {
	if len(os.Args) == 2 && os.Args[1] == "await" {
		await()
	}
	gctune.Rest(startMemory)
	// The long-lived processes are named runsc-sandbox and runsc-gofer.
	if strings.HasPrefix(os.Args[0], "runsc-") {
		plainCPUID()
	}
	const called, internal = "", "internal use only"
	cli.Run(map[util.SubCommand]string{
		new(cmd.Run):     called,
		new(cmd.Restore): called,
		new(save):        called,
		new(cmd.Delete):  called,
		new(cmd.Boot):    internal,
		new(cmd.Gofer):   internal,
		new(cmd.Umount):  internal,
	}, nil)
}

// await waits for arguments, a JSON array at the socket that is descriptor 3, and answers with a
// byte. So a server can have a process ready whose own start is done. If the socket ends without
// arguments, the process is not needed.
func await() {
	rehearse()
	socket := os.NewFile(3, "arguments")
	var args []string
	if err := json.NewDecoder(socket).Decode(&args); err != nil {
		os.Exit(0)
	}
	if _, err := socket.Write([]byte{0}); err != nil {
		os.Exit(1)
	}
	if err := socket.Close(); err != nil {
		os.Exit(1)
	}
	os.Args = append(os.Args[:1], args...)
}

// rehearse does the first steps of a start without effect. Doing them the first time takes 7 ms
// longer, while encoding/json learns the types of a spec and the program's pages are mapped.
func rehearse() {
	var spec specs.Spec
	_ = json.Unmarshal([]byte("{}"), &spec)
	set := flag.NewFlagSet("", flag.ContinueOnError)
	config.RegisterFlags(set)
	if conf, err := config.NewFromFlags(set); err == nil {
		_ = conf.ToFlags()
	}
}

// startMemory is the number of bytes that a process of runsc may take before it collects garbage
// for the first time: twice what the restore of a small sandbox takes. A start allocates some 10
// MB, nearly all of which stays. Collecting that again and again from 4 MB on takes 10 ms of a
// create's 190 and 25 of a restore's 180; a larger value would take memory in every sandbox.
const startMemory = 32 << 20
