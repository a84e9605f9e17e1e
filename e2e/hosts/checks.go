package main

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

//go:embed checks/*.sh
var scripts embed.FS

// lab runs the checks of one machine.
type lab struct {
	options options
	machine machine
	luggage *luggage
	root    string // directory of its root
	dir     string // directory of its disks
	logs    string // directory of its output
}

// Limits of checks, by the machine's clock. A check that hangs is noticed this late; a lower limit
// fails slow machines.
const (
	checkLimit = 4 * time.Minute
	testsLimit = 15 * time.Minute
)

// goTests are the checks that run tests of the repository, with a package and a pattern of its
// tests. The machines do not have the programs that other tests of e2e need (node, chromium, Go).
var goTests = map[string]struct{ dir, run string }{
	"cgroup":   {"internal/cgroup", "."},
	"runsc":    {"internal/runsc", "."},
	"network":  {"internal/network", "."},
	"agent":    {"internal/agent", "."},
	"node":     {"internal/node", "."},
	"buildkit": {"internal/buildkit", "."},
	"story":    {"e2e", "^(TestStory|TestWhoAndWhere|TestHostIsInvisible|TestFiles)$"},
	"limits":   {"e2e", "^(TestSizesAreLimits|TestServerGroup|TestLostSandbox)$"},
	"builds":   {"e2e", "^(TestDockerfiles|TestBuildFails)$"},
	// Each is a part of TestMemory, which as a whole takes hours where the processor is emulated. The empty name in
	// the last chooses "/tmp is on the disk", whose name begins with a slash.
	"memory-one":   {"e2e", "^TestMemory$/^(at_once|in_steps|small_pieces|shared_mapping|the_shell_goes_on)$"},
	"memory-many":  {"e2e", "^TestMemory$/^(several_processes|a_command_of_several_processes|several_commands_at_once)$"},
	"memory-files": {"e2e", "^TestMemory$/^(tmpfs|tmpfs_and_a_process_together|the_disk_is_not_memory|)$"},
	"processes":    {"e2e", "^(TestForkBomb|TestTimeoutReachesEveryDescendant|TestZombiesAndKilledChildren)$"},
	"disk":         {"e2e", "^TestFullDisk$"},
	"sleep":        {"e2e", "^(TestSleepKeepsEverything|TestSleepCutsTheOutside|TestForkGoesOn|TestSnapshots)$"},
	"egress":       {"e2e", "^TestEgress"},
	"crashes":      {"e2e", "^(TestRestartAdopts|TestDoctorCleans|TestReboot|TestKilledAtAnyMoment|TestSentryKilled)$"},
}

// packages lists the packages whose tests the chosen checks of the machines run.
func (o options) packages(chosen []machine) (all []string) {
	for _, m := range chosen {
		for _, c := range m.checks {
			if t, is := goTests[c]; is && o.wants(m, c) && !slices.Contains(all, t.dir) {
				all = append(all, t.dir)
			}
		}
	}
	return all
}

// wants reports whether a check of a machine is to be run.
func (o options) wants(m machine, check string) bool {
	return o.checks.MatchString(check) || o.checks.MatchString(m.name+"/"+check)
}

