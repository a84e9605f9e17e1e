package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements while many clients create, execute and destroy in a loop.
const (
	loadCycles  = "load, %d clients: create, execute, destroy"
	loadCreate  = "  create"
	loadWarm    = "  of them from the pool"
	loadExecute = "  the first command"
	loadDestroy = "  destroy"
	loadRefused = "  answered 429 or 503"
	loadGet     = "  get one, beside it"
	fullRefused = "create when capacity is gone, answered 503"
)

// backOff is the time that a client waits after a refusal. Retry-After is in whole seconds and
// would measure how well clients sleep.
const backOff = 100 * time.Millisecond

// measureLoad drives a server of its own with default settings, pool included.
func measureLoad(ctx context.Context, o options, s *server, _ *docker, r *results) (err error) {
	loaded, err := startServer(ctx, s.program, s.outside, "CAY_POOL_ENABLED=true")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loaded.close()) }()
	if err := loaded.awaitTemplate(ctx, template); err != nil {
		return err
	}
	watched, err := loaded.create(ctx)
	if err != nil {
		return err
	}
	l := &loop{server: loaded, results: r}
	work, stop := context.WithTimeout(ctx, o.loadTime)
	defer stop()
	began := time.Now()
	var wg sync.WaitGroup
	for range o.clients {
		wg.Go(func() { l.run(work) })
	}
	wg.Go(func() { l.watch(work, watched) })
	wg.Wait()
	if err := errors.Join(l.errs...); err != nil {
		return err
	}
	r.add(fmt.Sprintf(loadCycles, o.clients), "per s", float64(l.cycles)/time.Since(began).Seconds())
	r.add(loadWarm, "per s", float64(l.warm)/time.Since(began).Seconds())
	r.add(loadRefused, "times", float64(l.refused))
	return nil
}

// loop holds the results of all clients.
type loop struct {
	server  *server
	results *results

	mu sync.Mutex
	// +checklocks:mu
	cycles, warm, refused int // guarded by mu, as the results are
	// +checklocks:mu
	errs []error // guarded by mu
}

// run runs one client.
func (l *loop) run(ctx context.Context) {
	for ctx.Err() == nil {
		err := l.once(ctx)
		var problem *cay.Error
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.As(err, &problem) && (problem.Status == http.StatusTooManyRequests ||
			problem.Status == http.StatusServiceUnavailable) && problem.RetryAfter > 0:
			l.mu.Lock()
			l.refused++
			l.mu.Unlock()
			time.Sleep(backOff)
		default:
			l.mu.Lock()
			l.errs = append(l.errs, err)
			l.mu.Unlock()
			return
		}
	}
}

// once runs one cycle. A cycle that the end of the loop interrupts is not counted.
func (l *loop) once(ctx context.Context) error {
	began := time.Now()
	sandbox, err := l.server.api.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: template,
		Timeout: new(sandboxTimeout)},
		cay.CreateOptions{})
	if err != nil {
		return fmt.Errorf("creating: %w", err)
	}
	created := time.Now()
	if _, err := l.server.execute(ctx, sandbox.ID, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
		return err
	}
	executed := time.Now()
	if err := l.server.api.DestroySandbox(ctx, sandbox.ID); err != nil {
		return fmt.Errorf("destroying: %w", err)
	}
	destroyed := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cycles++
	if sandbox.Source != nil && *sandbox.Source == cay.SandboxSourceWarm {
		l.warm++
	}
	l.results.add(loadCreate, unitMS, milliseconds(created.Sub(began)))
	l.results.add(loadExecute, unitMS, milliseconds(executed.Sub(created)))
	l.results.add(loadDestroy, unitMS, milliseconds(destroyed.Sub(executed)))
	return nil
}

// watch reads one sandbox, 20 times a second, until ctx ends.
func (l *loop) watch(ctx context.Context, id string) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		began := time.Now()
		_, err := l.server.api.GetSandbox(ctx, id)
		if ctx.Err() != nil {
			return
		}
		l.mu.Lock()
		if err != nil {
			l.errs = append(l.errs, err)
		}
		l.results.took(loadGet, began)
		l.mu.Unlock()
	}
}
