package template

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// ErrImageGone says that an image is not there any more, or not what it was.
var ErrImageGone = errors.New("the template's image is gone")

// Built is what a build made.
type Built struct {
	Image  string // content hash
	Size   int64  // bytes
	Source string // what it was made from

	// What the image itself says; the definition goes over it.
	Env     map[string]string
	User    string
	Workdir string
}

// Builder makes images.
type Builder interface {
	// Build makes the image of a definition; nothing is done when the same was
	// done before. It calls progress with lines for people, from one goroutine at
	// a time and not after it has returned.
	Build(ctx context.Context, d Definition, progress func(string)) (Built, error)
	// Check reports whether an image can be used: ErrImageGone if it must be
	// built again, another error if nobody can tell.
	Check(ctx context.Context, image string) error
	// Collect removes the images that are not in keep and have not been asked
	// for lately. It goes on after errors and joins them.
	Collect(ctx context.Context, keep []string) (removed []string, freed int64, err error)
}

// Users says which images are in use beside those of the templates; the
// sandboxes' Store does.
type Users interface {
	// Images lists the images that sandboxes which are not over need.
	Images(ctx context.Context) ([]string, error)
}

// Times of the background work.
const (
	// retryFirst to retryMost is how long a failed build waits before it is tried
	// again, doubling each time: a mirror that is down for a minute costs little, one
	// that is down for a day is not hammered.
	retryFirst = 30 * time.Second
	retryMost  = time.Hour
	// collectEvery is how often unused images are removed and those in use looked
	// after. Longer keeps replaced images on the disk longer.
	collectEvery = time.Hour
	// writeTimeout bounds writing down that a build was interrupted while cay
	// stops. Not written, the next start finds out by itself.
	writeTimeout = 5 * time.Second
)

// Config is what the operator decides about templates.
type Config struct {
	Builtins []Definition // in the order they are built in; see [Builtins]
}

// Service is the templates.
type Service struct {
	cfg     Config
	store   Store
	builder Builder
	users   Users
	log     *slog.Logger

	wake chan struct{} // holds one token: the queue or what is due changed

	mu sync.Mutex
	// +checklocks:mu
	queue []string // names to look after, in this order
	// +checklocks:mu
	waiting map[string]time.Time // when a failed one is due again
	// +checklocks:mu
	delay map[string]time.Duration
}

// New makes a service. Call Register before it is used and Run for the
// background work.
func New(cfg Config, store Store, builder Builder, users Users, log *slog.Logger) *Service {
	return &Service{cfg: cfg, store: store, builder: builder, users: users, log: log, wake: make(chan struct{}, 1),
		waiting: map[string]time.Time{}, delay: map[string]time.Duration{}}
}

// Ready implements [sandbox.Templates]. A template that is not ready moves to
// the front of those to be built.
func (s *Service) Ready(ctx context.Context, orgID, nameOrID string) (sandbox.TemplateVersion, error) {
	t, err := s.store.GetTemplate(ctx, orgID, nameOrID)
	if err != nil {
		return sandbox.TemplateVersion{}, err
	}
	if t.Version == 0 || t.Image == "" {
		if t.Builtin() {
			s.Prefer(t.Name)
		}
		return sandbox.TemplateVersion{}, notReady(t)
	}
	return sandbox.TemplateVersion{ID: t.ID, Name: t.Name, Version: t.Version, Image: t.Image, Env: maps.Clone(t.Env),
		User: t.User, Workdir: t.Workdir, Size: t.Size, DiskMB: t.DiskMB, Egress: t.Egress}, nil
}

func notReady(t Template) error {
	detail := fmt.Sprintf("template %q is %s", t.Name, t.Status)
	switch {
	case t.Status == Failed && t.BuildError != "":
		detail += ": " + t.BuildError
	case t.Progress != "":
		detail += ": " + t.Progress
	}
	return fault.New(fault.Conflict, "template_not_ready", "%s", detail)
}

// Get returns a template that the organization may use: NotFound, code
// "template_not_found".
func (s *Service) Get(ctx context.Context, orgID, nameOrID string) (Template, error) {
	return s.store.GetTemplate(ctx, orgID, nameOrID)
}

// List pages the templates the organization may use, newest first.
func (s *Service) List(ctx context.Context, orgID string, limit int, cursor string) ([]Template, string, error) {
	return s.store.ListTemplates(ctx, orgID, limit, cursor)
}

// Log returns the log of a template's newest build, oldest line first.
func (s *Service) Log(ctx context.Context, orgID, nameOrID string) ([]LogLine, error) {
	t, err := s.store.GetTemplate(ctx, orgID, nameOrID)
	if err != nil {
		return nil, err
	}
	return s.store.TemplateLog(ctx, t.ID)
}

