package template

import (
	"context"
	"fmt"

	"github.com/cayhq/cay/internal/fault"
)

// Follow calls emit with the lines of a template's newest build, existing ones first and then as
// they are written, and returns the template when the build has ended. Of the build after it
// passes only lines with numbers above seq; of another build, all. An error of emit ends it. If
// the server stops it gives Unavailable, code "stopping".
func (s *Service) Follow(ctx context.Context, orgID, nameOrID, after string, seq int64,
	emit func(build string, lines []LogLine) error) (Template, error) {
	if err := s.mayBuild(); err != nil {
		return Template{}, err
	}
	t, err := s.store.GetTemplate(ctx, orgID, nameOrID)
	if err != nil {
		return Template{}, err
	}
	for {
		changed := s.watch(t.ID)
		if t, err = s.store.GetTemplate(ctx, orgID, t.ID); err != nil {
			return Template{}, err
		}
		if t.BuildID != after {
			after, seq = t.BuildID, 0
		}
		for full := true; full; {
			lines, err := s.store.TemplateLog(ctx, t.ID, seq, logPage)
			if err != nil {
				return Template{}, fmt.Errorf("reading the log of template %s: %w", t.Name, err)
			}
			if full = len(lines) == logPage; len(lines) == 0 {
				break
			}
			if err := emit(after, lines); err != nil {
				return Template{}, err
			}
			seq = lines[len(lines)-1].Seq
		}
		if !t.Queued() {
			return t, nil
		}
		if err := s.mayBuild(); err != nil {
			return Template{}, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Template{}, context.Cause(ctx)
		case <-s.hangup:
			return Template{}, fault.New(fault.Unavailable, fault.CodeStopping,
				"the server stops; follow the build again when the server is back")
		}
	}
}

// Hangup ends every Follow that waits, also later ones, since followers of a build must not delay
// the server's stop.
func (s *Service) Hangup() { s.once.Do(func() { close(s.hangup) }) }

// watch returns a channel that is closed at the next change of a template or its log.
func (s *Service) watch(id string) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watched[id] == nil {
		s.watched[id] = make(chan struct{})
	}
	return s.watched[id]
}

// changed notifies the followers of a template.
func (s *Service) changed(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.watched[id]; c != nil {
		close(c)
		delete(s.watched, id)
	}
}
