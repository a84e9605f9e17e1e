package main

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/cayhq/cay/client"
	"github.com/cayhq/cay/internal/sandbox"
)

type poolConfig struct {
	Enabled    bool           `toml:"enabled"`
	Target     int            `toml:"target"`
	MaxMembers int            `toml:"max_members"`
	Templates  []poolTemplate `toml:"templates"`
}

type poolTemplate struct {
	Template string `toml:"template"`
	Org      string `toml:"org"`
	Size     string `toml:"size"`
	Target   int    `toml:"target"`
}

// check refuses what cannot work; sizes are those that there are.
func (c poolConfig) check(sizes map[string]bool) error {
	if c.Target < 0 {
		return fmt.Errorf("pool.target: must be at least 0, not %d", c.Target)
	}
	if c.MaxMembers < 0 {
		return fmt.Errorf("pool.max_members: must be at least 0, not %d", c.MaxMembers)
	}
	for i, t := range c.Templates {
		switch {
		case t.Template == "":
			return fmt.Errorf("pool.templates[%d].template: must name a template", i)
		case t.Size != "" && !sizes[t.Size]:
			return fmt.Errorf("pool.templates[%d].size: %q is not among sandbox.sizes", i, t.Size)
		case t.Target < 0:
			return fmt.Errorf("pool.templates[%d].target: must be at least 0, not %d", i, t.Target)
		}
	}
	return nil
}

// pool is the pool's configuration, measured.
func (s *server) pool() sandbox.PoolConfig {
	cfg := s.cfg.Pool
	prepared := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cay_pool_prepare_seconds",
		Help: "Time to prepare a member of the pool, by result.", Buckets: []float64{.1, .2, .3, .5, .75, 1, 2, 5, 10, 30, 60}}, []string{"result"})
	s.registry.MustRegister(prepared, poolMetrics{s})
	p := sandbox.PoolConfig{Enabled: cfg.Enabled, Target: cfg.Target, MaxMembers: cfg.MaxMembers,
		Prepared: func(took time.Duration, err error) {
			result := "ready"
			if err != nil {
				result = "failed"
			}
			prepared.WithLabelValues(result).Observe(took.Seconds())
		}}
	for _, t := range cfg.Templates {
		p.Templates = append(p.Templates, sandbox.PoolTemplate{Template: t.Template, OrgID: t.Org, Size: t.Size, Target: t.Target})
	}
	return p
}

// poolMetrics reads the pool's counts when they are asked for.
type poolMetrics struct{ server *server }

var (
	poolReady   = prometheus.NewDesc("cay_pool_ready", "Members of the pool that can be claimed.", nil, nil)
	poolCreates = prometheus.NewDesc("cay_pool_creates_total", "Creates while the pool was on: warm from it, or cold.", []string{"source"}, nil)
)

func (m poolMetrics) Describe(c chan<- *prometheus.Desc) {
	c <- poolReady
	c <- poolCreates
}

func (m poolMetrics) Collect(c chan<- prometheus.Metric) {
	n := m.server.sandboxes.PoolCounts()
	c <- prometheus.MustNewConstMetric(poolReady, prometheus.GaugeValue, float64(n.Ready))
	c <- prometheus.MustNewConstMetric(poolCreates, prometheus.CounterValue, float64(n.Warm), string(sandbox.Warm))
	c <- prometheus.MustNewConstMetric(poolCreates, prometheus.CounterValue, float64(n.Cold), string(sandbox.Cold))
}

func (a *app) poolCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pool",
		Short:   "Show the sandboxes that are booted in advance",
		Long:    "Show the sandboxes that are booted in advance, by template and size. Needs a key of the server's first organization with the scope admin.",
		Example: "  cay sandbox pool",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.Pool(cmd.Context())
			if err != nil {
				return err
			}
			if all == nil {
				all = []client.PoolEntry{}
			}
			return a.show(client.Pool{Pool: all}, func() error {
				var rows [][]string
				for _, p := range all {
					rows = append(rows, []string{p.Template, fmt.Sprint(p.TemplateVersion), p.Size, fmt.Sprint(p.Ready), fmt.Sprint(p.Target), fmt.Sprint(p.Claimed)})
				}
				return a.table([]string{"TEMPLATE", "VERSION", "SIZE", "READY", "TARGET", "CLAIMED"}, rows)
			})
		},
	}
}
