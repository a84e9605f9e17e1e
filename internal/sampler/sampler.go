// Package sampler measures regularly what sandboxes use of their machine, and keeps the samples of
// the last hours. It asks the agents of those sandboxes that a front follows; a sandbox that no
// caller has used lately costs nothing.
//
// A Sampler is safe for concurrent use. Its memory is bounded for each sandbox that it follows. The
// samples are lost with the process. A sample is no activity of a sandbox, delays none of its
// operations, and says what the sandbox says: it decides nothing.
package sampler

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// sampleEvery is the interval between two samples of a sandbox. A sample is one call to its
	// agent and takes about a millisecond of its CPU. Clients draw curves of minutes, so shorter
	// intervals would only cost CPU.
	sampleEvery = 15 * time.Second
	// lookEvery is the interval between two searches for sandboxes that are due. A sandbox has
	// its first sample after that; clients wait up to 30 s for it.
	lookEvery = 3 * time.Second
	// keepSamples is the number of samples kept of a sandbox: 3 hours, some 60 KB.
	keepSamples = int(3 * time.Hour / sampleEvery)
	// sampleTimeout bounds one call to an agent. A sandbox that does not answer in time gets no
	// sample.
	sampleTimeout = 2 * time.Second
	// samplersAtOnce is the number of concurrent calls, so that a sandbox that does not answer
	// does not delay all others.
	samplersAtOnce = 4
)

// Sandboxes has the method of [*sandbox.Service] that this package calls.
type Sandboxes interface {
	Lookup(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)
}

// Agent has the method of [*agentapi.Client] that this package calls.
type Agent interface {
	Metrics(ctx context.Context, t agentapi.Target) (agentapi.Metrics, error)
}

// Sampler holds the samples. Make it with [New]; Run takes them.
type Sampler struct {
	sandboxes Sandboxes
	agent     Agent
	log       *slog.Logger

	mu sync.Mutex
	// +checklocks:mu
	of map[sandbox.ID]*history
}

// history holds the samples of one sandbox. The mutex of its Sampler guards it.
type history struct {
	asked   time.Time // time of the last call
	samples []agentapi.Metrics
}

// New returns a Sampler that follows no sandbox.
func New(sandboxes Sandboxes, agent Agent, log *slog.Logger) *Sampler {
	return &Sampler{sandboxes: sandboxes, agent: agent, log: log, of: map[sandbox.ID]*history{}}
}

// Follow begins to sample a sandbox. It ends by itself when the sandbox is over.
func (s *Sampler) Follow(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of[id] == nil {
		s.of[id] = &history{}
	}
}

// Forget ends the sampling of a sandbox and drops its samples.
func (s *Sampler) Forget(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.of, id)
}

// Between returns the samples of a sandbox from one time to another, both included, in seconds since
// 1970.
func (s *Sampler) Between(id sandbox.ID, from, to int64) []agentapi.Metrics {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []agentapi.Metrics
	if h := s.of[id]; h != nil {
		for _, m := range h.samples {
			if m.Unix >= from && m.Unix <= to {
				out = append(out, m)
			}
		}
	}
	return out
}

// Latest returns the newest sample of a sandbox, if there is one.
func (s *Sampler) Latest(id sandbox.ID) (m agentapi.Metrics, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.of[id]
	if h == nil || len(h.samples) == 0 {
		return m, false
	}
	return h.samples[len(h.samples)-1], true
}

// due returns the sandboxes to be sampled now.
func (s *Sampler) due(now time.Time) []sandbox.ID {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []sandbox.ID
	for id, h := range s.of {
		if now.Sub(h.asked) >= sampleEvery {
			h.asked = now
			ids = append(ids, id)
		}
	}
	return ids
}

func (s *Sampler) add(id sandbox.ID, m agentapi.Metrics) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.of[id]
	if h == nil {
		return // forgotten meanwhile
	}
	if len(h.samples) == keepSamples {
		h.samples = append(h.samples[:0], h.samples[1:]...)
	}
	h.samples = append(h.samples, m)
}

// Run takes samples until ctx ends.
func (s *Sampler) Run(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			s.sample(ctx, s.due(now))
		}
	}
}

func (s *Sampler) sample(ctx context.Context, ids []sandbox.ID) {
	work := make(chan sandbox.ID)
	var wg sync.WaitGroup
	for range min(samplersAtOnce, len(ids)) {
		wg.Go(func() {
			for id := range work {
				s.sampleOne(ctx, id)
			}
		})
	}
	for _, id := range ids {
		work <- id
	}
	close(work)
	wg.Wait()
}

// sampleOne samples one sandbox, if it runs. A suspend breaks the call.
func (s *Sampler) sampleOne(ctx context.Context, id sandbox.ID) {
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	sb, err := s.sandboxes.Lookup(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && sb.State.Over():
		s.Forget(id)
		return
	case err != nil || sb.State != sandbox.Running:
		return
	}
	m, err := s.agent.Metrics(ctx, agentapi.Target{SandboxID: string(sb.ID), Run: sb.Run})
	if err != nil {
		s.log.DebugContext(ctx, "sampling a sandbox", "sandbox", id, "error", err)
		return
	}
	m.Unix = time.Now().Unix() // the sandbox's own clock is not trusted
	s.add(id, m)
}
