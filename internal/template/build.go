package template

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// run is one run of the builder, for one template or for several with the same inputs. The
// Service's mu guards its fields, except those that never change.
type run struct {
	id, org, key string
	members      []*member
	cancel       context.CancelCauseFunc // nil until it runs
	joining      sync.WaitGroup          // templates that join the run, until they have begun
	needs        string                  // ID of a template that its FROM names and that is not ready
	needsName    string
}

// member is one template of a run.
type member struct {
	order
	journal *journal // nil until it has begun
	last    string   // image of the last version if that image is gone; for built-in templates
}

// member returns the member for a template, and for its build unless that is "".
func (r *run) member(template, build string) *member {
	for _, m := range r.members {
		if m.template == template && (build == "" || m.build == build) {
			return m
		}
	}
	return nil
}

var errCancelled = errors.New("the build was cancelled")

// perform carries out a run.
func (s *Service) perform(ctx context.Context, r *run) {
	defer s.leave(r)
	if r.org != "" {
		if b, found := s.inputsOf(ctx, r); found {
			_ = s.build(ctx, r, b) // the error is in the row and the log
		}
		return
	}
	s.mu.Lock()
	members := r.members
	s.mu.Unlock()
	if len(members) == 0 {
		return // cancelled meanwhile
	}
	first := members[0].order
	err := s.ensure(ctx, members[0], r, *s.definition(first.name))
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, waits := s.parked[first.template]; err == nil || ctx.Err() != nil || waits {
		s.retry.over(first.template)
		return
	}
	delay := s.retry.failed(first, 0)
	s.log.Error("template build failed", "template", first.name, "retry_in", delay, "error", err)
}

// inputsOf returns the inputs of a run's builds, which all of them share. A build that was replaced
// or deleted since it was queued has none any more: it leaves the run, and the inputs are those of
// another one. Without any the run is over.
func (s *Service) inputsOf(ctx context.Context, r *run) (Build, bool) {
	for {
		s.mu.Lock()
		members := r.members
		s.mu.Unlock()
		if len(members) == 0 {
			return Build{}, false
		}
		m := members[0]
		b, err := s.store.GetBuild(ctx, m.template, m.build)
		if err == nil {
			return b, true
		}
		if !fault.Is(err, fault.NotFound) {
			s.later(m, fmt.Errorf("reading a build: %w", err))
		}
		s.drop(r, m, nil)
	}
}

// later queues a build again that could not be begun or recorded.
func (s *Service) later(m *member, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delay := s.retry.failed(m.order, 0)
	s.log.Error("cannot begin or record a template build", "template", m.name, "org", m.org, "retry_in", delay,
		"error", cause)
	s.stir()
}

// leave ends a run, and lets builds continue that waited for its templates.
func (s *Service) leave(r *run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked(r)
	if s.running[r.org]--; s.running[r.org] == 0 {
		delete(s.running, r.org)
	}
	for _, m := range r.members {
		s.unparkLocked(m.template)
	}
}

// closeLocked closes a run, so that no template can join it any more.
//
// +checklocks:s.mu
func (s *Service) closeLocked(r *run) {
	if s.runs[r.key] == r {
		delete(s.runs, r.key)
	}
}

// ensure makes a built-in template ready if it is not, or if its image is gone.
func (s *Service) ensure(ctx context.Context, m *member, r *run, d Definition) error {
	t, err := s.store.GetTemplate(ctx, "", d.Name)
	if err != nil {
		return fmt.Errorf("reading template %s: %w", d.Name, err)
	}
	refresh := false
	if t.Image != "" {
		err := s.builder.Check(ctx, t.Image)
		switch {
		case errors.Is(err, ErrImageGone):
			s.log.Warn("image of template is gone: building it again", "template", t.Name, "image", t.Image, "error", err)
			m.last = t.Image
		case err != nil:
			return fmt.Errorf("checking image of template %s: %w", t.Name, err)
		case t.Status == Ready && t.Inputs == d.inputs(""):
			return nil
		default:
			refresh = t.Queued() && t.Inputs == d.inputs("") // a rebuild was requested
		}
	}
	m.build = newID("bld_")
	_, err = s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
		tries := t.Tries
		t.begin(m.build)
		t.Tries = tries
		if m.last != "" {
			t.Image = "" // no sandbox can be created from it until then
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("writing template %s: %w", t.Name, err)
	}
	return s.build(ctx, r, Build{Definition: d, Refresh: refresh})
}

