// Command bench measures a cay server of its own on this machine and, in turn, a Docker engine if
// one answers. It prints a table and, with -json, writes all measurements to a file.
//
// It needs root and a built cay. It removes the server, its sandboxes and its images in the engine
// at the end, also after an error and after ^C. docs/performance.md explains the numbers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// options hold the settings of a run.
type options struct {
	cay    string // path of the program
	old    string // path of an older program to compare it with, "" for none
	json   string // file for the results, "" for none
	starts int    // sandboxes created one after the other
	idle   int    // idle sandboxes whose memory is measured
	crowd  int    // sandboxes with policies beside the one that sends
	dense  int    // idle sandboxes at once
	doc    string // Markdown file whose run is replaced by this one, "" for none

	clients  int           // clients that create, execute and destroy in a loop
	loadTime time.Duration // duration of that loop
	docker   bool
	only     string // the only part to measure, "" for all
}

// commands returns how often each command runs in one sandbox.
func (o options) commands() int { return 2 * o.starts }

func main() {
	var o options
	var quick bool
	flag.StringVar(&o.cay, "cay", "bin/cay", "the program to measure")
	flag.StringVar(&o.old, "old", "",
		"measure this older `program` in turn with it, and nothing else; fail if the new one is slower")
	flag.StringVar(&o.json, "json", "", "write the results to this `file` as well")
	flag.IntVar(&o.starts, "n", 25,
		"how many sandboxes to create one after the other, 2 to 200; commands run twice as often")
	flag.IntVar(&o.idle, "idle", 10, "how many sandboxes at rest to take the memory of, 1 to 100")
	flag.IntVar(&o.crowd, "crowd", 200,
		"how many sandboxes with egress policies stand beside the one that sends, 2 to 250; 200 need 4 GB of memory")
	flag.BoolVar(&o.docker, "docker", true, "measure Docker beside it when an engine answers")
	flag.IntVar(&o.dense, "dense", 300, "how many sandboxes rest at once, 2 to 1000; 300 need 7 GB of memory")
	flag.IntVar(&o.clients, "clients", 50, "how many clients create, execute and destroy in a loop, 1 to 200")
	flag.DurationVar(&o.loadTime, "load", time.Minute, "for how long they do, up to 10m")
	flag.StringVar(&o.doc, "doc", "",
		"put the results into this Markdown `file`, between its lines <!-- run --> and <!-- /run -->")
	flag.StringVar(&o.only, "only", "",
		"measure this `part` alone: starts, commands, live, files, ports, rest, sleep, egress, builds, fork, pool, "+
			"records, fleet, computesdk, load or dense; with -old: starts, which has commands and wakes too, or pool")
	flag.BoolVar(&quick, "quick", false, "few runs: shows that everything works, and little more")
	serve := flag.String("serve", "", "be the server that ports are measured with, at `ADDRESS,ADDRESS`, and nothing else")
	flag.Parse()
	if address, raw, both := strings.Cut(*serve, ","); both {
		fmt.Fprintln(os.Stderr, "bench:", serveBulk(address, raw))
		os.Exit(1)
	}
	if quick {
		o.starts, o.idle, o.crowd, o.dense, o.clients, o.loadTime = 4, 3, 5, 5, 4, 5*time.Second
	}
	if flag.NArg() > 0 || o.dense < 2 || o.dense > 1000 || o.clients < 1 || o.clients > 200 || o.loadTime <= 0 ||
		o.loadTime > 10*time.Minute || o.starts < 2 || o.starts > 200 || o.idle < 1 || o.idle > 100 || o.crowd < 2 ||
		o.crowd > 250 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench: the server needs root")
		os.Exit(1)
	}
	run := bench
	if o.old != "" {
		run = benchPair
	}
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// cleanTimeout limits the clean-up, which also runs after an interrupt.
const cleanTimeout = 2 * time.Minute

func bench(ctx context.Context, o options) (err error) {
	began := time.Now()
	r := &results{Host: lookAtHost()}
	out, err := newOutside(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.close()) }()
	s, err := startServer(ctx, o.cay, out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	progress("waiting for the template")
	if err := s.awaitTemplate(ctx, template); err != nil {
		return err
	}
	r.Host.Cay, err = s.version(ctx)
	if err != nil {
		return err
	}
	d, err := beside(ctx, o, s, r)
	if err != nil {
		return err
	}
	if d != nil {
		defer func() { err = errors.Join(err, d.close()) }()
	}
	for _, part := range []struct {
		name    string
		measure func(context.Context, options, *server, *docker, *results) error
	}{
		{"starts", measureStarts},
		{"commands", measureCommands},
		{"live", measureLive},
		{"files", measureFiles},
		{"ports", measurePorts},
		{"rest", measureIdle},
		{"sleep", measureSleep},
		{"egress", measureEgress},
		{"builds", measureBuilds},
		{"fork", measureFork},
		{"pool", measurePool},
		{"records", measureRecords},
		{"fleet", measureFleet},
		{"computesdk", measureComputeSDK},
		{"load", measureLoad},
		{"dense", measureDense},
	} {
		if o.only != "" && o.only != part.name {
			continue
		}
		progress("measuring " + part.name)
		if err := part.measure(ctx, o, s, d, r); err != nil {
			return fmt.Errorf("measuring %s: %w", part.name, err)
		}
	}
	r.Host.LoadAfter = load()
	r.TookSeconds = time.Since(began).Seconds()
	r.summarise()
	r.print(os.Stdout)
	if o.doc != "" {
		if err := r.document(o.doc); err != nil {
			return err
		}
	}
	if o.json != "" {
		return r.write(o.json)
	}
	return nil
}

// beside finds the engine and gives it the image. It returns nil if there is no engine.
func beside(ctx context.Context, o options, s *server, r *results) (*docker, error) {
	if !o.docker {
		r.Host.Docker = "not asked for"
		return nil, nil
	}
	d := findDocker(ctx)
	if d == nil {
		r.Host.Docker = "no engine answers"
		return nil, nil
	}
	progress("giving Docker an image of the same files")
	if err := d.takeImage(ctx, s); err != nil {
		return nil, errors.Join(err, d.close())
	}
	r.Host.Docker, r.Host.DockerNetwork = d.version, d.networkName()
	return d, nil
}

func progress(what string) { fmt.Fprintln(os.Stderr, "bench: "+what) }
