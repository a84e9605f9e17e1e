package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/sandbox"
)

// observe registers the metrics of sandboxes and of this process, and returns a function that counts transitions.
func (s *server) observe() func(sandbox.Event) {
	transitions := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cay_sandbox_transitions_total",
		Help: "Transitions of sandboxes by the state they went to and the reason."}, []string{"to", "reason"})
	s.registry.MustRegister(transitions, trafficMetrics{s.slots},
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cay_sandbox_leases", Help: "Calls that use a sandbox now."},
			func() float64 { return float64(s.sandboxes.InUse()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "cay_network_rules_repaired_total",
			Help: "Times that packet filter rules were put back after another program removed them."},
			func() float64 { return float64(s.slots.Repairs()) }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return func(e sandbox.Event) { transitions.WithLabelValues(string(e.To), e.Reason).Inc() }
}

// observeBuilds registers the metric of builds and returns a function that counts a build.
func (s *server) observeBuilds() func(result string, took time.Duration) {
	builds := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cay_template_build_duration_seconds",
		Help: "Time that builds of templates ran, by result: ready, failed, cancelled.",
		// From a build whose result exists already to one beyond the time limit.
		Buckets: []float64{.1, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600}}, []string{"result"})
	s.registry.MustRegister(builds)
	return func(result string, took time.Duration) { builds.WithLabelValues(result).Observe(took.Seconds()) }
}

// observeMemory registers the metrics of the memory that calls hold.
func (s *server) observeMemory() {
	s.registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cay_calls_memory_bytes",
			Help: "Memory that calls hold now, as it is counted."},
			func() float64 { return float64(s.budget.Used()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cay_calls_memory_limit_bytes",
			Help: "Memory that calls may hold together."},
			func() float64 { return float64(s.budget.Limit()) }))
}

// pool returns the settings of the warm pool, with a function that measures its work.
func (s *server) pool() sandbox.PoolConfig {
	cfg := s.cfg.Pool
	prepared := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cay_pool_prepare_seconds",
		Help:    "Time to prepare a pooled sandbox, by result.",
		Buckets: []float64{.1, .2, .3, .5, .75, 1, 2, 5, 10, 30, 60}}, []string{"result"})
	s.registry.MustRegister(prepared, poolMetrics{s})
	p := sandbox.PoolConfig{Enabled: cfg.Enabled, Target: cfg.Target, MaxPooled: cfg.MaxPooled,
		Prepared: func(took time.Duration, err error) {
			result := "ready"
			if err != nil {
				result = "failed"
			}
			prepared.WithLabelValues(result).Observe(took.Seconds())
		}}
	for _, t := range cfg.Templates {
		p.Templates = append(p.Templates,
			sandbox.PoolTemplate{Template: t.Template, OrgID: t.Org, Size: t.Size, Target: t.Target})
	}
	return p
}

// poolMetrics collects the counts of the warm pool.
type poolMetrics struct{ server *server }

var (
	poolReady   = prometheus.NewDesc("cay_pool_ready", "Pooled sandboxes that can be claimed.", nil, nil)
	poolCreates = prometheus.NewDesc("cay_pool_creates_total", "Creates while the pool was on: warm from it, or cold.",
		[]string{"source"}, nil)
)

// Describe implements [prometheus.Collector].
func (m poolMetrics) Describe(c chan<- *prometheus.Desc) {
	c <- poolReady
	c <- poolCreates
}

// Collect implements [prometheus.Collector].
func (m poolMetrics) Collect(c chan<- prometheus.Metric) {
	n := m.server.sandboxes.PoolCounts()
	c <- prometheus.MustNewConstMetric(poolReady, prometheus.GaugeValue, float64(n.Ready))
	c <- prometheus.MustNewConstMetric(poolCreates, prometheus.CounterValue, float64(n.Warm), string(sandbox.Warm))
	c <- prometheus.MustNewConstMetric(poolCreates, prometheus.CounterValue, float64(n.Cold), string(sandbox.Cold))
}

// trafficMetrics collects the counters of all sandboxes together. A counter for each sandbox would be a time series
// that ends with the sandbox.
type trafficMetrics struct{ slots *network.Network }

var (
	packetsMetric = prometheus.NewDesc("cay_network_packets_total",
		"Packets that left sandboxes (allowed) or were kept in (denied).", []string{"verdict"}, nil)
	excessMetric = prometheus.NewDesc("cay_network_excess_packets_total",
		"Packets that were kept in because a sandbox, or all together, had too many connections or questions.", nil, nil)
	bytesMetric = prometheus.NewDesc("cay_network_bytes_total",
		"Bytes that left sandboxes (allowed) or were kept in (denied).", []string{"verdict"}, nil)
)

// Describe implements [prometheus.Collector].
func (m trafficMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- packetsMetric
	ch <- bytesMetric
	ch <- excessMetric
}

// Collect implements [prometheus.Collector].
func (m trafficMetrics) Collect(ch chan<- prometheus.Metric) {
	c, excess, err := m.slots.Totals()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(packetsMetric, err)
		return
	}
	ch <- prometheus.MustNewConstMetric(excessMetric, prometheus.CounterValue, float64(excess))
	for _, v := range []struct {
		desc    *prometheus.Desc
		n       uint64
		verdict string
	}{
		{packetsMetric, c.AllowedPackets, "allowed"}, {packetsMetric, c.DeniedPackets, "denied"},
		{bytesMetric, c.AllowedBytes, "allowed"}, {bytesMetric, c.DeniedBytes, "denied"},
	} {
		ch <- prometheus.MustNewConstMetric(v.desc, prometheus.CounterValue, float64(v.n), v.verdict)
	}
}
