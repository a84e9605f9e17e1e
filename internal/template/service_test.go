package template

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// memory is a Store in memory. The contract suite of package store tests the real ones; these
// tests are about the service.
type memory struct {
	mu sync.Mutex
	// +checklocks:mu
	rows map[string]Template
	// +checklocks:mu
	builds map[string]Build
	// +checklocks:mu
	logs map[string][]LogLine
	// +checklocks:mu
	fail error // error of the next calls
	// +checklocks:mu
	inUse map[string]bool // templates with sandboxes
	// +checklocks:mu
	tags map[string]map[string]Tag
	// +checklocks:mu
	between map[string]func() // run once, before the next call of the method of that name
}

// meanwhile makes something happen just before the next call of a method.
func (m *memory) meanwhile(method string, f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.between = map[string]func(){method: f}
}

// enter runs what happens before a call of a method.
func (m *memory) enter(method string) {
	m.mu.Lock()
	f := m.between[method]
	delete(m.between, method)
	m.mu.Unlock()
	if f != nil {
		f()
	}
}

func newMemory() *memory {
	return &memory{rows: map[string]Template{}, builds: map[string]Build{}, logs: map[string][]LogLine{},
		inUse: map[string]bool{}, tags: map[string]map[string]Tag{}}
}

var errNoTemplate = fault.New(fault.NotFound, "template_not_found", "there is no such template")

func (m *memory) InsertTemplate(_ context.Context, t Template, b *Build, limit int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	n := 0
	for _, other := range m.rows {
		if other.OrgID == t.OrgID {
			n++
			if other.Name == t.Name {
				return fault.New(fault.Conflict, "template_exists", "taken")
			}
		}
	}
	if limit > 0 && n >= limit {
		return fault.New(fault.Exhausted, "quota_exceeded", "full")
	}
	m.rows[t.ID] = t
	if b != nil {
		m.builds[t.ID] = *b
	}
	return nil
}

func (m *memory) UpdateTemplate(_ context.Context, id string, b *Build,
	change func(*Template) error) (Template, error) {
	m.enter("UpdateTemplate")
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return Template{}, m.fail
	}
	t, ok := m.rows[id]
	if !ok {
		return Template{}, errNoTemplate
	}
	build := t.BuildID
	if err := change(&t); err != nil {
		return Template{}, err
	}
	if t.BuildID != build {
		m.logs[id] = nil
	}
	for name, tag := range m.tags[id] {
		if t.Repairs != "" && tag.Version.Image == t.Repairs {
			repaired := t.NewestTag(name)
			repaired.CreatedAt = tag.CreatedAt
			m.tags[id][name] = repaired
		}
	}
	for _, tag := range t.Tagging {
		m.putTagLocked(id, tag)
	}
	t.Tagging, t.Repairs = nil, ""
	m.rows[id] = t
	if b != nil {
		m.builds[id] = *b
	}
	return t, nil
}

func (m *memory) Tags(_ context.Context, id string) ([]Tag, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.tags[id]), func(a, b Tag) int { return strings.Compare(a.Name, b.Name) }), nil
}

// putTagLocked sets a tag.
//
// +checklocks:m.mu
func (m *memory) putTagLocked(id string, tag Tag) {
	if m.tags[id] == nil {
		m.tags[id] = map[string]Tag{}
	}
	m.tags[id][tag.Name] = tag
}

func (m *memory) CopyTag(_ context.Context, id, from string, names []string, at time.Time) (string, error) {
	m.enter("CopyTag")
	m.mu.Lock()
	defer m.mu.Unlock()
	tag, ok := m.tags[id][from]
	if !ok {
		return "", NoTag(m.rows[id].Name, from)
	}
	for _, name := range names {
		if name == DefaultTag {
			t := m.rows[id]
			t.Promote(tag, at)
			m.rows[id] = t
			continue
		}
		tag.Name, tag.CreatedAt = name, at
		m.putTagLocked(id, tag)
	}
	return tag.BuildID, nil
}

func (m *memory) MarkTags(_ context.Context, image string, gone bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, tags := range m.tags {
		for name, tag := range tags {
			if tag.Version.Image == image {
				tag.Gone = gone
				m.tags[id][name] = tag
			}
		}
	}
	return nil
}

func (m *memory) DeleteTags(_ context.Context, id string, names []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range names {
		delete(m.tags[id], name)
	}
	return nil
}

