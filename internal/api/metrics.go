package api

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/trace"
)

// metrics counts requests by route pattern, never by path, because the ids in paths would create a
// series each.
type metrics struct {
	inFlight prometheus.Gauge
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	parts    *prometheus.HistogramVec
}

func newMetrics(registry prometheus.Registerer) *metrics {
	m := &metrics{
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cay_http_requests_in_flight", Help: "Requests being answered now.",
		}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cay_http_requests_total", Help: "Requests answered, by route pattern, method and class of status (4xx).",
		}, []string{"route", "method", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cay_http_request_duration_seconds",
			Help: "Time to answer a request, its body included, by route pattern and method.",
			// From a look-up to a command of five minutes.
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		}, []string{"route", "method"}),
		parts: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "cay_http_request_part_duration_seconds",
			Help:    "Time of each part of requests that succeeded, as their Server-Timing has them, by route pattern.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60, 300},
		}, []string{"route", "part"}),
	}
	registry.MustRegister(m.inFlight, m.requests, m.duration, m.parts)
	return m
}

func (m *metrics) observe(route, method string, status int, took time.Duration) {
	if route == "" {
		route = "none"
	}
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete:
	default:
		method = "other" // callers choose the method, and each would create a series
	}
	m.requests.WithLabelValues(route, method, strconv.Itoa(status/100)+"xx").Inc()
	m.duration.WithLabelValues(route, method).Observe(took.Seconds())
}

func (m *metrics) observeParts(route string, spans []trace.Span) {
	for _, s := range spans {
		m.parts.WithLabelValues(route, s.Name).Observe(s.Took.Seconds())
	}
}
