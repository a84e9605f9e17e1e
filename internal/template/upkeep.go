package template

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// lookAfter queues the built-in templates to be checked, except those that were never requested.
func (s *Service) lookAfter(ctx context.Context) {
	for _, d := range s.cfg.Builtins {
		t, err := s.store.GetTemplate(ctx, "", d.Name)
		if err != nil {
			s.log.Error("cannot look after template", "template", d.Name, "error", err)
			continue
		}
		if t.Version > 0 || t.Queued() {
			s.enqueue(ctx, builtinOrder(t))
		}
	}
}

// KeepUp removes images and contexts that nothing needs, and looks after images that could not be used, while another
// server builds and until ctx ends. It needs [Config.Shared].
func (s *Service) KeepUp(ctx context.Context) {
	look, tick := time.NewTicker(suspectsEvery), time.NewTicker(collectEvery)
	defer look.Stop()
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			if s.follows.Load() {
				s.checkOwn(ctx)
			}
		case <-tick.C:
			if s.follows.Load() {
				s.collect(ctx)
			}
		}
	}
}

// checkOwn checks the suspect images of this machine, which drops a damaged one: the next create fetches it again.
func (s *Service) checkOwn(ctx context.Context) {
	s.mu.Lock()
	suspects := slices.Collect(maps.Keys(s.suspect))
	clear(s.suspect)
	s.mu.Unlock()
	for _, image := range suspects {
		if err := s.builder.Check(ctx, image); err != nil && ctx.Err() == nil {
			s.log.Warn("an image of this machine cannot be used", "image", image, "error", err)
		}
	}
}

// checkSuspects begins to check the suspect images in goroutines of wg. Neither the builds nor another check wait for
// one, since it may fetch the image from a slow bucket.
func (s *Service) checkSuspects(ctx context.Context, wg *sync.WaitGroup) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for image := range s.suspect {
		if s.checking[image] {
			continue // it is checked again when that check has ended
		}
		delete(s.suspect, image)
		s.checking[image] = true
		wg.Go(func() {
			gone, err := s.checkImage(ctx, image)
			if err != nil && ctx.Err() == nil {
				s.log.Error("cannot look after an image", "image", image, "error", err)
			}
			s.mu.Lock()
			delete(s.checking, image)
			if gone {
				delete(s.suspect, image) // another check could queue the same builds when these are over
			}
			s.mu.Unlock()
			s.stir()
		})
	}
}

// checkImage queues builds of the templates of an image that is gone. It reports whether it queued all of them.
func (s *Service) checkImage(ctx context.Context, image string) (gone bool, err error) {
	if err := s.builder.Check(ctx, image); !errors.Is(err, ErrImageGone) {
		return false, err
	}
	if err := s.store.MarkTags(ctx, image, true); err != nil {
		return false, fmt.Errorf("marking tags: %w", err)
	}
	templates, err := s.store.TemplatesWithImage(ctx, image)
	if err != nil {
		return false, fmt.Errorf("listing templates: %w", err)
	}
	var errs []error
	for _, t := range templates {
		switch {
		case !t.Builtin():
			errs = append(errs, s.rebuildGone(ctx, t, image))
		case s.definition(t.Name) != nil:
			s.enqueue(ctx, builtinOrder(t)) // its build checks the image itself
		}
	}
	err = errors.Join(errs...)
	return err == nil, err
}

// rebuildGone queues a build of a template whose image is gone. Until it is ready, creates from
// the template find no image. If the inputs that are kept gave another version, the template has failed.
func (s *Service) rebuildGone(ctx context.Context, t Template, image string) error {
	s.log.Warn("image of template is gone: building it again", "template", t.Name, "org", t.OrgID, "image", image)
	b, err := s.store.GetBuild(ctx, t.ID, t.BuildID)
	if fault.Is(err, fault.NotFound) {
		return nil // the template was deleted, or another build of it requested
	}
	if err != nil {
		return fmt.Errorf("reading the build of template %s: %w", t.ID, err)
	}
	switch {
	case b.Definition.inputs(b.Context) == t.Inputs:
		b.Repairs = image
	case b.Repairs != image: // the image was made of other inputs, which a later, failed build replaced
		b.Repairs = ""
	}
	id, newest := newID("bld_"), t.BuildID
	next, change := &b, func(t *Template) { t.begin(id) }
	// A default that a tag was promoted to has no inputs.
	if kept := b.Definition.inputs(b.Context); t.Inputs != kept && (b.Definition.TagsOnly || t.Inputs == "") {
		other := "another version"
		if len(b.Definition.Tags) > 0 {
			other += ", with the tags " + strings.Join(b.Definition.Tags, ", ")
		}
		why := &BuildError{ExitCode: -1, Message: "its image is gone, and the newest build, whose inputs are kept, gave " +
			other + ": build it again"}
		next, change = nil, func(t *Template) { t.end(Failed, why) }
	}
	b.Refresh, b.Private, b.Definition.Tags, b.Definition.TagsOnly = false, false, nil, false
	t, err = s.store.UpdateTemplate(ctx, t.ID, next, func(t *Template) error {
		if t.Image != image || t.Queued() || t.BuildID != newest {
			return errSettled
		}
		change(t)
		return nil
	})
	if errors.Is(err, errSettled) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("writing template %s: %w", t.ID, err)
	}
	s.changed(t.ID)
	if next == nil {
		return nil
	}
	s.enqueue(ctx, order{template: t.ID, org: t.OrgID, name: t.Name, build: id, key: s.key(t.OrgID, id, b)})
	return nil
}

// Collect removes the images and the contexts that nothing needs.
func (s *Service) Collect(ctx context.Context) (removed []string, freed int64, err error) {
	templates, err := s.store.TemplateImages(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("listing images of templates: %w", err)
	}
	sandboxes, err := s.users.Images(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("listing images of sandboxes: %w", err)
	}
	contexts, err := s.store.TemplateContexts(ctx, "")
	if err != nil {
		return nil, 0, fmt.Errorf("listing contexts: %w", err)
	}
	s.drafts.expire(time.Now().Add(-draftKept))
	removed, freed, err = s.builder.Collect(ctx, templates, sandboxes)
	gone, bytes, contextErr := s.contexts.Collect(contexts, s.uploads.expire(time.Now().Add(-uploadKept)))
	s.budget.gone(gone)
	return append(removed, gone...), freed + bytes, errors.Join(err, contextErr)
}

func (s *Service) collect(ctx context.Context) {
	removed, freed, err := s.Collect(ctx)
	if err != nil && ctx.Err() == nil {
		s.log.Error("cannot remove unused images and contexts", "error", err)
	}
	if len(removed) > 0 {
		s.log.Info("removed unused images and contexts", "names", removed, "freed_bytes", freed)
	}
}
