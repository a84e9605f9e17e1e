package e2e

import (
	"context"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Settings of TestSoak. The defaults are for `make test`; `make soak` does more.
var (
	soakCycles    = flag.Int("soak.cycles", 6, "how often one sandbox is suspended and woken")
	soakSandboxes = flag.Int("soak.sandboxes", 4, "how many sandboxes are suspended and woken at once")
	soakRounds    = flag.Int("soak.rounds", 2, "how often each of those is")
)

const (
	// soakWarm is the number of cycles before the first count of the server's and the host's
	// resources: caches fill, and the server makes its first connections.
	soakWarm = 3
	// soakMemoryMB is the memory that a worker checks while one sandbox cycles.
	soakMemoryMB = 16
	// soakSlack is the difference that the server's memory may have between two counts, MiB: Go's heap
	// grows and shrinks. A leak of one checkpoint's state for each cycle of `make soak` is ten times
	// that.
	soakSlack = 40
)

// TestSoak suspends and wakes again and again: one sandbox many times, then many at once. No line
// of the workers' logs may be lost or doubled, and neither the server nor the host may have more of
// anything in the end.
func TestSoak(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	t.Run("one", func(t *testing.T) {
		s := s.in(t)
		w := s.startWorker(s.persistent(nil), soakMemoryMB)
		for range soakWarm {
			w.cycle(&timings{})
		}
		s.suspend(w.id)
		before, times := s.holds(), &timings{}
		w.check()
		for range *soakCycles {
			w.cycle(times)
		}
		s.suspend(w.id)
		s.holdsNoMore(before)
		t.Logf("%d cycles of one sandbox with %d MiB: %s; its worker counted to %d", *soakCycles, soakMemoryMB, times,
			w.last())
		s.destroy(w.id)
		s.gone(w.id)
	})
	t.Run("many", func(t *testing.T) {
		s := s.in(t)
		empty, times := s.holds(), &timings{}
		var workers []*worker
		for range *soakSandboxes {
			workers = append(workers, s.startWorker(s.persistent(nil), 1))
		}
		all := func(do func(*worker)) {
			var wg sync.WaitGroup
			for _, w := range workers {
				wg.Go(func() { do(w) })
			}
			wg.Wait()
		}
		var before holdings
		for n := range *soakRounds + 1 {
			all(func(w *worker) { w.cycle(times) })
			if n == 0 { // the first round warms up
				all(func(w *worker) { s.suspend(w.id) })
				before = s.holds()
				all(func(w *worker) { w.check() })
			}
		}
		all(func(w *worker) { s.suspend(w.id) })
		s.holdsNoMore(before)
		for _, w := range workers {
			s.destroy(w.id)
			s.gone(w.id)
		}
		s.holdsNoMore(empty)
		t.Logf("%d cycles of %d sandboxes at once: %s", *soakSandboxes*(*soakRounds+1), *soakSandboxes, times)
	})
}

// cycle suspends and wakes a worker's sandbox, and checks the worker.
func (w *worker) cycle(times *timings) {
	w.s.t.Helper()
	began := time.Now()
	if _, err := w.s.api().Suspend(context.Background(), w.id); err != nil {
		w.s.t.Errorf("suspend: %v", err)
	}
	suspended := time.Now()
	if _, err := w.s.api().Wake(context.Background(), w.id); err != nil {
		w.s.t.Errorf("wake: %v", err)
	}
	times.add(suspended.Sub(began), time.Since(suspended))
	w.check()
}

// timings are the durations of suspends and wakes.
type timings struct {
	mu              sync.Mutex
	suspends, wakes []time.Duration
}

func (m *timings) add(suspend, wake time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.suspends, m.wakes = append(m.suspends, suspend), append(m.wakes, wake)
}

func (m *timings) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("suspend median %s, wake median %s", median(m.suspends), median(m.wakes))
}

func median(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2].Round(time.Millisecond)
}

// holdings counts, by kind, what the server and the host have of an instance.
type holdings map[string]int

