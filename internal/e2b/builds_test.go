package e2b

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// builds is a harness with a key that may build, and calls as clients make them.
type builds struct {
	*harness
	builder string
}

func newBuilds(t *testing.T) *builds {
	h := newHarness(t)
	return &builds{h, h.newKey(auth.TemplatesWrite)}
}

func (b *builds) call(method, path, body string) answer {
	b.t.Helper()
	return b.send(method, path, body, "X-API-Key", b.builder)
}

func (b *builds) announce(body string) (templateID, buildID string) {
	b.t.Helper()
	r := b.call("POST", "/v3/templates", body)
	if r.status != http.StatusAccepted {
		b.t.Fatalf("announcing %s: %d %s", body, r.status, r.body)
	}
	return r.json["templateID"].(string), r.json["buildID"].(string)
}

// link returns whether files are there, and the path of the URL to upload them to.
func (b *builds) link(key, hash string) (present bool, path string) {
	b.t.Helper()
	r := b.send("GET", "/templates/tpl_x/files/"+hash, "", "X-API-Key", key)
	if r.status != http.StatusCreated {
		b.t.Fatalf("asking for files: %d %s", r.status, r.body)
	}
	u, err := url.Parse(r.json["url"].(string))
	if err != nil || "http://"+u.Host != b.url {
		b.t.Fatalf("the URL is %s, %v", r.json["url"], err)
	}
	return r.json["present"].(bool), u.RequestURI()
}

