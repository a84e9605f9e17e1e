package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// TestPersistentKilledAtAnyMoment kills the server with SIGKILL while clients suspend, wake,
// checkpoint and use persistent sandboxes, again and again, until later starts have found a suspend
// and a wake half done. The sandboxes' kernels are not killed, so nothing may be lost: no sandbox,
// and no number that a worker has counted.
func TestPersistentKilledAtAnyMoment(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	var workers []*worker
	for range 3 {
		workers = append(workers, s.startWorker(s.persistent(nil), 16))
	}
	const rounds, most = 10, 60
	for round := 0; round < rounds || !s.interrupted(workers, "suspending") || !s.interrupted(workers, "waking"); round++ {
		if round == most {
			t.Fatalf("in %d rounds no start found a suspend and a wake half done", most)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		var wg sync.WaitGroup
		for _, w := range workers {
			for range 2 {
				wg.Go(func() { w.use(ctx) })
			}
		}
		time.Sleep(time.Duration(100+rand.IntN(900)) * time.Millisecond) // until the server is killed
		if round >= rounds {                                             // chance has not found both
			s.catch(workers, []cay.SandboxState{cay.SandboxStateSuspending, cay.SandboxStateWaking}[round%2])
		}
		s.stop(syscall.SIGKILL)
		cancel()
		wg.Wait()
		s.start()
		var running []string
		for _, w := range workers {
			switch state := s.settled(w.id); state {
			case "running":
				running = append(running, w.id)
			case "suspended":
			default:
				t.Fatalf("round %d: sandbox %s is %s", round, w.id, state)
			}
		}
		onHost := s.groupsOnHost()
		slices.Sort(onHost)
		slices.Sort(running)
		if !slices.Equal(onHost, running) {
			t.Errorf("round %d: the host has %v, and %v run", round, onHost, running)
		}
		for _, w := range workers {
			w.check()
		}
	}
	for _, w := range workers {
		s.destroy(w.id)
		s.gone(w.id)
	}
}

// interrupted reports whether a start has settled a sandbox that it found in the state.
func (s *server) interrupted(workers []*worker, from string) bool {
	s.t.Helper()
	for _, w := range workers {
		for _, e := range s.events(w.id) {
			if e.From == from && e.Reason == "interrupted" {
				return true
			}
		}
	}
	return false
}

// catch waits until a sandbox is in the state, or for a few seconds.
func (s *server) catch(workers []*worker, state cay.SandboxState) {
	s.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		for _, w := range workers {
			if s.get(w.id).State == state {
				return
			}
		}
		time.Sleep(10 * time.Millisecond) // a key may make 500 calls a second
	}
}

// use makes calls on the sandbox as clients do, until the server is gone.
func (w *worker) use(ctx context.Context) {
	for ctx.Err() == nil {
		verb, least := "execute", w.last()
		var result *cay.ExecuteResult
		var err error
		switch rand.IntN(8) {
		case 0, 1, 2:
			verb = "suspend"
			_, err = w.s.api().Suspend(ctx, w.id)
		case 3, 4:
			verb = "wake"
			_, err = w.s.api().Wake(ctx, w.id)
		case 5:
			verb = "checkpoint"
			_, err = w.s.api().Checkpoint(ctx, w.id)
		default:
			result, err = w.s.api().Execute(ctx, w.id, cay.ExecuteRequest{Command: new(workerCheck)})
		}
		switch refused := refusal(err); {
		case err == nil && result != nil:
			w.look(resultOf(result), least)
		case err == nil:
		case refused == nil:
			return
		case refused.Code == "sandbox_unreachable": // on a busy machine the agent may be late
		case refused.Status != 409 || verb == "execute" || verb == "wake": // else it is suspended, or in use
			w.s.t.Errorf("%s: %v", verb, err)
			return
		}
	}
}

