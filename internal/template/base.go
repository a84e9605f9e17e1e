package template

import (
	"context"
	"fmt"
	"maps"

	"github.com/cayhq/cay/internal/fault"
)

// base returns the template that a FROM names.
func (s *Service) base(ctx context.Context, r *run, name string) (Base, bool, error) {
	if !namePattern.MatchString(name) {
		return Base{}, false, nil
	}
	t, err := s.store.GetTemplate(ctx, r.org, name)
	if fault.Is(err, fault.NotFound) {
		return Base{}, false, nil
	}
	if err != nil {
		return Base{}, false, fmt.Errorf("finding template %s: %w", name, err)
	}
	if !t.usable() {
		if t, err = s.prepare(ctx, t); err != nil {
			return Base{}, false, err
		}
		if t.Queued() {
			s.mu.Lock()
			r.needs, r.needsName = t.ID, t.Name
			s.mu.Unlock()
		}
		return Base{}, false, &BuildError{Step: "FROM " + name, ExitCode: -1, Message: fault.As(notReady(t)).Detail}
	}
	out := Base{Image: t.Image, Env: maps.Clone(t.Env), User: t.User, Workdir: t.Workdir, Cmd: t.Start.Args}
	if t.Start.Command != "" {
		out.Cmd = []string{"/bin/sh", "-c", t.Start.Command}
	}
	return out, true, nil
}

// park makes a build wait until a template that it is made from is ready.
func (s *Service) park(ctx context.Context, m *member, on, name string) error {
	if s.waitsFor(on, m.template) {
		return s.failed(ctx, m, &BuildError{Step: "FROM " + name, ExitCode: -1,
			Message: "the template is itself made from this one, and neither is ready"})
	}
	m.journal.say(Progress{Text: "waiting for template " + name})
	m.journal.close()
	_, err := s.settle(ctx, m, func(t *Template) {
		t.Status, t.Progress, t.Tries = Pending, "waiting for template "+name, max(t.Tries-1, 0)
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.parked[m.template] = parking{m.order, on}
	s.mu.Unlock()
	// The template may have become ready, or been deleted, meanwhile.
	t, err := s.store.GetTemplate(ctx, m.org, on)
	if err != nil && !fault.Is(err, fault.NotFound) {
		return err
	}
	if err != nil || !t.Queued() {
		s.mu.Lock()
		s.unparkLocked(on)
		s.mu.Unlock()
	}
	return nil
}

// waitsFor reports whether a template waits for another, directly or through others.
func (s *Service) waitsFor(template, other string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for template != other {
		p, waits := s.parked[template]
		if !waits {
			return false
		}
		template = p.on
	}
	return true
}

// unparkLocked queues the builds that wait for a template.
//
// +checklocks:s.mu
func (s *Service) unparkLocked(on string) {
	for template, p := range s.parked {
		if p.on == on {
			delete(s.parked, template)
			s.queue.add(p.order)
		}
	}
	s.stir()
}
