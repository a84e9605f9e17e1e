package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cayhq/cay/internal/api"
	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/e2b"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// listen serves until ctx ends. Then it refuses new requests, and waits for those in flight until the shutdown timeout.
func (s *server) listen(ctx context.Context) error {
	listener, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return fmt.Errorf("listening for the API: %w", err)
	}
	names := portNames(s.cfg.Proxy, listener.Addr())
	metrics := promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{})
	secret, err := s.setting(ctx, settingPorts, portproxy.NewSecret)
	if err != nil {
		return err
	}
	stopping, hangup := context.WithCancel(context.WithoutCancel(ctx))
	defer hangup()
	var hijacked sync.WaitGroup
	relay := s.relay()
	handler := api.New(api.Config{
		Stopping: stopping, Hijacked: &hijacked,
		Ports: s.ports, Names: names, Signer: portproxy.NewSigner(secret),
		Rows: s.sandboxes, TemplateRows: s.templates, Sandboxes: s.sandboxes, Templates: s.templates,
		Auth: s.auth, Events: s.events, Webhooks: s.webhooks, Nodes: s.nodes, Agent: s.node.Agents(),
		Expect: s.db.Expect, Budget: s.budget, Ready: func() error { return s.db.Ping(ctx) }, Stored: s.stored,
		Metrics: metrics, Registry: s.registry, Log: s.log, Version: s.version, Relay: relay,
	})
	e2bHandler, err := s.openE2B(ctx, names, relay, handler)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	if e2bHandler != nil {
		handler = e2bHandler
	}
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	s.runCore(work, &wg)
	if s.files != nil {
		wg.Go(func() { s.runFiles(work) })
	}
	if e2bHandler != nil {
		wg.Go(func() { s.samples.Run(work) })
	}
	defer wg.Wait()
	defer stopWork()

	servers := []*http.Server{httpserver.Server(s.cfg.Listen, handler, s.log)}
	servers[0].RegisterOnShutdown(s.templates.Hangup)
	servers[0].RegisterOnShutdown(s.ports.Hangup)
	servers[0].RegisterOnShutdown(hangup)
	if e2bHandler != nil {
		servers[0].RegisterOnShutdown(e2bHandler.Hangup)
	}
	failed := make(chan error, 3)
	go func() { failed <- servers[0].Serve(listener) }()
	more, err := s.serveMore(work, &wg, metrics, handler, failed)
	servers = append(servers, more...)
	if err != nil {
		for _, srv := range servers {
			err = errors.Join(err, srv.Close())
		}
		return err
	}
	s.log.InfoContext(ctx, "cay is ready", "url", "http://"+listener.Addr().String(), "data_dir", s.cfg.DataDir,
		"instance", s.instance, "network", s.slots.Range(), "version", s.version)
	select {
	case err := <-failed:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	s.log.Info("shutting down; sandboxes go on running")
	s.endServing(ctx, servers, &hijacked)
	return nil
}

// endServing ends the servers, and waits for calls that have taken over their connection, until the shutdown timeout.
func (s *server) endServing(ctx context.Context, servers []*http.Server, hijacked *sync.WaitGroup) {
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(s.cfg.ShutdownTimeout))
	defer cancel()
	for _, srv := range servers {
		if err := srv.Shutdown(closing); err != nil {
			s.log.Warn("calls were cut off by the shutdown", "error", err)
			_ = srv.Close() // what Shutdown could not wait for
		}
	}
	if s.fleet != nil {
		s.fleet.stop() // so that no call begins that waitFor does not know
	}
	waitFor(closing, hijacked)
}

// serveMore serves the metrics and other machines on addresses of their own, if the settings name these. Calls that
// other servers send go to handler. It returns the servers that it has begun, also with an error. failed gets the
// errors with which their serving ends.
func (s *server) serveMore(ctx context.Context, wg *sync.WaitGroup, metrics, handler http.Handler,
	failed chan<- error) (all []*http.Server, err error) {
	if s.cfg.MetricsListen != "" {
		srv, err := s.serveMetrics(metrics, failed)
		if err != nil {
			return all, err
		}
		all = append(all, srv)
	}
	if s.fleet != nil {
		s.fleet.stop = s.serveFleet(ctx, wg, handler, failed)
	}
	return all, nil
}

