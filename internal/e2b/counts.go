package e2b

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// counts counts requests by route. It does not count by path, since each id would make a series.
type counts struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newCounts(registry prometheus.Registerer) *counts {
	c := &counts{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cay_e2b_requests_total", Help: "Requests of E2B's clients answered, by route and class of status (4xx).",
		}, []string{"route", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cay_e2b_request_duration_seconds", Help: "Time to answer a request of E2B's clients, its body included, by route.",
			// From a look-up to a command of an hour.
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60, 600, 3600},
		}, []string{"route"}),
	}
	registry.MustRegister(c.requests, c.duration)
	return c
}

func (c *counts) observe(route string, status int, took time.Duration) {
	if route == "" {
		route = "none"
	}
	c.requests.WithLabelValues(route, strconv.Itoa(status/100)+"xx").Inc()
	c.duration.WithLabelValues(route).Observe(took.Seconds())
}
