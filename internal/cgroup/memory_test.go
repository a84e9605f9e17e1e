package cgroup

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// TestGuard lets processes take memory without end: each is ended through Relieve and none by the
// kernel, and a process that holds little lives.
func TestGuard(t *testing.T) {
	g := newGroup(t)
	bystander, _ := child(t, g, "sleep")
	const limit = 128 << 20
	victims := make(chan *exec.Cmd, 1)
	guard := &Guard{Group: g, Limit: limit, Reserve: 32 << 20, Log: slog.New(slog.DiscardHandler),
		Relieve: func(context.Context, int64) (int64, error) {
			select {
			case v := <-victims:
				if err := v.Process.Kill(); err != nil {
					return 0, err
				}
				_ = v.Wait() // killed, as meant
				return limit, nil
			default:
				return 0, nil
			}
		}}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- guard.Run(ctx) }()
	for round := range 3 {
		v, begin := child(t, g, "allocate")
		victims <- v
		begin()
		for deadline := time.Now().Add(30 * time.Second); v.ProcessState == nil && len(victims) > 0; {
			time.Sleep(time.Millisecond)
			if time.Now().After(deadline) {
				t.Fatalf("round %d: the allocator was not ended", round)
			}
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := bystander.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the bystander is gone: %v", err)
	}
	if kills := kernelKills(t, g); kills != 0 {
		t.Errorf("the kernel killed %d times", kills)
	}
}

func kernelKills(t *testing.T, g Group) int64 {
	t.Helper()
	file := "memory.oom_control"
	if g.h.unified {
		file = "memory.events"
	}
	values, err := g.stat("memory", file)
	if err != nil {
		t.Fatal(err)
	}
	return values["oom_kill"]
}

// TestGuardSeesThroughCache fills the group with page cache, in whose place a process then grows: the guard acts before
// the kernel's limit is reached, where system calls fail.
func TestGuardSeesThroughCache(t *testing.T) {
	const limit, reserve = 128 << 20, 64 << 20
	var held int64
	// The process grows by so much in 200 ms, for which a busy machine may hold up the guard.
	for range 3 {
		if held = actsAt(t, limit, reserve); held <= limit+reserve/2 {
			return
		}
	}
	t.Errorf("the guard acts when processes hold %d MiB, the limit being %d", held>>20, limit>>20)
}

// actsAt returns how much processes hold when the guard acts for a process that grows in place of page cache.
func actsAt(t *testing.T, limit, reserve int64) int64 {
	t.Helper()
	g := newGroup(t)
	acted := make(chan int64, 1)
	guard := &Guard{Group: g, Limit: limit, Reserve: reserve, Log: slog.New(slog.DiscardHandler)}
	guard.Relieve = func(context.Context, int64) (int64, error) {
		held, err := g.MemoryHeld()
		if err != nil {
			return 0, err
		}
		select {
		case acted <- held:
		default:
		}
		return 0, errors.New("nobody is ended")
	}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- guard.Run(t.Context()) }()
	writer, begin := child(t, g, "cache")
	begin()
	if err := writer.Wait(); err != nil {
		t.Fatal(err)
	}
	if used, err := g.value("memory", "memory.usage_in_bytes"); !g.h.unified && (err != nil || used < limit) {
		t.Fatalf("%d bytes are in use, %v: the cache does not fill the group", used, err)
	}
	_, begin = child(t, g, "creep")
	begin()
	held := <-acted
	if err := <-done; !errors.Is(err, ErrHopeless) {
		t.Errorf("got %v", err)
	}
	return held
}