// serveMetrics serves the metrics alone. failed gets the error with which that ends.
func (s *server) serveMetrics(metrics http.Handler, failed chan<- error) (*http.Server, error) {
	l, err := net.Listen("tcp", s.cfg.MetricsListen)
	if err != nil {
		return nil, fmt.Errorf("listening for metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	srv := httpserver.Server(s.cfg.MetricsListen, mux, s.log)
	go func() { failed <- srv.Serve(l) }()
	return srv, nil
}

// runCore runs the work of the core rooms in goroutines of wg until ctx ends.
func (s *server) runCore(ctx context.Context, wg *sync.WaitGroup) {
	wg.Go(func() { s.sandboxes.Run(ctx) })
	wg.Go(func() { s.build(ctx) })
	wg.Go(func() { s.lead(ctx) })
}

// leadBuilds is the name of the lead of the server that builds the templates of a fleet.
const leadBuilds = "builds"

// build builds templates until ctx ends. In a fleet it does so while this server leads builds, and looks after the
// server's images otherwise.
func (s *server) build(ctx context.Context) {
	if !inFleet(s.cfg) {
		_ = s.templates.Run(ctx) // returns nil
		return
	}
	var kept sync.WaitGroup
	defer kept.Wait()
	kept.Go(func() { s.templates.KeepUp(ctx) })
	s.db.Lead(ctx, leadBuilds, s.instance, func(ctx context.Context) {
		if err := s.templates.Register(ctx); err != nil {
			s.log.ErrorContext(ctx, "beginning to build templates", "error", err)
			return
		}
		s.log.InfoContext(ctx, "this server builds the templates of the fleet")
		_ = s.templates.Run(ctx)
	}, func(err error) { s.log.Warn("this server does not build templates, and will try again", "error", err) })
}

// lead does the work of which one of the servers with the same records does all, while this server leads and until ctx
// ends.
func (s *server) lead(ctx context.Context) {
	s.db.Lead(ctx, "cluster", s.instance, s.workForCluster, func(err error) {
		s.log.Warn("this server does not deliver webhooks or drop old rows, and will try again", "error", err)
	})
}

// workForCluster delivers webhooks, drops old rows and looks for lost nodes until ctx ends.
func (s *server) workForCluster(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.webhooks.Run(ctx) })
	if inFleet(s.cfg) {
		wg.Go(func() { s.nodes.Watch(ctx) })
	}
	trim, purge := time.NewTicker(event.TrimInterval), time.NewTicker(sandbox.PurgeInterval)
	defer trim.Stop()
	defer purge.Stop()
	for s.events.Trim(ctx); ; {
		select {
		case <-trim.C:
			s.events.Trim(ctx)
		case <-purge.C:
			s.sandboxes.Purge(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// waitFor waits for wg or until ctx ends.
func waitFor(ctx context.Context, wg *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// openE2B returns the handler for E2B's clients, which hands all other requests to next. It returns nil if the
// API for them is turned off.
func (s *server) openE2B(ctx context.Context, names portproxy.Names, relay *httpserver.Relay,
	next http.Handler) (*e2b.Handler, error) {
	if !s.cfg.E2B.Enabled {
		return nil, nil
	}
	secret, err := s.setting(ctx, settingE2B, rand.Text) // at least 128 bits
	if err != nil {
		return nil, err
	}
	return e2b.New(e2b.Config{Rows: s.sandboxes, TemplateRows: s.templates,
		Sandboxes: s.sandboxes, Templates: s.templates, Auth: s.auth, Agent: s.node.Agents(),
		Events: s.events, Webhooks: s.webhooks, Ports: s.ports, Samples: s.samples, Names: names, Secret: []byte(secret), Budget: s.budget, Log: s.log,
		Registry: s.registry, Relay: relay}, next), nil
}

// portNames returns the host names of ports: those of the operator's domain. With the domain "localhost" a server that
// listens on the loopback alone has names below it with its own port. They are not the default, since programs on the
// same machine may trust all pages below localhost.
func portNames(cfg config.Proxy, at net.Addr) portproxy.Names {
	if tcp, ok := at.(*net.TCPAddr); ok && cfg.Domain == "localhost" && tcp.IP.IsLoopback() {
		return portproxy.LocalNames(tcp.Port)
	}
	return portproxy.Names{Domain: cfg.Domain, Scheme: cfg.Scheme}
}
