package sampler

import (
	"context"
	"errors"
	"log/slog"
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
	s.Follow("sbx_a")
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
	if due := s.due(now); len(due) != 1 {
		t.Errorf("due are %v", due)
	}
	if due := s.due(now.Add(sampleEvery - 1)); len(due) != 0 {
		t.Errorf("due again are %v", due)
	}
	s.Forget("sbx_a")
	if len(s.of) != 0 {
		t.Error("it is not forgotten")
	}
}

// machine has sandboxes in every state, and agents of which one never answers.
type machine struct {
	mu sync.Mutex
	// +checklocks:mu
	calls map[string]int
}

func (m *machine) Lookup(_ context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
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
	if t.SandboxID == "sbx_silent" {
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
			s.Follow(id)
		}
		began := time.Now().Unix()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s.Run(ctx)
		got := s.Between("sbx_runs", began, time.Now().Unix())
		if len(got) != 4 || got[0].MemUsed != 42 {
			t.Errorf("of a running sandbox: %+v", got)
		}
		if m.calls["sbx_silent"] < 3 || m.calls["sbx_asleep"]+m.calls["sbx_over"]+m.calls["sbx_unreadable"] != 0 {
			t.Errorf("the calls are %v", m.calls)
		}
		if len(s.of) != 4 || s.of["sbx_none"] != nil || s.of["sbx_over"] != nil {
			t.Errorf("it follows %v", s.of)
		}
	})
}
