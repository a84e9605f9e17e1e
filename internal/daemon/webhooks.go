package daemon

import (
	"context"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/api"
	"github.com/cayhq/cay/internal/e2b"
	"github.com/cayhq/cay/internal/webhook"
	"github.com/cayhq/cay/internal/webhook/sender"
)

// openWebhooks opens the room of webhooks.
func (s *server) openWebhooks() error {
	cfg := s.cfg.Webhooks
	allowed, err := cfg.AllowPrefixes()
	if err != nil {
		return err
	}
	post := sender.New(sender.Config{UserAgent: "cay/" + s.version, Permit: permitted(allowed, s.slots.Permitted)})
	s.onClose(func(context.Context) error { post.Close(); return nil })
	attempts := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cay_webhook_attempt_seconds",
		Help: "Time that attempts at deliveries of webhooks took, by outcome: delivered, refused (another answer than " +
			"2xx), unreachable (no answer), forbidden (an address that webhooks may not call).",
		// From a receiver nearby to the time after which an attempt is given up.
		Buckets: []float64{.005, .025, .1, .25, .5, 1, 2, 5, 15}}, []string{"outcome"})
	s.registry.MustRegister(attempts, webhookMetrics{s})
	// Webhooks of E2B's clients are delivered although the API for them may be turned off.
	s.webhooks = webhook.New(webhook.Config{MaxPerOrg: cfg.MaxPerOrg, Concurrency: cfg.Concurrency, Log: s.log,
		Now:     s.db.Now,
		Shared:  s.db.Shared(),
		Observe: func(outcome string, took time.Duration) { attempts.WithLabelValues(outcome).Observe(took.Seconds()) },
	}, s.db, s.events, post, map[webhook.Format]webhook.Wire{
		webhook.Standard: webhook.NewStandard(api.EncodeEvent), webhook.E2B: e2b.NewWire(s.sandboxes),
	})
	return nil
}

// permitted returns a function that allows the addresses of the ranges, and those that others allows.
func permitted(allowed []netip.Prefix, others func(netip.Addr) error) func(netip.AddrPort) error {
	return func(to netip.AddrPort) error {
		for _, p := range allowed {
			if p.Contains(to.Addr()) {
				return nil
			}
		}
		return others(to.Addr())
	}
}

// webhookMetrics collects what is pending of all webhooks.
type webhookMetrics struct{ server *server }

var (
	webhooksPending = prometheus.NewDesc("cay_webhook_deliveries_pending",
		"Deliveries of enabled webhooks that are not made yet, of the whole cluster: all servers with the same records "+
			"report the same.", nil, nil)
	webhooksOldest = prometheus.NewDesc("cay_webhook_oldest_pending_seconds",
		"Time since the oldest of these deliveries was queued, of the whole cluster; 0 if there is none.", nil, nil)
)

// webhookMetricsPatience limits the wait of a scrape for the records.
const webhookMetricsPatience = 5 * time.Second

// Describe implements [prometheus.Collector].
func (m webhookMetrics) Describe(c chan<- *prometheus.Desc) {
	c <- webhooksPending
	c <- webhooksOldest
}

// Collect implements [prometheus.Collector].
func (m webhookMetrics) Collect(c chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), webhookMetricsPatience)
	defer cancel()
	n, oldest, err := m.server.db.PendingDeliveries(ctx)
	if err != nil {
		c <- prometheus.NewInvalidMetric(webhooksPending, err)
		return
	}
	age := 0.0
	if !oldest.IsZero() {
		age = max(m.server.db.Now().Sub(oldest).Seconds(), 0)
	}
	c <- prometheus.MustNewConstMetric(webhooksPending, prometheus.GaugeValue, float64(n))
	c <- prometheus.MustNewConstMetric(webhooksOldest, prometheus.GaugeValue, age)
}