func (m *memory) GetTemplate(_ context.Context, orgID, nameOrID string) (Template, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, org := range []string{orgID, ""} {
		for _, t := range m.rows {
			if t.OrgID == org && (t.ID == nameOrID || t.Name == nameOrID) {
				return t, nil
			}
		}
	}
	return Template{}, errNoTemplate
}

func (m *memory) GetBuild(_ context.Context, id, buildID string) (Build, error) {
	m.enter("GetBuild")
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.builds[id]
	if !ok || buildID != "" && m.rows[id].BuildID != buildID {
		return Build{}, errNoTemplate
	}
	return b, nil
}

func (m *memory) DeleteTemplate(_ context.Context, id string, force bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.rows[id]; !ok {
		return errNoTemplate
	}
	if m.inUse[id] && !force {
		return fault.New(fault.Conflict, "template_in_use", "in use")
	}
	delete(m.rows, id)
	delete(m.builds, id)
	delete(m.logs, id)
	return nil
}

func (m *memory) ListTemplates(context.Context, string, int, string) ([]Template, string, error) {
	panic("the service hands lists through")
}

// choose returns the rows that are wanted, the oldest requested build first.
func (m *memory) choose(wanted func(Template) bool) []Template {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []Template
	for _, t := range m.rows {
		if wanted(t) {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b Template) int {
		if c := a.QueuedAt.Compare(b.QueuedAt); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out
}

func (m *memory) QueuedTemplates(context.Context) ([]Template, error) {
	return m.choose(Template.Queued), nil
}

func (m *memory) TemplatesWithImage(_ context.Context, image string) ([]Template, error) {
	return m.choose(func(t Template) bool { return t.Image == image }), nil
}

func (m *memory) TemplateImages(context.Context) ([]string, error) {
	var out []string
	for _, t := range m.choose(func(t Template) bool { return t.Image != "" }) {
		out = append(out, t.Image)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, tags := range m.tags {
		for _, tag := range tags {
			out = append(out, tag.Version.Image)
		}
	}
	return out, nil
}

func (m *memory) TemplateContexts(_ context.Context, orgID string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for id, b := range m.builds {
		if b.Context != "" && (orgID == "" || m.rows[id].OrgID == orgID) {
			out = append(out, b.Context)
		}
	}
	return out, nil
}

func (m *memory) ChangeTemplateLog(_ context.Context, id string, c LogChange) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.rows[id]; !ok {
		return errNoTemplate
	}
	for _, d := range c.Drop {
		m.logs[id] = slices.DeleteFunc(m.logs[id],
			func(l LogLine) bool { return l.Step == d.Step && l.Seq >= d.From && l.Seq <= d.To })
	}
	for _, l := range c.Add {
		bySeq := func(l LogLine, n int64) int { return int(l.Seq - n) }
		if _, there := slices.BinarySearchFunc(m.logs[id], l.Seq, bySeq); there {
			return fmt.Errorf("line %d is there already", l.Seq)
		}
	}
	m.logs[id] = append(m.logs[id], c.Add...)
	slices.SortFunc(m.logs[id], func(a, b LogLine) int { return int(a.Seq - b.Seq) })
	return nil
}

func (m *memory) TemplateLog(_ context.Context, id string, after int64, limit int) ([]LogLine, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []LogLine
	for _, l := range m.logs[id] {
		if l.Seq > after && len(out) < limit {
			out = append(out, l)
		}
	}
	return out, nil
}

func (m *memory) TemplateLogRest(_ context.Context, id string, skip, limit int) ([]LogLine, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rest := m.logs[id][min(skip, len(m.logs[id])):]
	return slices.Clone(rest[:min(limit, len(rest))]), nil
}

// set changes a row, as a crash or an older cay might have left it.
func (m *memory) set(t *testing.T, name string, change func(*Template)) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, row := range m.rows {
		if row.Name == name {
			change(&row)
			m.rows[id] = row
			return
		}
	}
	t.Fatalf("there is no row of %s", name)
}

// shelf is Contexts in memory.
type shelf struct {
	mu sync.Mutex
	// +checklocks:mu
	files map[string]string
	// +checklocks:mu
	kept [][]string
	// +checklocks:mu
	away error // of every Path
}

func newShelf() *shelf { return &shelf{files: map[string]string{}} }

func (s *shelf) Put(_ context.Context, r io.Reader, limit int64) (string, int64, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return "", 0, err
	}
	if int64(len(b)) > limit {
		return "", 0, fault.New(fault.TooLarge, "blob_too_large", "too large")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	name := digest(string(b))
	s.files[name] = string(b)
	return name, int64(len(b)), nil
}

func (s *shelf) Path(_ context.Context, name string) (string, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.files[name]; !ok {
		return "", nil, fs.ErrNotExist
	}
	if s.away != nil {
		return "", nil, s.away
	}
	return "/shelf/" + name, func() {}, nil
}

func (s *shelf) Open(_ context.Context, name string) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	text, ok := s.files[name]
	if !ok {
		return nil, errors.New("no such file")
	}
	return io.NopCloser(strings.NewReader(text)), nil
}

