package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of the resources in use while hostile tenants attack.
const (
	// hostileMemoryMB limits the server's resident memory, MiB. The guarantee names it.
	hostileMemoryMB = 512
	// hostileGoroutines and hostileFiles are far above what the quotas of the tenants allow, and far
	// below what one attacker without a limit would reach.
	hostileGoroutines = 30_000
	// hostileProcesses limits the processes and threads of the host that one tenant may add.
	hostileProcesses = 100
)

// usage counts the resources that the server and the host have in use.
type usage struct {
	rssMB, highMB, goroutines, files, threads, conntrack, processes, usedMB int
	filesMost, conntrackMost                                                int
}

// hostNow reads the present usage.
func hostNow(s *server) usage {
	s.t.Helper()
	u, err := s.usage()
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

func (s *server) usage() (u usage, err error) {
	s.mu.Lock()
	proc := "/proc/" + strconv.Itoa(s.cmd.Process.Pid)
	s.mu.Unlock()
	read := func(path string) string {
		data, e := os.ReadFile(path)
		if e != nil && err == nil {
			err = e
		}
		return strings.TrimSpace(string(data))
	}
	number := func(lines, prefix string) (n int) {
		for line := range strings.Lines(lines) {
			if rest, found := strings.CutPrefix(line, prefix); found {
				_, _ = fmt.Sscan(rest, &n) // 0 if it is "unlimited"
			}
		}
		return n
	}
	status := read(proc + "/status")
	u.rssMB, u.highMB, u.threads = number(status, "VmRSS:")>>10, number(status, "VmHWM:")>>10, number(status, "Threads:")
	u.filesMost = number(read(proc+"/limits"), "Max open files")
	u.conntrack = number(read("/proc/sys/net/netfilter/nf_conntrack_count"), "")
	u.conntrackMost = number(read("/proc/sys/net/netfilter/nf_conntrack_max"), "")
	files, e := os.ReadDir(proc + "/fd")
	if e != nil {
		return u, e
	}
	u.files = len(files)
	processes, e := filepath.Glob("/proc/[0-9]*")
	if e != nil {
		return u, e
	}
	u.processes = len(processes)
	var disk syscall.Statfs_t
	if e := syscall.Statfs(filepath.Dir(s.dataDir), &disk); e != nil {
		return u, e
	}
	u.usedMB = int((disk.Blocks - disk.Bfree) * uint64(disk.Bsize) >> 20)
	return u, err
}

// watching reads the usage every second.
type watching struct {
	done chan struct{}
	over chan peak
}

// peak holds the highest value of each number.
type peak struct {
	usage
	before usage
	looks  int
	failed string // why a look failed
}

func (s *server) watch(before usage) *watching {
	w := &watching{make(chan struct{}), make(chan peak, 1)}
	go func() {
		p := peak{before: before}
		for {
			u, err := s.usage()
			if err == nil {
				status, body, e := s.try(s.t.Context(), "GET", "/metrics", nil)
				if e != nil || status != 200 {
					err = fmt.Errorf("metrics: %d %w", status, e)
				}
				for line := range strings.Lines(string(body)) {
					if rest, found := strings.CutPrefix(line, "go_goroutines "); found {
						_, err = fmt.Sscan(rest, &u.goroutines)
					}
				}
			}
			if err != nil {
				p.failed = err.Error()
			} else {
				p.looks++
				p.add(u)
			}
			select {
			case <-w.done:
				w.over <- p
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return w
}

func (w *watching) stop() peak {
	close(w.done)
	return <-w.over
}

func (p *peak) add(u usage) {
	for _, of := range []struct{ most, now *int }{
		{&p.rssMB, &u.rssMB}, {&p.highMB, &u.highMB}, {&p.goroutines, &u.goroutines}, {&p.files, &u.files}, {&p.threads, &u.threads},
		{&p.conntrack, &u.conntrack}, {&p.processes, &u.processes}, {&p.usedMB, &u.usedMB}, {&p.filesMost, &u.filesMost}, {&p.conntrackMost, &u.conntrackMost},
	} {
		*of.most = max(*of.most, *of.now)
	}
}

func (p peak) String() string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "in use (%d looks)\tbefore\tat most\n", p.looks)
	for _, of := range []struct {
		name         string
		before, most int
	}{
		{"MiB of the server", p.before.rssMB, p.highMB}, {"goroutines", p.before.goroutines, p.goroutines}, {"threads of the server", p.before.threads, p.threads},
		{"open files of the server", p.before.files, p.files}, {"conntrack entries of the host", p.before.conntrack, p.conntrack},
		{"processes of the host", p.before.processes, p.processes}, {"MiB of the host's disk", p.before.usedMB, p.usedMB},
	} {
		fmt.Fprintf(w, "%s\t%d\t%d\n", of.name, of.before, of.most)
	}
	_ = w.Flush() // into a builder
	return out.String()
}

// check fails the test for each number above its limit.
func (p peak) check(t *testing.T, before usage) {
	t.Helper()
	if p.looks == 0 || p.failed != "" {
		t.Errorf("after %d looks one failed: %s", p.looks, p.failed)
	}
	for _, of := range []struct {
		name        string
		most, bound int
	}{
		{"MiB of the server", p.highMB, hostileMemoryMB}, {"goroutines", p.goroutines, hostileGoroutines},
		{"open files of the server", p.files, p.filesMost / 2}, {"conntrack entries of the host", p.conntrack, p.conntrackMost / 2},
		{"processes of the host", p.processes - before.processes, hostileProcesses * (*hostileTenants + 1)},
	} {
		if of.most > of.bound {
			t.Errorf("%d %s, want at most %d", of.most, of.name, of.bound)
		}
	}
}

// schedule says how long threads ran on processors, and how long they were ready and waited for
// one. Waiting here is due to the machine; a late answer without it is due to a lock or a queue of
// cay.
type schedule struct{ ran, waited, wall time.Duration }

func (s schedule) since(before schedule) schedule {
	return schedule{s.ran - before.ran, s.waited - before.waited, s.wall - before.wall}
}

// scheduled returns the schedule of the server's threads since its start. It lacks the time that
// ended threads have waited.
func (s *server) scheduled() (all schedule) {
	s.t.Helper()
	s.mu.Lock()
	dir := fmt.Sprintf("/proc/%d", s.cmd.Process.Pid)
	s.mu.Unlock()
	data, err := os.ReadFile(dir + "/stat")
	if err != nil {
		s.t.Fatal(err)
	}
	_, fields, _ := strings.Cut(string(data), ") ")
	var user, system time.Duration // in hundredths of a second
	for i, f := range strings.Fields(fields) {
		switch i {
		case 11:
			_, err = fmt.Sscan(f, (*int64)(&user))
		case 12:
			_, err = fmt.Sscan(f, (*int64)(&system))
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	all.ran = (user + system) * 10 * time.Millisecond
	threads, err := filepath.Glob(dir + "/task/*/schedstat")
	if err != nil || len(threads) == 0 {
		s.t.Fatalf("no threads of the server: %v", err)
	}
	for _, path := range threads {
		var ran, waited int64 // nanoseconds
		if data, err := os.ReadFile(path); err == nil {
			_, _ = fmt.Sscan(string(data), &ran, &waited) // 0 from a kernel that does not count
		}
		all.waited += time.Duration(waited)
	}
	all.wall = time.Duration(time.Now().UnixNano())
	return all
}

// machineScheduled returns how long the machine's processors were busy, all together.
func machineScheduled(t testing.TB) schedule {
	t.Helper()
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	var user, nice, system, idle, wait, hard, soft time.Duration // in hundredths of a second
	if _, err := fmt.Sscanf(string(data), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &wait, &hard,
		&soft); err != nil {
		t.Fatal(err)
	}
	return schedule{ran: (user + nice + system + hard + soft) * 10 * time.Millisecond,
		wall: time.Duration(time.Now().UnixNano())}
}

// processors returns a table of the use of the processors.
func processors(phases []phase) string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "processors\tlasted\tall of the machine busy\tserver ran\tserver was ready and waited")
	for _, p := range phases {
		fmt.Fprintf(w, "%s\t%s\t%.0f%%\t%s\t%s\n", p.name, p.server.wall.Round(time.Second),
			100*p.machine.ran.Seconds()/p.machine.wall.Seconds()/float64(runtime.NumCPU()),
			p.server.ran.Round(time.Millisecond), p.server.waited.Round(time.Millisecond))
	}
	_ = w.Flush() // a builder does not fail
	return out.String()
}

// runAfterOthers lets this process run only while no other wants the CPU, until the test ends. With
// the kernel's autogroups the session counts, else the threads. A session that has no autogroup of its
// own answers with EINVAL.
func runAfterOthers(t *testing.T) {
	t.Helper()
	const last = 19
	set := func(nice int) {
		err := os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(nice)), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EINVAL) {
			t.Errorf("setting the priority of the session: %v", err)
		}
		threads, err := filepath.Glob("/proc/self/task/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range threads {
			id, err := strconv.Atoi(filepath.Base(path))
			if err == nil {
				err = unix.Setpriority(unix.PRIO_PROCESS, id, nice)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) {
				t.Errorf("setting the priority of thread %d: %v", id, err)
			}
		}
	}
	set(last)
	t.Cleanup(func() { set(0) })
}
