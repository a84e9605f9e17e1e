package e2b

import (
	"context"
	"net/http"
	"strconv"
	"strings"
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
	// maxMetricIDs is the number of sandboxes that one request may name.
	maxMetricIDs = 100
)

// samples holds what recently used sandboxes use of their machine. It is lost when the server
// restarts.
type samples struct {
	mu sync.Mutex
	// +checklocks:mu
	of map[sandbox.ID]*history // guarded by mu
}

type history struct {
	asked   time.Time // time of the last call
	samples []agentapi.Metrics
}

func newSamples() *samples { return &samples{of: map[sandbox.ID]*history{}} }

// follow begins to sample a sandbox.
func (s *samples) follow(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of[id] == nil {
		s.of[id] = &history{}
	}
}

func (s *samples) forget(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.of, id)
}

// due returns the sandboxes to be sampled now.
func (s *samples) due(now time.Time) []sandbox.ID {
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

func (s *samples) add(id sandbox.ID, m agentapi.Metrics) {
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

// between returns the samples from one time to another, both included.
func (s *samples) between(sb sandbox.Sandbox, from, to int64) []metricBody {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []metricBody{}
	if h := s.of[sb.ID]; h != nil {
		for _, m := range h.samples {
			if m.Unix >= from && m.Unix <= to {
				out = append(out, metricOf(m, sb.Size.VCPUs))
			}
		}
	}
	return out
}

// Run takes samples until ctx ends.
func (s *Surface) Run(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			s.sample(ctx, s.samples.due(now))
		}
	}
}

func (s *Surface) sample(ctx context.Context, ids []sandbox.ID) {
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

// sampleOne samples one sandbox, if it runs. This is no activity of the sandbox, and delays no
// operation: a suspend breaks the call.
func (s *Surface) sampleOne(ctx context.Context, id sandbox.ID) {
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	sb, err := s.Sandboxes.Lookup(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && sb.State.Over():
		s.samples.forget(id)
		return
	case err != nil || sb.State != sandbox.Running:
		return
	}
	m, err := s.Agent.Metrics(ctx, target(sb))
	if err != nil {
		s.Log.DebugContext(ctx, "sampling a sandbox", "sandbox", id, "error", err)
		return
	}
	m.Unix = time.Now().Unix() // the sandbox's own clock is not trusted
	s.samples.add(id, m)
}

// metricBody is E2B's SandboxMetric.
type metricBody struct {
	Timestamp     time.Time `json:"timestamp"`
	TimestampUnix int64     `json:"timestampUnix"`
	CPUCount      int       `json:"cpuCount"`
	CPUUsedPct    float64   `json:"cpuUsedPct"`
	MemUsed       int64     `json:"memUsed"`
	MemTotal      int64     `json:"memTotal"`
	MemCache      int64     `json:"memCache"`
	DiskUsed      int64     `json:"diskUsed"`
	DiskTotal     int64     `json:"diskTotal"`
}

// metricOf encodes a sample of a sandbox with vcpus virtual CPUs. The agent reports the CPUs of
// the host, since a sandbox of a shared size sees all of them.
func metricOf(m agentapi.Metrics, vcpus int) metricBody {
	return metricBody{Timestamp: time.Unix(m.Unix, 0).UTC(), TimestampUnix: m.Unix, CPUCount: vcpus,
		CPUUsedPct: m.CPUPercent, MemUsed: m.MemUsed, MemTotal: m.MemTotal, MemCache: m.MemCache,
		DiskUsed: m.DiskUsed, DiskTotal: m.DiskTotal}
}

// metrics answers GET /sandboxes/{id}/metrics.
func (s *Surface) metrics(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	from, err := unixSeconds(q.Get("start"), "start", 0)
	if err != nil {
		return err
	}
	to, err := unixSeconds(q.Get("end"), "end", never.Unix())
	if err != nil {
		return err
	}
	if from > to {
		return fault.InvalidField("start", "must not be after end")
	}
	id := sandboxID(r)
	sb, err := s.present(r, id)
	if err != nil {
		return err
	}
	s.samples.follow(id)
	reply(w, r, http.StatusOK, s.samples.between(sb, from, to))
	return nil
}

// latestMetrics answers GET /sandboxes/metrics with the latest sample of each live sandbox that
// is named.
func (s *Surface) latestMetrics(w http.ResponseWriter, r *http.Request) error {
	names := strings.FieldsFunc(strings.Join(r.URL.Query()["sandbox_ids"], ","), func(c rune) bool { return c == ',' })
	if len(names) == 0 || len(names) > maxMetricIDs {
		return fault.InvalidField("sandbox_ids", "must name 1 to %d sandboxes", maxMetricIDs)
	}
	out := map[string]metricBody{}
	for _, name := range names {
		id := sandbox.ID(idPrefix + name)
		sb, err := s.present(r, id)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			return err
		}
		s.samples.follow(id)
		if all := s.samples.between(sb, 0, never.Unix()); len(all) > 0 {
			out[name] = all[len(all)-1]
		}
	}
	reply(w, r, http.StatusOK, map[string]any{"sandboxes": out})
	return nil
}

func unixSeconds(text, field string, otherwise int64) (int64, error) {
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fault.InvalidField(field, "must be a time in seconds since 1970")
	}
	return n, nil
}