// build runs the builder and records the result for each template of the run.
func (s *Service) build(ctx context.Context, r *run, b Build) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.mu.Lock()
	r.cancel = cancel
	members := r.members
	s.mu.Unlock()
	for _, m := range members {
		s.begin(ctx, r, m)
	}
	if s.left(r) == 0 {
		return nil
	}
	start := time.Now()
	built, err := s.builds(ctx, r, b)
	took := time.Since(start).Round(time.Second / 10)

	s.mu.Lock()
	s.closeLocked(r)
	s.mu.Unlock()
	r.joining.Wait()
	s.mu.Lock()
	members = r.members
	needs, needsName := r.needs, r.needsName
	s.mu.Unlock()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	s.count(ctx, err, needs, took)
	var errs []error
	for _, m := range members {
		if m.journal == nil {
			continue
		}
		var settled error
		switch {
		case err == nil:
			settled = s.succeeded(ctx, m, b, built, took)
		case needs != "" && ctx.Err() == nil:
			settled = s.park(ctx, m, needs, needsName)
		default:
			settled = s.failed(ctx, m, err)
		}
		if settled != nil && !errors.Is(settled, errSettled) && !fault.Is(settled, fault.NotFound) {
			errs = append(errs, settled)
			if ctx.Err() == nil && m.org != "" {
				s.later(m, fmt.Errorf("writing down how it ended: %w", settled))
			}
		}
		s.changed(m.template)
	}
	return errors.Join(append(errs, err)...)
}

// count records in the metrics how a run ended.
func (s *Service) count(ctx context.Context, err error, needs string, took time.Duration) {
	switch {
	case err == nil:
		s.cfg.Observe("ready", took)
	case errors.Is(err, errCancelled):
		s.cfg.Observe("cancelled", took)
	case ctx.Err() == nil && needs == "":
		s.cfg.Observe("failed", took)
	}
}

// left returns the number of templates that still need a run.
func (s *Service) left(r *run) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(r.members)
}

// begin claims a template's build for a run and opens its journal. A build that is no longer
// needed leaves the run.
func (s *Service) begin(ctx context.Context, r *run, m *member) {
	var t Template
	before, err := s.readLog(ctx, m.template) // of an earlier try
	if err == nil {
		t, err = s.store.UpdateTemplate(ctx, m.template, nil, func(t *Template) error {
			if t.BuildID != m.build || !t.Queued() {
				return errSettled
			}
			t.Status, t.Progress, t.UpdatedAt = Building, "starting", now()
			t.Tries++
			return nil
		})
	}
	if err != nil {
		if !errors.Is(err, errSettled) && !fault.Is(err, fault.NotFound) && ctx.Err() == nil {
			s.later(m, fmt.Errorf("beginning it: %w", err))
		}
		s.drop(r, m, nil)
		return
	}
	log := s.log.With("template", t.Name, "org", t.OrgID)
	log.Info("building template")
	// The last lines are written even if the server stops.
	j := newJournal(context.WithoutCancel(ctx), before, func(ctx context.Context, c LogChange, progress string) error {
		return s.write(ctx, m, c, progress)
	}, func(err error) { log.Warn("cannot record the output of a build", "error", err) })
	j.say(Progress{Text: "building template " + t.Name})
	s.changed(t.ID)
	s.mu.Lock()
	m.journal = j
	gone := r.member(m.template, m.build) == nil // cancelled or deleted meanwhile
	s.mu.Unlock()
	if gone {
		j.close()
	}
}

// write writes a batch of a journal and notifies its followers. It writes nothing of a build that
// is no longer the newest.
func (s *Service) write(ctx context.Context, m *member, c LogChange, progress string) error {
	_, err := s.store.UpdateTemplate(ctx, m.template, nil, func(t *Template) error {
		if t.BuildID != m.build {
			return errSettled
		}
		if t.Status == Building {
			t.Progress, t.UpdatedAt = progress, now()
		}
		return nil
	})
	if err == nil {
		err = s.store.ChangeTemplateLog(ctx, m.template, c)
	}
	if errors.Is(err, errSettled) || fault.Is(err, fault.NotFound) {
		return nil
	}
	s.changed(m.template)
	return err
}

// drop removes a template from its run. If cause is not nil, it ends a run that no template needs
// any more.
func (s *Service) drop(r *run, m *member, cause error) {
	s.mu.Lock()
	var rest []*member
	for _, other := range r.members {
		if other != m {
			rest = append(rest, other)
		}
	}
	r.members = rest
	if len(rest) == 0 {
		s.closeLocked(r)
		if r.cancel != nil && cause != nil {
			r.cancel(cause)
		}
	}
	j := m.journal
	s.mu.Unlock()
	if j != nil {
		j.close()
	}
}