// holds counts the present holdings.
func (s *server) holds() holdings {
	s.t.Helper()
	h := holdings{
		"processes": s.processes(), "processes in control groups": len(s.groupProcesses("")), "control groups": len(s.groups()),
		"sandboxes with a checkpoint": len(s.checkpoints()), "namespaces": len(s.ours("ip", "netns", "list")),
		"links": len(s.ours("ip", "-brief", "link")), "tables": len(s.ours("nft", "list", "tables")),
		"mounts": s.mounts(), "goroutines": s.metric("go_goroutines"),
	}
	s.mu.Lock()
	pid := strconv.Itoa(s.cmd.Process.Pid)
	s.mu.Unlock()
	fds, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		s.t.Fatal(err)
	}
	h["open files of the server"] = len(fds)
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		s.t.Fatal(err)
	}
	h["MiB of the server"] = s.number(string(status), "VmRSS:") >> 10
	h["threads of the server"] = s.number(string(status), "Threads:")
	for _, dir := range []string{s.dataDir, "/run/cay/" + s.instance()} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil // the file has gone meanwhile
			}
			h["files"]++
			if info, err := d.Info(); err == nil && strings.HasPrefix(path, filepath.Join(s.dataDir, "checkpoints")) {
				h["MiB of checkpoints"] += int(info.Sys().(*syscall.Stat_t).Blocks>>1) >> 10
			}
			return nil
		})
	}
	return h
}

// holdsNoMore waits until there is no more of anything than before. Idle connections and slots of
// the network are given back with a delay.
func (s *server) holdsNoMore(before holdings) {
	s.t.Helper()
	slack := holdings{
		"MiB of the server": soakSlack, "MiB of checkpoints": 4 + before["MiB of checkpoints"]/4,
		// Go starts threads when others wait for the disk, and keeps them; connections come and go.
		"threads of the server": 12 + *soakSandboxes, "goroutines": 12 + *soakSandboxes, "open files of the server": 8 + *soakSandboxes,
	}
	for deadline := time.Now().Add(patience); ; {
		now := s.holds()
		var more []string
		for kind, n := range now {
			if n > before[kind]+slack[kind] {
				more = append(more, fmt.Sprintf("%d %s, and had %d", n, kind, before[kind]))
			}
		}
		if len(more) == 0 {
			s.t.Logf("before: %v; after: %v", before, now)
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("it has %s", strings.Join(more, "; "))
			return
		}
		time.Sleep(100 * time.Millisecond) // a poll with a deadline
	}
}

// processes counts the host's processes whose command line has the server's directory: the server,
// gVisor's, and those that they have started.
func (s *server) processes() (n int) {
	s.t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range paths {
		if cmdline, err := os.ReadFile(path); err == nil && strings.Contains(string(cmdline), s.dataDir) {
			n++
		}
	}
	return n
}

// mounts counts the host's mounts of the instance.
func (s *server) mounts() (n int) {
	s.t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, s.dataDir) || strings.Contains(line, s.instance()) {
			n++
		}
	}
	return n
}

// metric returns the value of one of the server's metrics without labels.
func (s *server) metric(name string) int {
	s.t.Helper()
	return s.number(s.metrics(), name+" ")
}

// metrics returns the server's metrics.
func (s *server) metrics() string {
	s.t.Helper()
	body, err := s.api().Metrics(context.Background())
	if err != nil {
		s.t.Fatalf("metrics: %v", err)
	}
	defer body.Close()
	text, err := io.ReadAll(body)
	if err != nil {
		s.t.Fatalf("metrics: %v", err)
	}
	return string(text)
}

// number returns the first number after the prefix of a line.
func (s *server) number(lines, prefix string) int {
	s.t.Helper()
	for line := range strings.Lines(lines) {
		var n float64
		if rest, found := strings.CutPrefix(line, prefix); found {
			if _, err := fmt.Sscan(rest, &n); err == nil {
				return int(n)
			}
		}
	}
	s.t.Fatalf("no %q in\n%s", prefix, lines)
	return 0
}
