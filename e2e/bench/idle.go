package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of idle sandboxes.
const (
	memoryPrivate = "memory of a sandbox at rest: its own"
	memorySentry  = "  of it: sentry (runsc-sandbox)"
	memoryGofer   = "  of it: gofer (runsc-gofer)"
	memoryStubs   = "  of it: stubs (what runs inside)"
	memoryMemfd   = "  of it: the memory file (agent, files in memory)"
	memoryPSS     = "  proportional (PSS), all processes"
	memoryGroup   = "  charged to its control group, kernel's included"
	rateGet       = "get one, 1 client"
	rateGetMany   = "get one, 8 clients"
	rateList      = "list all, 1 client"
	rateListMany  = "list all, 8 clients"
)

const (
	// settle is the wait after a sandbox's first command, in which the agent gives back memory that it
	// does not use.
	settle = 5 * time.Second
	// rateTime is the duration over which each rate is measured.
	rateTime = 2 * time.Second
)

// measureIdle creates sandboxes that do nothing, and measures their memory and the rate at which
// the API answers about them.
func measureIdle(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	ids := make([]string, o.idle)
	for i := range ids {
		var err error
		if ids[i], err = s.createIdle(ctx); err != nil {
			return err
		}
	}
	if err := pause(ctx, settle); err != nil {
		return err
	}
	if err := addMemory(ids, r); err != nil {
		return err
	}
	if err := s.rates(ctx, ids, r); err != nil {
		return err
	}
	for _, id := range ids {
		if err := s.api.DestroySandbox(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// createIdle makes a sandbox that has run a command, and nothing since.
func (s *server) createIdle(ctx context.Context) (string, error) {
	id, err := s.create(ctx)
	if err == nil {
		_, err = s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}})
	}
	return id, err
}

// addMemory adds the memory of sandboxes at rest.
func addMemory(ids []string, r *results) error {
	for _, id := range ids {
		use, err := memoryOf(id)
		if err != nil {
			return fmt.Errorf("taking the memory of %s: %w", id, err)
		}
		own := use.own["memfd"]
		for _, role := range roles {
			own += use.own[role]
		}
		r.add(memoryPrivate, unitMB, own/1e6)
		r.add(memorySentry, unitMB, use.own["sentry"]/1e6)
		r.add(memoryGofer, unitMB, use.own["gofer"]/1e6)
		r.add(memoryStubs, unitMB, use.own["stub"]/1e6)
		r.add(memoryMemfd, unitMB, use.own["memfd"]/1e6)
		r.add(memoryPSS, unitMB, use.pss/1e6)
		r.add(memoryGroup, unitMB, use.charged/1e6)
	}
	return nil
}

func (s *server) rates(ctx context.Context, ids []string, r *results) error {
	get := func(i int) error {
		_, err := s.api.GetSandbox(ctx, ids[i%len(ids)])
		return err
	}
	list := func(int) error {
		_, err := s.api.ListSandboxes(ctx, cay.ListSandboxesOptions{})
		return err
	}
	for _, c := range []struct {
		name    string
		clients int
		call    func(int) error
	}{
		{rateGet, 1, get}, {rateGetMany, 8, get}, {rateList, 1, list}, {rateListMany, 8, list},
	} {
		rate, err := rateOf(c.clients, c.call)
		if err != nil {
			return fmt.Errorf("measuring %s: %w", c.name, err)
		}
		r.add(c.name, unitRate, rate)
	}
	return nil
}

// rateOf returns how many calls per second a number of concurrent clients complete.
func rateOf(clients int, call func(int) error) (float64, error) {
	counts, errs := make([]int, clients), make([]error, clients)
	began := time.Now()
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for time.Since(began) < rateTime && errs[c] == nil {
				errs[c] = call(counts[c])
				counts[c]++
			}
		})
	}
	wg.Wait()
	took, total := time.Since(began), 0
	for _, n := range counts {
		total += n
	}
	return float64(total) / took.Seconds(), errors.Join(errs...)
}