func (s *shelf) Size(name string) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.files[name]; !ok {
		return 0, errors.New("no such file")
	}
	return int64(len(s.files[name])), nil
}

func (s *shelf) Collect(keep, keepHere []string) ([]string, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keep = slices.Concat(keep, keepHere)
	s.kept = append(s.kept, keep)
	var removed []string
	for name := range s.files {
		if !slices.Contains(keep, name) {
			delete(s.files, name)
			removed = append(removed, name)
		}
	}
	return removed, 0, nil
}

// builder is a Builder that the test controls.
type builder struct {
	mu sync.Mutex
	// +checklocks:mu
	built []string // names, in order
	// +checklocks:mu
	jobs []Job // in order
	// +checklocks:mu
	fail map[string]error // by name
	// +checklocks:mu
	gone map[string]bool // by image
	// +checklocks:mu
	from     map[string]string // the base of a template, by name
	checkErr error
	// +checklocks:mu
	fetching map[string]chan struct{} // by image: Check waits until it is closed
	// +checklocks:mu
	collected [][]string
	// +checklocks:mu
	keptHere []string
	// +checklocks:mu
	block   chan struct{} // if not nil, Build waits for it after its first line
	made    func(d Definition) string
	takes   []time.Duration // what the steps take, and what writing the image does; set before the first build
	running atomic.Int32
	most    atomic.Int32 // most builds at once
}

func newBuilder() *builder {
	return &builder{fail: map[string]error{}, gone: map[string]bool{}, from: map[string]string{},
		made: func(d Definition) string { return "image of " + d.Name + " " + d.Image + d.Dockerfile }}
}

func (b *builder) Build(ctx context.Context, j Job, progress func(Progress)) (Built, error) {
	b.most.Store(max(b.most.Load(), b.running.Add(1)))
	defer b.running.Add(-1)
	d := j.Definition
	b.mu.Lock()
	b.built, b.jobs = append(b.built, d.Name), append(b.jobs, j)
	err, block, from := b.fail[d.Name], b.block, b.from[d.Name]
	b.mu.Unlock()
	progress(Progress{Text: "working on " + d.Name})
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return Built{}, context.Cause(ctx)
		}
	}
	for _, long := range b.takes {
		select {
		case <-time.After(long):
			j.Made()
		case <-ctx.Done():
			return Built{}, context.Cause(ctx)
		}
	}
	if from != "" {
		if _, ok, err := j.Base(ctx, from); err != nil {
			return Built{}, fmt.Errorf("resolving: %s", err) // the chain of errors may be lost on the way
		} else if !ok {
			return Built{}, fmt.Errorf("there is no %s", from)
		}
	}
	if err != nil {
		return Built{}, err
	}
	progress(Progress{Text: "done with " + d.Name})
	image := b.made(d)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.gone, image)
	return Built{Image: image, Size: 7, Source: "from " + d.Image, Env: map[string]string{"A": "image", "B": "image"},
		User: "app", Workdir: "/srv", Cmd: []string{"serve"}}, nil
}

// Same takes images for the same that differ in what stands behind an "@" alone.
func (b *builder) Same(_ context.Context, one, other string) (bool, error) {
	one, _, _ = strings.Cut(one, "@")
	other, _, _ = strings.Cut(other, "@")
	return one == other, nil
}

func (b *builder) HasUser(_ context.Context, image, name string) (bool, error) {
	return name != "nobody-has-it", nil
}

func (b *builder) Check(ctx context.Context, image string) error {
	b.mu.Lock()
	fetched := b.fetching[image]
	b.mu.Unlock()
	if fetched != nil {
		select {
		case <-fetched:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.gone[image] {
		return fmt.Errorf("test: %w", ErrImageGone)
	}
	return b.checkErr
}

func (b *builder) Collect(_ context.Context, keep, keepHere []string) ([]string, int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.Sort(keep)
	b.collected, b.keptHere = append(b.collected, keep), keepHere
	return nil, 0, nil
}

// kept returns the arguments of each Collect.
func (b *builder) kept() [][]string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.collected)
}

