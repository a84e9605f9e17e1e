// Command filters compiles the seccomp programs of gVisor's sentry or gofer and prints them as Go, for
// package runsc/boot/filter or runsc/fsgofer/filter of the module that it is built with. gVisor's own
// releases contain the sentry's programs. Its Go module does not, so that every start would compile them.
//
//	filters sentry|gofer
package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/runsc/boot/filter/config"
	gofer "gvisor.dev/gvisor/runsc/fsgofer/filter"
)

func main() {
	if err := write(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "filters:", err)
		os.Exit(1)
	}
}

func write(args []string) error {
	programs, begin, end := []precompiledseccomp.Program(nil), "func init() {\n", "}\n"
	var err error
	switch strings.Join(args, " ") {
	case "sentry":
		programs, err = sentryPrograms()
		// The package fills the map once, without programs. This init runs first and takes its place.
		begin, end = begin+"registerPrecompiledProgramsOnce.Do(func() {\n", "})\n"+end
	case "gofer":
		programs, err = goferPrograms()
	default:
		return fmt.Errorf("usage: filters sentry|gofer")
	}
	if err != nil {
		return fmt.Errorf("compiling the programs: %w", err)
	}
	fmt.Print("package filter\n\nimport \"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp\"\n\n" +
		begin + "precompiledPrograms = make(map[string]precompiledseccomp.Program)\n")
	for _, p := range programs {
		// Clear the placeholders of values that are only known at installation; they differ from run to run.
		for _, offsets := range p.VarOffsets {
			for _, at := range offsets {
				p.Bytecode32[at] = 0
			}
		}
		fmt.Print(p.Registration("", "precompiledseccomp", "precompiledPrograms"))
	}
	fmt.Print(end)
	return nil
}

// sentryPrograms returns the sentry's programs for the options with which cay starts sandboxes. Others are
// left out, since every process would have them in its memory.
func sentryPrograms() ([]precompiledseccomp.Program, error) {
	programs, err := config.PrecompiledPrograms()
	programs = slices.DeleteFunc(programs, func(p precompiledseccomp.Program) bool {
		other := []string{"NVProxy=true", "TPUProxy=true", `Platform="ptrace"`, `Platform="slimvm"`}
		return slices.ContainsFunc(other, func(option string) bool { return strings.Contains(p.Name, option) })
	})
	slices.SortFunc(programs, func(a, b precompiledseccomp.Program) int { return strings.Compare(a.Name, b.Name) })
	return programs, err
}

// goferPrograms returns the gofer's program for the options with which cay starts sandboxes.
func goferPrograms() ([]precompiledseccomp.Program, error) {
	opt := gofer.Options{DirectFS: true}
	const self = "self_pid" // the ID of the process; Rules puts that of the compiling process there
	vars := precompiledseccomp.Values{}
	vars.SetUint64(self, 0)
	name, keys := fmt.Sprintf("%+v", opt), slices.Collect(maps.Keys(vars))
	p, err := precompiledseccomp.Precompile(name, keys, func(vars precompiledseccomp.Values) *seccomp.Program {
		rules := gofer.Rules(opt)
		rules.Remove(unix.SYS_TGKILL)
		rules.Set(unix.SYS_TGKILL, seccomp.PerArg{seccomp.EqualTo(vars.GetUint64(self))})
		// Install of package filter has the same rule sets.
		return &seccomp.Program{RuleSets: []seccomp.RuleSet{
			{Rules: seccomp.DenyNewExecMappings},
			{Rules: rules, Action: seccomp.Allow},
		}}
	})
	return []precompiledseccomp.Program{p}, err
}