// run runs the chosen checks of the machine, each of which gives a row.
func (l *lab) run(ctx context.Context) (rows []row) {
	if l.options.wants(l.machine, "cuts") && len(l.machine.checks) == 1 && l.machine.checks[0] == "cuts" {
		return l.cuts(ctx)
	}
	start := time.Now()
	g, err := l.boot(ctx, true)
	if err != nil && ctx.Err() != nil {
		return nil
	}
	rows = append(rows, l.row("boot", start, "", err))
	if err != nil {
		return rows
	}
	defer func() { g.cut() }()
	var kernel bytes.Buffer
	const facts = "uname -r; stat -fc %T /sys/fs/cgroup; systemctl --version | head -1 | cut -d' ' -f1-2"
	if err := g.script(ctx, facts, &kernel, l.outside(checkLimit)); err == nil {
		rows[0].note = strings.Join(strings.Split(strings.TrimSpace(kernel.String()), "\n"), ", ")
	}
	for _, name := range l.machine.checks {
		if !l.options.wants(l.machine, name) {
			continue
		}
		start := time.Now()
		note, err := l.try(ctx, g, name)
		if err == nil && name == "reboot" {
			if err = g.reboot(ctx); err == nil {
				if g, err = l.boot(ctx, false); err != nil {
					return append(rows, l.row(name, start, note, err))
				}
				note, err = l.try(ctx, g, "rebooted")
			}
		}
		if ctx.Err() != nil {
			return rows // an interrupted check has no result
		}
		rows = append(rows, l.row(name, start, note, err))
		if err != nil && l.options.keep {
			fmt.Printf("%s runs on until ^C: ssh -i %s -p %s root@127.0.0.1\n", l.machine.name, l.luggage.keyFile, g.port)
			<-ctx.Done()
		}
	}
	return rows
}

// try runs one check and returns its note.
func (l *lab) try(ctx context.Context, g *guest, name string) (note string, err error) {
	common, err := scripts.ReadFile("checks/lib.sh")
	if err != nil {
		return "", err
	}
	var text []byte
	limit := checkLimit
	if _, is := goTests[name]; is {
		limit = testsLimit
		text = l.options.goTests(name, limit-time.Minute)
	} else if text, err = scripts.ReadFile("checks/" + name + ".sh"); err != nil {
		return "", err
	}
	log, err := os.Create(filepath.Join(l.logs, name+".log"))
	if err != nil {
		return "", err
	}
	defer log.Close()
	out := &notes{file: log}
	err = g.script(ctx, string(common)+string(text), out, l.outside(limit))
	note = out.last()
	return note, err
}

// goTests returns the script of a check that runs tests. Its note says so if the options leave out some.
func (o options) goTests(check string, limit time.Duration) []byte {
	run, only := goTests[check].run, ""
	if o.tests[check] != "" {
		run, only = o.tests[check], "of a choice"
	}
	return fmt.Appendf(nil, "stop_server\nonly=%s go_tests %s %s %s\n", shellQuote(only), goTests[check].dir,
		shellQuote(run), limit)
}

// outside converts a duration of the machine's clock to one of the host's clock.
func (l *lab) outside(d time.Duration) time.Duration {
	return time.Duration(float64(d) / l.options.clock)
}

// row makes the row of a check that has ended, and prints it.
func (l *lab) row(check string, start time.Time, note string, err error) row {
	r := row{machine: l.machine.name, check: check, result: passed, note: note}
	r.took, r.day = time.Since(start).Round(time.Second), start.Format(time.DateOnly)
	switch {
	case errors.Is(err, errTimeout):
		r.result = "TIMED OUT"
	case err != nil:
		r.result = "FAILED"
		if note == "" {
			r.note = oneLine(err.Error())
		}
	}
	fmt.Printf("%s %-10s %-9s %6s  %s\n", r.machine, r.check, r.result, r.took, r.note)
	return r
}

// notes writes the output of a check into a file, and keeps the last line that begins with "note:
// ".
type notes struct {
	file *os.File
	mu   sync.Mutex
	// +checklocks:mu
	rest []byte // of an incomplete line; guarded by mu
	// +checklocks:mu
	note string // guarded by mu
}

// Write implements io.Writer.
func (n *notes) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rest = append(n.rest, p...)
	for {
		line, rest, whole := bytes.Cut(n.rest, []byte("\n"))
		if !whole {
			break
		}
		n.keepLocked(string(line))
		n.rest = rest
	}
	if len(n.rest) > bufio.MaxScanTokenSize {
		n.rest = nil // no note is that long
	}
	return n.file.Write(p)
}

// +checklocks:n.mu
func (n *notes) keepLocked(line string) {
	if note, is := strings.CutPrefix(line, "note: "); is {
		n.note = oneLine(note)
	}
}

// last returns the last note.
func (n *notes) last() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.note
}