func (b *builder) take() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.built
	b.built = nil
	return out
}

// hold makes builds wait until the returned function is called.
func (b *builder) hold() (release func()) {
	block := make(chan struct{})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.block = block
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.block = nil
		close(block)
	}
}

// fails makes the builds of a name fail; nil lets them succeed.
func (b *builder) fails(name string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail[name] = err
}

// sandboxes are the images that sandboxes need.
type sandboxes []string

func (s sandboxes) Images(context.Context) ([]string, error) { return s, nil }

func definition(name string) Definition {
	return Definition{Name: name, Description: "about " + name, StartCommand: new(""), Image: name + ":1",
		Env: map[string]string{"A": "definition"}, DiskMB: 100}
}

// harness is a service with its parts, for one run of the server.
type harness struct {
	*Service
	store   *memory
	builder *builder
	shelf   *shelf
	stop    func() // stops the service
}

// start starts a service. Call it inside a synctest bubble.
func start(t *testing.T, store *memory, b *builder, ds ...Definition) *harness {
	t.Helper()
	cfg := Config{Builtins: ds}
	for _, d := range ds {
		cfg.Prepare = append(cfg.Prepare, d.Name)
	}
	return startWith(t, cfg, store, b, newShelf())
}

func startWith(t *testing.T, cfg Config, store *memory, b *builder, contexts *shelf) *harness {
	t.Helper()
	cfg.Sizes, cfg.MaxDiskMB = []string{"small"}, 1000
	s := New(cfg, store, b, contexts, sandboxes{"of a sandbox"}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err := s.Register(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run ended with %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return &harness{s, store, b, contexts, stop}
}

func (h *harness) get(t *testing.T, name string) Template {
	t.Helper()
	tpl, err := h.Get(t.Context(), "org", name)
	if err != nil {
		t.Fatal(err)
	}
	return tpl
}

func (h *harness) wantBuilt(t *testing.T, names ...string) {
	t.Helper()
	synctest.Wait()
	if got := h.builder.take(); !slices.Equal(got, names) {
		t.Errorf("built %v, want %v", got, names)
	}
}

func (h *harness) wantStatus(t *testing.T, name string, status Status, version int) Template {
	t.Helper()
	synctest.Wait()
	tpl := h.get(t, name)
	if tpl.Status != status || tpl.Version != version {
		t.Errorf("%s is %s, version %d; want %s, version %d", name, tpl.Status, tpl.Version, status, version)
	}
	return tpl
}

func TestBuiltinsAreBuilt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newMemory(), newBuilder(), definition("base"), definition("python"))
		h.wantBuilt(t, "base", "python")
		got := h.wantStatus(t, "python", Ready, 1)
		want := Template{ID: got.ID, Name: "python", Description: "about python", Status: Ready, Version: 1,
			ImageSize: 7, Source: "from python:1", Inputs: definition("python").inputs(""),
			Shape: sandbox.Shape{Image: "image of python python:1", Env: map[string]string{"A": "definition", "B": "image"},
				User: "app", Workdir: "/srv", DiskMB: 100, Egress: sandbox.Egress{Mode: sandbox.AllowAll}},
			CreatedAt: got.CreatedAt, UpdatedAt: time.Now().UTC(), BuiltAt: time.Now().UTC(), BuildID: got.BuildID, ReadyBuild: got.BuildID}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("template (-want +got):\n%s", diff)
		}
		if !strings.HasPrefix(got.ID, "tpl_") || len(got.ID) != 24 {
			t.Errorf("id is %q", got.ID)
		}
		version, err := h.Ready(t.Context(), "org", got.ID)
		if err != nil || version.Image != got.Image || version.Version != 1 || version.Name != "python" ||
			version.User != "app" {
			t.Errorf("Ready gave %+v, %v", version, err)
		}
		lines, err := h.Log(t.Context(), "org", "python")
		if err != nil || len(lines) != 4 || lines[1].Text != "working on python" || lines[1].At.IsZero() {
			t.Errorf("log is %v, %v", lines, err)
		}
		time.Sleep(30 * time.Minute)
		h.wantBuilt(t)
	})
}

