package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of starts and ends.
const (
	startAnswered       = "create until the first command answered"
	startCreate         = "  of it: create"
	startFirst          = "  of it: the first command (true)"
	startDestroy        = "destroy"
	startGone           = "  until nothing of it is on the machine"
	startLine           = "cay run … true, destroyed again"
	dockerStartAnswered = "docker run -d until docker exec true answered"
	dockerStartCreate   = "  of it: docker run -d"
	dockerStartFirst    = "  of it: docker exec true"
	dockerStartDestroy  = "docker rm --force"
	dockerStartLine     = "docker run --rm … true"
)

// counterparts maps measurements of cay to those of Docker, or of cay, that are taken in turn with them.
var counterparts = map[string]string{
	startAnswered:                           dockerStartAnswered,
	startCreate:                             dockerStartCreate,
	startFirst:                              dockerStartFirst,
	startGone:                               dockerStartDestroy,
	startLine:                               dockerStartLine,
	warmCreate:                              dockerWithWarm,
	commandTrue:                             dockerTrue,
	fmt.Sprintf(wakeAnswered, smallSleeper): dockerWithWake,
	commandShell:                            dockerShell,
	commandPython:                           dockerPython,
	commandLine:                             dockerTrue,
	buildE2B:                                buildCold,
}

// measureStarts creates and destroys, one at a time.
func measureStarts(ctx context.Context, o options, s *server, d *docker, r *results) (err error) {
	p, err := newPlain(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	// The first of each warms the page cache and is not counted.
	for i := range o.starts + 1 {
		into := r
		if i == 0 {
			into = &results{}
		}
		if err := s.startOnce(ctx, into); err != nil {
			return err
		}
		if err := p.once(ctx, into); err != nil {
			return err
		}
		if d != nil {
			if err := d.startOnce(ctx, into); err != nil {
				return err
			}
		}
	}
	for range max(2, o.starts/3) {
		began := time.Now()
		if err := s.line(ctx, "run", "-t", template, "--", "true"); err != nil {
			return err
		}
		r.took(startLine, began)
		if d != nil {
			began = time.Now()
			args := append([]string{"run", "--rm", "--label", d.name}, d.network...)
			if _, err := d.do(ctx, append(args, d.name, "true")...); err != nil {
				return err
			}
			r.took(dockerStartLine, began)
		}
	}
	return nil
}

func (s *server) startOnce(ctx context.Context, r *results) error {
	began := time.Now()
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	created := time.Now()
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
		return err
	}
	r.took(startAnswered, began)
	r.add(startCreate, unitMS, milliseconds(created.Sub(began)))
	r.took(startFirst, created)
	began = time.Now()
	if err := s.api.DestroySandbox(ctx, id); err != nil {
		return err
	}
	r.took(startDestroy, began)
	// The clean-up of this sandbox must not fall into the next measurement.
	if err := awaitGone(ctx, id); err != nil {
		return fmt.Errorf("waiting for a destroy: %w", err)
	}
	r.took(startGone, began)
	return nil
}

func (d *docker) startOnce(ctx context.Context, r *results) error {
	began := time.Now()
	id, err := d.run(ctx)
	if err != nil {
		return err
	}
	created := time.Now()
	if _, err := d.do(ctx, "exec", id, "true"); err != nil {
		return err
	}
	r.took(dockerStartAnswered, began)
	r.add(dockerStartCreate, unitMS, milliseconds(created.Sub(began)))
	r.took(dockerStartFirst, created)
	began = time.Now()
	if _, err := d.do(ctx, "rm", "--force", id); err != nil {
		return err
	}
	r.took(dockerStartDestroy, began)
	return nil
}
