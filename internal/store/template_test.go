package store

import (
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

func aTemplate(org, name string, i int) template.Template {
	return template.Template{ID: fmt.Sprintf("tpl_%s%s", org, name), OrgID: org, Name: name, CreatedAt: start.Add(time.Duration(i) * time.Second)}
}

// testTemplateStore is the contract of template.Store: every implementation keeps it.
func testTemplateStore(t *testing.T, open func(t *testing.T) template.Store) {
	for name, f := range map[string]func(*testing.T, template.Store){
		"round trip": templateRoundTrip,
		"finding":    templateFind,
		"listing":    templateList,
		"images":     templateImages,
		"log":        templateLog,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, open(t))
		})
	}
}

func templateRoundTrip(t *testing.T, st template.Store) {
	full := template.Template{ID: "tpl_1", OrgID: "org_a", Name: "mine", Description: "what", Status: template.Building, Progress: "step 3 of 7", BuildError: "no",
		Version: 4, Image: "abc", ImageSize: 5 << 30, Source: "debian:bookworm", Inputs: "1234", Env: map[string]string{"A": "b"}, Workdir: "/w", User: "u", StartCommand: "run me",
		Size: "shared-cpu-1x", DiskMB: 99, Egress: sandbox.Egress{Mode: sandbox.DenyAll, AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("1.2.3.0/24")}},
		CreatedAt: start, UpdatedAt: start.Add(time.Second), BuiltAt: start.Add(2 * time.Second)}
	for i, f := range reflect.VisibleFields(reflect.TypeFor[template.Template]()) {
		if reflect.ValueOf(full).Field(i).IsZero() {
			t.Errorf("the test leaves field %s empty", f.Name)
		}
	}
	later := full
	later.OrgID, later.Name, later.Description, later.Status, later.Progress, later.BuildError = "org_b", "other", "else", template.Ready, "p", "e"
	later.Version, later.Image, later.ImageSize, later.Source, later.Inputs, later.Env = 5, "def", 7, "docker.io/x", "56", map[string]string{"C": "d"}
	later.Workdir, later.User, later.StartCommand, later.Size, later.DiskMB = "/x", "v", "r", "z", 1
	later.Egress = sandbox.Egress{Mode: sandbox.AllowAll}
	later.CreatedAt, later.UpdatedAt, later.BuiltAt = start.Add(time.Minute), start.Add(time.Hour), start.Add(2*time.Hour)
	for _, want := range []template.Template{full, later, {ID: "tpl_2", OrgID: "org_b", Name: "bare", CreatedAt: start}} {
		if err := st.PutTemplate(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		got, err := st.GetTemplate(t.Context(), want.OrgID, want.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, prefixes); diff != "" {
			t.Errorf("stored and read back (-want +got):\n%s", diff)
		}
	}
}

func templateFind(t *testing.T, st template.Store) {
	builtin, own, other := aTemplate("", "python", 0), aTemplate("org_a", "python", 1), aTemplate("org_b", "secret", 2)
	for _, tpl := range []template.Template{builtin, own, other} {
		if err := st.PutTemplate(t.Context(), tpl); err != nil {
			t.Fatal(err)
		}
	}
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
	twin := aTemplate("org_a", "python", 3)
	twin.ID = "tpl_twin"
	wantFault(t, st.PutTemplate(t.Context(), twin), fault.Conflict, "template_exists")
}

func templateList(t *testing.T, st template.Store) {
	for i := range 5 {
		for _, org := range []string{"", "org_a", "org_b"} {
			if err := st.PutTemplate(t.Context(), aTemplate(org, fmt.Sprint("t", i), i)); err != nil {
				t.Fatal(err)
			}
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
		tpl.Image, tpl.Status = image, template.Failed // a failed rebuild leaves the last version in use
		if image != "unbuilt" {
			tpl.Version = 1
		}
		if err := st.PutTemplate(t.Context(), tpl); err != nil {
			t.Fatal(err)
		}
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
	line := func(i int) template.LogLine {
		return template.LogLine{At: start.Add(time.Duration(i) * time.Second), Text: fmt.Sprint("line ", i)}
	}
	wantFault(t, st.AppendTemplateLog(t.Context(), "tpl_none", false, []template.LogLine{line(0)}), fault.NotFound, "template_not_found")
	a, b := aTemplate("", "a", 0), aTemplate("", "b", 0)
	for _, tpl := range []template.Template{a, b} {
		if err := st.PutTemplate(t.Context(), tpl); err != nil {
			t.Fatal(err)
		}
	}
	check := func(what string, want ...template.LogLine) {
		t.Helper()
		got, err := st.TemplateLog(t.Context(), a.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	add := func(id string, reset bool, lines ...template.LogLine) {
		t.Helper()
		if err := st.AppendTemplateLog(t.Context(), id, reset, lines); err != nil {
			t.Fatal(err)
		}
	}
	check("empty")
	add(a.ID, false, line(1), line(2))
	add(b.ID, false, line(9))
	add(a.ID, false, line(0)) // in the order they were written, whatever their times
	check("appended", line(1), line(2), line(0))
	a.Progress = "on"
	if err := st.PutTemplate(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	check("after the template was replaced", line(1), line(2), line(0))
	add(a.ID, true, line(5))
	check("reset", line(5))
	add(a.ID, true)
	check("reset to nothing")
	if other, err := st.TemplateLog(t.Context(), b.ID); err != nil || len(other) != 1 {
		t.Errorf("the other template's log: %v, %v", other, err)
	}
}
