package e2e

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// e2bBuild is a build that was begun through E2B's API.
type e2bBuild struct {
	s   *server
	key string
	url string // of the template's builds and this one
}

// e2bBuildState is the state of a build as clients read it.
type e2bBuildState struct {
	Status     string
	LogEntries []struct{ Message string }
	Reason     struct{ Step, Message string }
}

// beginE2BBuild announces a build and begins it.
func (s *server) beginE2BBuild(key, name string, request object) e2bBuild {
	s.t.Helper()
	status, body := s.e2bCall(key, "POST", "/v3/templates", jsonOf(object{"name": name}))
	if status != 202 {
		s.t.Fatalf("announcing: %d %s", status, body)
	}
	url := fmt.Sprintf("/templates/%s/builds/%s", text(body, "templateID"), text(body, "buildID"))
	if status, body = s.e2bCall(key, "POST", "/v2"+url, jsonOf(request)); status != 202 {
		s.t.Fatalf("building: %d %s", status, body)
	}
	return e2bBuild{s, key, url}
}

// state returns the state of the build, with entries from an offset on.
func (b e2bBuild) state(offset int) (out e2bBuildState) {
	b.s.t.Helper()
	status, body := b.s.e2bCall(b.key, "GET", fmt.Sprintf("%s/status?logsOffset=%d", b.url, offset), "")
	if err := json.Unmarshal(body, &out); status != 200 || err != nil {
		b.s.t.Fatalf("the state: %d %s", status, body)
	}
	return out
}

// until waits until the build has one of the states.
func (b e2bBuild) until(want ...string) e2bBuildState {
	b.s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) { // a poll with a deadline
		state := b.state(0)
		if slices.Contains(want, state.Status) {
			return state
		}
		if time.Now().After(deadline) {
			b.s.t.Fatalf("the build is not %s: %+v", want, state)
		}
	}
}

// uploadE2B uploads files under a hash, and returns the answer of the upload.
func (s *server) uploadE2B(key, hash string, data []byte) (status int, answer []byte) {
	s.t.Helper()
	status, body := s.e2bCall(key, "GET", "/templates/tpl_x/files/"+hash, "")
	to, found := strings.CutPrefix(text(body, "url"), s.url)
	if status != 201 || !found {
		s.t.Fatalf("asking for an upload: %d %s", status, body)
	}
	return s.e2bCall("", "PUT", to, string(data))
}

// hostileE2BBuilds makes the builds that no honest client makes. Each ends with an error at its step, and the
// server goes on.
func (s *server) hostileE2BBuilds(t *testing.T, key string) {
	s = s.in(t)
	many := make([]object, 1000)
	for i := range many {
		many[i] = object{"type": "ENV", "args": []string{fmt.Sprintf("A%d", i), "x"}}
	}
	end := s.beginE2BBuild(key, "many", object{"fromTemplate": "python", "steps": many}).until("ready", "error")
	if end.Status != "ready" {
		t.Errorf("a thousand steps: %+v", end.Reason)
	} else if got := s.inside("many", "env | grep -c ^A"); got != "1000" {
		t.Errorf("of a thousand variables %s are there", got)
	}
	s.hostileE2BUploads(t, key)

	// The beginning and the end of an endless log are kept.
	flood := s.beginE2BBuild(key, "flood", object{"fromTemplate": "python", "steps": []object{
		{"type": "RUN", "args": []string{"yes $(printf %0200d 0) | head -c 20000000; echo the last line; exit 3"}}}})
	if end = flood.until("ready", "error"); end.Status != "error" || end.Reason.Step != "1" ||
		!strings.Contains(end.Reason.Message, "the last line") {
		t.Errorf("a flood: %+v", end.Reason)
	}
	entries := 0
	for {
		some := flood.state(entries).LogEntries
		if entries += len(some); len(some) == 0 || entries > 20_000 {
			break
		}
	}
	if entries < 100 || entries > 20_000 {
		t.Errorf("a flood of 100,000 lines has %d entries", entries)
	}

	// Deleting a template ends its build.
	deleted := s.beginE2BBuild(key, "deleted", object{"fromTemplate": "python", "steps": []object{
		{"type": "RUN", "args": []string{"sleep 1000"}}}})
	deleted.until("building")
	if status, body := s.e2bCall(key, "DELETE", "/templates/deleted", ""); status != 204 {
		t.Errorf("deleting a template that is built: %d %s", status, body)
	}
	if status, body := s.e2bCall(key, "GET", deleted.url+"/status", ""); status != 404 {
		t.Errorf("the build of a deleted template: %d %s", status, body)
	}
	end = s.beginE2BBuild(key, "after", object{"fromTemplate": "python"}).until("ready", "error")
	if end.Status != "ready" {
		t.Errorf("after all of it: %+v", end)
	}
}

// hostileE2BUploads uploads what is no archive of the files of its step, and builds with it.
func (s *server) hostileE2BUploads(t *testing.T, key string) {
	file := func(name string) *tar.Header { return &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644} }
	directory := &tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o755}
	link := &tar.Header{Name: "a/out", Typeflag: tar.TypeSymlink, Linkname: "/etc", Mode: 0o777}
	device := &tar.Header{Name: "a/sda", Typeflag: tar.TypeBlock, Devmajor: 8, Mode: 0o644}
	archive := func(headers ...*tar.Header) []byte { return tarOf(t, nil, headers...) }
	for i, c := range []struct {
		what, from string
		data       []byte
		status     int    // of the upload
		step       string // of the build's error
		reason     string
	}{
		{"a path above", "a", archive(directory, file("a/../../above")), 204, "1", "above"},
		{"an absolute path", "a", archive(directory, file("/etc/cay")), 204, "1", "etc/cay"},
		{"a device", "a", archive(directory, device), 204, "1", "sda"},
		{"files of another hash", "a", archive(file("b")), 204, "1", "a"},
		{"no archive", "a", []byte(strings.Repeat("no archive", 100)), 400, "1", "not uploaded"},
		{"nothing", "a", nil, 400, "1", "not uploaded"},
		{"a path that leads out", "../a", archive(file("a")), 204, "1", "leads out"},
		{"a link that leads out", "a", archive(directory, link, file("a/out/cay")), 204, "finalize", "0/out/cay"},
	} {
		hash := fmt.Sprintf("%064x", i)
		if status, body := s.uploadE2B(key, hash, c.data); status != c.status {
			t.Errorf("%s: the upload: %d %s, want %d", c.what, status, body, c.status)
		}
		end := s.beginE2BBuild(key, "hostile", object{"fromTemplate": "python", "steps": []object{
			{"type": "COPY", "args": []string{c.from, "/to/", "", ""}, "filesHash": hash}}}).until("ready", "error")
		if end.Status != "error" || end.Reason.Step != c.step || !strings.Contains(end.Reason.Message, c.reason) {
			t.Errorf("%s: %+v", c.what, end)
		}
	}
}