// builds calls the builder.
func (s *Service) builds(ctx context.Context, r *run, b Build) (Built, error) {
	j := Job{ID: r.id, OrgID: r.org, Definition: b.Definition, Refresh: b.Refresh, MaxDisk: s.cfg.MaxDisk,
		Base: func(ctx context.Context, name string) (Base, bool, error) { return s.base(ctx, r, name) }}
	if b.Context != "" {
		path, release, err := s.contexts.Path(ctx, b.Context)
		if errors.Is(err, fs.ErrNotExist) {
			s.log.Error("the context of a build is gone", "context", b.Context, "error", err)
			return Built{}, &BuildError{ExitCode: -1, Message: "its context is gone: rebuild it with a context"}
		}
		if err != nil {
			s.log.Error("the context of a build cannot be read", "context", b.Context, "error", err)
			return Built{}, &BuildError{ExitCode: -1, Message: "its context cannot be read now: try again later"}
		}
		defer release()
		j.Context = path
	}
	s.mu.Lock()
	for _, m := range r.members {
		if secret, has := s.secrets[m.build]; has {
			j.Credentials = &secret
		}
	}
	s.mu.Unlock()
	timed, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var why atomic.Pointer[BuildError]
	why.Store(&BuildError{ExitCode: -1, Message: fmt.Sprintf("it was not done within %s", s.cfg.Timeout)})
	end := time.AfterFunc(s.cfg.Timeout, func() { cancel(why.Load()) })
	defer end.Stop()
	j.Made = sync.OnceFunc(func() {
		if end.Stop() { // else it is too late
			why.Store(&BuildError{ExitCode: -1,
				Message: fmt.Sprintf("its steps were done, but its image was not written within %s", s.cfg.Timeout)})
			end.Reset(s.cfg.Timeout)
		}
	})
	built, err := s.builder.Build(timed, j, func(p Progress) { s.tell(r, p) })
	if err != nil && ctx.Err() == nil && timed.Err() != nil {
		late := why.Load()
		if as := new(*BuildError); errors.As(err, as) {
			late.Step, late.Tail = (*as).Step, (*as).Tail
		}
		return Built{}, late
	}
	if err == nil {
		err = checkReady(b.Definition, built)
	}
	return built, err
}

// checkReady refuses a readiness check without a start command.
func checkReady(d Definition, b Built) error {
	if d.Ready != nil && d.StartCommand == nil && len(b.Entrypoint)+len(b.Cmd) == 0 {
		return &BuildError{ExitCode: -1,
			Message: "it has a readiness check, and neither a start_command nor an ENTRYPOINT or CMD"}
	}
	return nil
}

// checkUser refuses a user that the image does not have, since no sandbox could run as that user.
func (s *Service) checkUser(ctx context.Context, d Definition, b Built) error {
	var t Template
	d.describe(&t, b)
	if _, err := strconv.ParseUint(t.User, 10, 32); err == nil || t.User == "" || t.User == "root" {
		return nil
	}
	known, err := s.builder.HasUser(ctx, b.Image, t.User)
	if err != nil {
		return fmt.Errorf("looking for user %q in the image: %w", t.User, err)
	}
	if !known {
		return &BuildError{ExitCode: -1, Message: fmt.Sprintf("there is no user %q in the image's /etc/passwd", t.User)}
	}
	return nil
}

// tell passes progress to every template of a run.
func (s *Service) tell(r *run, p Progress) {
	s.mu.Lock()
	var journals []*journal
	for _, m := range r.members {
		if m.journal != nil {
			journals = append(journals, m.journal)
		}
	}
	s.mu.Unlock()
	for _, j := range journals {
		j.say(p)
	}
}

// settle changes the row of a build if it is still its template's newest.
func (s *Service) settle(ctx context.Context, m *member, change func(*Template)) (Template, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	return s.store.UpdateTemplate(ctx, m.template, nil, func(t *Template) error {
		if t.BuildID != m.build {
			return errSettled
		}
		change(t)
		return nil
	})
}

