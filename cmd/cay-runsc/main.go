// Command cay-runsc is what cay needs of gVisor's runsc: the verbs that start,
// restore and save a sandbox, and those that runsc calls itself. Every start of a
// sandbox starts it several times (client, gofer, sandbox, and both again in
// their chroots), so nothing may be linked here that they do not need: each
// package's init is paid on every create. It is embedded into cay and unpacked
// under its content hash.
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

// entry is where the kernel starts the program (-E of the linker, in the Makefile),
// before Go's runtime. What it does there gVisor does again later, with more threads than
// one, for which the kernel waits for an RCU grace period of 2 to 18 ms; a process of
// one thread does not wait, and the second time there is nothing left to do:
//
//   - It registers the process for membarrier, which gVisor does in a package's init, in each
//     of the three processes that a start runs one after the other: 30 ms of 240.
//   - It makes the table of files large enough for the descriptors from 256 on, to which
//     the sentry moves the sandbox's standard streams: 14 ms more.
//
// Without it everything works, later.
//
//lint:ignore U1000 the linker is told of it
func entry()

func main() {
	if len(os.Args) == 2 && os.Args[1] == "await" {
		await()
	}
	gctune.Rest(startMemory)
	// The processes that stay are named runsc-sandbox and runsc-gofer.
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

// await waits until it is told its arguments, as a JSON array at the socket that is descriptor 3, and
// answers with a byte: whoever starts sandboxes has a process ready that has its own start
// behind it. An end without any says that it is not needed.
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

// rehearse does what a start does first, without effect: doing it the first time takes 7 ms longer,
// in which encoding/json learns the types of a spec, and the program's pages are mapped.
func rehearse() {
	var spec specs.Spec
	_ = json.Unmarshal([]byte("{}"), &spec)
	set := flag.NewFlagSet("", flag.ContinueOnError)
	config.RegisterFlags(set)
	if conf, err := config.NewFromFlags(set); err == nil {
		_ = conf.ToFlags()
	}
}

// startMemory is how much a process of runsc may take before it collects garbage for the
// first time, in bytes: twice what the restore of a small sandbox takes. A start
// allocates some 10 MB, nearly all of which stays; collecting that again and again from 4
// MB on is 10 ms of a create's 190 and 25 of a restore's 180.
const startMemory = 32 << 20