// TestSentryKilled kills sandboxes' kernels, like a bug in one or a lack of memory on the host. A
// persistent sandbox falls back to its latest recovery point; any other is lost.
func TestSentryKilled(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.persistent(nil)
	defer s.destroy(id)
	w := s.startWorker(id, 4)

	t.Run("running", func(t *testing.T) {
		s := s.in(t)
		w.s = s
		least := w.check()
		checkpoint := s.checkpoint(id)
		w.check()
		s.killSentry(id)
		s.waitState(id, "suspended")
		s.fellBackTo(id, checkpoint)
		w.fellBack(least)
	})
	t.Run("ephemeral", func(t *testing.T) {
		s := s.in(t)
		id := s.create(nil)
		s.killSentry(id)
		if reason := s.waitState(id, "destroyed"); reason != "lost" {
			t.Errorf("destroyed with reason %q", reason)
		}
		s.gone(id)
	})
	t.Run("without a recovery point", func(t *testing.T) {
		s := s.in(t)
		id := s.persistent(nil)
		s.killSentry(id)
		if reason := s.waitState(id, "destroyed"); reason != "lost" {
			t.Errorf("destroyed with reason %q", reason)
		}
		s.gone(id)
	})
	t.Run("suspending", func(t *testing.T) {
		s := s.in(t)
		w.s = s
		before, after := 0, 0
		for range 10 {
			least := w.check() // this wakes the sandbox
			checkpoint := s.checkpoint(id)
			latest := w.check()
			began, pid := time.Now(), s.sentry(id)
			answer := make(chan error)
			go func() {
				_, err := s.api().Suspend(context.Background(), id)
				answer <- err
			}()
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) // until the kernel is killed
			_ = syscall.Kill(pid, syscall.SIGKILL)                       // it may have ended
			suspended := <-answer
			if state := s.settled(id); state != "suspended" {
				s.waitState(id, "suspended") // it stays running until the server notices
			}
			if at := s.suspendedAt(id); at.Before(began) {
				before++
				if suspended == nil {
					t.Error("the suspend answered 200 and left no checkpoint")
				}
				s.fellBackTo(id, checkpoint)
				w.fellBack(least)
			} else {
				after++
				w.from(latest)
			}
		}
		t.Logf("killed while being suspended: %d times at the checkpoint before, %d times at the new one", before, after)
	})
	t.Run("waking", func(t *testing.T) {
		s := s.in(t)
		w.s = s
		cut := 0
		for range 10 {
			least := w.check()
			s.suspend(id)
			checkpoint := s.suspendedAt(id)
			answer := make(chan error)
			go func() {
				_, err := s.api().Wake(context.Background(), id)
				answer <- err
			}()
			pid := 0
			for deadline := time.Now().Add(patience); pid == 0; pid = s.sentry(id) {
				if time.Now().After(deadline) {
					t.Fatal("no kernel has started")
				}
			}
			time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond) // until the kernel is killed
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := <-answer; err != nil {
				cut++
			}
			s.waitState(id, "suspended")
			if at := s.suspendedAt(id); !at.Equal(checkpoint) {
				t.Errorf("the checkpoint is of %s, want %s", at, checkpoint)
			}
			w.fellBack(least)
		}
		t.Logf("killed while being woken: the wake failed %d times of 10", cut)
		if cut == 0 {
			t.Error("no wake was cut short")
		}
		if got := s.field(id, "error"); got != "" {
			t.Errorf("the running sandbox has the error %q", got)
		}
	})
}

// fellBackTo checks that a sandbox is suspended at a recovery point, and that an event says so.
func (s *server) fellBackTo(id string, checkpoint time.Time) {
	s.t.Helper()
	if at := s.suspendedAt(id); !at.Equal(checkpoint) {
		s.t.Errorf("the checkpoint is of %s, want the recovery point of %s", at, checkpoint)
	}
	want := "fell back to the recovery point of " + checkpoint.UTC().Format(time.RFC3339)
	if e := s.events(id)[0]; e.To != "suspended" || e.Detail != want {
		s.t.Errorf("the last event of the sandbox is %+v, want %q", e, want)
	}
}

