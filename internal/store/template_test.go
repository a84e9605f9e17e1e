package store

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

func aTemplate(org, name string, i int) template.Template {
	return template.Template{ID: fmt.Sprintf("tpl_%s%s", org, name), OrgID: org, Name: name,
		CreatedAt: start.Add(time.Duration(i) * time.Second)}
}

// testTemplateStore tests the contract of template.Store, which every implementation must keep.
func testTemplateStore(t *testing.T, open func(t *testing.T) template.Store) {
	for name, f := range map[string]func(*testing.T, template.Store){
		"round trip": templateRoundTrip,
		"finding":    templateFind,
		"listing":    templateList,
		"images":     templateImages,
		"log":        templateLog,
		"tags":       templateTags,
		"inserting":  templateInsert,
		"updating":   templateUpdate,
		"builds":     templateBuilds,
		"queued":     templateQueued,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, open(t))
		})
	}
}

// put inserts templates.
func put(t *testing.T, st template.Store, all ...template.Template) {
	t.Helper()
	for _, tpl := range all {
		if err := st.InsertTemplate(t.Context(), tpl, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// update changes a template.
func update(t *testing.T, st template.Store, id string, change func(*template.Template)) template.Template {
	t.Helper()
	tpl, err := st.UpdateTemplate(t.Context(), id, nil, func(tpl *template.Template) error { change(tpl); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return tpl
}

func templateRoundTrip(t *testing.T, st template.Store) {
	full := template.Template{ID: "tpl_1", OrgID: "org_a", Name: "mine", Description: "what",
		Status: template.Building, Progress: "step 3 of 7",
		BuildError: &template.BuildError{Step: "RUN x", ExitCode: 3, Tail: []string{"a", "b"}, Message: "no"},
		BuildID:    "bld_1", Tries: 2, QueuedAt: start.Add(3 * time.Second),
		Version: 4, ImageSize: 5 << 30, Source: "debian:bookworm", Inputs: "1234", ReadyBuild: "bld_0",
		Shape: sandbox.Shape{Image: "abc", Env: map[string]string{"A": "b"}, Workdir: "/w", User: "u",
			Start: sandbox.Start{Args: []string{"run", "me"},
				Ready: &sandbox.Ready{HTTP: &sandbox.ReadyHTTP{Port: 80, Path: "/"}, Timeout: time.Second}},
			Size: sandbox.Size{Name: "shared-cpu-1x"}, DiskMB: 99,
			Egress: sandbox.Egress{Mode: sandbox.DenyAll, AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("1.2.3.0/24")}}},
		CreatedAt: start, UpdatedAt: start.Add(time.Second), BuiltAt: start.Add(2 * time.Second)}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[template.Template]()) {
		if reflect.ValueOf(full).FieldByIndex(f.Index).IsZero() && f.Name != "Tagging" &&
			f.Name != "Repairs" { // see templateTags
			t.Errorf("the test leaves field %s empty", f.Name)
		}
	}
	later := full
	later.OrgID, later.Name, later.Description, later.Status, later.Progress =
		"org_b", "other", "else", template.Ready, "p"
	later.BuildError, later.BuildID, later.Tries, later.QueuedAt = nil, "bld_2", 0, time.Time{}
	later.Version, later.Image, later.ImageSize, later.Source, later.Inputs, later.ReadyBuild, later.Env =
		5, "def", 7, "docker.io/x", "56", "bld_2", map[string]string{"C": "d"}
	later.Workdir, later.User, later.Start, later.Size.Name, later.DiskMB = "/x", "v", sandbox.Start{Command: "r"}, "z", 1
	later.Egress = sandbox.Egress{Mode: sandbox.AllowAll}
	later.CreatedAt, later.UpdatedAt, later.BuiltAt = start.Add(time.Minute), start.Add(time.Hour), start.Add(2*time.Hour)
	bare := template.Template{ID: "tpl_2", OrgID: "org_b", Name: "bare", CreatedAt: start}
	check := func(want template.Template) {
		t.Helper()
		got, err := st.GetTemplate(t.Context(), want.OrgID, want.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, prefixes); diff != "" {
			t.Errorf("stored and read back (-want +got):\n%s", diff)
		}
	}
	put(t, st, full, bare)
	check(full)
	check(bare)
	if diff := cmp.Diff(later,
		update(t, st, full.ID, func(tpl *template.Template) { *tpl = later }), prefixes); diff != "" {
		t.Errorf("updated (-want +got):\n%s", diff)
	}
	check(later)
	check(bare)
}

func templateInsert(t *testing.T, st template.Store) {
	put(t, st, aTemplate("org_a", "a", 0), aTemplate("org_b", "b", 0))
	insert := func(org, name string, limit int) error {
		tpl := aTemplate(org, name, 1)
		tpl.ID += "_"
		return st.InsertTemplate(t.Context(), tpl, &template.Build{Context: "c"}, limit)
	}
	wantFault(t, insert("org_a", "a", 0), fault.Conflict, "template_exists")
	wantFault(t, insert("org_a", "x", 1), fault.Exhausted, "quota_exceeded")
	if contexts, err := st.TemplateContexts(t.Context(), ""); err != nil || len(contexts) > 0 {
		t.Errorf("refused inserts left contexts %v, %v", contexts, err)
	}
	if err := insert("org_a", "x", 2); err != nil {
		t.Error(err)
	}
	if err := insert("", "a", 0); err != nil {
		t.Errorf("using a name of another organization: %v", err)
	}
}

func templateUpdate(t *testing.T, st template.Store) {
	tpl := aTemplate("org_a", "a", 0)
	put(t, st, tpl)
	no := errors.New("no")
	got, err := st.UpdateTemplate(t.Context(), tpl.ID, &template.Build{Context: "c"}, func(tpl *template.Template) error {
		tpl.Description = "changed"
		return no
	})
	if !errors.Is(err, no) || got.ID != "" {
		t.Errorf("a refused update returned %+v, %v", got, err)
	}
	if read, err := st.GetTemplate(t.Context(), "org_a", "a"); err != nil || read.Description != "" {
		t.Errorf("a refused update wrote %+v, %v", read, err)
	}
	_, err = st.GetBuild(t.Context(), tpl.ID, "")
	wantFault(t, err, fault.NotFound, "template_not_found")
	_, err = st.UpdateTemplate(t.Context(), "tpl_none", nil,
		func(*template.Template) error { t.Error("called"); return nil })
	wantFault(t, err, fault.NotFound, "template_not_found")
	var wg sync.WaitGroup
	const many = 20
	for range many {
		wg.Go(func() { update(t, st, tpl.ID, func(tpl *template.Template) { tpl.Version++ }) })
	}
	wg.Wait()
	if read, err := st.GetTemplate(t.Context(), "org_a", "a"); err != nil || read.Version != many {
		t.Errorf("after %d updates at once: %d, %v", many, read.Version, err)
	}
}

func templateBuilds(t *testing.T, st template.Store) {
	tpl, other := aTemplate("org_a", "a", 0), aTemplate("org_b", "b", 0)
	first := template.Build{Definition: template.Definition{Name: "a", Dockerfile: "FROM base",
		Env: map[string]string{"A": "b"}, StartCommand: new(""), BuildArgs: map[string]string{"C": "d"},
		Debian: &template.Debian{Suite: "x", Packages: []string{"y"}}, Ready: &sandbox.Ready{Port: 5}},
		Context: "c1", Refresh: true, Private: true, Repairs: "i"}
	if err := st.InsertTemplate(t.Context(), tpl, &first, 0); err != nil {
		t.Fatal(err)
	}
	if err := st.InsertTemplate(t.Context(), other, &template.Build{Context: "c2"}, 0); err != nil {
		t.Fatal(err)
	}
	if own, err := st.TemplateContexts(t.Context(), other.OrgID); err != nil || !slices.Equal(own, []string{"c2"}) {
		t.Errorf("another organization's contexts are %v, %v", own, err)
	}
	check := func(want template.Build, contexts ...string) {
		t.Helper()
		got, err := st.GetBuild(t.Context(), tpl.ID, "")
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("build (-want +got):\n%s%v", diff, err)
		}
		if all, err := st.TemplateContexts(t.Context(), ""); err != nil || !slices.Equal(all, contexts) {
			t.Errorf("contexts %v, %v; want %v", all, err, contexts)
		}
	}
	check(first, "c1", "c2")
	update(t, st, tpl.ID, func(tpl *template.Template) { tpl.Version = 2 })
	check(first, "c1", "c2")
	second := template.Build{Definition: template.Definition{Name: "a", Image: "x"}, Context: "c2"}
	if _, err := st.UpdateTemplate(t.Context(), tpl.ID, &second,
		func(*template.Template) error { return nil }); err != nil {
		t.Fatal(err)
	}
	check(second, "c2")
	for build, want := range map[string]bool{"bld_2": true, "bld_1": false} { // another one has taken its place
		update(t, st, tpl.ID, func(tpl *template.Template) { tpl.BuildID = "bld_2" })
		got, err := st.GetBuild(t.Context(), tpl.ID, build)
		if want != (err == nil) || want && got.Context != "c2" || !want && !fault.Is(err, fault.NotFound) {
			t.Errorf("the inputs of %s are %+v, %v", build, got, err)
		}
	}
	if err := st.DeleteTemplate(t.Context(), other.ID, false); err != nil {
		t.Fatal(err)
	}
	check(second, "c2")
	if err := st.DeleteTemplate(t.Context(), tpl.ID, false); err != nil {
		t.Fatal(err)
	}
	_, err := st.GetBuild(t.Context(), tpl.ID, "")
	wantFault(t, err, fault.NotFound, "template_not_found")
	wantFault(t, st.DeleteTemplate(t.Context(), tpl.ID, true), fault.NotFound, "template_not_found")
}

func templateQueued(t *testing.T, st template.Store) {
	for i, at := range []time.Time{start.Add(time.Hour), {}, start} {
		tpl := aTemplate("org_a", fmt.Sprint("t", i), i)
		tpl.QueuedAt, tpl.Image, tpl.Version = at, "image", i
		put(t, st, tpl)
	}
	names := func(all []template.Template, err error) []string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, tpl := range all {
			out = append(out, tpl.Name)
		}
		return out
	}
	if got := names(st.QueuedTemplates(t.Context())); !slices.Equal(got, []string{"t2", "t0"}) {
		t.Errorf("the queued templates are %v", got)
	}
	if got := names(st.TemplatesWithImage(t.Context(), "image")); !slices.Equal(got, []string{"t1", "t2"}) {
		t.Errorf("the templates with the image are %v", got)
	}
}

func templateFind(t *testing.T, st template.Store) {
	builtin, own, other := aTemplate("", "python", 0), aTemplate("org_a", "python", 1), aTemplate("org_b", "secret", 2)
	put(t, st, builtin, own, other)
	for _, c := range []struct{ org, nameOrID, want string }{
		{"org_a", "python", own.ID},
		{"org_b", "python", builtin.ID},
		{"", "python", builtin.ID},
		{"org_a", builtin.ID, builtin.ID},
		{"org_a", own.ID, own.ID},
		{"org_b", own.ID, ""},
		{"org_a", "secret", ""},
		{"org_a", other.ID, ""},
		{"org_a", "", ""},
		{"org_a", "PYTHON", ""},
	} {
		got, err := st.GetTemplate(t.Context(), c.org, c.nameOrID)
		if c.want == "" {
			wantFault(t, err, fault.NotFound, "template_not_found")
		} else if err != nil || got.ID != c.want {
			t.Errorf("%q asks for %q: %q, %v; want %q", c.org, c.nameOrID, got.ID, err, c.want)
		}
	}
}

func templateList(t *testing.T, st template.Store) {
	for i := range 5 {
		for _, org := range []string{"", "org_a", "org_b"} {
			put(t, st, aTemplate(org, fmt.Sprint("t", i), i))
		}
	}
	var got []string
	for after := ""; ; {
		page, next, err := st.ListTemplates(t.Context(), "org_a", 3, after)
		if err != nil {
			t.Fatal(err)
		}
		for _, tpl := range page {
			got = append(got, tpl.ID)
		}
		if after = next; next == "" {
			break
		}
	}
	var want []string
	for i := 4; i >= 0; i-- {
		want = append(want, fmt.Sprint("tpl_t", i), fmt.Sprint("tpl_org_at", i))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("newest first (-want +got):\n%s", diff)
	}
	_, _, err := st.ListTemplates(t.Context(), "org_a", 3, "bad")
	wantFault(t, err, fault.Invalid, "invalid_cursor")
}

func templateImages(t *testing.T, st template.Store) {
	for i, image := range []string{"b", "a", "b", "", "unbuilt"} {
		tpl := aTemplate("org_a", fmt.Sprint("t", i), i)
		tpl.Image, tpl.Status = image, template.Failed // after a failed rebuild the last version stays in use
		if image != "unbuilt" {
			tpl.Version = 1
		}
		put(t, st, tpl)
	}
	got, err := st.TemplateImages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func templateLog(t *testing.T, st template.Store) {
	line := func(seq int64, step int) template.LogLine {
		return template.LogLine{Seq: seq, At: start.Add(time.Duration(10-seq) * time.Second), Step: step,
			Heading: seq == 1, Line: 8 * step, Text: fmt.Sprint("line ", seq)}
	}
	change := func(id string, c template.LogChange) {
		t.Helper()
		if err := st.ChangeTemplateLog(t.Context(), id, c); err != nil {
			t.Fatal(err)
		}
	}
	wantFault(t,
		st.ChangeTemplateLog(t.Context(), "tpl_none", template.LogChange{Add: []template.LogLine{line(1, 0)}}),
		fault.NotFound, "template_not_found")
	a, b := aTemplate("", "a", 0), aTemplate("", "b", 0)
	put(t, st, a, b)
	check := func(what string, after int64, limit int, want ...template.LogLine) {
		t.Helper()
		got, err := st.TemplateLog(t.Context(), a.ID, after, limit)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	check("empty", 0, 9)
	change(a.ID, template.LogChange{Add: []template.LogLine{line(1, 0), line(2, 1)}})
	change(b.ID, template.LogChange{Add: []template.LogLine{line(9, 0)}})
	// Lines are ordered by their numbers and not by their times.
	change(a.ID, template.LogChange{Add: []template.LogLine{line(3, 2), line(4, 1), line(5, 1)}})
	check("appended", 0, 9, line(1, 0), line(2, 1), line(3, 2), line(4, 1), line(5, 1))
	check("a part", 1, 2, line(2, 1), line(3, 2))
	update(t, st, a.ID, func(tpl *template.Template) { tpl.Progress = "on" })
	check("after the template was changed", 4, 9, line(5, 1))
	note := line(4, 1)
	note.Text = "… 2 lines left out …"
	change(a.ID, template.LogChange{Drop: []template.LogRange{{Step: 1, From: 2, To: 4}}, Add: []template.LogLine{note}})
	check("dropped", 0, 9, line(1, 0), line(3, 2), note, line(5, 1))
	for skip, want := range map[int][]template.LogLine{0: {line(1, 0), line(3, 2)}, 3: {line(5, 1)}, 4: nil, 99: nil} {
		if got, err := st.TemplateLogRest(t.Context(), a.ID, skip, 2); err != nil || !cmp.Equal(want, got) {
			t.Errorf("without the first %d: %v, %v", skip, got, err)
		}
	}
	update(t, st, a.ID, func(tpl *template.Template) { tpl.BuildID = "bld_2" })
	check("another build", 0, 9)
	if other, err := st.TemplateLog(t.Context(), b.ID, 0, 9); err != nil || len(other) != 1 {
		t.Errorf("the other template's log: %v, %v", other, err)
	}
}

// templateTags checks that tags are written with the row, keep what they name, and go with the template.
func templateTags(t *testing.T, st template.Store) {
	ctx := t.Context()
	a, b := aTemplate("org_a", "a", 0), aTemplate("org_a", "b", 0)
	a.Version, a.Image = 2, "newest"
	put(t, st, a, b)
	tag := func(name, image string) template.Tag {
		return template.Tag{Name: name, BuildID: "bld_" + image, CreatedAt: start,
			Version: sandbox.TemplateVersion{ID: a.ID, Name: "a", Version: 1, Shape: sandbox.Shape{Image: image,
				Env: map[string]string{"A": "b"}, User: "u", Workdir: "/w", Size: sandbox.Size{Name: "s"}, DiskMB: 5,
				Egress: sandbox.Egress{Mode: sandbox.DenyAll, AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("1.2.3.0/24")}},
				Start:  sandbox.Start{Command: "run", Ready: &sandbox.Ready{Port: 80, Timeout: time.Second}}}}}
	}
	one, two, again := tag("one", "i1"), tag("two", "i1"), tag("one", "i2")
	if got := update(t, st, a.ID, func(tpl *template.Template) {
		tpl.Tagging = []template.Tag{one, two}
	}); got.Tagging != nil {
		t.Errorf("tags are read back with the row: %v", got.Tagging)
	}
	check := func(id string, want ...template.Tag) {
		t.Helper()
		got, err := st.Tags(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, prefixes); diff != "" {
			t.Errorf("tags (-want +got):\n%s", diff)
		}
	}
	check(a.ID, one, two)
	check(b.ID)
	update(t, st, a.ID, func(tpl *template.Template) { tpl.Tagging = []template.Tag{again} })
	check(a.ID, again, two)
	if images, err := st.TemplateImages(ctx); err != nil || !cmp.Equal(images, []string{"i1", "i2", "newest"}) {
		t.Errorf("the images are %v, %v", images, err)
	}
	_, err := st.UpdateTemplate(ctx, a.ID, nil, func(t *template.Template) error {
		for i := range template.MaxTags {
			t.Tagging = append(t.Tagging, template.Tag{Name: fmt.Sprint("more", i), CreatedAt: start})
		}
		return nil
	})
	if !fault.Is(err, fault.Exhausted) {
		t.Errorf("more than %d tags: %v", template.MaxTags, err)
	}
	if err := st.DeleteTags(ctx, a.ID, []string{"two", "none"}); err != nil {
		t.Fatal(err)
	}
	check(a.ID, again)

	// A tag is copied with what it names at that moment.
	later := start.Add(time.Hour)
	if build, err := st.CopyTag(ctx, a.ID, "one", []string{"copy", "one"}, later); err != nil || build != "bld_i2" {
		t.Errorf("copied the tag of %q, %v", build, err)
	}
	copied := again
	copied.Name, copied.CreatedAt, again.CreatedAt = "copy", later, later
	check(a.ID, copied, again)
	for _, from := range []string{"two", ""} {
		_, err := st.CopyTag(ctx, a.ID, from, []string{"x"}, later)
		wantFault(t, err, fault.NotFound, "template_not_found")
	}
	_, err = st.CopyTag(ctx, "tpl_none", "one", []string{"x"}, later)
	wantFault(t, err, fault.NotFound, "template_not_found")
	var many []string
	for i := range template.MaxTags {
		many = append(many, fmt.Sprint("more", i))
	}
	_, err = st.CopyTag(ctx, a.ID, "one", many, later)
	wantFault(t, err, fault.Exhausted, "quota_exceeded")
	check(a.ID, copied, again)

	// The default version becomes that of a tag, with the policy that the template has.
	before, err := st.GetTemplate(ctx, a.OrgID, a.ID)
	if err != nil {
		t.Fatal(err)
	}
	if build, err := st.CopyTag(ctx, a.ID, "one", []string{template.DefaultTag}, later); err != nil || build != "bld_i2" {
		t.Errorf("promoted the tag of %q, %v", build, err)
	}
	promoted := before
	promoted.Promote(again, later)
	got, err := st.GetTemplate(ctx, a.OrgID, a.ID)
	if diff := cmp.Diff(promoted, got); err != nil || diff != "" || got.Image != "i2" || got.ReadyBuild != "bld_i2" ||
		got.Egress.Mode != before.Egress.Mode {
		t.Errorf("the default version (-want +got):\n%s%v", diff, err)
	}
	check(a.ID, copied, again)

	// Tags of an image are marked, and those of one template repaired.
	other := tag("other", "i2")
	update(t, st, b.ID, func(tpl *template.Template) { tpl.Tagging = []template.Tag{other} })
	update(t, st, a.ID, func(tpl *template.Template) { tpl.Tagging = []template.Tag{one} })
	copied.Gone, other.Gone = true, true
	if err := st.MarkTags(ctx, "i2", true); err != nil {
		t.Fatal(err)
	}
	check(a.ID, copied, one)
	check(b.ID, other)
	repaired := update(t, st, a.ID, func(tpl *template.Template) { tpl.ReadyBuild, tpl.Repairs = "bld_new", "i2" })
	want := repaired.NewestTag("copy")
	want.CreatedAt = later
	check(a.ID, want, one)
	check(b.ID, other)
	other.Gone = false
	if err := st.MarkTags(ctx, "i2", false); err != nil {
		t.Fatal(err)
	}
	check(b.ID, other)
	if err := st.DeleteTemplate(ctx, a.ID, true); err != nil {
		t.Fatal(err)
	}
	check(a.ID)
}