// TestGuardReadsOnce checks that the guard reads a group's statistics once for each look while page cache
// keeps it looking.
func TestGuardReadsOnce(t *testing.T) {
	g := newGroup(t)
	if g.h.unified {
		t.Skip("on v2 the guard looks only when the kernel reports, and has nothing else to read")
	}
	guard := &Guard{Group: g, Limit: 128 << 20, Reserve: 64 << 20, Log: slog.New(slog.DiscardHandler),
		Relieve: func(context.Context, int64) (int64, error) { return 0, errors.New("nobody is ended") }}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	writer, begin := child(t, g, "cache")
	begin()
	if err := writer.Wait(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	opens := os.NewFile(uintptr(fd), "opens")
	defer opens.Close()
	names := map[int32]string{}
	for _, name := range []string{"memory.stat", "memory.oom_control"} {
		wd, err := unix.InotifyAddWatch(fd, filepath.Join(g.dir("memory"), name), unix.IN_OPEN)
		if err != nil {
			t.Fatal(err)
		}
		names[int32(wd)] = name
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- guard.Run(ctx) }()
	count := map[string]int{}
	for buf := make([]byte, 4096); count["memory.oom_control"] < 10; {
		n, err := opens.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < n; at += unix.SizeofInotifyEvent { // of watched files, events have no names
			count[names[int32(binary.NativeEndian.Uint32(buf[at:]))]]++
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// Setting up the watch opens memory.oom_control once more; a look may have begun since the last count.
	if stats, looks := count["memory.stat"], count["memory.oom_control"]; stats > looks+1 {
		t.Errorf("%d reads of memory.stat in %d looks", stats, looks)
	}
}

// TestGuardGivesUp checks that the guard returns ErrHopeless when no process can be ended.
func TestGuardGivesUp(t *testing.T) {
	g := newGroup(t)
	_, begin := child(t, g, "allocate")
	guard := &Guard{Group: g, Limit: 64 << 20, Reserve: 8 << 20, Log: slog.New(slog.DiscardHandler),
		Relieve: func(context.Context, int64) (int64, error) { return 0, errors.New("nobody answers") }}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	begin()
	if err := guard.Run(t.Context()); !errors.Is(err, ErrHopeless) {
		t.Errorf("got %v", err)
	}
}

// TestGuardBelievesNoAnswer has a relief that always claims to have freed memory: the loans and the time are bounded.
func TestGuardBelievesNoAnswer(t *testing.T) {
	const limit, reserve = 64 << 20, 8 << 20
	g := newGroup(t)
	_, begin := child(t, g, "allocate")
	guard := &Guard{Group: g, Limit: limit, Reserve: reserve, Log: slog.New(slog.DiscardHandler),
		Patience: 2 * time.Second,
		Relieve:  func(context.Context, int64) (int64, error) { return 1, nil }}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	begin()
	if err := guard.Run(t.Context()); !errors.Is(err, ErrHopeless) {
		t.Errorf("got %v", err)
	}
	held, err := g.MemoryHeld()
	// The kernel counts in batches for each CPU.
	if most := int64(limit + (1+attempts)*reserve + 1<<20); err != nil || held > most {
		t.Errorf("the group holds %d bytes, %v; more than %d", held, err, most)
	}
}

// TestCredit checks that credit lasts for a group that is as long below its limit as above it, and not for another.
func TestCredit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := credit{most: 10 * time.Second, left: 10 * time.Second, last: time.Now()}
		over := func(rest, d time.Duration) bool {
			time.Sleep(rest + d)
			return c.spend(d)
		}
		for range 100 { // as long below as above
			if !over(time.Second, time.Second) {
				t.Fatal("refused although it rests")
			}
		}
		if !over(time.Hour, 9*time.Second) || over(500*time.Millisecond, 2*time.Second) {
			t.Error("rest gives more, or less, than the most")
		}
	})
}

// TestGuardAwaitsMemory has freed memory return to the host slower than settleTime: nothing else is ended for it.
func TestGuardAwaitsMemory(t *testing.T) {
	g := newGroup(t)
	holder, begin := child(t, g, "trickle")
	var asked atomic.Int32
	guard := &Guard{Group: g, Limit: 128 << 20, Reserve: 64 << 20, Log: slog.New(slog.DiscardHandler),
		Relieve: func(context.Context, int64) (int64, error) {
			if asked.Add(1) > 1 {
				return 0, nil
			}
			for held, err := g.MemoryHeld(); held < 144<<20; held, err = g.MemoryHeld() { // it still grows
				if err != nil {
					return 0, err
				}
				time.Sleep(time.Millisecond)
			}
			return 144 << 20, holder.Process.Signal(unix.SIGUSR1)
		}}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- guard.Run(ctx) }()
	begin()
	if err := holder.Wait(); err != nil {
		t.Error(err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the guard asked for memory %d times, want 1", n)
	}
}
