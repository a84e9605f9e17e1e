// Command filters compiles the seccomp programs of gVisor's sentry or gofer and writes them as Go, for
// package runsc/boot/filter or runsc/fsgofer/filter of the module that it is built with. gVisor's own
// releases carry the sentry's; its Go module does not, and every start then compiles its own.
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
		// Its package fills the map once, with none: whoever comes first.
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
		// Stand-ins for what is only known when it is installed: in some order of the day, else.
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

// sentryPrograms are those of sandboxes as cay starts them: every process has them in its memory.
func sentryPrograms() ([]precompiledseccomp.Program, error) {
	programs, err := config.PrecompiledPrograms()
	programs = slices.DeleteFunc(programs, func(p precompiledseccomp.Program) bool {
		other := []string{"NVProxy=true", "TPUProxy=true", `Platform="ptrace"`, `Platform="slimvm"`}
		return slices.ContainsFunc(other, func(option string) bool { return strings.Contains(p.Name, option) })
	})
	slices.SortFunc(programs, func(a, b precompiledseccomp.Program) int { return strings.Compare(a.Name, b.Name) })
	return programs, err
}

// goferPrograms is that of a sandbox as cay starts it.
func goferPrograms() ([]precompiledseccomp.Program, error) {
	opt := gofer.Options{DirectFS: true}
	const self = "self_pid" // the ID of the process, which the rules have from the one that makes them
	vars := precompiledseccomp.Values{}
	vars.SetUint64(self, 0)
	p, err := precompiledseccomp.Precompile(fmt.Sprintf("%+v", opt), slices.Collect(maps.Keys(vars)), func(vars precompiledseccomp.Values) *seccomp.Program {
		rules := gofer.Rules(opt)
		rules.Remove(unix.SYS_TGKILL)
		rules.Set(unix.SYS_TGKILL, seccomp.PerArg{seccomp.EqualTo(vars.GetUint64(self))})
		// As package filter's Install has it.
		return &seccomp.Program{RuleSets: []seccomp.RuleSet{
			{Rules: seccomp.DenyNewExecMappings},
			{Rules: rules, Action: seccomp.Allow},
		}}
	})
	return []precompiledseccomp.Program{p}, err
}
