package cli

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strings"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// aTemplate returns the fake server's template of a name, if it has one.
func (f *fakeAPI) aTemplate(name string) (cay.Template, bool) {
	at := time.Now().UTC().Add(-3 * time.Hour)
	t := cay.Template{ID: "tpl_" + name, Name: name, Description: "with " + name, Builtin: true, Status: "ready",
		Version: 2, Env: cay.Env{},
		Egress: cay.Egress{Mode: "allow_all"}, CreatedAt: at, UpdatedAt: at, BuiltAt: &at, ImageSizeBytes: new(int64(91_500_000)), Source: new("debian:bookworm")}
	switch name {
	case "python":
	case "broken":
		t.Status, t.Version, t.BuildError = "failed", 0, &cay.BuildError{Step: new("step 2"), Message: "exit status 100",
			ExitCode: new(100), Tail: []string{"E: no\x1b[2J"}}
	case "slow":
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.building--; f.building > 0 {
			t.Status, t.Version, t.Progress = "building", 0, new(fmt.Sprintf("step %d of 3", 3-f.building))
		}
	default:
		return t, false
	}
	return t, true
}

func (f *fakeAPI) templates(w http.ResponseWriter, _ *http.Request, _ []byte) {
	python, _ := f.aTemplate("python")
	broken, _ := f.aTemplate("broken")
	answer(w, 200, cay.TemplateList{Templates: []cay.Template{python, broken}})
}

func (f *fakeAPI) template(w http.ResponseWriter, r *http.Request, _ []byte) {
	t, ok := f.aTemplate(r.PathValue("name"))
	if !ok {
		refuse(w, 404, "template_not_found", "", "there is no template "+t.Name)
		return
	}
	answer(w, 200, t)
}

// fakeForm returns the record of a multipart body: the JSON and the files of the tar.
func fakeForm(body []byte, boundary string) string {
	parts := multipart.NewReader(bytes.NewReader(body), boundary)
	var out []string
	for {
		part, err := parts.NextPart()
		if err != nil {
			return strings.Join(out, " ")
		}
		b, err := io.ReadAll(part)
		if err != nil {
			return err.Error()
		}
		if part.FormName() != "context" {
			out = append(out, strings.TrimSpace(string(b)))
			continue
		}
		for files := tar.NewReader(bytes.NewReader(b)); ; {
			h, err := files.Next()
			if err != nil {
				break
			}
			text, err := io.ReadAll(files)
			if err != nil {
				return err.Error()
			}
			out = append(out, fmt.Sprintf("%s %o %d:%d %s%q", h.Name, h.Mode, h.Uid, h.Gid, h.Linkname, text))
		}
	}
}

func (f *fakeAPI) createTemplate(w http.ResponseWriter, r *http.Request, body []byte) {
	if _, params, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err == nil && params["boundary"] != "" {
		body = []byte(fakeForm(body, params["boundary"]))
	}
	var in cay.CreateTemplateRequest
	if err := json.NewDecoder(bytes.NewReader(body)).Decode(&in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	switch {
	case in.Name == "taken":
		refuse(w, 409, "template_exists", "", `there is a template "taken" already`)
	case in.Debian != nil && slices.Contains(in.Debian.Packages, "-x"):
		refuse(w, 400, "invalid_debian", "debian.packages[0]", `"-x" is not the name of a package`)
	case in.Ready != nil && in.Ready.Port != nil && *in.Ready.Port > 65535:
		refuse(w, 400, "invalid_ready", "ready.port", "must be between 1 and 65535")
	default:
		answer(w, 202, cay.Template{ID: "tpl_" + in.Name, Name: in.Name, Status: "pending", Env: cay.Env{}})
	}
}

func (f *fakeAPI) rebuildTemplate(w http.ResponseWriter, r *http.Request, _ []byte) {
	answer(w, 202, cay.Template{ID: "tpl_" + r.PathValue("name"), Name: r.PathValue("name"), Status: "pending",
		Env: cay.Env{}})
}

// follow streams the log of a build. The log of the template flaky breaks off after each line, and that of endless does
// not end.
func (f *fakeAPI) follow(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.PathValue("name"), "tpl_")
	w.Header().Set("Content-Type", "text/event-stream")
	fmt.Fprint(w, ":\n\n")
	event := func(id, event string, v any) {
		b, _ := json.Marshal(v) // a type of the client
		fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", id, event, b)
		w.(http.Flusher).Flush()
	}
	lines := []cay.TemplateLogLine{{Text: "step 1 of 2: FROM python (cached)", Step: new(1), Heading: true},
		{Text: "step 2 of 2: RUN make", Step: new(2), Heading: true},
		{Text: "cc\x1b[2J main.c", Step: new(2)}}
	for i, l := range lines {
		id := fmt.Sprint("bld_1.", i)
		if last := r.Header.Get("Last-Event-ID"); last != "" && id <= last {
			continue
		}
		event(id, "line", l)
		if name == "flaky" {
			return
		}
	}
	if name == "endless" {
		<-r.Context().Done()
		return
	}
	t := cay.Template{ID: "tpl_" + name, Name: name, Status: "ready", Version: 2, Env: cay.Env{},
		Source: new("python"), ImageSizeBytes: new(int64(5_000_000))}
	if name == "bad" {
		t.Status, t.Version = "failed", 1
		t.BuildError = &cay.BuildError{Step: new("RUN make"), ExitCode: new(2),
			Message: "the command ended with exit code 2", Tail: []string{"cc: no\x1b[2J"}}
	}
	event("", "end", t)
}

func (f *fakeAPI) logs(w http.ResponseWriter, r *http.Request, _ []byte) {
	if r.Header.Get("Accept") == "text/event-stream" {
		f.follow(w, r)
		return
	}
	answer(w, 200, map[string]any{"lines": []cay.TemplateLogLine{{Time: time.Now(), Text: "Get:1 bookworm"},
		{Time: time.Now(), Text: "done\x1b]0;evil\a"}}})
}