// Prefer moves a built-in template that waits for its turn to the front. One
// that waits after a failure keeps waiting.
func (s *Service) Prefer(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.queue, name); i > 0 {
		s.queue = slices.Insert(slices.Delete(s.queue, i, i+1), 0, name)
	}
}

// Recheck looks after every built-in template soon: for whoever found that an
// image cannot be used.
func (s *Service) Recheck() {
	for _, d := range s.cfg.Builtins {
		s.enqueue(d.Name)
	}
}

// enqueue puts a name at the end of the queue, unless it waits already.
func (s *Service) enqueue(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, waits := s.waiting[name]
	if waits || slices.Contains(s.queue, name) {
		return
	}
	s.queue = append(s.queue, name)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Register writes the rows of built-in templates that are new, says of builds
// that a crash interrupted that they are pending, and queues all to be looked
// after. Call it once, before anybody asks for a template.
func (s *Service) Register(ctx context.Context) error {
	for _, d := range s.cfg.Builtins {
		t, err := s.store.GetTemplate(ctx, "", d.Name)
		switch {
		case fault.Is(err, fault.NotFound):
			t = Template{ID: newID(), Name: d.Name, Status: Pending, Egress: sandbox.Egress{Mode: sandbox.AllowAll}, CreatedAt: now()}
			d.describe(&t, Built{})
		case err != nil:
			return fmt.Errorf("reading template %s: %w", d.Name, err)
		case t.Status == Building:
			t.Status, t.Progress = Pending, ""
		default:
			s.enqueue(d.Name)
			continue
		}
		if err := s.put(ctx, &t); err != nil {
			return err
		}
		s.enqueue(d.Name)
	}
	return nil
}

// Run looks after the built-in templates until ctx ends: it builds those that
// need it, one at a time, tries failed ones again, and removes images nobody
// uses. It returns nil.
func (s *Service) Run(ctx context.Context) error {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	collected := false
	for {
		name, due := s.next()
		if name != "" {
			s.lookAfter(ctx, name)
			if ctx.Err() != nil {
				return nil
			}
			continue
		}
		if !collected { // what a former life left, once nothing is to be built
			collected = true
			s.collect(ctx)
		}
		var retry <-chan time.Time
		if !due.IsZero() {
			retry = time.After(time.Until(due))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-retry:
		case <-tick.C:
			s.Recheck()
			s.collect(ctx)
		}
	}
}

// next takes the first of the queue; failed ones that are due join it first. If
// there is none it says when one will be due, or the zero time.
func (s *Service) next() (name string, due time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.cfg.Builtins { // in their order, not the map's
		at, waits := s.waiting[d.Name]
		switch {
		case !waits:
		case !at.After(time.Now()):
			delete(s.waiting, d.Name)
			s.queue = append(s.queue, d.Name)
		case due.IsZero() || at.Before(due):
			due = at
		}
	}
	if len(s.queue) == 0 {
		return "", due
	}
	name, s.queue = s.queue[0], s.queue[1:]
	return name, time.Time{}
}

// lookAfter builds a built-in template if it needs it.
func (s *Service) lookAfter(ctx context.Context, name string) {
	i := slices.IndexFunc(s.cfg.Builtins, func(d Definition) bool { return d.Name == name })
	d := s.cfg.Builtins[i]
	err := s.ensure(ctx, d)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil || ctx.Err() != nil {
		delete(s.delay, name)
		return
	}
	delay := min(max(2*s.delay[name], retryFirst), retryMost)
	s.delay[name] = delay
	s.waiting[name] = time.Now().Add(delay)
	s.log.Error("template build failed", "template", name, "retry_in", delay, "error", err)
}

// ensure makes sure that a definition's template is ready and its image there.
func (s *Service) ensure(ctx context.Context, d Definition) error {
	t, err := s.store.GetTemplate(ctx, "", d.Name)
	if err != nil {
		return fmt.Errorf("reading template %s: %w", d.Name, err)
	}
	last := t.Image
	if t.Image != "" {
		err := s.builder.Check(ctx, t.Image)
		switch {
		case errors.Is(err, ErrImageGone):
			s.log.Warn("image of template is gone: building it again", "template", t.Name, "image", t.Image, "error", err)
			t.Image = "" // nothing can be made from it until then
		case err != nil:
			return fmt.Errorf("checking image of template %s: %w", t.Name, err)
		case t.Status == Ready && t.Inputs == d.inputs():
			return nil
		}
	}
	return s.build(ctx, d, t, last)
}

// build builds a template and writes down how it went. last is the image of its
// newest version, there or not.
func (s *Service) build(ctx context.Context, d Definition, t Template, last string) error {
	t.Status, t.Progress, t.BuildError = Building, "starting", ""
	if err := s.put(ctx, &t); err != nil {
		return err
	}
	if err := s.note(ctx, t.ID, true, "building template "+t.Name); err != nil {
		return err
	}
	s.log.Info("building template", "template", t.Name)
	start := time.Now()
	built, err := s.builder.Build(ctx, d, func(line string) {
		s.log.Info("building template", "template", t.Name, "progress", line)
		t.Progress = line
		// Progress is for people: a build is not given up because a line is lost.
		if err := errors.Join(s.put(ctx, &t), s.note(ctx, t.ID, false, line)); err != nil && ctx.Err() == nil {
			s.log.Warn("cannot write down progress of template", "template", t.Name, "error", err)
		}
	})
	t.Progress = ""
	if err != nil {
		return s.buildFailed(ctx, t, err)
	}
	if built.Image != last || t.Version == 0 {
		t.Version++
	}
	t.Status, t.Image, t.ImageSize, t.Source, t.Inputs, t.BuiltAt = Ready, built.Image, built.Size, built.Source, d.inputs(), now()
	d.describe(&t, built)
	if err := s.put(ctx, &t); err != nil {
		return err
	}
	took := time.Since(start).Round(time.Second / 10)
	s.log.Info("template is ready", "template", t.Name, "version", t.Version, "source", t.Source, "took", took)
	return s.note(ctx, t.ID, false, fmt.Sprintf("version %d is ready after %v, from %s", t.Version, took, t.Source))
}

// buildFailed writes down a build that did not end well. One that was
// interrupted because cay stops is pending again; the last ready version stays.
func (s *Service) buildFailed(ctx context.Context, t Template, cause error) error {
	t.Status, t.BuildError = Failed, cause.Error()
	if ctx.Err() != nil {
		t.Status, t.BuildError = Pending, ""
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	errs := []error{fmt.Errorf("building template %s: %w", t.Name, cause), s.put(ctx, &t)}
	for line := range strings.Lines(cause.Error()) {
		errs = append(errs, s.note(ctx, t.ID, false, strings.TrimRight(line, "\n")))
	}
	return errors.Join(errs...)
}

// Collect removes the images that no template and no sandbox needs.
func (s *Service) Collect(ctx context.Context) (removed []string, freed int64, err error) {
	templates, err := s.store.TemplateImages(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("listing images of templates: %w", err)
	}
	sandboxes, err := s.users.Images(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("listing images of sandboxes: %w", err)
	}
	return s.builder.Collect(ctx, slices.Concat(templates, sandboxes))
}

func (s *Service) collect(ctx context.Context) {
	removed, freed, err := s.Collect(ctx)
	if err != nil && ctx.Err() == nil {
		s.log.Error("cannot remove unused images", "error", err)
	}
	if len(removed) > 0 {
		s.log.Info("removed unused images", "images", removed, "freed_bytes", freed)
	}
}

// describe copies what a definition says about sandboxes into the row. The
// egress policy is not among it: a rebuild does not change that.
func (d Definition) describe(t *Template, b Built) {
	t.Description, t.StartCommand, t.Size, t.DiskMB = d.Description, d.StartCommand, d.Size, d.DiskMB
	t.User, t.Workdir = b.User, b.Workdir
	if d.User != "" {
		t.User = d.User
	}
	if d.Workdir != "" {
		t.Workdir = d.Workdir
	}
	t.Env = map[string]string{}
	maps.Copy(t.Env, b.Env)
	maps.Copy(t.Env, d.Env)
}

func (s *Service) put(ctx context.Context, t *Template) error {
	t.UpdatedAt = now()
	if err := s.store.PutTemplate(ctx, *t); err != nil {
		return fmt.Errorf("writing template %s: %w", t.Name, err)
	}
	return nil
}

// maxLogLine bounds a line of a build log, in bytes.
const maxLogLine = 4000

func (s *Service) note(ctx context.Context, id string, reset bool, line string) error {
	if len(line) > maxLogLine {
		line = strings.ToValidUTF8(line[:maxLogLine], "") + "…"
	}
	if err := s.store.AppendTemplateLog(ctx, id, reset, []LogLine{{At: now(), Text: line}}); err != nil {
		return fmt.Errorf("writing build log: %w", err)
	}
	return nil
}

func now() time.Time { return time.Now().UTC() }

// newID makes a template's ID: 100 random bits.
func newID() string {
	var b [13]byte
	rand.Read(b[:])
	return "tpl_" + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))[:20]
}
