package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	cay "github.com/cayhq/cay/sdk/go"
)

// TestOddNames lists, reads, writes and removes files whose names are not UTF-8, with the encoded
// names that a listing gives.
func TestOddNames(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.want(id, `mkdir /tmp/n; cd /tmp/n; printf 'a' >"$(printf 'caf\351 & +#?%%=\377')"; mkdir "$(printf 'd\376')"; `+
		`printf b >"$(printf 'd\376/e\303')"; printf c >"café %E9"`)
	files := "/v1/sandboxes/" + id + "/files"
	type entry struct {
		Path    string `json:"path"`
		Encoded string `json:"path_encoded"`
		Type    string `json:"type"`
	}
	list := func(path string, depth int) (found []entry) {
		t.Helper()
		status, body := s.call("GET", fmt.Sprintf("%s/list?path=%s&depth=%d", files, path, depth), nil)
		var all struct{ Entries []entry }
		if err := json.Unmarshal(body, &all); status != 200 || err != nil {
			t.Fatalf("listing %s: %d %s, %v", path, status, body, err)
		}
		return all.Entries
	}
	want := map[string]string{"/tmp/n/caf\uFFFD & +#?%=\uFFFD": "a", "/tmp/n/d\uFFFD": "", "/tmp/n/d\uFFFD/e\uFFFD": "b",
		"/tmp/n/café %E9": "c"}
	all := list("/tmp/n", 2)
	for _, e := range all {
		text, ok := want[e.Path]
		if !ok || (e.Encoded == "") != (e.Path == "/tmp/n/café %E9") {
			t.Errorf("listed: %+v", e)
		}
		if e.Type != "file" || e.Encoded == "" {
			continue
		}
		if status, body := s.call("GET", files+"?path="+e.Encoded, nil); status != 200 || string(body) != text {
			t.Errorf("%s: %d %s, want %q", e.Encoded, status, body, text)
		}
		if status, body := s.send("PUT", files+"?path="+e.Encoded, "application/octet-stream",
			strings.NewReader("new")); status != 204 {
			t.Errorf("writing %s: %d %s", e.Encoded, status, body)
		}
		if status, body := s.call("GET", files+"/stat?path="+e.Encoded, nil); status != 200 ||
			!strings.Contains(string(body), `"path_encoded":`) {
			t.Errorf("asking for %s: %d %s", e.Encoded, status, body)
		}
		if status, body := s.call("GET", files+"?path="+e.Encoded, nil); status != 200 || string(body) != "new" {
			t.Errorf("%s afterwards: %d %s", e.Encoded, status, body)
		}
	}
	if len(all) != len(want) {
		t.Errorf("listed: %+v", all)
	}
	for _, e := range all {
		if e.Encoded == "" || strings.Count(e.Path, "/") > 3 {
			continue
		}
		if e.Type == "directory" {
			if below := list(e.Encoded, 1); len(below) != 1 {
				t.Errorf("below %s: %+v", e.Encoded, below)
			}
		}
		if status, body := s.call("DELETE", files+"?recursive=true&path="+e.Encoded, nil); status != 204 {
			t.Errorf("removing %s: %d %s", e.Encoded, status, body)
		}
	}
	if left := list("/tmp/n", 2); len(left) != 1 {
		t.Errorf("left: %+v", left)
	}
}

// TestWatchEndsWithItsDirectory removes a directory that is watched.
func TestWatchEndsWithItsDirectory(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.want(id, "mkdir -p /srv/w/sub")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	resp, err := s.visit(ctx, "GET", "/v1/sandboxes/"+id+"/files/watch?path=/srv/w&recursive=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	for line := ""; line != "event: ready\n"; {
		if line, err = in.ReadString('\n'); err != nil {
			t.Fatalf("the stream ends before it is ready: %q, %v", line, err)
		}
	}
	s.want(id, "rm -r /srv/w")
	told, err := io.ReadAll(in)
	if err != nil || !strings.Contains(string(told), `{"path":"/srv/w","type":"remove"}`) ||
		!strings.Contains(string(told), "event: error\n") || !strings.Contains(string(told), "file_not_found") {
		t.Errorf("the stream ends with %q, %v", told, err)
	}
}

// TestWhatIsAsked sends requests that real clients send: for a shell, for a range of lines, with an
// argument that is too long.
func TestWhatIsAsked(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	const line = "echo ${BASH_VERSION:+bash} $0"
	for shell, want := range map[string]string{"bash": "bash bash", "sh": "/bin/sh"} {
		if got := s.want(id, line, object{"shell": shell}); got != want {
			t.Errorf("%s: %q", shell, got)
		}
		p, err := s.api().StartProcess(t.Context(), id, requestOf[cay.StartProcessRequest](t,
			object{"command": line + "; echo $TERM", "shell": shell, "pty": object{"cols": 80, "rows": 24}}))
		if err != nil {
			t.Fatal(err)
		}
		pid := strconv.Itoa(p.PID)
		if p, err = s.api().WaitProcess(t.Context(), id, pid, patience); err != nil || p.Exit == nil ||
			p.Exit.ExitCode != 0 {
			t.Errorf("the process ends with %s, %v", jsonOf(p), err)
		}
		out, err := s.api().ProcessOutput(t.Context(), id, pid, 0)
		if err != nil || !strings.Contains(jsonOf(out), want) || !strings.Contains(jsonOf(out), "xterm-256color") {
			t.Errorf("%s: %s, %v", shell, jsonOf(out), err)
		}
	}
	most := strings.Repeat("x", 128<<10-1)
	if r := s.exec(id, "", object{"command": nil,
		"args": []string{"sh", "-c", "echo ${#1}", "sh", most}}); r.Stdout != "131071\n" {
		t.Errorf("the longest argument: %+v", r)
	}
	var many []string
	for range 18 {
		many = append(many, most)
	}
	_, err := s.api().Execute(t.Context(), id, cay.ExecuteRequest{Args: append([]string{"true"}, many...)})
	if e := refusal(err); e == nil || e.Status != 400 || !strings.Contains(e.Detail, "2097152") {
		t.Errorf("more than all arguments may have: %v", err)
	}
	req, err := http.NewRequest("GET", s.url+"/v1/sandboxes/"+id+"/files?path=/etc/passwd", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.key)
	req.Header.Set("Range", "lines=1-2")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); resp.StatusCode != 200 || err != nil ||
		!strings.HasPrefix(string(got), "root:") {
		t.Errorf("a range of an unknown unit: %d %q, %v", resp.StatusCode, got, err)
	}
}