// succeeded records a successful build.
func (s *Service) succeeded(ctx context.Context, m *member, b Build, built Built, took time.Duration) error {
	if m.org != "" { // templates of a run may differ in their settings
		var err error
		if b, err = s.store.GetBuild(ctx, m.template, m.build); err != nil {
			m.journal.close()
			return err
		}
	}
	err := checkReady(b.Definition, built)
	if err == nil {
		err = s.checkUser(ctx, b.Definition, built)
	}
	if err == nil && len(b.Definition.Tags) > 0 { // other builds may have taken the room since it was announced
		err = s.roomForTags(ctx, Template{ID: m.template, Name: m.name}, b.Definition.Tags)
	}
	if err == nil {
		built.Image, err = s.unchanged(ctx, m, built.Image)
	}
	var tags []Tag
	if err == nil {
		if tags, err = s.store.Tags(ctx, m.template); err != nil {
			err = fmt.Errorf("reading the tags of template %s: %w", m.name, err)
		}
	}
	if err != nil {
		return s.failed(ctx, m, err)
	}
	m.journal.say(Progress{Text: fmt.Sprintf("the image is ready after %v, from %s", took, built.Source)})
	m.journal.close()
	t, err := s.settle(ctx, m, func(t *Template) {
		before := *t
		before.Image = cmp.Or(m.last, t.Image)
		next := before
		b.Definition.describe(&next, built)
		next.Image, next.ImageSize, next.Source, next.Inputs, next.BuiltAt = built.Image, built.Size, built.Source,
			b.Definition.inputs(b.Context), now()
		next.ReadyBuild, next.Repairs = m.build, b.Repairs
		if before.Version == 0 || !sameVersion(before, next) {
			next.Version = nextVersion(before, tags)
		}
		next.tag(b.Definition.Tags)
		if b.Definition.TagsOnly && before.Version > 0 {
			t.Tagging = next.Tagging // of a version that the row does not have
		} else {
			*t = next
		}
		t.end(Ready, nil)
	})
	s.forget(m)
	if err == nil {
		s.log.Info("template is ready", "template", t.Name, "org", t.OrgID, "version", t.Version, "source", t.Source,
			"took", took)
	}
	return err
}

// unchanged returns the image of the version before where the new one is the same but for the times of files, and the
// new one otherwise: a build that gave nothing else is no version.
func (s *Service) unchanged(ctx context.Context, m *member, image string) (string, error) {
	t, err := s.store.GetTemplate(ctx, m.org, m.template)
	if err != nil || t.Image == "" || m.last != "" {
		return image, nil // the template is gone, or the image is: there is nothing to compare with
	}
	same, err := s.builder.Same(ctx, t.Image, image)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		s.log.Warn("cannot compare a built image with the one before: it counts as another", "template", t.Name, "error", err)
	}
	if same {
		return t.Image, nil
	}
	return image, nil
}

// sameVersion reports whether sandboxes of both would start alike.
func sameVersion(a, b Template) bool {
	return a.Image == b.Image && a.User == b.User && a.Workdir == b.Workdir && maps.Equal(a.Env, b.Env) &&
		digest(a.Start) == digest(b.Start)
}

// failed records a failed build. A build that the server's stop interrupted is pending again. The
// last ready version stays.
func (s *Service) failed(ctx context.Context, m *member, cause error) error {
	if ctx.Err() != nil {
		m.journal.close()
		_, err := s.settle(ctx, m, func(t *Template) { t.Status, t.Progress, t.Tries = Pending, "", max(t.Tries-1, 0) })
		return err
	}
	why := new(*BuildError)
	if !errors.As(cause, why) {
		*why = &BuildError{ExitCode: -1, Message: cause.Error()}
	}
	result := **why
	for line := range strings.Lines(result.Error()) {
		m.journal.say(Progress{Text: strings.TrimRight(line, "\n")})
	}
	if tail := m.journal.close(); result.Step != "" && len(result.Tail) == 0 {
		result.Tail = tail[:max(len(tail)-1, 0)] // without the message itself
	}
	s.log.Warn("template build failed", "template", m.name, "org", m.org, "error", result.Short())
	_, err := s.settle(ctx, m, func(t *Template) { t.end(Failed, &result) })
	s.forget(m)
	return err
}

// forget removes the credentials of a finished build.
func (s *Service) forget(m *member) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.secrets, m.build)
	if m.org != "" {
		s.retry.over(m.template)
	}
}

// describe copies a definition's settings for sandboxes into the row, except the egress policy,
// which a rebuild does not change.
func (d Definition) describe(t *Template, b Built) {
	t.Description, t.Size.Name, t.DiskMB = d.Description, d.Size, d.DiskMB
	t.User, _, _ = strings.Cut(b.User, ":") // the group is not used
	t.Workdir = b.Workdir
	if d.User != "" {
		t.User = d.User
	}
	if d.Workdir != "" {
		t.Workdir = d.Workdir
	}
	t.Env = map[string]string{}
	maps.Copy(t.Env, b.Env)
	maps.Copy(t.Env, d.Env)
	t.Start = sandbox.Start{Ready: d.Ready}
	if d.StartCommand != nil {
		t.Start.Command = *d.StartCommand
	} else if args := append(append([]string{}, b.Entrypoint...), b.Cmd...); len(args) > 0 {
		t.Start.Args = args
	}
}
