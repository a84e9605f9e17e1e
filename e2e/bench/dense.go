package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements with as many idle sandboxes as a small machine should hold.
const (
	denseCount   = "sandboxes at rest at once"
	denseHost    = "  memory of the machine, each"
	denseCPU     = "  CPU of one core that all take together"
	denseCreate  = "  create beside them, cold"
	denseExecute = "  execute args [true] beside them"
	denseFirst   = "  execute args [true] in one that rested"
	denseGone    = "  all destroyed until the machine is free of them"
)

const (
	// denseRest is the time over which the CPU use of idle sandboxes is measured.
	denseRest = 30 * time.Second
	// denseIdle is the wait between the last command of the sandboxes and that measurement. Earlier, the
	// server still keeps its connection to the agent, which TCP probes.
	denseIdle = 95 * time.Second
)

// measureDense fills a server of its own up to its limit of sandboxes, which are all idle.
func measureDense(ctx context.Context, o options, s *server, _ *docker, r *results) (err error) {
	dense, err := startServer(ctx, s.program, s.outside, "CAY_CAPACITY_MAX_SANDBOXES="+strconv.Itoa(o.dense+1))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dense.close()) }()
	if err := dense.awaitTemplate(ctx, template); err != nil {
		return err
	}
	before, err := availableMemory()
	if err != nil {
		return err
	}
	ids := make([]string, o.dense)
	for i := range ids {
		if ids[i], err = dense.create(ctx); err != nil {
			return fmt.Errorf("after %d sandboxes: %w", i, err)
		}
		if _, err := dense.execute(ctx, ids[i], cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
			return fmt.Errorf("after %d sandboxes: %w", i, err)
		}
	}
	r.add(denseCount, "", float64(o.dense))
	if err := pause(ctx, settle); err != nil {
		return err
	}
	after, err := availableMemory()
	if err != nil {
		return err
	}
	r.add(denseHost, unitMB, (before-after)/1e6/float64(o.dense))
	if err := denseCPUOf(ctx, ids, r); err != nil {
		return err
	}
	if err := dense.beside(ctx, o, ids, r); err != nil {
		return err
	}
	return dense.empty(ctx, ids, r)
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// beside measures one sandbox beside the idle crowd, and a create that finds no room.
func (s *server) beside(ctx context.Context, o options, ids []string, r *results) error {
	for i := range o.starts {
		began := time.Now()
		if _, err := s.execute(ctx, ids[i*len(ids)/o.starts], cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
			return err
		}
		r.took(denseFirst, began)
		began = time.Now()
		id, err := s.create(ctx)
		if err != nil {
			return err
		}
		r.took(denseCreate, began)
		for j := range 3 {
			began = time.Now()
			if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
				return err
			}
			if j > 0 { // starts measures the first command of a sandbox
				r.took(denseExecute, began)
			}
		}
		began = time.Now()
		_, err = s.create(ctx) // one more than the limit
		var problem *cay.Error
		if !errors.As(err, &problem) || problem.Status != http.StatusServiceUnavailable || problem.RetryAfter <= 0 {
			return fmt.Errorf("with no room, a create says %w", err)
		}
		r.took(fullRefused, began)
		if err := s.api.DestroySandbox(ctx, id); err != nil {
			return err
		}
		if err := awaitGone(ctx, id); err != nil {
			return fmt.Errorf("waiting for a destroy: %w", err)
		}
	}
	return nil
}

// empty destroys all sandboxes, one after the other, and waits until nothing of them is left.
func (s *server) empty(ctx context.Context, ids []string, r *results) error {
	began := time.Now()
	for _, id := range ids {
		if err := s.api.DestroySandbox(ctx, id); err != nil {
			return err
		}
	}
	for _, id := range ids {
		if err := awaitGone(ctx, id); err != nil {
			return fmt.Errorf("waiting for destroys: %w", err)
		}
	}
	r.took(denseGone, began)
	return nil
}

// awaitGone waits until the sandbox has no control group any more. The group is removed after its
// processes have ended.
func awaitGone(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if _, err := groupOf(id); err != nil {
			return nil // the group is gone
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%s is still there: %w", id, err)
		}
	}
}

// denseCPUOf measures the CPU use of idle sandboxes.
func denseCPUOf(ctx context.Context, ids []string, r *results) error {
	if err := pause(ctx, denseIdle); err != nil {
		return err
	}
	before, err := cpuOf(ids)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := pause(ctx, denseRest); err != nil {
		return err
	}
	after, err := cpuOf(ids)
	if err != nil {
		return err
	}
	r.add(denseCPU, "%", 100*(after-before).Seconds()/time.Since(began).Seconds())
	return nil
}

// cpuOf returns the sum of the CPU time that the sandboxes have used.
func cpuOf(ids []string) (sum time.Duration, err error) {
	for _, id := range ids {
		took, err := cpuOfOne(id)
		if err != nil {
			return 0, fmt.Errorf("reading the CPU time of %s: %w", id, err)
		}
		sum += took
	}
	return sum, nil
}

func cpuOfOne(id string) (time.Duration, error) {
	v1, err := filepath.Glob(filepath.Join("/sys/fs/cgroup/cpuacct", "cay-*", id, "cpuacct.usage"))
	if err != nil {
		return 0, err
	}
	if len(v1) == 1 {
		data, err := os.ReadFile(v1[0])
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
		return time.Duration(ns), err
	}
	group, err := groupOf(id)
	if err != nil {
		return 0, err
	}
	data, err := os.ReadFile(filepath.Join(group, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if us, ok := strings.CutPrefix(line, "usage_usec "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(us), 10, 64)
			return time.Duration(n) * time.Microsecond, err
		}
	}
	return 0, errors.New("cpu.stat has no usage_usec")
}

// availableMemory returns the memory that the machine could give to other processes, in bytes.
func availableMemory() (float64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if kb, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kb), "kB")), 64)
			return n * 1024, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}
