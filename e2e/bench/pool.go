package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of the warm pool, on a server of its own that has one.
const (
	warmAnswered   = "create from the pool until the first command answered"
	warmCreate     = "  of it: the create, warm"
	warmCold       = "a cold create, in turn with the pool"
	dockerWithWarm = "docker run -d, in turn with the pool"
)

// measurePool creates from the full pool, creates cold and starts a container, in turn.
func measurePool(ctx context.Context, o options, s *server, d *docker, r *results) (err error) {
	warm, err := startServer(ctx, s.program, s.outside, "CAY_POOL_ENABLED=true")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, warm.close()) }()
	if err := warm.awaitTemplate(ctx, template); err != nil {
		return err
	}
	// The first create is cold, and makes the pool keep that kind of sandbox.
	for i := range o.starts + 1 {
		into := r
		if i == 0 {
			into = &results{}
		}
		if err := warm.warmOnce(ctx, i > 0, into); err != nil {
			return err
		}
		began := time.Now()
		id, err := s.create(ctx)
		if err != nil {
			return err
		}
		into.took(warmCold, began)
		if err := s.api.DestroySandbox(ctx, id); err != nil {
			return err
		}
		if d != nil {
			began := time.Now()
			id, err := d.run(ctx)
			if err != nil {
				return err
			}
			into.took(dockerWithWarm, began)
			if _, err := d.do(ctx, "rm", "--force", id); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *server) warmOnce(ctx context.Context, full bool, r *results) error {
	want := cay.SandboxSourceCold
	if full {
		want = cay.SandboxSourceWarm
		if err := s.awaitPool(ctx); err != nil {
			return err
		}
	}
	began := time.Now()
	sandbox, err := s.api.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: template, Timeout: new(sandboxTimeout)},
		cay.CreateOptions{})
	if err != nil {
		return fmt.Errorf("creating a sandbox: %w", err)
	}
	created := time.Now()
	if _, err := s.execute(ctx, sandbox.ID, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
		return err
	}
	r.took(warmAnswered, began)
	r.add(warmCreate, unitMS, milliseconds(created.Sub(began)))
	if sandbox.Source == nil || *sandbox.Source != want {
		return fmt.Errorf("a create was not %s: %+v", want, sandbox)
	}
	return s.api.DestroySandbox(ctx, sandbox.ID)
}

// awaitPool waits until the pool is full.
func (s *server) awaitPool(ctx context.Context) error {
	if err := s.poll(ctx, patience, func() (bool, error) {
		pool, err := s.api.Pool(ctx)
		return len(pool) == 1 && pool[0].Ready >= pool[0].Target, err
	}); err != nil {
		return fmt.Errorf("waiting for the pool: %w", err)
	}
	return nil
}
