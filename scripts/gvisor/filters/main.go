// Command filters compiles the seccomp programs of gVisor's sentry and writes them as Go, for
// package runsc/boot/filter of the module that it is built with. gVisor's own releases carry
// them; its Go module does not, and every start then compiles its own.
package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

func main() {
	if err := write(); err != nil {
		fmt.Fprintln(os.Stderr, "filters:", err)
		os.Exit(1)
	}
}

func write() error {
	programs, err := config.PrecompiledPrograms()
	if err != nil {
		return fmt.Errorf("compiling the programs: %w", err)
	}
	programs = slices.DeleteFunc(programs, func(p precompiledseccomp.Program) bool { return !wanted(p.Name) })
	if len(programs) == 0 {
		return fmt.Errorf("gVisor has no program for what cay starts on %s", runtime.GOARCH)
	}
	slices.SortFunc(programs, func(a, b precompiledseccomp.Program) int { return strings.Compare(a.Name, b.Name) })
	// The package fills its map of programs once, with none: whoever comes first.
	fmt.Print(`package filter

import "gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"

func init() {
	registerPrecompiledProgramsOnce.Do(func() {
		precompiledPrograms = make(map[string]precompiledseccomp.Program)
`)
	for _, p := range programs {
		// Stand-ins for what is only known when it is installed: some order of the day, else.
		for _, offsets := range p.VarOffsets {
			for _, at := range offsets {
				p.Bytecode32[at] = 0
			}
		}
		fmt.Print(p.Registration("\t\t", "precompiledseccomp", "precompiledPrograms"))
	}
	fmt.Print("\t})\n}\n")
	return nil
}

// wanted reports whether cay starts sandboxes with a program: every process has it in its memory.
func wanted(name string) bool {
	for _, device := range []string{"NVProxy=true", "TPUProxy=true", `Platform="ptrace"`} {
		if strings.Contains(name, device) {
			return false
		}
	}
	return true
}
