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
	// sampleEvery is how often a sandbox is asked what it uses: one call to its agent, about
	// a millisecond of its CPU. Clients draw curves of minutes.
	sampleEvery = 15 * time.Second
	// lookEvery is how often those that are due are looked for. A sandbox has its first
	// sample after that; clients wait up to 30 s for it.
	lookEvery = 3 * time.Second
	// keepSamples is 3 hours of them, some 60 KB a sandbox.
	keepSamples = int(3 * time.Hour / sampleEvery)
	// sampleTimeout bounds one question. A sandbox that does not answer has no sample.
	sampleTimeout = 2 * time.Second
	// samplersAtOnce keep a sandbox that does not answer from holding up all others.
	samplersAtOnce = 4
	// maxMetricIDs is how many sandboxes one request may name.
	maxMetricIDs = 100
)

// samples is what sandboxes that came by here used of their machines. It is memory alone:
// another life of the server begins anew.
type samples struct {
	mu sync.Mutex
	// +checklocks:mu
	of map[sandbox.ID]*history // guarded by mu
}

type history struct {
	asked   time.Time // last
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

// due takes the sandboxes that are to be asked now.
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

// between copies the samples of a time, both ends included.
func (s *samples) between(box sandbox.Sandbox, from, to int64) []metricBody {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []metricBody{}
	if h := s.of[box.ID]; h != nil {
		for _, m := range h.samples {
			if m.Unix >= from && m.Unix <= to {
				out = append(out, metricOf(m, box.Size.VCPUs))
			}
		}
	}
	return out
}

// Run samples until ctx ends.
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

// sampleOne asks one sandbox, if it runs. It is no activity, and holds nobody up: a
// suspend breaks the question.
func (s *Surface) sampleOne(ctx context.Context, id sandbox.ID) {
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	box, err := s.Sandboxes.Lookup(ctx, id)
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && box.State.Over():
		s.samples.forget(id)
		return
	case err != nil || box.State != sandbox.Running:
		return
	}
	m, err := s.Agent.Metrics(ctx, target(box))
	if err != nil {
		s.Log.DebugContext(ctx, "sampling a sandbox", "sandbox", id, "error", err)
		return
	}
	m.Unix = time.Now().Unix() // its own clock is its own
	s.samples.add(id, m)
}

// metricBody is SandboxMetric.
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

// metricOf encodes a sample of a sandbox with vcpus virtual CPUs. The agent reports the
// CPUs of the host, of which a sandbox of a shared size sees all.
func metricOf(m agentapi.Metrics, vcpus int) metricBody {
	return metricBody{Timestamp: time.Unix(m.Unix, 0).UTC(), TimestampUnix: m.Unix, CPUCount: vcpus, CPUUsedPct: m.CPUPercent,
		MemUsed: m.MemUsed, MemTotal: m.MemTotal, MemCache: m.MemCache, DiskUsed: m.DiskUsed, DiskTotal: m.DiskTotal}
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
		return fault.InField("invalid_start", "start", "must not be after end")
	}
	id := sandboxID(r)
	box, err := s.present(r, id)
	if err != nil {
		return err
	}
	s.samples.follow(id)
	reply(w, http.StatusOK, s.samples.between(box, from, to))
	return nil
}

// latestMetrics answers GET /sandboxes/metrics: the latest sample of each that is named and
// there.
func (s *Surface) latestMetrics(w http.ResponseWriter, r *http.Request) error {
	names := strings.FieldsFunc(strings.Join(r.URL.Query()["sandbox_ids"], ","), func(c rune) bool { return c == ',' })
	if len(names) == 0 || len(names) > maxMetricIDs {
		return fault.InField("invalid_sandbox_ids", "sandbox_ids", "must name 1 to %d sandboxes", maxMetricIDs)
	}
	out := map[string]metricBody{}
	for _, name := range names {
		id := sandbox.ID(idPrefix + name)
		box, err := s.present(r, id)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			return err
		}
		s.samples.follow(id)
		if all := s.samples.between(box, 0, never.Unix()); len(all) > 0 {
			out[name] = all[len(all)-1]
		}
	}
	reply(w, http.StatusOK, map[string]any{"sandboxes": out})
	return nil
}

func unixSeconds(text, field string, otherwise int64) (int64, error) {
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fault.InField("invalid_"+field, field, "must be a time in seconds since 1970")
	}
	return n, nil
}