// TestReboot removes everything that a machine loses at a reboot from under sandboxes of every kind
// and state.
func TestReboot(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	asleep, saved := s.startWorker(s.persistent(nil), 4), s.startWorker(s.persistent(nil), 4)
	unsaved, ephemeral := s.persistent(nil), s.create(nil)
	asleep.check()
	s.suspend(asleep.id)
	least := saved.check()
	checkpoint := s.checkpoint(saved.id)
	saved.check()
	s.stop(syscall.SIGKILL)
	s.reboot()
	s.start()
	for _, id := range []string{unsaved, ephemeral} {
		if reason := s.waitState(id, "destroyed"); reason != "lost" {
			t.Errorf("a sandbox without a recovery point was destroyed with reason %q", reason)
		}
		s.gone(id)
	}
	if state := s.settled(asleep.id); state != "suspended" {
		t.Errorf("the suspended sandbox is %s", state)
	}
	s.waitState(saved.id, "suspended")
	s.fellBackTo(saved.id, checkpoint)
	asleep.check()
	saved.fellBack(least)

	// One sandbox is being suspended and one is being woken.
	for round := 0; !s.interrupted([]*worker{saved}, "suspending") ||
		!s.interrupted([]*worker{asleep}, "waking"); round++ {
		if round == 20 {
			t.Fatalf("in %d rounds no start found a suspend and a wake half done", round)
		}
		slept := asleep.check()
		s.suspend(asleep.id)
		least = saved.check()
		checkpoint = s.checkpoint(saved.id)
		latest := saved.check()
		s.killHalfWay(saved.id, asleep.id)
		s.reboot()
		s.start()
		for _, w := range []*worker{saved, asleep} {
			s.waitState(w.id, "suspended")
		}
		if s.suspendedAt(saved.id).Equal(checkpoint) {
			s.fellBackTo(saved.id, checkpoint)
			saved.fellBack(least)
		} else {
			saved.from(latest) // the new checkpoint was complete
		}
		asleep.fellBack(slept)
	}
	s.alive(s.create(nil))
}

// killHalfWay kills the server as soon as one sandbox is being suspended and another woken.
func (s *server) killHalfWay(suspend, wake string) {
	s.t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = s.api().Suspend(context.Background(), suspend) }) // fail when the server is killed
	wg.Go(func() { _, _ = s.api().Wake(context.Background(), wake) })
	seen := map[string]bool{}
	for deadline := time.Now().Add(patience); !seen["suspending"] || !seen["waking"]; {
		if time.Now().After(deadline) {
			s.t.Fatalf("no suspend and no wake has begun: %v", seen)
		}
		for _, id := range []string{suspend, wake} {
			state, _ := s.state(id)
			seen[state] = true
		}
	}
	s.stop(syscall.SIGKILL)
	wg.Wait()
}

// in returns the server with its failures reported to t, for a part of a test.
func (s *server) in(t testing.TB) *server {
	own := *s
	own.t = t
	return &own
}

// TestServerGroup checks that the server runs in a control group of its own with a limit on memory
// and a CPU weight, and what is left of the group when the server has ended. With cgroup v2 a server
// that systemd has started, in a service or a session, stays in the group that it was started in.
func TestServerGroup(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	group := "/cay-" + s.instance() + "-server"
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if own := unifiedGroup(t, "self"); strings.HasSuffix(own, ".scope") || strings.HasSuffix(own, ".service") {
		if got := unifiedGroup(t, strconv.Itoa(s.cmd.Process.Pid)); got != own {
			t.Errorf("the server is in %s and was started in %s", got, own)
		}
		return
	}
	if in := strings.Count(string(data), ":"+group+"\n"); in != 2 && !strings.Contains(string(data), "0::"+group+"\n") {
		t.Errorf("the server is in %s", data)
	}
	found := 0
	for file, want := range map[string]string{"memory.limit_in_bytes": "1073741824", "cpu.shares": "102400",
		"memory.max": "1073741824", "cpu.weight": "10000"} {
		for _, dir := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup"} {
			got, err := os.ReadFile(filepath.Join(dir+group, file))
			if err != nil {
				continue
			}
			found++
			if strings.TrimSpace(string(got)) != want {
				t.Errorf("%s of the server is %s, not %s", file, got, want)
			}
		}
	}
	if found != 2 {
		t.Errorf("the server has %d of 2 settings", found)
	}
	s.stop(syscall.SIGTERM)
	if left, err := filepath.Glob("/sys/fs/cgroup/*" + group); err != nil || len(left) > 0 {
		t.Errorf("left on the host are %v, %v", left, err)
	}
}

// unifiedGroup returns the group that a process is in where control groups are those of v2, otherwise "".
func unifiedGroup(t *testing.T, pid string) string {
	t.Helper()
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		return ""
	}
	data, err := os.ReadFile(filepath.Join("/proc", pid, "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if path, is := strings.CutPrefix(strings.TrimSpace(line), "0::"); is {
			return path
		}
	}
	return ""
}