func tarOf(t *testing.T, name, text string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644,
		Size: int64(len(text))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// wantFailed announces a build of the template x, and checks that it fails at a step, which clients find in
// its state and in its only entry.
func (b *builds) wantFailed(steps, step, message string) {
	b.t.Helper()
	tpl, build := b.announce(`{"name":"x"}`)
	path := fmt.Sprintf("/v2/templates/%s/builds/%s", tpl, build)
	if r := b.call("POST", path, steps); r.status != http.StatusAccepted || r.body != "" {
		b.t.Errorf("%.200s: %d %s", steps, r.status, r.body)
		return
	}
	status := fmt.Sprintf("/templates/%s/builds/%s/status", tpl, build)
	r := b.call("GET", status, "")
	var out struct {
		Status     string
		Reason     struct{ Step, Message string }
		LogEntries []struct{ Level, Step, Message string }
	}
	if err := json.Unmarshal([]byte(r.body), &out); err != nil || out.Status != "error" || out.Reason.Step != step ||
		!strings.HasPrefix(out.Reason.Message, message) || len(out.LogEntries) != 1 || out.LogEntries[0].Level != "error" ||
		out.LogEntries[0].Step != step || out.LogEntries[0].Message != out.Reason.Message {
		b.t.Errorf("%.200s: %d %s, want step %s: %q", steps, r.status, r.body, step, message)
	}
	if r := b.call("GET", status+"?logsOffset=1", ""); !strings.Contains(r.body, `"logEntries":[]`) {
		b.t.Errorf("after its entry: %s", r.body)
	}
	if r := b.call("POST", path, `{"fromTemplate":"base"}`); r.status != http.StatusConflict {
		b.t.Errorf("a failed build is started again: %d %s", r.status, r.body)
	}
}

// TestBuildTemplate makes the calls of a build, and looks at the row that comes of it.
func TestBuildTemplate(t *testing.T) {
	b := newBuilds(t)
	hash := strings.Repeat("ab", 32)
	tpl, build := b.announce(`{"name":"App_1","cpuCount":1,"memoryMB":500,"minFreeDiskMb":4096,"tags":["default"]}`)
	status := fmt.Sprintf("/templates/%s/builds/%s/status", tpl, build)
	if r := b.call("GET", status, ""); r.status != 200 || r.json["status"] != "waiting" {
		t.Errorf("an announced build: %d %s", r.status, r.body)
	}
	if r := b.call("GET", "/templates/aliases/app_1", ""); r.status != 404 {
		t.Errorf("an announced template exists: %d %s", r.status, r.body)
	}
	steps := `{"fromTemplate":"base","startCmd":"serve","readyCmd":"[ -n \"$(ss -Htuln sport = :8000)\" ]","steps":[
		{"type":"COPY","args":["a.txt","/a","",""],"filesHash":"` + hash + `","force":false,"forceUpload":true,"gzip":true},
		{"type":"RUN","args":["true"]}]}`
	path := fmt.Sprintf("/v2/templates/%s/builds/%s", tpl, build)
	b.wantFailed(steps, "1", "step 1: COPY: its files were not uploaded")
	for _, unknown := range []string{strings.Repeat("x", 30_000), build[:len(build)-1], "bld_aaaaaaaaaaaaaaaaaaaa"} {
		if r := b.call("POST", fmt.Sprintf("/v2/templates/%s/builds/%s", tpl, unknown), steps); r.status != 404 {
			t.Errorf("a build that was not announced: %d %s", r.status, r.body)
		}
	}
	present, to := b.link(b.builder, hash)
	if r := b.send("PUT", to, tarOf(t, "a.txt", "A")); present || r.status != http.StatusNoContent {
		t.Errorf("there before: %v; the upload: %d %s", present, r.status, r.body)
	}
	if present, _ := b.link(b.builder, hash); !present {
		t.Error("an upload is not there")
	}
	if present, _ := b.link(b.other, hash); present {
		t.Error("another organization has it")
	}
	if r := b.call("POST", path, steps); r.status != http.StatusAccepted || r.body != "" {
		t.Fatalf("the build: %d %s", r.status, r.body)
	}
	if r := b.call("GET", status, ""); r.status != 200 || r.json["status"] != "waiting" || r.json["logEntries"] == nil {
		t.Errorf("a queued build: %d %s", r.status, r.body)
	}
	if r := b.send("GET", status, "", "X-API-Key", b.other); r.status != 404 {
		t.Errorf("another organization's: %d %s", r.status, r.body)
	}
	got, err := b.templates.Get(t.Context(), b.org.Org.ID, "app_1")
	if err != nil || got.ID != tpl || got.BuildID != build || got.Size.Name != "small" || got.DiskMB != 4096 {
		t.Fatalf("the template is %+v, %v", got, err)
	}
	for name, disk := range map[string]string{"app_1": "4096", "mine": "2048"} { // of the request, and the defaults
		want := fmt.Sprintf(`"names":["%s"],"cpuCount":1,"memoryMB":512,"diskSizeMB":%s,`, name, disk)
		if r := b.control("GET", "/v2/templates", ""); r.status != 200 || !strings.Contains(r.body, want) {
			t.Errorf("the templates are %d %s, without %s", r.status, r.body, want)
		}
	}
	want := sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 8000}}
	if diff := cmp.Diff(want, got.Start); diff != "" {
		t.Errorf("its start (-want +got):\n%s", diff)
	}
}

