package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// sandboxes lists the ids of the sandboxes that have a status.
func (s *server) sandboxes(status string) []string {
	s.t.Helper()
	var ids []string
	for sandbox, err := range s.api().Sandboxes(context.Background(), cay.ListSandboxesOptions{
		Status: []cay.SandboxStatus{cay.SandboxStatus(status)}, ListOptions: cay.ListOptions{Limit: 200}}) {
		if err != nil {
			s.t.Fatalf("list: %v", err)
		}
		ids = append(ids, sandbox.ID)
	}
	return ids
}

// TestRestartAdopts ends the server with SIGTERM and with SIGKILL. Sandboxes go on with their
// processes, and still end when their time is up.
func TestRestartAdopts(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	long, short := s.create(nil), s.create(object{"timeout": "12s"})
	s.want(long, "nohup sh -c 'while true; do date +%s%N > /tmp/next; mv /tmp/next /tmp/beat; sleep 0.05; done' "+
		">/dev/null 2>&1 & until test -e /tmp/beat; do sleep 0.1; done")
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		before := s.want(long, "cat /tmp/beat; cat /proc/sys/kernel/random/boot_id")
		s.stop(signal)
		s.start()
		after := s.want(long, "old=$(cat /tmp/beat); while [ \"$(cat /tmp/beat)\" = \"$old\" ]; do sleep 0.1; done; "+
			"cat /tmp/beat; cat /proc/sys/kernel/random/boot_id")
		b, a := strings.Fields(before), strings.Fields(after)
		if len(b) != 2 || len(a) != 2 || b[1] != a[1] || b[0] == a[0] {
			t.Errorf("after %s: before %q, after %q", signal, before, after)
		}
	}
	if reason := s.waitState(short, "destroyed"); reason != "expired" {
		t.Errorf("the sandbox with a short timeout was destroyed with reason %q", reason)
	}
	// The new server process enforces the memory limit.
	if r := s.exec(long, "exec python3 -c 'b = bytearray(2 << 30)'"); !r.OOMKilled {
		t.Errorf("after adoption: %+v", r)
	}
	s.alive(long)
}

// TestTermLetsCallsFinish sends SIGTERM while a command runs.
func TestTermLetsCallsFinish(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	answer := make(chan string, 1)
	go func() {
		r, err := s.api().Execute(context.Background(), id,
			cay.ExecuteRequest{Command: new("touch /tmp/begun; sleep 2; echo finished")})
		answer <- fmt.Sprint(jsonOf(r), err)
	}()
	for deadline := time.Now().Add(patience); s.exec(id, "test -e /tmp/begun").ExitCode != 0; {
		if time.Now().After(deadline) {
			t.Fatal("the command does not begin")
		}
	}
	s.stop(syscall.SIGTERM)
	if got := <-answer; !strings.Contains(got, "finished") {
		t.Errorf("the call in flight returned %s", got)
	}
}

// TestKilledAtAnyMoment kills the server with SIGKILL while it creates and destroys, again and
// again, until later starts have found both an interrupted create and an interrupted destroy. After
// each start every sandbox is running or destroyed, running ones work, and the host has nothing
// without a row.
func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	const rounds, most = 10, 60
	for round := 0; round < rounds || !s.reconciled("abandon", "finish"); round++ {
		if round == most {
			t.Fatalf("in %d rounds no start found an interrupted create and an interrupted destroy", most)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() { s.churn(ctx) })
		}
		// The delays spread over the time of a create and a destroy, and grow if that was not enough: the
		// first create of a server reads the whole image.
		time.Sleep(time.Duration(50+round%rounds*75+rand.IntN(75)) * time.Millisecond * time.Duration(1+round/rounds))
		s.stop(syscall.SIGKILL)
		cancel()
		wg.Wait()
		began := time.Now()
		s.start()
		s.agree(began)
	}
	for _, id := range s.sandboxes("running") {
		s.destroy(id)
	}
	s.agree(time.Now())
}

// reconciled reports whether the server's starts had to do each of the actions.
func (s *server) reconciled(actions ...string) bool {
	s.t.Helper()
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, a := range actions {
		if !bytes.Contains(log, []byte("action="+a)) {
			return false
		}
	}
	return true
}

// churn creates sandboxes and destroys two in three, until the server is gone.
func (s *server) churn(ctx context.Context) {
	for ctx.Err() == nil {
		sandbox, err := s.api().CreateSandbox(ctx, cay.CreateSandboxRequest{Template: "python", Timeout: new("10m")},
			cay.CreateOptions{})
		if err != nil {
			if refusal(err) != nil {
				s.t.Errorf("create: %v", err)
			}
			return
		}
		if rand.IntN(3) > 0 {
			if err := s.api().DestroySandbox(ctx, sandbox.ID); err != nil && refusal(err) == nil {
				return
			}
		}
	}
}

// agree waits until every sandbox is running or destroyed, and checks that the running ones work
// and that the host has no others.
func (s *server) agree(since time.Time) {
	s.t.Helper()
	for len(s.sandboxes("creating")) > 0 {
		if time.Since(since) > patience {
			s.t.Fatalf("still creating after %s: %v", patience, s.sandboxes("creating"))
		}
		time.Sleep(20 * time.Millisecond) // a poll with a deadline
	}
	running := s.sandboxes("running")
	for _, id := range running {
		s.alive(id)
	}
	// A destroy continues after its answer.
	for onHost := s.groupsOnHost(); len(onHost) != len(running); onHost = s.groupsOnHost() {
		if time.Since(since) > patience {
			s.t.Errorf("the host has %v, rows say %v", onHost, running)
			return
		}
		time.Sleep(20 * time.Millisecond) // a poll with a deadline
	}
}
