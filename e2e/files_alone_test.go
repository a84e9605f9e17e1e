package e2e

import (
	"context"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// suspendFiles suspends a sandbox without its memory.
func (s *server) suspendFiles(id string) {
	s.t.Helper()
	sandbox, err := s.api().SuspendFiles(context.Background(), id)
	if err != nil {
		s.t.Fatalf("suspend: %v", err)
	}
	if sandbox.State != cay.SandboxStateSuspended || sandbox.MemoryKept == nil || *sandbox.MemoryKept {
		s.t.Errorf("after the suspend the sandbox is %s, memory kept: %v", sandbox.State, sandbox.MemoryKept)
	}
}

// TestFilesAlone suspends a persistent sandbox without its memory. The next use boots it with its files,
// environment and policy, and the host has nothing of it meanwhile.
func TestFilesAlone(t *testing.T) {
	s := shared(t)
	id := s.persistent(object{"env": object{"KEPT": "yes"}, "egress": object{"mode": "deny_all"}})
	defer s.destroy(id)
	const look = "cat /proc/sys/kernel/random/boot_id /root/note; echo $KEPT; pgrep -c sleep; cat /dev/shm/note 2>&1; true"
	s.want(id, "echo remember >/root/note; echo gone >/dev/shm/note; sleep 1000 >/dev/null 2>&1 &")
	limits, boots := s.limits(id), map[string]bool{}
	for range 3 {
		s.suspendFiles(id)
		for _, left := range s.onHost(id) {
			t.Errorf("while suspended the host has %s", left)
		}
		boot, rest, _ := strings.Cut(s.want(id, look), "\n")
		if rest != "remember\nyes\n0\ncat: /dev/shm/note: No such file or directory" || boots[boot] {
			t.Errorf("after a boot, %s: %s", boot, rest)
		}
		boots[boot] = true
		if got := s.limits(id); got != limits {
			t.Errorf("the limits on the host are\n%s\nwant\n%s", got, limits)
		}
	}
	s.want(id, "echo more >>/root/note; echo here >/dev/shm/note")
	s.suspend(id)
	if got := s.want(id, "cat /root/note /dev/shm/note"); got != "remember\nmore\nhere" {
		t.Errorf("after a suspend with memory: %q", got)
	}
	// A snapshot of one that has only its files boots with them.
	s.suspendFiles(id)
	snap, err := s.api().CreateSnapshot(context.Background(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.api().DeleteSnapshot(context.Background(), snap.ID); err != nil {
			t.Error(err)
		}
	}()
	child := s.create(object{"template": nil, "snapshot": snap.ID})
	defer s.destroy(child)
	if got := s.want(child, "cat /root/note; ls /dev/shm; echo $KEPT"); got != "remember\nmore\nyes" {
		t.Errorf("a child has %q", got)
	}
}

// TestFilesAloneKilledAtAnyMoment kills the server while it suspends a sandbox without memory or boots it
// from that, again and again. The sandbox has its files each time.
func TestFilesAloneKilledAtAnyMoment(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.persistent(nil)
	for round := range 6 {
		s.want(id, "echo x >>/root/note")
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for err := error(nil); err == nil; { // the calls fail when the server has gone
				if _, err = s.api().SuspendFiles(ctx, id); err == nil {
					_, err = s.api().Wake(ctx, id)
				}
			}
		}()
		time.Sleep(time.Duration(20+round*90+rand.IntN(90)) * time.Millisecond)
		s.stop(syscall.SIGKILL)
		cancel()
		<-done
		s.start()
		if got, want := s.want(id, "cat /root/note"), strings.TrimSpace(strings.Repeat("x\n", round+1)); got != want {
			t.Fatalf("round %d: the file is %q, want %q", round, got, want)
		}
	}
	s.destroy(id)
	s.agree(time.Now())
}