func TestReadyWhileBuilding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBuilder()
		b.block = make(chan struct{})
		h := start(t, newMemory(), b, definition("base"), definition("node"), definition("python"))
		time.Sleep(2 * flushEvery)
		synctest.Wait()
		if _, err := h.Ready(t.Context(), "org", "none"); !fault.Is(err, fault.NotFound) ||
			fault.As(err).Code != "template_not_found" {
			t.Errorf("error is %v", err)
		}
		_, err := h.Ready(t.Context(), "org", "base")
		if e := fault.As(err); e == nil || e.Kind != fault.Conflict || e.Code != "template_not_ready" ||
			e.Detail != `template "base" is building: working on base` {
			t.Errorf("error is %v", err)
		}
		_, err = h.Ready(t.Context(), "org", "python") // and so it is preferred
		if e := fault.As(err); e == nil || e.Code != "template_not_ready" || e.Detail != `template "python" is pending` {
			t.Errorf("error is %v", err)
		}
		if got := h.get(t, "base"); got.Progress != "working on base" || got.Status != Building {
			t.Errorf("base is %+v", got)
		}
		close(b.block)
		h.wantBuilt(t, "base", "python", "node")
		if got := h.wantStatus(t, "base", Ready, 1); got.Progress != "" {
			t.Errorf("progress is still %q", got.Progress)
		}
	})
}

func TestRestartBuildsNothingAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		h := start(t, store, b, definition("base"))
		h.wantBuilt(t, "base")
		before := h.get(t, "base")
		h.stop()
		h = start(t, store, b, definition("base"))
		h.wantBuilt(t)
		if diff := cmp.Diff(before, h.get(t, "base")); diff != "" {
			t.Errorf("the restart changed (-before +after):\n%s", diff)
		}
	})
}

func TestChangedDefinitionMakesANewVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		h := start(t, store, b, definition("base"))
		h.wantBuilt(t, "base")
		h.stop()
		store.set(t, "base", func(row *Template) { row.Egress = sandbox.Egress{Mode: sandbox.DenyAll} })

		d := definition("base")
		d.Image = "base:2"
		b.block = make(chan struct{})
		h = start(t, store, b, d)
		old := h.wantStatus(t, "base", Building, 1)
		if v, err := h.Ready(t.Context(), "org", "base"); err != nil || v.Version != 1 || v.Image != old.Image {
			t.Errorf("while version 2 is built Ready gives %+v, %v", v, err)
		}
		close(b.block)
		got := h.wantStatus(t, "base", Ready, 2)
		if got.ID != old.ID || got.Image != "image of base base:2" || got.Egress.Mode != sandbox.DenyAll ||
			!got.CreatedAt.Equal(old.CreatedAt) {
			t.Errorf("version 2 is %+v", got)
		}

		// Another definition with the same image is no new version.
		h.stop()
		d.Description = "in other words"
		h = start(t, store, b, d)
		if got := h.wantStatus(t, "base", Ready, 2); got.Description != "in other words" {
			t.Errorf("description is %q", got.Description)
		}
	})
}

func TestFailedBuildIsTriedAgainLaterAndLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		b.fail["base"] = errors.New("installing: mmdebstrap ended with exit code 25\nE: no network")
		h := start(t, store, b, definition("base"), definition("python"))
		h.wantBuilt(t, "base", "python") // one failure does not delay the other
		got := h.wantStatus(t, "base", Failed, 0)
		if got.BuildError == nil || !strings.Contains(got.BuildError.Message, "exit code 25\nE: no network") ||
			got.Progress != "" {
			t.Errorf("failed template is %+v", got)
		}
		if _, err := h.Ready(t.Context(), "org", "base"); fault.As(err) == nil ||
			!strings.Contains(fault.As(err).Detail, `is failed: installing`) {
			t.Errorf("error is %v", err)
		}
		lines, err := h.Log(t.Context(), "org", "base")
		if err != nil || lines[len(lines)-1].Text != "E: no network" {
			t.Errorf("log is %v, %v", lines, err)
		}
		wait := retryFirst
		for range 10 {
			time.Sleep(wait - time.Second)
			h.lookAfter(t.Context()) // does not shorten the wait
			h.wantBuilt(t)
			time.Sleep(time.Second)
			h.wantBuilt(t, "base")
			wait = min(2*wait, retryMost)
		}
		b.mu.Lock()
		delete(b.fail, "base")
		b.mu.Unlock()
		time.Sleep(wait)
		h.wantBuilt(t, "base")
		if got := h.wantStatus(t, "base", Ready, 1); got.BuildError != nil {
			t.Errorf("error is still %v", got.BuildError)
		}
	})
}

func TestFailedRebuildKeepsTheLastVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		h := start(t, store, b, definition("base"))
		h.wantBuilt(t, "base")
		h.stop()
		b.fail["base"] = errors.New("no")
		d := definition("base")
		d.Image = "base:2"
		h = start(t, store, b, d)
		h.wantStatus(t, "base", Failed, 1)
		if v, err := h.Ready(t.Context(), "org", "base"); err != nil || v.Image != "image of base base:1" {
			t.Errorf("Ready gives %+v, %v", v, err)
		}
	})
}

func TestImageThatIsGoneIsBuiltAgain(t *testing.T) {
	tests := []struct {
		name string
		when func(t *testing.T, h *harness) *harness // makes the service check
	}{
		{"found by a restart", func(t *testing.T, h *harness) *harness {
			h.stop()
			return start(t, h.store, h.builder, definition("base"))
		}},
		{"found by somebody", func(t *testing.T, h *harness) *harness { h.Recheck(h.get(t, "base").Image); return h }},
		{"found in time", func(_ *testing.T, h *harness) *harness { time.Sleep(collectEvery); return h }},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := start(t, newMemory(), newBuilder(), definition("base"))
				h.wantBuilt(t, "base")
				image := h.get(t, "base").Image
				h.builder.mu.Lock()
				h.builder.gone[image] = true
				h.builder.block = make(chan struct{})
				h.builder.mu.Unlock()
				h = tc.when(t, h)
				h.wantBuilt(t, "base")
				if _, err := h.Ready(t.Context(), "org", "base"); !fault.Is(err, fault.Conflict) {
					t.Errorf("without an image Ready gives %v", err)
				}
				close(h.builder.block)
				if got := h.wantStatus(t, "base", Ready, 1); got.Image != image {
					t.Errorf("image is %q, want %q again", got.Image, image)
				}
			})
		})
	}
}

func TestImageThatCannotBeCheckedIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		h := start(t, store, b, definition("base"))
		h.wantBuilt(t, "base")
		h.stop()
		b.checkErr = errors.New("input/output error")
		h = start(t, store, b, definition("base"))
		h.wantBuilt(t)
		h.wantStatus(t, "base", Ready, 1)
	})
}

func TestInterruptedBuildStartsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		b.block = make(chan struct{})
		h := start(t, store, b, definition("base"))
		h.wantStatus(t, "base", Building, 0)
		h.stop()
		row := h.get(t, "base")
		if row.Status != Pending || row.Progress != "" || row.BuildError != nil {
			t.Errorf("after a stop the row is %+v", row)
		}
		// A crash leaves it building.
		store.set(t, "base", func(row *Template) { row.Status, row.Progress = Building, "half way" })
		close(b.block)
		h = start(t, store, b, definition("base"))
		h.wantBuilt(t, "base", "base")
		h.wantStatus(t, "base", Ready, 1)
	})
}

func TestRegisterSaysPendingBeforeAnythingIsBuilt(t *testing.T) {
	store := newMemory()
	s := New(Config{Builtins: []Definition{definition("base")}}, store, newBuilder(), newShelf(), sandboxes{},
		slog.New(slog.DiscardHandler))
	if err := s.Register(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := s.Get(t.Context(), "org", "base")
	if err != nil || got.Status != Pending || got.Description != "about base" || !got.Builtin() {
		t.Errorf("row is %+v, %v", got, err)
	}
	full := errors.New("disk full")
	store.mu.Lock()
	store.fail = full
	store.mu.Unlock()
	other := New(Config{Builtins: []Definition{definition("python")}}, store, newBuilder(), newShelf(), sandboxes{},
		slog.New(slog.DiscardHandler))
	if err := other.Register(t.Context()); !errors.Is(err, full) {
		t.Errorf("error is %v", err)
	}
}

func TestImagesOfTemplatesAndSandboxesAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, newMemory(), newBuilder(), definition("base"), definition("python"))
		h.wantBuilt(t, "base", "python")
		want := []string{"image of base base:1", "image of python python:1"}
		if diff := cmp.Diff([][]string{want}, h.builder.kept()); diff != "" {
			t.Errorf("kept at the first collection (-want +got):\n%s", diff)
		}
		h.builder.mu.Lock()
		if diff := cmp.Diff([]string{"of a sandbox"}, h.builder.keptHere); diff != "" {
			t.Errorf("kept on this machine (-want +got):\n%s", diff)
		}
		h.builder.mu.Unlock()
		time.Sleep(2 * collectEvery)
		synctest.Wait()
		if n := len(h.builder.kept()); n != 3 {
			t.Errorf("collected %d times in two hours and at the start, want 3", n)
		}
	})
}
