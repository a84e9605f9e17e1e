// Command hosts runs cay and its tests in virtual machines of the kinds that users have, and writes
// the results into a table.
//
// It needs root, a built cay and the packages that scripts/needs.sh names for it. Roots of machines
// stay in the user's cache directory. It removes everything else and ends its processes at the end,
// also after an error and after ^C. docs/hosts.md explains the table.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options say what to run.
type options struct {
	machines string            // names of machines, separated by spaces
	checks   *regexp.Regexp    // matches the names of checks
	tests    map[string]string // for checks that run tests, an expression that matches those to run instead of all
	cuts     int               // number of power cuts in each machine that has the check
	arm64    string            // repository that was built for arm64
	doc      string            // Markdown file whose table is updated, "" for none
	cache    string            // directory of roots and logs
	clock    float64           // speed of a machine's clock; 1 is the normal one
	keep     bool              // lets a failed machine run until the program is interrupted
}

func main() {
	// Children die with the thread that started them, so none outlives the program.
	runtime.LockOSThread()
	var o options
	flag.StringVar(&o.machines, "machines", names(), "which `machines` to run, separated by spaces")
	checks := flag.String("checks", ".", "run the checks that this `expression` matches, as unit or as bookworm/unit")
	o.tests = map[string]string{}
	flag.Func("tests", "in a check, run the tests that match, as `node=^TestRoom$`; repeatable", func(text string) error {
		check, expression, _ := strings.Cut(text, "=")
		if _, is := goTests[check]; !is || expression == "" {
			return errors.New("it has no check that runs tests, or no expression")
		}
		o.tests[check] = expression
		return nil
	})
	flag.IntVar(&o.cuts, "cuts", 10, "how often the check cuts takes the power away, 1 to 1000")
	flag.StringVar(&o.arm64, "arm64", "", "`directory` of this repository, built there with GOARCH=arm64 make build")
	flag.StringVar(&o.doc, "doc", "", "bring the table of this Markdown `file`, after <!-- run -->, up to date")
	flag.Float64Var(&o.clock, "clock", 0.2, "how fast the clock of an emulated machine goes, 0.01 to 1")
	flag.BoolVar(&o.keep, "keep", false, "leave a machine in which a check failed running until ^C")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := o.check(*checks)
	if err == nil {
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "hosts:", err)
		os.Exit(1)
	}
}

// check completes the options and refuses those that make no sense.
func (o *options) check(checks string) (err error) {
	if o.checks, err = regexp.Compile(checks); err != nil {
		return fmt.Errorf("-checks: %w", err)
	}
	if o.cuts < 1 || o.cuts > 1000 {
		return fmt.Errorf("-cuts is %d; it is 1 to 1000", o.cuts)
	}
	if o.clock < 0.01 || o.clock > 1 {
		return fmt.Errorf("-clock is %g; it is 0.01 to 1", o.clock)
	}
	if hasKVM() {
		o.clock = 1
	}
	if os.Geteuid() != 0 {
		return errors.New("it needs root, for mmdebstrap and for a server that has the templates")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	o.cache = filepath.Join(cache, "cay", "hosts")
	if os.Getenv("CAY_IMAGES_CACHE_DIR") == "" { // make sets the same
		return os.Setenv("CAY_IMAGES_CACHE_DIR", filepath.Join(cache, "cay", "images"))
	}
	return nil
}

// run does everything that the options ask for. It fails if any check did.
func run(ctx context.Context, o options) (err error) {
	var chosen []machine
	for name := range strings.FieldsSeq(o.machines) {
		i := slices.IndexFunc(machines, func(m machine) bool { return m.name == name })
		if i < 0 {
			return fmt.Errorf("there is no machine %q; there are %s", name, names())
		}
		if machines[i].release.arch != "amd64" && o.arm64 == "" {
			fmt.Printf("%s is left out: -arm64 names no repository\n", name)
			continue
		}
		chosen = append(chosen, machines[i])
	}
	// The cache is not below /tmp, which may be memory: disks are large.
	if err := os.MkdirAll(o.cache, 0o700); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.cache, "run-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var all []row
	packed := map[string]*luggage{}
	for _, m := range chosen {
		if !slices.ContainsFunc(m.checks, func(c string) bool { return o.wants(m, c) }) {
			continue
		}
		arch := m.release.arch
		if packed[arch] == nil {
			built := here
			if arch != "amd64" {
				built = o.arm64
			}
			if packed[arch], err = pack(ctx, filepath.Join(dir, arch), built, o.packages(chosen)); err != nil {
				return fmt.Errorf("packing what machines need: %w", err)
			}
		}
		rows := tryMachine(ctx, o, m, packed[arch], dir)
		all = append(all, rows...)
		if o.doc != "" { // after an interruption too: hours of checks may have ended before it
			if err := updateDoc(o.doc, rows); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	fmt.Print("\n", table(all))
	failed := 0
	for _, r := range all {
		if r.result != passed {
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d checks failed; their output is in %s", failed, len(all), filepath.Join(o.cache, "logs"))
	}
	return nil
}

// tryMachine runs the chosen checks in one machine. Every error becomes a row, but for those of an interruption.
func tryMachine(ctx context.Context, o options, m machine, l *luggage, dir string) []row {
	start := time.Now()
	lab := &lab{options: o, machine: m, luggage: l}
	lab.dir, lab.logs = filepath.Join(dir, m.name), filepath.Join(o.cache, "logs", m.name)
	root, err := makeRoot(ctx, o.cache, m.release)
	if err != nil && ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return []row{lab.row("boot", start, "", fmt.Errorf("making the root: %w", err))}
	}
	lab.root = root
	for _, d := range []string{lab.dir, lab.logs} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return []row{lab.row("boot", start, "", err)}
		}
	}
	fmt.Printf("%s: root ready after %s\n", m.name, time.Since(start).Round(time.Second))
	rows := lab.run(ctx)
	if err := os.RemoveAll(lab.dir); err != nil {
		rows = append(rows, lab.row("boot", start, "", err))
	}
	return rows
}
