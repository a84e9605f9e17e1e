package template

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Register writes the rows of new built-in templates, takes up builds that the last server did
// not finish, and queues built-in templates to be checked. Call it before the first request or, with
// [Config.Shared], each time that this server is to build.
func (s *Service) Register(ctx context.Context) error {
	s.startOver()
	for _, d := range s.cfg.Builtins {
		t, err := s.store.GetTemplate(ctx, "", d.Name)
		asked := slices.Contains(s.cfg.Prepare, d.Name)
		switch {
		case fault.Is(err, fault.NotFound):
			t = Template{ID: newID(idPrefix), Name: d.Name, Status: Pending, CreatedAt: now()}
			t.UpdatedAt, t.Egress.Mode = t.CreatedAt, sandbox.AllowAll
			d.describe(&t, Built{})
			if !asked {
				t.Progress = lazy
			}
			if err := s.store.InsertTemplate(ctx, t, nil, 0); err != nil {
				return fmt.Errorf("writing template %s: %w", t.Name, err)
			}
		case err != nil:
			return fmt.Errorf("reading template %s: %w", d.Name, err)
		default:
			asked = asked || t.Queued() || t.Version > 0 || t.Status == Failed
			if t, err = s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
				if t.Status == Building || t.Status == Pending {
					t.Status, t.Progress = Pending, ""
				}
				if !asked {
					t.Progress = lazy
				}
				return nil
			}); err != nil {
				return fmt.Errorf("writing template %s: %w", t.Name, err)
			}
		}
		switch {
		case t.Tries >= maxTries:
			if err := s.tooOften(ctx, t, retryMost); err != nil {
				return err
			}
		case asked:
			s.enqueue(ctx, builtinOrder(t))
		}
	}
	if err := s.resume(ctx); err != nil {
		return err
	}
	s.follows.Store(false)
	return nil
}

// startOver drops what the Service knew of builds when it built before.
func (s *Service) startOver() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue.orders = nil
	s.retry = retries{due: map[string]retry{}, delay: map[string]time.Duration{}}
	clear(s.runs)
	clear(s.running)
	clear(s.parked)
	clear(s.secrets)
}

// strayTime is the time for which a queued build is unknown to the server that builds before it is taken up: it may be
// about to be known, or its end about to be written.
const strayTime = 2 * writeTimeout

// takeAsked queues the built-in templates that other servers have asked for, and takes up builds that a server has
// queued which does not build any more. strays says since when these are unknown, by build.
func (s *Service) takeAsked(ctx context.Context, strays map[string]time.Time) {
	queued, err := s.store.QueuedTemplates(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.log.Error("cannot look for builds that other servers ask for", "error", err)
		}
		return
	}
	unknown := map[string]bool{}
	for _, t := range queued {
		switch {
		case t.Builtin() && s.definition(t.Name) != nil:
			s.enqueue(ctx, builtinOrder(t))
		case t.Builtin() || s.knows(t):
		case strays[t.BuildID].IsZero():
			unknown[t.BuildID], strays[t.BuildID] = true, time.Now()
		case time.Since(strays[t.BuildID]) < strayTime:
			unknown[t.BuildID] = true
		default:
			if err := s.takeUp(ctx, t); err != nil && ctx.Err() == nil {
				s.log.Error("cannot take up a build", "template", t.Name, "org", t.OrgID, "error", err)
			}
		}
	}
	maps.DeleteFunc(strays, func(build string, _ time.Time) bool { return !unknown[build] })
}

// knows reports whether the newest build of a template waits or runs here.
func (s *Service) knows(t Template) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.runs {
		if r.member(t.ID, t.BuildID) != nil {
			return true
		}
	}
	for _, p := range s.parked {
		if p.template == t.ID {
			return true
		}
	}
	_, waits := s.retry.due[t.ID]
	return waits || slices.ContainsFunc(s.queue.orders,
		func(o order) bool { return o.template == t.ID && o.build == t.BuildID })
}

// lazy is the progress text of a built-in template that has not been requested yet.
const lazy = "is built when it is first asked for"

// resume takes up the builds of organizations' templates that the last server left.
func (s *Service) resume(ctx context.Context) error {
	queued, err := s.store.QueuedTemplates(ctx)
	if err != nil {
		return fmt.Errorf("listing builds: %w", err)
	}
	for _, t := range queued {
		if t.Builtin() {
			continue
		}
		if err := s.takeUp(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// takeUp takes up a build that is queued in the rows and not here.
func (s *Service) takeUp(ctx context.Context, t Template) error {
	b, err := s.store.GetBuild(ctx, t.ID, t.BuildID)
	if err != nil {
		return fmt.Errorf("reading the build of template %s: %w", t.ID, err)
	}
	switch {
	case t.Tries >= maxTries:
		err = s.tooOften(ctx, t, 0)
	case b.Private:
		err = s.giveUp(ctx, t,
			"the server was restarted, and it keeps registry credentials in memory alone: rebuild the template with them")
	default:
		_, err = s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
			t.Status, t.Progress = Pending, ""
			return nil
		})
		s.enqueue(ctx, order{template: t.ID, org: t.OrgID, name: t.Name, build: t.BuildID,
			key: s.key(t.OrgID, t.BuildID, b)})
	}
	if err != nil {
		return fmt.Errorf("taking up the build of template %s: %w", t.ID, err)
	}
	return nil
}

// tooOften ends a build that several servers have started and none has finished. That of a
// built-in template is tried again after a long wait.
func (s *Service) tooOften(ctx context.Context, t Template, wait time.Duration) error {
	if wait > 0 {
		s.mu.Lock()
		s.retry.failed(builtinOrder(t), wait)
		s.mu.Unlock()
	}
	return s.giveUp(ctx, t, fmt.Sprintf("the server ended during each of %d tries", t.Tries))
}

func (s *Service) giveUp(ctx context.Context, t Template, why string) error {
	s.log.Error("template build given up", "template", t.Name, "org", t.OrgID, "error", why)
	_, err := s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
		t.end(Failed, &BuildError{ExitCode: -1, Message: why})
		return nil
	})
	s.changed(t.ID)
	return err
}
