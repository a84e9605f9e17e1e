package sampler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestSamplesAreBounded checks that a history is bounded, and that a sandbox that is not followed
// has none.
func TestSamplesAreBounded(t *testing.T) {
	s := New(nil, nil, nil)
	s.add("sbx_gone", agentapi.Metrics{Unix: 1})
	s.Follow("sbx_a", "org")
	if _, ok := s.Latest("sbx_a"); ok {
		t.Error("it has a sample before the first is taken")
	}
	for i := range keepSamples + 10 {
		s.add("sbx_a", agentapi.Metrics{Unix: int64(i)})
	}
	all := s.Between("sbx_a", 0, 1<<40)
	if len(all) != keepSamples || all[0].Unix != 10 || len(s.of) != 1 {
		t.Errorf("%d samples from %d, %d histories", len(all), all[0].Unix, len(s.of))
	}
	if got := s.Between("sbx_a", 20, 22); len(got) != 3 {
		t.Errorf("between 20 and 22 are %d", len(got))
	}
	if m, ok := s.Latest("sbx_a"); !ok || m.Unix != int64(keepSamples+9) {
		t.Errorf("the latest is %+v, %v", m, ok)
	}
	if got := s.Between("sbx_b", 0, 100); len(got) != 0 {
		t.Errorf("a sandbox that is not followed has %v", got)
	}
	now := time.Now()
	for range 2 { // it waits in its queue once
		s.enqueue(now)
	}
	if q := s.queues["org"]; len(q) != 1 {
		t.Errorf("due are %v", q)
	}
	if id, ok := s.next("org"); id != "sbx_a" || !ok {
		t.Errorf("the first is %s, %v", id, ok)
	}
	if orgs := s.enqueue(s.of["sbx_a"].asked.Add(sampleEvery - 1)); len(orgs) != 0 {
		t.Errorf("due again are %v", orgs)
	}
	s.enqueue(now.Add(time.Hour))
	s.Forget("sbx_a")
	if id, ok := s.next("org"); ok || len(s.of) != 0 || len(s.queues) != 0 {
		t.Errorf("it is not forgotten: %s, %v, %v", id, s.of, s.queues)
	}
}

// machine has sandboxes in every state, and agents of which some never answer: those whose IDs begin with
// sbx_silent.
type machine struct {
	mu sync.Mutex
	// +checklocks:mu
	calls map[string]int
}

func (m *machine) GetAny(_ context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	sb := sandbox.Sandbox{ID: id, State: sandbox.Running, Run: "run"}
	switch id {
	case "sbx_none":
		return sb, fault.New(fault.NotFound, fault.CodeSandboxNotFound, "there is none")
	case "sbx_over":
		sb.State = sandbox.Destroyed
	case "sbx_asleep":
		sb.State = sandbox.Suspended
	case "sbx_unreadable":
		return sb, errors.New("the database is locked")
	}
	return sb, nil
}

func (m *machine) Metrics(ctx context.Context, t agentapi.Target) (agentapi.Metrics, error) {
	m.mu.Lock()
	m.calls[t.SandboxID]++
	m.mu.Unlock()
	if strings.HasPrefix(t.SandboxID, "sbx_silent") {
		<-ctx.Done()
		return agentapi.Metrics{}, ctx.Err()
	}
	return agentapi.Metrics{Unix: 1, MemUsed: 42}, nil
}

// TestRun follows sandboxes in every state for a minute.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{calls: map[string]int{}}
		s := New(m, m, slog.New(slog.DiscardHandler))
		for _, id := range []sandbox.ID{"sbx_none", "sbx_over", "sbx_asleep", "sbx_unreadable", "sbx_silent", "sbx_runs"} {
			s.Follow(id, "org")
		}
		began := time.Now().Unix()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s.Run(ctx)
		got := s.Between("sbx_runs", began, time.Now().Unix())
		if len(got) != 4 || got[0].MemUsed != 42 {
			t.Errorf("of a running sandbox: %+v", got)
		}
		// The silent one is skipped for one interval after its first call, and for two after the next.
		if m.calls["sbx_silent"] != 2 || m.calls["sbx_asleep"]+m.calls["sbx_over"]+m.calls["sbx_unreadable"] != 0 {
			t.Errorf("the calls are %v", m.calls)
		}
		if len(s.of) != 4 || s.of["sbx_none"] != nil || s.of["sbx_over"] != nil {
			t.Errorf("it follows %v", s.of)
		}
	})
}

// TestSilentAgentsDelayNoOthers checks that organizations with many silent agents change the period of no
// other's samples, and that silent agents cost few calls.
func TestSilentAgentsDelayNoOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{calls: map[string]int{}}
		s := New(m, m, slog.New(slog.DiscardHandler))
		const orgs, silent, minutes = 8, 20, 20
		for i := range orgs {
			for n := range silent {
				s.Follow(sandbox.ID(fmt.Sprint("sbx_silent_", i, "_", n)), fmt.Sprint("hostile", i))
			}
		}
		for i := range 50 {
			s.Follow(sandbox.ID(fmt.Sprint("sbx_runs_", i)), "honest")
		}
		ctx, cancel := context.WithTimeout(t.Context(), minutes*time.Minute)
		defer cancel()
		s.Run(ctx)
		for i := range 50 {
			all := s.Between(sandbox.ID(fmt.Sprint("sbx_runs_", i)), 0, time.Now().Unix())
			for k := 1; k < len(all); k++ {
				if apart := all[k].Unix - all[k-1].Unix; apart > int64((sampleEvery+2*lookEvery)/time.Second) {
					t.Fatalf("two samples are %d s apart", apart)
				}
			}
			if want := minutes * int(time.Minute/(sampleEvery+lookEvery)); len(all) < want {
				t.Fatalf("%d samples, want %d", len(all), want)
			}
		}
		calls := 0
		for id, n := range m.calls {
			if strings.HasPrefix(id, "sbx_silent") {
				calls += n
			}
		}
		if most := orgs * silent * (6 + minutes/4); calls > most { // 6 until they are skipped for 4 minutes
			t.Errorf("%d calls of silent agents, want at most %d", calls, most)
		}
		if len(s.queues) != 0 && len(s.of) != orgs*silent+50 {
			t.Errorf("%d queues, %d histories", len(s.queues), len(s.of))
		}
	})
}

// TestAgentIsAskedAgain checks that an agent which answers again has its usual period soon.
func TestAgentIsAskedAgain(t *testing.T) {
	s := New(nil, nil, nil)
	s.Follow("sbx_a", "org")
	var skipped []int
	for _, answered := range []bool{false, false, false, false, false, false, true, false, true, true, true, true, true} {
		s.heard("sbx_a", answered)
		skipped = append(skipped, s.of["sbx_a"].skip)
	}
	if want := []int{1, 2, 4, 8, 16, 16, 8, 16, 8, 4, 2, 1, 0}; !slices.Equal(skipped, want) {
		t.Errorf("skipped %v, want %v", skipped, want)
	}
	s.heard("sbx_none", false) // forgotten meanwhile
}
