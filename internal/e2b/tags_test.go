package e2b

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/template"
)

// TestTags makes, moves, lists and removes tags, and creates sandboxes by them.
func TestTags(t *testing.T) {
	b := newBuilds(t)
	old := strings.Repeat("01", 32)
	set := func(image string, version int) {
		t.Helper()
		if _, err := b.db.UpdateTemplate(t.Context(), "tpl_"+strings.Repeat("b", 20), nil, func(t *template.Template) error {
			t.Image, t.Version, t.ReadyBuild = image, version, fmt.Sprint("bld_", version)
			t.BuildID = t.ReadyBuild + "_later" // a tag names a build that is ready
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	tags := func() string {
		t.Helper()
		r := b.control("GET", "/templates/mine/tags", "")
		var all []struct{ Tag, BuildID, CreatedAt string }
		if err := json.Unmarshal([]byte(r.body), &all); r.status != 200 || err != nil {
			t.Fatalf("%d %s: %v", r.status, r.body, err)
		}
		var out []string
		for _, tag := range all {
			out = append(out, tag.Tag+"="+tag.BuildID)
		}
		return strings.Join(out, " ")
	}
	want := func(r answer, status int, has string) {
		t.Helper()
		if r.status != status || !strings.Contains(r.body, has) {
			t.Errorf("%d %s, want %d with %s", r.status, r.body, status, has)
		}
	}
	set(old, 1)
	want(b.call("POST", "/templates/tags", `{"target":"mine","tags":["v1","stable","default","v1"]}`), 201,
		`{"buildID":"bld_1","tags":["default","stable","v1"]}`)
	set(strings.Repeat("02", 32), 2)
	want(b.call("POST", "/templates/tags", `{"target":"Mine:latest","tags":["v2"]}`), 201, `"buildID":"bld_2"`)
	if got := tags(); got != "default=bld_2 stable=bld_1 v1=bld_1 v2=bld_2" {
		t.Errorf("tags: %s", got)
	}
	want(b.call("POST", "/templates/tags", `{"target":"mine:v2","tags":["stable"]}`), 201, `"buildID":"bld_2"`)
	want(b.call("DELETE", "/templates/tags", `{"name":"mine","tags":["v2","none"]}`), http.StatusNoContent, "")
	if got := tags(); got != "default=bld_2 stable=bld_2 v1=bld_1" {
		t.Errorf("then tags: %s", got)
	}
	for ref, version := range map[string]int{"mine": 2, "mine:v1": 1, "mine:stable": 2, "mine:default": 2,
		"MINE:latest": 2, "mine:bld_1": 1, "mine:bld_2": 2} {
		id, _ := b.create(fmt.Sprintf(`{"templateID":%q}`, ref))
		if sb := b.row(id); sb.TemplateVersion != version || sb.Template != "mine" || version == 1 && sb.Image != old {
			t.Errorf("a sandbox of %s is of version %d of %s", ref, sb.TemplateVersion, sb.Template)
		}
	}
	want(b.control("POST", "/v2/sandboxes", `{"templateID":"mine:v2"}`), 404, "no tag")
	for ref, count := range map[string]int{"mine": 7, "mine:v1": 2, "mine:default": 7, "mine:latest": 7, "mine:v2": 0,
		"none:v1": 0} {
		r := b.control("GET", "/v2/sandboxes?template="+url.QueryEscape(ref), "")
		if got := strings.Count(r.body, `"sandboxID"`); r.status != 200 || got != count {
			t.Errorf("%s lists %d, want %d: %d %s", ref, got, count, r.status, r.body)
		}
	}
	want(b.control("GET", "/templates/aliases/mine%3Av1", ""), 200, "tpl_")
	want(b.control("GET", "/templates/aliases/mine%3Av2", ""), 404, "no tag")
	for body, status := range map[string]int{
		`{}`: 400, `{"target":"mine","tags":[]}`: 400, `{"target":"mine:none","tags":["default"]}`: 404, `{"target":"none","tags":["a"]}`: 404,
		`{"target":"mine:none","tags":["a"]}`: 404, `{"target":"base","tags":["a"]}`: 403, `{"target":"mine","tags":["a:b"]}`: 400,
		`{"target":"mine","tags":["` + strings.Repeat("a", 129) + `"]}`: 400, `{"target":"mine","tags":["A b"]}`: 400,
	} {
		want(b.call("POST", "/templates/tags", body), status, "")
	}
	for body, status := range map[string]int{`{}`: 400, `{"name":"mine","tags":["default"]}`: 400,
		`{"name":"none","tags":["a"]}`: 404,
		`{"name":"base","tags":["a"]}`: 403} {
		want(b.call("DELETE", "/templates/tags", body), status, "")
	}
	want(b.send("POST", "/templates/tags", `{"target":"mine","tags":["x"]}`, "X-API-Key", b.other), 404, "")
	// The default version is the one that was given the tag last, and latest is a tag like others.
	want(b.call("POST", "/templates/tags", `{"target":"mine:stable","tags":["latest"]}`), 201, `"buildID":"bld_2"`)
	want(b.call("POST", "/templates/tags", `{"target":"mine:bld_1","tags":["default"]}`), 201, `"buildID":"bld_1"`)
	if got := tags(); got != "default=bld_1 latest=bld_2 stable=bld_2 v1=bld_1" {
		t.Errorf("after v1 became the default: %s", got)
	}
	for ref, version := range map[string]int{"mine": 1, "mine:default": 1, "mine:latest": 2} {
		id, _ := b.create(fmt.Sprintf(`{"templateID":%q}`, ref))
		if sb := b.row(id); sb.TemplateVersion != version || (sb.Image == old) != (version == 1) {
			t.Errorf("a sandbox of %s is of version %d, image %s", ref, sb.TemplateVersion, sb.Image)
		}
	}
	many, err := json.Marshal(map[string]any{"target": "mine", "tags": numbered(template.MaxTags)})
	if err != nil {
		t.Fatal(err)
	}
	want(b.call("POST", "/templates/tags", string(many)), 429, "quota_exceeded")
	want(b.call("GET", "/templates/mine/other", ""), 501, "")
}

func numbered(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprint("t", i))
	}
	return out
}