// TestBuildStatus checks what clients read of a build: its entries in pages, and why it failed.
func TestBuildStatus(t *testing.T) {
	b := newBuilds(t)
	tpl, build := b.announce(`{"name":"app"}`)
	if r := b.call("POST", fmt.Sprintf("/v2/templates/%s/builds/%s", tpl, build),
		`{"fromTemplate":"base","steps":[{"type":"RUN","args":["make"]}]}`); r.status != 202 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	var lines []template.LogLine
	for i := range 250 {
		lines = append(lines, template.LogLine{Seq: int64(2*i + 1), At: time.Now(), Step: 6, Line: 9,
			Text: fmt.Sprint("line ", i)})
	}
	lines = append(lines, template.LogLine{Seq: 1000, At: time.Now(), Heading: true, Step: 1,
		Text: "step 1: load build definition from Dockerfile"},
		template.LogLine{Seq: 1001, At: time.Now(), Heading: true, Step: 2, Line: 1, Text: "step 2: FROM base"},
		template.LogLine{Seq: 1002, At: time.Now(), Text: "warning: no registry answers"},
		template.LogLine{Seq: 1003, At: time.Now(), Text: "RUN make: line 9: exit code 2"})
	if err := b.db.ChangeTemplateLog(t.Context(), tpl, template.LogChange{Add: lines}); err != nil {
		t.Fatal(err)
	}
	type entry struct{ Level, Message, Step string }
	read := func(offset int) (out struct {
		Status     string
		Logs       []string
		LogEntries []entry
		Reason     *struct{ Message, Step string }
	}) {
		t.Helper()
		r := b.call("GET", fmt.Sprintf("/templates/%s/builds/%s/status?logsOffset=%d", tpl, build, offset), "")
		if err := json.Unmarshal([]byte(r.body), &out); r.status != 200 || err != nil {
			t.Fatalf("%d %s: %v", r.status, r.body, err)
		}
		return out
	}
	for _, c := range []struct {
		step    *template.BuildError
		number  string
		message string
	}{
		{&template.BuildError{Step: "RUN make", Line: 9, Message: "line 9: exit code 2", Tail: []string{"cc: no"}}, "1", "step 1: RUN make: exit code 2\ncc: no"},
		{&template.BuildError{Step: "RUN x", Line: 3, Message: "line 3: exit code 2"}, "base", "RUN x: exit code 2"},
		{&template.BuildError{Step: "FROM y", Message: "not ready"}, "base", "FROM y: not ready"},
		{&template.BuildError{Message: "it was cancelled"}, "finalize", "it was cancelled"},
	} {
		if _, err := b.db.UpdateTemplate(t.Context(), tpl, nil, func(t *template.Template) error {
			t.Status, t.BuildError, t.QueuedAt = template.Failed, c.step, time.Time{}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if s := read(0); s.Status != "error" || s.Reason == nil || s.Reason.Step != c.number ||
			s.Reason.Message != c.message {
			t.Errorf("%+v is told as %+v", c.step, s.Reason)
		}
		if c.number != "1" {
			continue
		}
		var all []entry
		for {
			s := read(len(all))
			if all = append(all, s.LogEntries...); len(s.LogEntries) == 0 {
				break
			}
			if len(s.LogEntries) > 100 || len(s.Logs) != len(s.LogEntries) {
				t.Fatalf("%d entries, %d lines", len(s.LogEntries), len(s.Logs))
			}
		}
		end := []entry{{"debug", "step 1: load build definition from Dockerfile", ""}, {"info", "step 2: FROM base", "base"},
			{"warn", "warning: no registry answers", ""}, {"error", "RUN make: exit code 2", "1"}}
		if diff := cmp.Diff(end, all[250:]); diff != "" || all[0] != (entry{"info", "line 0", "1"}) {
			t.Errorf("the entries begin with %v and end with (-want +got):\n%s", all[0], diff)
		}
	}
	for _, query := range []string{"logsOffset=x", "logsOffset=-1", "limit=-1"} {
		if r := b.call("GET", fmt.Sprintf("/templates/%s/builds/%s/status?%s", tpl, build, query), ""); r.status != 400 {
			t.Errorf("%s: %d %s", query, r.status, r.body)
		}
	}
}

// TestUploadsAreSigned checks that only the URL that the server gave takes files, for its
// key and its hash alone.
func TestUploadsAreSigned(t *testing.T) {
	b := newBuilds(t)
	hash, other := strings.Repeat("1", 64), strings.Repeat("2", 64)
	_, good := b.link(b.builder, hash)
	data := tarOf(t, "x", "x")
	u, err := url.Parse(good)
	if err != nil {
		t.Fatal(err)
	}
	with := func(name, value string) string {
		q := u.Query()
		q.Set(name, value)
		return u.Path + "?" + q.Encode()
	}
	key, until := u.Query().Get("key"), fmt.Sprint(time.Now().Add(-time.Second).Unix())
	later := fmt.Sprint(time.Now().Add(time.Minute).Unix())
	for name, path := range map[string]string{
		"no signature": u.Path, "another hash": strings.Replace(good, hash, other, 1), "another key": with("key", "key_other"),
		"a later end": with("expires", "99999999999"), "no end": with("expires", ""), "a wrong signature": with("signature", strings.Repeat("0", 40)),
		"expired":   u.Path + "?" + url.Values{"key": {key}, "expires": {until}, "signature": {b.handler.uploadSum(key, hash, until)}}.Encode(),
		"of no key": u.Path + "?" + url.Values{"key": {"key_none"}, "expires": {later}, "signature": {b.handler.uploadSum("key_none", hash, later)}}.Encode(),
	} {
		if r := b.send("PUT", path, data); r.status != 401 {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	for _, hash := range []string{"x", strings.Repeat("A", 64), "..%2f..%2fx", strings.Repeat("0", 65)} {
		if r := b.call("GET", "/templates/tpl_x/files/"+hash, ""); r.status != 400 {
			t.Errorf("files/%s: %d %s", hash, r.status, r.body)
		}
	}
	if r := b.send("PUT", good, strings.Repeat("no archive", 100)); r.status != 400 {
		t.Errorf("no archive: %d %s", r.status, r.body)
	}
	if r := b.send("PUT", good, data+strings.Repeat("\x00", contextLimit)); r.status != 413 {
		t.Errorf("too much: %d %s", r.status, r.body)
	}
	if present, _ := b.link(b.builder, hash); present {
		t.Error("a refused upload is there")
	}
	if r := b.send("PUT", good, data); r.status != 204 {
		t.Errorf("the URL itself: %d %s", r.status, r.body)
	}
	r := b.send("GET", "/templates/tpl_x/files/"+hash, "", "X-API-Key", b.builder, "X-Forwarded-Proto", "https")
	if text, _ := r.json["url"].(string); !strings.HasPrefix(text, "https://") {
		t.Errorf("behind TLS the URL is %s", text)
	}
}

// TestUploadsEndWithTheirKey checks that a URL for an upload is worth nothing once the key that it was
// made for is revoked, also for an upload that has begun.
func TestUploadsEndWithTheirKey(t *testing.T) {
	b := newBuilds(t)
	hash, data := strings.Repeat("1", 64), tarOf(t, "x", "x")
	revoke := func(secret string) {
		t.Helper()
		who, err := b.auth.Authenticate(t.Context(), secret)
		if err == nil {
			err = b.auth.RevokeKey(t.Context(), who, who.Key.ID)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	first, second := b.newKey(auth.TemplatesWrite), b.newKey(auth.TemplatesWrite)
	_, before := b.link(first, hash)
	revoke(first)
	if r := b.send("PUT", before, data); r.status != 401 {
		t.Errorf("begun after its key was revoked: %d %s", r.status, r.body)
	}
	_, during := b.link(second, hash)
	body, rest := io.Pipe()
	request, err := http.NewRequestWithContext(t.Context(), "PUT", b.url+during, body)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		// These fail only if the server answers too early, which the status shows.
		_, _ = io.WriteString(rest, data[:len(data)/2])
		revoke(second)
		_, _ = io.WriteString(rest, data[len(data)/2:])
		_ = rest.Close()
	}()
	r, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != 401 {
		t.Errorf("ended after its key was revoked: %d", r.StatusCode)
	}
	if present, _ := b.link(b.builder, hash); present {
		t.Error("an upload of a revoked key is there")
	}
}

// TestRefusedBuilds checks what a build is refused for.
func TestRefusedBuilds(t *testing.T) {
	b := newBuilds(t)
	for body, status := range map[string]int{
		`{}`: 400, `{"name":"a b"}`: 400, `{"name":"base"}`: 409, `{"name":"x","cpuCount":64}`: 400, `{"name":"x","cpuCount":-1}`: 400,
		`{"name":"x","memoryMB":513}`: 400, `{"name":"x","minFreeDiskMb":99999999}`: 400, `{"name":"x:v 1"}`: 400, `{"name":"x","tags":["a/b"]}`: 400,
		`{"name":"x","ofTheFuture":1}`: 501, `{"alias":"x","teamID":"t"}`: 202, `{"name":"x:default","tags":["default"]}`: 202,
	} {
		if r := b.call("POST", "/v3/templates", body); r.status != status {
			t.Errorf("%s: %d %s, want %d", body, r.status, r.body, status)
		}
	}
	tpl, build := b.announce(`{"name":"x"}`)
	path := fmt.Sprintf("/v2/templates/%s/builds/%s", tpl, build)
	for body, status := range map[string]int{
		`{}`: 400, `{"fromImage":"a","fromTemplate":"b"}`: 400, `{"fromTemplate":"none"}`: 404, `{"fromTemplate":"a\nRUN id"}`: 404,
		`{"fromImage":"a\nRUN id"}`: 400, `{"fromImage":"$X"}`: 400, `{"fromImage":"a AS b"}`: 400, `{"fromImage":"--platform=x"}`: 400,
		`{"fromTemplate":"base","startCmd":"s","readyCmd":"sleep 45.1"}`:            400,
		`{"fromImage":"a","fromImageRegistry":{"type":"aws","awsAccessKeyId":"x"}}`: 400, `{"fromImage":"a","fromImageRegistry":{"type":"registry"}}`: 400,
		`{"fromTemplate":"base","steps":[{"type":"RUN","args":["a"],"new":1}]}`:                                                           501,
		`{"fromTemplate":"base","startCmd":"` + strings.Repeat("x", 1<<17) + `"}`:                                                         400,
		`{"fromTemplate":"base","startCmd":"x","readyCmd":"a\u0000b"}`:                                                                    400,
		`{"fromTemplate":"base","steps":[` + strings.Repeat(`{"type":"RUN","args":["true"]},`, 1000) + `{"type":"RUN","args":["true"]}]}`: 400,
	} {
		if r := b.call("POST", path, body); r.status != status {
			t.Errorf("%.200s: %d %s, want %d", body, r.status, r.body, status)
		}
	}
	for steps, want := range map[string]string{
		`{"type":"ADD","args":["a","b"]}`:                                 "step 2: ADD: its type must be",
		`{"type":"COPY","args":["a","b"],"filesHash":"../../x"}`:          "step 2: COPY: must be 64",
		`{"type":"COPY","args":["a","b"]}`:                                "step 2: COPY: has no filesHash",
		`{"type":"RUN","args":["a\u0000"]}`:                               "step 2: RUN: its arguments must be text",
		`{"type":"RUN\nRUN id","args":["a"]}`:                             "step 2: RUN\nRUN id: its type must be",
		`{"type":"` + strings.Repeat("x", 10_000) + `","args":["a","b"]}`: "step 2: " + strings.Repeat("x", 20) + ": its",
	} {
		b.wantFailed(`{"fromTemplate":"base","steps":[{"type":"RUN","args":["true"]},`+steps+`]}`, "2", want)
	}
	if _, err := b.templates.Get(t.Context(), b.org.Org.ID, "x"); err == nil {
		t.Error("a refused build made a template")
	}
	for _, other := range []string{"/v2/templates/tpl_none/builds/" + build, "/v2/templates/" + tpl + "/builds/bld_none"} {
		if r := b.call("POST", other, `{"fromTemplate":"base"}`); r.status != 404 {
			t.Errorf("%s: %d %s", other, r.status, r.body)
		}
	}
	if r := b.send("POST", path, `{"fromTemplate":"base"}`, "X-API-Key", b.other); r.status != 404 {
		t.Errorf("another organization: %d %s", r.status, r.body)
	}
	if r := b.call("POST", path, `{"fromTemplate":"base"}`); r.status != 202 {
		t.Errorf("after all of it: %d %s", r.status, r.body)
	}
	if r := b.call("POST", path, `{"fromTemplate":"base"}`); r.status != 409 {
		t.Errorf("once more: %d %s", r.status, r.body)
	}
}

// TestBases checks what templates are made from, and how they start.
func TestBases(t *testing.T) {
	b := newBuilds(t)
	ctx, org := t.Context(), b.org.Org.ID
	serving := template.Template{ID: "tpl_" + strings.Repeat("s", 20), OrgID: org, Name: "serving_",
		Status: template.Ready, Version: 1, CreatedAt: time.Now().UTC(),
		Shape: sandbox.Shape{Image: strings.Repeat("ab", 32), User: "www", Egress: sandbox.Egress{Mode: sandbox.AllowAll},
			Start: sandbox.Start{Args: []string{"serve"}, Ready: &sandbox.Ready{Port: 80}}}}
	if err := b.db.InsertTemplate(ctx, serving, nil, 0); err != nil {
		t.Fatal(err)
	}
	type result struct {
		Ref, User        string
		Account, Foreign bool
		Start            string
		Ready            *sandbox.Ready
		Instead          string
		Credentials      *template.Credentials
	}
	for body, want := range map[string]result{
		`{"fromTemplate":"base"}`:                                                                   {Ref: "base", User: "root", Account: true},
		`{"fromImage":"e2bdev/base"}`:                                                               {Ref: "base", User: "root", Account: true},
		`{"fromImage":"docker.io/e2bdev/base:latest","readyCmd":"true"}`:                            {Ref: "base", User: "root", Account: true},
		`{"fromTemplate":"mine:default","startCmd":"s","readyCmd":"sleep 20"}`:                      {Ref: "mine", User: "root", Start: "s", Ready: &sandbox.Ready{Command: `read -r up rest </proc/uptime && [ "${up%.*}" -ge 21 ]`}},
		`{"fromTemplate":"mine","startCmd":"s","readyCmd":"curl x"}`:                                {Ref: "mine", User: "root", Start: "s", Ready: &sandbox.Ready{Command: "curl x"}},
		`{"fromTemplate":"mine","startCmd":"s","readyCmd":"ss -tuln | grep :80"}`:                   {Ref: "mine", User: "root", Start: "s", Ready: &sandbox.Ready{Port: 80}},
		`{"fromTemplate":"serving_"}`:                                                               {Ref: serving.ID, User: "www", Start: "the image's", Ready: serving.Start.Ready},
		`{"fromTemplate":"serving_","readyCmd":"r"}`:                                                {Ref: serving.ID, User: "www", Start: "the image's", Ready: &sandbox.Ready{Command: "r"}},
		`{"fromImage":"debian:12"}`:                                                                 {Ref: "debian:12", Account: true, Foreign: true, Instead: "base"},
		`{"fromImage":"docker.io/library/python:3.13"}`:                                             {Ref: "docker.io/library/python:3.13", Account: true, Foreign: true, Instead: "python"},
		`{"fromImage":"example.com:5000/python:3"}`:                                                 {Ref: "example.com:5000/python:3", Account: true, Foreign: true},
		`{"fromImage":"a/b","fromImageRegistry":{"type":"registry","username":"u","password":"p"}}`: {Ref: "a/b", Account: true, Foreign: true, Credentials: &template.Credentials{Registry: "docker.io", Username: "u", Password: "p"}},
		`{"fromImage":"eu-docker.pkg.dev/a","fromImageRegistry":{"type":"gcp","serviceAccountJson":"{}"}}`: {
			Ref: "eu-docker.pkg.dev/a", Account: true, Foreign: true,
			Credentials: &template.Credentials{Registry: "eu-docker.pkg.dev", Username: "_json_key", Password: "{}"}},
		`{"fromImage":"12.dkr.ecr.us-west-1.amazonaws.com/a:1","fromImageRegistry":` + aws("k", "s", "us-west-1") + `}`: {
			Ref: "12.dkr.ecr.us-west-1.amazonaws.com/a:1", Account: true, Foreign: true,
			Credentials: &template.Credentials{Registry: "12.dkr.ecr.us-west-1.amazonaws.com", Username: "k",
				Password: "s", AWSRegion: "us-west-1"}},
	} {
		var in buildBody
		if err := json.Unmarshal([]byte(body), &in); err != nil {
			t.Fatal(err)
		}
		base, request, err := b.handler.base(ctx, org, in)
		if err != nil {
			t.Errorf("%s: %v", body, err)
			continue
		}
		got := result{Ref: base.Ref, User: base.User, Account: base.Account, Foreign: base.Foreign, Start: "the image's",
			Ready: request.Ready, Credentials: request.Credentials}
		if request.StartCommand != nil {
			got.Start = *request.StartCommand
		}
		for _, name := range request.Instead {
			got.Instead = name
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", body, diff)
		}
	}
}

// aws returns the credentials for a registry of AWS as clients send them.
func aws(key, secret, region string) string {
	return fmt.Sprintf(`{"type":"aws","awsAccessKeyId":%q,"awsSecretAccessKey":%q,"awsRegion":%q}`, key, secret, region)
}

// TestCredentialsThatAreRefused checks that keys of AWS go to no registry of others, and that each error
// names its field.
func TestCredentialsThatAreRefused(t *testing.T) {
	const host = "12.dkr.ecr.eu-west-1.amazonaws.com"
	for _, c := range []struct{ image, registry, field string }{
		{host + "/a", aws("", "s", "eu-west-1"), "fromImageRegistry.awsAccessKeyId"},
		{host + "/a", aws("k", "", "eu-west-1"), "fromImageRegistry.awsSecretAccessKey"},
		{host + "/a", aws("k", "s", "eu-west-2"), "fromImageRegistry.awsRegion"},
		{host + "/a", aws("k", "s", ""), "fromImageRegistry.awsRegion"},
		{"a", aws("k", "s", "eu-west-1"), "fromImage"},
		{"12.dkr.ecr.eu-west-1.amazonaws.com.example.com/a", aws("k", "s", "eu-west-1"), "fromImage"},
		{"x.12.dkr.ecr.eu-west-1.amazonaws.com/a", aws("k", "s", "eu-west-1"), "fromImage"},
		{"12.dkr.ecr.eu/west-1.amazonaws.com/a", aws("k", "s", "eu/west-1"), "fromImage"},
		{host + ":444/a", aws("k", "s", "eu-west-1"), "fromImage"},
		{host + "/a", `{"type":"azure"}`, "fromImageRegistry.type"},
	} {
		var in registryBody
		if err := json.Unmarshal([]byte(c.registry), &in); err != nil {
			t.Fatal(err)
		}
		got, err := registryCredentials(c.image, &in)
		if f := fault.As(err); got != nil || f == nil || f.Kind != fault.Invalid || f.Field != c.field {
			t.Errorf("%s with %s: %v, %v; want the field %s", c.image, c.registry, got, err, c.field)
		}
	}
}

func TestSizes(t *testing.T) {
	sizes := []sandbox.Size{{Name: "s1", VCPUs: 1, MemoryMB: 512}, {Name: "s4", VCPUs: 4, MemoryMB: 2048}, {Name: "s2",
		VCPUs: 2, MemoryMB: 1024},
		{Name: "m1", VCPUs: 1, MemoryMB: 2048}}
	for _, c := range []struct {
		cpus, memory int
		want         string
	}{{0, 0, ""}, {1, 0, "s1"}, {2, 1024, "s2"}, {1, 1100, "m1"}, {3, 100, "s4"}, {0, 2048, "m1"}, {2, 0, "s2"}} {
		if got, err := sizeFor(sizes, c.cpus, c.memory); err != nil || got != c.want {
			t.Errorf("%d CPUs and %d MiB give %q, %v; want %q", c.cpus, c.memory, got, err, c.want)
		}
	}
	if _, err := sizeFor(sizes, 8, 1); err == nil || !strings.Contains(err.Error(), "s4") {
		t.Errorf("more than there is: %v", err)
	}
}

// TestRegistryBodyIsRead fails for a field of the credentials that no type of them uses.
func TestRegistryBodyIsRead(t *testing.T) {
	used := map[string]bool{"Type": true}
	for kind, ref := range map[string]string{"registry": "ghcr.io/x", "gcp": "gcr.io/x",
		"aws": "123456789012.dkr.ecr.us-east-1.amazonaws.com/x"} {
		full := func() (in registryBody) {
			caytest.Fill(&in, 7)
			in.Type, in.AWSRegion = kind, "us-east-1"
			return in
		}
		in := full()
		want, err := registryCredentials(ref, &in)
		if err != nil {
			t.Fatal(err)
		}
		caytest.EachWithout(full, func(name string, without registryBody) {
			got, err := registryCredentials(ref, &without)
			used[name] = used[name] || err != nil || *got != *want
		})
	}
	caytest.EachWithout(func() (in registryBody) { return in }, func(name string, _ registryBody) {
		if !used[name] {
			t.Errorf("no type of credentials uses %s", name)
		}
	})
}
