package template

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/blob"
	"github.com/cayhq/cay/internal/fault"
)

// workshop is a service over real files, since contexts are put together from them.
type workshop struct {
	*Service
	t        *testing.T
	store    *memory
	builder  *builder
	contexts *blob.Store
	dir      string
}

func newWorkshop(t *testing.T, change ...func(*Config)) *workshop {
	t.Helper()
	cfg := Config{Builtins: []Definition{definition("base")}, Sizes: []string{"small"}, MaxDiskMB: 8192}
	for _, c := range change {
		c(&cfg)
	}
	w := &workshop{t: t, store: newMemory(), builder: newBuilder(), dir: t.TempDir()}
	var err error
	if w.contexts, err = blob.Open(w.dir, 0); err != nil {
		t.Fatal(err)
	}
	w.Service = New(cfg, w.store, w.builder, w.contexts, sandboxes{}, slog.New(slog.DiscardHandler))
	if err := w.Register(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.Run(ctx) }) // returns nil
	t.Cleanup(func() { stop(); wg.Wait() })
	return w
}

// entry is one entry of an archive.
type entry struct {
	name, text string
	kind       byte // 0 is a file
	mode       int64
}

// always lets an upload of any time be recorded.
func always(context.Context) error { return nil }

func archive(t *testing.T, zip bool, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	var to io.WriteCloser = nopCloser{&b}
	if zip {
		to = gzip.NewWriter(&b)
	}
	w := tar.NewWriter(to)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: cmp.Or(e.kind, tar.TypeReg), Mode: cmp.Or(e.mode, 0o644), Uid: 4711,
			ModTime: time.Unix(1_700_000_000, 0)}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.text))
		} else {
			h.Linkname = e.text
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, e.text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func (w *workshop) upload(org, name string, data []byte) {
	w.t.Helper()
	if err := w.PutUpload(w.t.Context(), org, name, bytes.NewReader(data), int64(len(data)), always); err != nil {
		w.t.Fatal(err)
	}
}

// begin announces a build and queues it.
func (w *workshop) begin(name, dockerfile string, parts ...Part) (Draft, error) {
	w.t.Helper()
	d, err := w.Announce(w.t.Context(), me, Announcement{Name: name, Size: "small"})
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = w.BuildDraft(w.t.Context(), me, d.TemplateID, d.BuildID, Request{}, dockerfile, parts)
	return d, err
}

// await waits for the end of a build.
func (w *workshop) await(d Draft) BuildState {
	w.t.Helper()
	for range 2000 {
		s, err := w.BuildState(w.t.Context(), me.OrgID, d.TemplateID, d.BuildID)
		if err != nil {
			w.t.Fatal(err)
		}
		if s.Status == Ready || s.Status == Failed {
			return s
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.t.Fatal("the build does not end")
	return BuildState{}
}

// content returns the entries of the context of a template's build.
func (w *workshop) content(name string) []string {
	w.t.Helper()
	t, err := w.Get(w.t.Context(), me.OrgID, name)
	if err != nil {
		w.t.Fatal(err)
	}
	b, err := w.store.GetBuild(w.t.Context(), t.ID, "")
	if err != nil {
		w.t.Fatal(err)
	}
	path, release, err := w.contexts.Path(w.t.Context(), b.Context)
	if err != nil {
		w.t.Fatal(err)
	}
	defer release()
	data, err := os.ReadFile(path)
	if err != nil {
		w.t.Fatal(err)
	}
	var out []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			w.t.Fatal(err)
		}
		text, _ := io.ReadAll(r)
		out = append(out, fmt.Sprintf("%c %s %o %d %s%s", h.Typeflag, h.Name, h.Mode, h.Uid, h.Linkname, text))
	}
}

// TestContextOfUploads checks what a context of uploads holds: what was asked for, under the directory
// of each part, with no owners.
func TestContextOfUploads(t *testing.T) {
	w := newWorkshop(t)
	w.upload(me.OrgID, "dir", archive(t, true, entry{name: "src/app/", kind: tar.TypeDir, mode: 0o700},
		entry{name: "src/app/x", text: "X"},
		entry{name: "src/app/d/", kind: tar.TypeDir, mode: 0o755}, entry{name: "src/app/d/l", kind: tar.TypeSymlink,
			text: "../../../etc"},
		entry{name: "src/app/hard", kind: tar.TypeLink, text: "src/app/x"}))
	w.upload(me.OrgID, "file", archive(t, false, entry{name: "a[1] $b.txt", text: "A", mode: 0o4755}))
	w.upload(me.OrgID, "all", archive(t, true, entry{name: "./", kind: tar.TypeDir, mode: 0o755}, entry{name: "y",
		text: "Y"}))
	w.upload(me.OrgID, "link", archive(t, true, entry{name: "d/link", kind: tar.TypeSymlink, text: "/x"}))
	for _, c := range []struct {
		upload, from string
		want         fs.FileMode
	}{{"dir", "src/app", fs.ModeDir}, {"dir", "src", fs.ModeDir}, {"file", "a[1] $b.txt", 0}, {"file", ".", fs.ModeDir},
		{"all", ".", fs.ModeDir}, {"link", "d/link", fs.ModeSymlink}} {
		if got, err := w.UploadKind(t.Context(), me.OrgID, c.upload, c.from); err != nil || got != c.want {
			t.Errorf("%s of %s is %v, %v; want %v", c.from, c.upload, got, err, c.want)
		}
	}
	d, err := w.begin("app", "FROM base", Part{Upload: "dir", From: "src/app", Dir: "0"},
		Part{Upload: "file", From: "a[1] $b.txt", Dir: "1", As: "a[1] $b.txt"}, Part{Upload: "all", From: ".", Dir: "2"},
		Part{Upload: "link", From: "d/link", Dir: "3", As: "other"}, Part{Upload: "dir", From: "src", Dir: "4"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"0 Dockerfile 644 0 FROM base",
		"5 0/ 755 0 ", "0 0/x 644 0 X", "5 0/d/ 755 0 ", "2 0/d/l 644 0 ../../../etc", "1 0/hard 644 0 0/x",
		"5 1/ 755 0 ", "0 1/a[1] $b.txt 4755 0 A",
		"5 2/ 755 0 ", "0 2/y 644 0 Y",
		"5 3/ 755 0 ", "2 3/other 644 0 /x",
		"5 4/ 755 0 ", "5 4/app/ 700 0 ", "0 4/app/x 644 0 X", "5 4/app/d/ 755 0 ", "2 4/app/d/l 644 0 ../../../etc", "1 4/app/hard 644 0 4/app/x",
	}
	if diff := gocmp.Diff(want, w.content("app")); diff != "" {
		t.Errorf("the context (-want +got):\n%s", diff)
	}
	if s := w.await(d); s.Status != Ready {
		t.Errorf("the build is %+v", s)
	}
	job := w.builder.jobs[len(w.builder.jobs)-1]
	if job.Definition.Dockerfile != "Dockerfile" || job.Definition.Size != "small" || job.Context == "" {
		t.Errorf("the job is %+v", job)
	}
}

// TestHostileUploads checks that what an upload says is refused by the step's name, and leaves no
// template.
func TestHostileUploads(t *testing.T) {
	w := newWorkshop(t)
	part := Part{Upload: "u", From: "src", Dir: "0", Step: "step 7 (COPY)"}
	file := part
	file.As = "src"
	for name, c := range map[string]struct {
		data []byte
		part Part
	}{
		"up":                   {archive(t, true, entry{name: "src/", kind: tar.TypeDir}, entry{name: "src/../../x"}), part},
		"absolute":             {archive(t, true, entry{name: "/etc/passwd"}), part},
		"beside":               {archive(t, true, entry{name: "srcs/x"}), part},
		"a device":             {archive(t, true, entry{name: "src/dev", kind: tar.TypeChar}), part},
		"a pipe":               {archive(t, true, entry{name: "src/fifo", kind: tar.TypeFifo}), part},
		"a hard link up":       {archive(t, true, entry{name: "src/h", kind: tar.TypeLink, text: "../../etc/passwd"}), part},
		"a hard link beside":   {archive(t, true, entry{name: "src/h", kind: tar.TypeLink, text: "other"}), part},
		"more than the file":   {archive(t, true, entry{name: "src", text: "x"}, entry{name: "y"}), file},
		"below the file":       {archive(t, true, entry{name: "src", text: "x"}, entry{name: "src/y"}), file},
		"cut off":              {archive(t, true, entry{name: "src/x", text: strings.Repeat("x", 5000)})[:60], part},
		"no archive in gzip":   {zipped(t, []byte("what is this")), part},
		"no upload":            {nil, Part{Upload: "missing", From: "src", Dir: "0", Step: "step 7 (COPY)"}},
		"another organization": {nil, Part{Upload: "theirs", From: "src", Dir: "0", Step: "step 7 (COPY)"}},
	} {
		w.upload("org_other", "theirs", archive(t, true, entry{name: "src/x"}))
		if c.data != nil {
			w.upload(me.OrgID, "u", c.data)
		}
		_, err := w.begin("bad", "FROM base", c.part)
		if f := fault.As(err); f == nil || f.Kind != fault.Invalid || !strings.HasPrefix(f.Detail, "step 7 (COPY): ") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := w.Get(t.Context(), me.OrgID, "bad"); !fault.Is(err, fault.NotFound) {
			t.Errorf("%s: a template is there: %v", name, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(w.dir, "tmp")); err != nil || len(left) > 0 {
		t.Errorf("left in the directory of contexts: %v, %v", left, err)
	}
	// A bomb ends at the limit of contexts.
	w.Service.cfg.ContextLimit = 1 << 20
	w.upload(me.OrgID, "bomb", archive(t, true, entry{name: "src/x", text: strings.Repeat("\x00", 50<<20)}))
	_, err := w.begin("bomb", "FROM base", Part{Upload: "bomb", From: "src", Dir: "0"})
	wantCode(t, err, "context_too_large")
	// Headers without an entry, and an entry that is left out, cost no more than the limit allows.
	var headers bytes.Buffer
	zip := gzip.NewWriter(&headers)
	long := tar.NewWriter(zip)
	for range 200 {
		err := long.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax",
			PAXRecords: map[string]string{"CAY.x": strings.Repeat("x", 60<<10)}})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(long.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"headers": headers.Bytes(),
		"left out": archive(t, true, entry{name: "src", text: strings.Repeat("\x00", 50<<20)})} {
		w.upload(me.OrgID, name, data)
		_, err := w.begin("skipped", "FROM base", Part{Upload: name, From: "src", Dir: "0"})
		wantCode(t, err, "invalid_files")
	}
	if _, err := w.UploadKind(t.Context(), me.OrgID, "headers", "src"); fault.As(err) != nil &&
		fault.As(err).Kind != fault.Invalid {
		t.Errorf("the kind of headers: %v", err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.UploadKind(over, me.OrgID, "headers", "src"); err == nil {
		t.Error("the kind of an upload was found for a caller that has left")
	}
	for _, data := range [][]byte{nil, []byte("text"), bytes.Repeat([]byte("x"), 4096)} {
		wantCode(t, w.PutUpload(t.Context(), me.OrgID, "u", bytes.NewReader(data), int64(len(data)), always),
			"invalid_context")
	}
}

func zipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestUploadsAreBounded checks that uploads count as the contexts of their organization, that those
// of one build fit beside each other, and that unused ones are forgotten.
func TestUploadsAreBounded(t *testing.T) {
	data := archive(t, false, entry{name: "x", text: "x"})
	size := int64(len(data))
	w := newWorkshop(t, func(c *Config) { c.ContextLimit, c.ContextTotal = 3*size, 3*size })
	// Their sizes are known, so they need no room for what they could have been.
	held := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 3 {
		one := slices.Clone(data)
		one[len(one)-1] = byte(i) // in the padding
		wg.Go(func() {
			r := io.MultiReader(bytes.NewReader(one[:600]), waits{held}, bytes.NewReader(one[600:]))
			if err := w.PutUpload(t.Context(), me.OrgID, fmt.Sprint(i), r, size, always); err != nil {
				t.Errorf("upload %d: %v", i, err)
			}
		})
	}
	for w.reserved(me.OrgID) < 3*size {
		time.Sleep(time.Millisecond)
	}
	wantCode(t, w.PutUpload(t.Context(), me.OrgID, "more", bytes.NewReader(data), size, always), "quota_exceeded")
	if err := w.PutUpload(t.Context(), "org_other", "0", bytes.NewReader(data), size, always); err != nil {
		t.Errorf("another organization: %v", err)
	}
	close(held)
	wg.Wait()
	if !w.HasUpload(me.OrgID, "1") || w.HasUpload("org_third", "1") {
		t.Error("uploads are not their organizations'")
	}
	w.uploads.byOrg[me.OrgID]["0"].used = time.Now().Add(-2 * uploadKept)
	if _, _, err := w.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.HasUpload(me.OrgID, "0") || !w.HasUpload(me.OrgID, "1") || len(w.uploads.byOrg) != 2 {
		t.Errorf("after a collection: %v", w.uploads.byOrg)
	}
	for i := range maxUploads + 10 {
		w.uploads.put("org_many", fmt.Sprint(i), "blob", 1)
	}
	if n := len(w.uploads.byOrg["org_many"]); n != maxUploads || !w.HasUpload("org_many", fmt.Sprint(maxUploads+9)) {
		t.Errorf("%d uploads are remembered", n)
	}
}

func (w *workshop) reserved(org string) int64 {
	w.budget.mu.Lock()
	defer w.budget.mu.Unlock()
	return w.budget.putting[org]
}

// waits is a reader that ends when its channel is closed.
type waits struct{ until chan struct{} }

func (r waits) Read([]byte) (int, error) { <-r.until; return 0, io.EOF }

// TestDrafts checks the life of announced builds.
func TestDrafts(t *testing.T) {
	w := newWorkshop(t)
	ctx := t.Context()
	state := func(org string, d Draft) string {
		t.Helper()
		s, err := w.BuildState(ctx, org, d.TemplateID, d.BuildID)
		if err != nil {
			return fault.As(err).Code
		}
		if s.Error != nil {
			return string(s.Status) + ": " + s.Error.Message
		}
		return string(s.Status)
	}
	announce := func(name string) Draft {
		t.Helper()
		d, err := w.Announce(ctx, me, Announcement{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	one, two := announce("app__1_"), announce("app__1_")
	if one.TemplateID != two.TemplateID || one.BuildID == two.BuildID {
		t.Errorf("two builds of a new template: %+v, %+v", one, two)
	}
	if got := state(me.OrgID, one); got != "pending" {
		t.Errorf("an announced build is %s", got)
	}
	stranger := Draft{TemplateID: one.TemplateID, BuildID: "bld_none"}
	if a, b, c := state("org_other", one), state(me.OrgID, stranger), state(me.OrgID,
		Draft{TemplateID: "tpl_none", BuildID: one.BuildID}); a != "template_not_found" ||
		b != "template_not_found" || c != "template_not_found" {
		t.Errorf("other builds are %s, %s, %s", a, b, c)
	}
	build := func(c Caller, d Draft, text string) error {
		_, err := w.BuildDraft(ctx, c, d.TemplateID, d.BuildID, Request{}, text, nil)
		return err
	}
	wantCode(t, build(Caller{OrgID: "org_other"}, one, "FROM base"), "template_not_found")

	release := w.builder.hold()
	if err := build(me, one, "FROM base\nRUN a"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, build(me, one, "FROM base\nRUN a"), "build_in_progress")
	// The same again joins the build that runs; another takes its place.
	if err := build(me, two, "FROM base\nRUN a"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Draft{one, two} {
		if got := state(me.OrgID, d); got != "building" && got != "pending" {
			t.Errorf("the build is %s", got)
		}
	}
	three := announce("app__1_")
	if err := build(me, three, "FROM base\nRUN b"); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Draft{one, two} {
		if got := state(me.OrgID, d); got != "failed: a newer build of the template replaced it" {
			t.Errorf("the build before is %s", got)
		}
	}
	release()
	if s := w.await(three); s.Status != Ready {
		t.Errorf("the newest build is %+v", s)
	}
	// What was built is not built again, and has the log of that build.
	four := announce("app__1_")
	if err := build(me, four, "FROM base\nRUN b"); err != nil {
		t.Fatal(err)
	}
	s := w.await(four)
	if log, err := w.LogRest(ctx, s.Template, 0, 100); err != nil || len(log) == 0 || s.Status != Ready {
		t.Errorf("a build without a change: %+v, log %v, %v", s, log, err)
	}
	tpl, err := w.Get(ctx, me.OrgID, "app__1_")
	if err != nil || tpl.Version != 1 || tpl.ID != one.TemplateID || tpl.BuildID != three.BuildID {
		t.Errorf("the template is %+v, %v", tpl, err)
	}
	// A failed one leaves it, and is remembered when the next has taken its place.
	w.builder.mu.Lock()
	w.builder.fail["app__1_"] = &BuildError{Step: "RUN c", ExitCode: 1, Message: "exit code 1", Line: 9}
	w.builder.mu.Unlock()
	five := announce("app__1_")
	if err := build(me, five, "FROM base\nRUN c"); err != nil {
		t.Fatal(err)
	}
	if s := w.await(five); s.Status != Failed || s.Error.Line != 9 {
		t.Errorf("the failed build is %+v", s)
	}
	six := announce("app__1_")
	if err := build(me, six, "FROM base\nRUN d"); err != nil {
		t.Fatal(err)
	}
	if a, b := state(me.OrgID, five), state(me.OrgID, three); a != "failed: exit code 1" || b != "ready" {
		t.Errorf("past builds are %s, %s", a, b)
	}
	// One that cannot be built ends without a change of the template, and cannot be started again.
	seven := announce("app__1_")
	wantCode(t, w.FailDraft("org_other", seven.TemplateID, seven.BuildID, &BuildError{}), "template_not_found")
	if err := w.FailDraft(me.OrgID, seven.TemplateID, seven.BuildID, &BuildError{Message: "no such step"}); err != nil {
		t.Fatal(err)
	}
	if got := state(me.OrgID, seven); got != "failed: no such step" {
		t.Errorf("a build that cannot be built is %s", got)
	}
	wantCode(t, build(me, seven, "FROM base"), "build_in_progress")
	if tpl, err := w.Get(ctx, me.OrgID, "app__1_"); err != nil || tpl.BuildID != six.BuildID {
		t.Errorf("the template's build is %s, %v; want %s", tpl.BuildID, err, six.BuildID)
	}
	for _, name := range []string{"base", "Aa", "", "-a", "_a", "a b", "a:b", "tpl_aaaaaaaaaaaaaaaaaaaa",
		strings.Repeat("a", 64)} {
		if _, err := w.Announce(ctx, me, Announcement{Name: name}); err == nil {
			t.Errorf("the name %q is taken", name)
		}
	}
	if _, err := w.Announce(ctx, me, Announcement{Name: "x", Size: "huge"}); err == nil {
		t.Error("an unknown size is taken")
	}
}

// TestTurns checks that callers of one organization follow each other, that those of others do not
// wait for them, and that one that has waited can leave.
func TestTurns(t *testing.T) {
	turns := turns{taken: map[string]chan struct{}{}}
	if err := turns.enter(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := turns.enter(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	left, leave := context.WithCancel(t.Context())
	leave()
	if err := turns.enter(left, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("entering without waiting: %v", err)
	}
	var inside atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := turns.enter(t.Context(), "a"); err != nil {
				t.Error(err)
				return
			}
			if n := inside.Add(1); n != 1 {
				t.Errorf("%d are inside", n)
			}
			inside.Add(-1)
			turns.leave("a")
		})
	}
	turns.leave("a")
	wg.Wait()
	turns.leave("b")
	if len(turns.taken) != 0 {
		t.Errorf("left over: %v", turns.taken)
	}
}

// TestLogOfASecondTry checks that a build which waited for a template goes on with its log.
func TestLogOfASecondTry(t *testing.T) {
	w := newWorkshop(t)
	w.builder.mu.Lock()
	w.builder.from["app"] = "base" // which is built first
	w.builder.mu.Unlock()
	d, err := w.begin("app", "FROM base")
	if err != nil {
		t.Fatal(err)
	}
	s := w.await(d)
	if s.Status != Ready {
		t.Fatalf("the build is %+v", s)
	}
	lines, err := w.LogRest(t.Context(), s.Template, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, l := range lines {
		if l.Seq != int64(i+1) {
			t.Errorf("line %d has the number %d", i+1, l.Seq)
		}
		text, _, _ := strings.Cut(l.Text, " after ")
		got = append(got, text)
	}
	want := []string{"building template app", "working on app", "waiting for template base", "building template app",
		"working on app", "done with app", "the image is ready"}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("the log (-want +got):\n%s", diff)
	}
}

// TestTagsOfBuilds checks that a build gives its version the tags it was announced with, which keep
// that version and its image.
func TestTagsOfBuilds(t *testing.T) {
	w := newWorkshop(t)
	ctx := t.Context()
	build := func(text string, tags ...string) {
		t.Helper()
		d, err := w.Announce(ctx, me, Announcement{Name: "app", Tags: tags})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.BuildDraft(ctx, me, d.TemplateID, d.BuildID, Request{}, text, nil); err != nil {
			t.Fatal(err)
		}
		if s := w.await(d); s.Status != Ready {
			t.Fatalf("the build is %+v", s)
		}
	}
	// The fake makes an image of the Dockerfile's path, which is always the same.
	w.builder.made = func(d Definition) string { return "image of " + strings.Join(d.Tags, " ") }
	build("FROM base\nRUN a", "v1")
	build("FROM base\nRUN b", "v2", "stable")
	versions := func() map[string]int {
		t.Helper()
		out := map[string]int{}
		for _, ref := range []string{"app", "app:v1", "app:v2", "app:stable"} {
			if v, err := w.Ready(ctx, me.OrgID, ref); err == nil {
				out[ref] = v.Version
			} else if !fault.Is(err, fault.NotFound) {
				t.Errorf("%s: %v", ref, err)
			}
		}
		return out
	}
	if diff := gocmp.Diff(map[string]int{"app": 2, "app:v1": 1, "app:v2": 2, "app:stable": 2}, versions()); diff != "" {
		t.Errorf("the versions (-want +got):\n%s", diff)
	}
	// A build that does nothing gives its tags again.
	if err := w.Untag(ctx, me, "app", []string{"v2", "stable"}); err != nil {
		t.Fatal(err)
	}
	build("FROM base\nRUN b", "v2", "stable")
	if diff := gocmp.Diff(map[string]int{"app": 2, "app:v1": 1, "app:v2": 2, "app:stable": 2}, versions()); diff != "" {
		t.Errorf("the versions after the same build (-want +got):\n%s", diff)
	}
	// Tags that are announced one beside the other do not fit together.
	var drafts []Draft
	for i := range 2 {
		var tags []string
		for n := range 30 {
			tags = append(tags, fmt.Sprintf("many-%d-%d", i, n))
		}
		d, err := w.Announce(ctx, me, Announcement{Name: "full", Tags: tags})
		if err != nil {
			t.Fatal(err)
		}
		drafts = append(drafts, d)
	}
	for i, want := range []Status{Ready, Failed} {
		d := drafts[i]
		if _, err := w.BuildDraft(ctx, me, d.TemplateID, d.BuildID, Request{}, fmt.Sprint("FROM base\nRUN full ", i),
			nil); err != nil {
			t.Fatal(err)
		}
		if s := w.await(d); s.Status != want {
			t.Errorf("build %d of 30 tags is %+v, want %s", i, s, want)
		}
	}
	// A rebuild moves no tag.
	if _, err := w.Rebuild(ctx, me, "app", nil, nil); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); versions()["app"] != 3; time.Sleep(5 * time.Millisecond) { // a poll
		if time.Now().After(deadline) {
			t.Fatalf("the versions are %v", versions())
		}
	}
	if diff := gocmp.Diff(map[string]int{"app": 3, "app:v1": 1, "app:v2": 2, "app:stable": 2}, versions()); diff != "" {
		t.Errorf("the versions after a rebuild (-want +got):\n%s", diff)
	}
	if _, _, err := w.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	kept := w.builder.collected[len(w.builder.collected)-1]
	for _, image := range []string{"image of v1", "image of v2 stable", "image of "} {
		if !slices.Contains(kept, image) {
			t.Errorf("%q is not kept: %q", image, kept)
		}
	}
}

// TestDraftsAreBounded checks that announcing costs no memory without end.
func TestDraftsAreBounded(t *testing.T) {
	w := newWorkshop(t)
	var first, last Draft
	for i := range maxDrafts + 1 {
		d, err := w.Announce(t.Context(), me, Announcement{Name: fmt.Sprint("a", i)})
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = d
		}
		last = d
	}
	if n := len(w.drafts.byOrg[me.OrgID]); n != maxDrafts {
		t.Errorf("%d builds are remembered", n)
	}
	_, err := w.BuildState(t.Context(), me.OrgID, first.TemplateID, first.BuildID)
	wantCode(t, err, "template_not_found")
	if s, err := w.BuildState(t.Context(), me.OrgID, last.TemplateID, last.BuildID); err != nil || s.Status != Pending {
		t.Errorf("the last is %+v, %v", s, err)
	}
	var many []string
	for i := range MaxTags + 1 {
		many = append(many, fmt.Sprint("t", i))
	}
	_, err = w.Announce(t.Context(), me, Announcement{Name: "tags", Tags: many})
	wantCode(t, err, "invalid_tags")
	wantCode(t, w.Untag(t.Context(), me, "tags", many), "invalid_tags")
	for i := range 100 {
		if _, err := w.Announce(t.Context(), me, Announcement{Name: fmt.Sprint("b", i), Tags: many[1:]}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(w.drafts.byOrg[me.OrgID]); n > maxDrafts/MaxTags {
		t.Errorf("%d builds with %d tags are remembered", n, MaxTags)
	}
	for _, d := range w.drafts.byOrg[me.OrgID] {
		d.at = time.Now().Add(-2 * draftKept)
	}
	if _, _, err := w.Collect(t.Context()); err != nil || len(w.drafts.byOrg) != 0 {
		t.Errorf("after a collection: %d, %v", len(w.drafts.byOrg), err)
	}
}
