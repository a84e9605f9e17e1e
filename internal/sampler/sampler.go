// Package sampler measures regularly what sandboxes use of their machine, and keeps the samples of
// the last hours. It asks the agents of those sandboxes that a front follows ([Sampler.Follow]); only
// e2b does so now. A sandbox that no caller has used lately costs nothing.
//
// A Sampler is safe for concurrent use. Its memory is bounded for each sandbox that it follows. The
// samples are lost with the process. A sample is no activity of a sandbox, delays none of its
// operations, and says what the sandbox says: it decides nothing. Agents that do not answer delay the
// samples of their own organization's sandboxes only.
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
	// samplersAtOnce is the number of calls at once that still take the machine's CPU. More would
	// compete with the work that is measured; fewer would not use all CPUs.
	samplersAtOnce = 4
	// answerTime is the time in which an agent answers that has nothing else to do. A call that takes
	// longer only waits, and gives its place of samplersAtOnce to the next. A shorter time lets more
	// calls run at once on a busy machine; with a longer one silent agents keep the places occupied.
	answerTime = 100 * time.Millisecond
	// mostSkipped is the number of intervals for which a sandbox is left alone whose agent did not
	// answer, at most; it doubles with each time, and an answer halves it. With more, a sandbox that
	// was busy has no samples for a long time afterwards; with fewer, silent ones cost more calls.
	mostSkipped = 16 // 4 minutes
)

// Sandboxes has the method of [*sandbox.Service] that this package calls.
type Sandboxes interface {
	GetAny(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)
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

	places chan struct{} // holds a token for each of samplersAtOnce

	mu sync.Mutex
	// +checklocks:mu
	of map[sandbox.ID]*history
	// queues holds the sandboxes that are due, by organization, while a goroutine samples them one
	// after the other.
	// +checklocks:mu
	queues map[string][]sandbox.ID
}

// history holds the samples of one sandbox. The mutex of its Sampler guards it.
type history struct {
	org     string    // of the sandbox
	asked   time.Time // time of the last call
	queued  bool      // it waits in a queue
	skip    int       // intervals until the next call, besides the first
	samples []agentapi.Metrics
}

// New returns a Sampler that follows no sandbox.
func New(sandboxes Sandboxes, agent Agent, log *slog.Logger) *Sampler {
	return &Sampler{sandboxes: sandboxes, agent: agent, log: log, places: make(chan struct{}, samplersAtOnce),
		of: map[sandbox.ID]*history{}, queues: map[string][]sandbox.ID{}}
}

// Follow begins to sample a sandbox of an organization. It ends by itself when the sandbox is over.
func (s *Sampler) Follow(id sandbox.ID, org string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of[id] == nil {
		s.of[id] = &history{org: org}
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

// enqueue adds the sandboxes that are due to the queues, and returns the organizations whose queue was
// empty.
func (s *Sampler) enqueue(now time.Time) (orgs []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, h := range s.of {
		if h.queued || now.Sub(h.asked) < time.Duration(1+h.skip)*sampleEvery {
			continue
		}
		h.queued = true
		if s.queues[h.org] == nil {
			orgs = append(orgs, h.org)
		}
		s.queues[h.org] = append(s.queues[h.org], id)
	}
	return orgs
}

// next removes and returns the first sandbox of an organization's queue. Without one it removes the
// queue.
func (s *Sampler) next(org string) (sandbox.ID, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queues[org]) > 0 {
		id := s.queues[org][0]
		s.queues[org] = s.queues[org][1:]
		if h := s.of[id]; h != nil { // otherwise it was forgotten meanwhile
			h.asked, h.queued = time.Now(), false
			return id, true
		}
	}
	delete(s.queues, org)
	return "", false
}

// heard records whether an agent answered, which decides when it is asked again.
func (s *Sampler) heard(id sandbox.ID, answered bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.of[id]
	switch {
	case h == nil:
	case answered:
		h.skip /= 2
	default:
		h.skip = min(max(2*h.skip, 1), mostSkipped)
	}
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
	var all sync.WaitGroup
	defer all.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, org := range s.enqueue(now) {
				all.Go(func() {
					for id, ok := s.next(org); ok; id, ok = s.next(org) {
						s.sampleOne(ctx, id)
					}
				})
			}
		}
	}
}

// place waits for a place among the calls at once. leave gives the place back, unless its time has ended
// before. ok is false if ctx ended first.
func (s *Sampler) place(ctx context.Context) (leave func(), ok bool) {
	select {
	case s.places <- struct{}{}:
	case <-ctx.Done():
		return nil, false
	}
	giveBack := sync.OnceFunc(func() { <-s.places })
	end := time.AfterFunc(answerTime, giveBack)
	return func() { end.Stop(); giveBack() }, true
}

// sampleOne samples one sandbox, if it runs. A suspend breaks the call.
func (s *Sampler) sampleOne(ctx context.Context, id sandbox.ID) {
	leave, ok := s.place(ctx)
	if !ok {
		return
	}
	defer leave()
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	sb, err := s.sandboxes.GetAny(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && sb.State.Over():
		s.Forget(id)
		return
	case err != nil || sb.State != sandbox.Running:
		return
	}
	m, err := s.agent.Metrics(ctx, agentapi.Target{SandboxID: string(sb.ID), Run: sb.Run})
	s.heard(id, err == nil || ctx.Err() == nil) // an error is an answer too, if it comes in time
	if err != nil {
		s.log.DebugContext(ctx, "sampling a sandbox", "sandbox", id, "error", err)
		return
	}
	m.Unix = time.Now().Unix() // the sandbox's own clock is not trusted
	s.add(id, m)
}
