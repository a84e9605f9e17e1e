package e2b

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

// maxMetricIDs is the number of sandboxes that one request may name.
const maxMetricIDs = 100

// Samples has the methods of [*sampler.Sampler] that this package calls.
type Samples interface {
	Follow(id sandbox.ID, org string)
	Forget(id sandbox.ID)
	Between(id sandbox.ID, from, to int64) []agentapi.Metrics
	Latest(id sandbox.ID) (agentapi.Metrics, bool)
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
func (s *Handler) metrics(w http.ResponseWriter, r *http.Request) error {
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
	s.Samples.Follow(id, orgOf(r))
	out := []metricBody{}
	for _, m := range s.Samples.Between(id, from, to) {
		out = append(out, metricOf(m, sb.Size.VCPUs))
	}
	reply(w, r, http.StatusOK, out)
	return nil
}

// latestMetrics answers GET /sandboxes/metrics with the latest sample of each live sandbox that
// is named.
func (s *Handler) latestMetrics(w http.ResponseWriter, r *http.Request) error {
	names := strings.FieldsFunc(strings.Join(r.URL.Query()["sandbox_ids"], ","), func(c rune) bool { return c == ',' })
	if len(names) == 0 || len(names) > maxMetricIDs {
		return fault.InvalidField("sandbox_ids", "must name 1 to %d sandboxes", maxMetricIDs)
	}
	out, away := map[string]metricBody{}, map[string][]string{}
	for _, name := range names {
		id := sandbox.ID(idPrefix + name)
		sb, err := s.present(r, id)
		if fault.Is(err, fault.NotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if node := sb.Holder.Node; s.Relay.Away(r, node) {
			away[node] = append(away[node], name)
			continue
		}
		s.Samples.Follow(id, orgOf(r))
		if m, ok := s.Samples.Latest(id); ok {
			out[name] = metricOf(m, sb.Size.VCPUs)
		}
	}
	if err := s.metricsAway(r, away, out); err != nil {
		return err
	}
	reply(w, r, http.StatusOK, metricsBody{out})
	return nil
}

// metricsBody is the answer with the latest samples.
type metricsBody struct {
	Sandboxes map[string]metricBody `json:"sandboxes"`
}

// maxMetric is more than the size of a sample in an answer, in bytes.
const maxMetric = 512

// metricsAway adds the latest samples of sandboxes that other nodes have, whose names it is given by node. It
// leaves out those of a node that does not answer.
func (s *Handler) metricsAway(r *http.Request, names map[string][]string, out map[string]metricBody) error {
	if len(names) == 0 {
		return nil
	}
	queries := map[string]string{}
	for node, of := range names {
		queries[node] = url.Values{"sandbox_ids": {strings.Join(of, ",")}}.Encode()
	}
	passage := httpserver.Passage{Front: frontControl}
	return s.Relay.Gather(r, queries, maxMetric*(1+maxMetricIDs), passage, func(node string, body []byte) error {
		var got metricsBody
		if err := json.Unmarshal(body, &got); err != nil {
			return fmt.Errorf("decoding metrics: %w", err)
		}
		for _, name := range names[node] {
			if m, ok := got.Sandboxes[name]; ok {
				out[name] = m
			}
		}
		return nil
	})
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
