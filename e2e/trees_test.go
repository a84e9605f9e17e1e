package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// packed packs entries into an archive. Linkname holds a link's target or a file's content.
func packed(t *testing.T, entries ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		content := ""
		if h.Typeflag == 0 {
			h.Typeflag, content = tar.TypeReg, h.Linkname
			h.Linkname, h.Size = "", int64(len(content))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestFileCalls(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	base := "/v1/sandboxes/" + id + "/files"
	for _, step := range []struct {
		method, path string
		body         object
		status       int
		field, value string
	}{
		{"POST", "/mkdir", object{"path": "/home/user/a/b", "mode": "0700", "owner": "user"}, 200, "mode", "0700"},
		{"POST", "/mkdir", object{"path": "/home/user/a/b", "mode": "0755"}, 200, "mode", "0700"}, // an existing directory does not change
		{"GET", "/stat?path=/home/user/a", nil, 200, "owner", "user"},
		{"GET", "/stat?path=/proc/self", nil, 200, "type", "symlink"},
		{"GET", "/stat?path=/dev/null", nil, 200, "type", "other"},
		{"GET", "/stat?path=/etc/passwd/x", nil, 404, "code", "file_not_found"},
		{"POST", "/mkdir", object{"path": "/etc/passwd"}, 400, "code", "path_not_directory"},
		{"POST", "/mkdir", object{"path": "/etc/passwd/x"}, 400, "code", "path_not_directory"},
		{"POST", "/mkdir", object{"path": "/x", "owner": "nobody2"}, 400, "field", "owner"},
		{"POST", "/rename", object{"from": "/home/user/a", "to": "/srv/new/place"}, 200, "path", "/srv/new/place"},
		{"POST", "/rename", object{"from": "/home/user/a", "to": "/x"}, 404, "code", "file_not_found"},
		{"POST", "/rename", object{"from": "/etc/hostname", "to": "/etc/passwd"}, 409, "code", "path_exists"},
		{"POST", "/rename", object{"from": "/srv/new", "to": "/srv/new/place/x"}, 400, "field", "to"},
		{"POST", "/rename", object{"from": "/srv/new", "to": "/dev/shm/x"}, 400, "code", "invalid_path"},
		{"POST", "/rename", object{"from": "/proc/version", "to": "/x"}, 0, "", ""}, // the sandbox's kernel returns an error; it must not be a success
	} {
		status, body := s.call(step.method, base+step.path, step.body)
		if step.status == 0 {
			if status < 400 || status == 500 {
				t.Errorf("%v: %d %s", step.body, status, body)
			}
			continue
		}
		if status != step.status || text(body, step.field) != step.value {
			t.Errorf("%s %s %v: %d %s, want %d with %s %s", step.method, step.path, step.body, status, body, step.status,
				step.field, step.value)
		}
	}
	if got := s.want(id, "stat -c '%a %U' /srv/new/place/b /srv/new"); got != "700 user\n755 root" {
		t.Errorf("inside: %s", got)
	}
}

func TestTrees(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	base := "/v1/sandboxes/" + id + "/files/tar?path="
	put := func(path string, body io.Reader) (int, []byte) {
		t.Helper()
		return s.send("PUT", base+path, "application/x-tar", body)
	}
	t.Run("there and back", func(t *testing.T) {
		var many []tar.Header
		for i := range 2000 {
			many = append(many, tar.Header{Name: fmt.Sprintf("d%02d/f%d", i%50, i), Linkname: strings.Repeat("x", i), Uid: 4242,
				Gid: 4242})
		}
		many = append(many, tar.Header{Name: "run.sh", Linkname: "#!/bin/sh\n", Mode: 0o6755},
			tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "run.sh"})
		if status, body := put("/srv/many&owner=user", packed(t, many...)); status != 204 {
			t.Fatalf("%d %s", status, body)
		}
		if got := s.want(id,
			"cd /srv/many && find . -type f | wc -l && find . ! -user user | wc -l && stat -c %a run.sh && readlink link && "+
				"wc -c <d49/f1999"); got != "2001\n0\n755\nrun.sh\n1999" {
			t.Errorf("inside: %s", got)
		}
		resp, err := s.visit(context.Background(), "GET", base+"/srv/many", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		n, in := 0, tar.NewReader(resp.Body)
		for {
			h, err := in.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if n++; h.Name == "d49/f1999" && (h.Size != 1999 || h.Uname != "user") {
				t.Errorf("entry %+v", h)
			}
		}
		if n != 2000+50+2 {
			t.Errorf("got %d entries back", n)
		}
	})
	t.Run("hostile", func(t *testing.T) {
		// Without times, because those of /srv change.
		const outside = "ls -A / /etc; sha256sum /etc/passwd; stat -c '%a %U' /etc /etc/passwd"
		before := s.want(id, outside)
		for name, entries := range map[string][]tar.Header{
			"dots":            {{Name: "../../etc/evil", Linkname: "x"}},
			"absolute":        {{Name: "/etc/evil", Linkname: "x"}},
			"through a link":  {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, {Name: "l/evil", Linkname: "x"}},
			"relative links":  {{Name: "a", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "b", Typeflag: tar.TypeSymlink, Linkname: "a/../etc"}, {Name: "b/evil", Linkname: "x"}},
			"a hard link":     {{Name: "h", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}, {Name: "h", Linkname: "x"}},
			"a directory":     {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, {Name: "l/", Typeflag: tar.TypeDir, Mode: 0o777}},
			"a device":        {{Name: "d", Typeflag: tar.TypeBlock, Devmajor: 8}},
			"a sparse bomb":   {},
			"a file as a dir": {{Name: "f", Linkname: "x"}, {Name: "f/evil", Linkname: "x"}},
		} {
			body := packed(t, entries...)
			if name == "a sparse bomb" {
				body = sparseBomb()
			}
			status, answer := put("/srv/hostile", body)
			want := "400 invalid_tar"
			if name == "a sparse bomb" {
				want = "507 disk_full" // the disk is its limit, and it leaves nothing there
			}
			if got := fmt.Sprint(status, " ", text(answer, "code")); got != want || text(answer, "detail") == "" {
				t.Errorf("%s: %d %s, want %s", name, status, answer, want)
			}
			if left := s.want(id, "find /srv/hostile -size +1M"); left != "" {
				t.Errorf("%s left %s", name, left)
			}
			s.want(id, "rm -rf /srv/hostile")
		}
		if after := s.want(id, outside); after != before {
			t.Errorf("outside the directory something changed:\n%s\n%s", before, after)
		}
	})
	t.Run("refused and cut off", func(t *testing.T) {
		for path, want := range map[string]string{"/none": "404 file_not_found", "/etc/passwd": "400 path_not_directory",
			"": "400 invalid_path", "/a/../b": "400 invalid_path"} {
			status, body := s.call("GET", base+path, nil)
			if got := fmt.Sprint(status, " ", text(body, "code")); got != want {
				t.Errorf("GET %q: %s, want %s", path, got, want)
			}
		}
		if status, body := put("/etc/passwd", packed(t)); status != 400 || text(body, "code") != "path_not_directory" {
			t.Errorf("into a file: %d %s", status, body)
		}
		whole := packed(t, tar.Header{Name: "a", Linkname: "a"}, tar.Header{Name: "b",
			Linkname: strings.Repeat("b", 100_000)}).Bytes()
		if status, body := put("/srv/cut", bytes.NewReader(whole[:50_000])); status != 400 ||
			text(body, "code") != "invalid_tar" {
			t.Errorf("cut off: %d %s", status, body)
		}
		if got := s.want(id, "ls -A /srv/cut"); got != "a" {
			t.Errorf("the cut upload has left %q", got)
		}
		// A caller that leaves in the middle leaves no partial file.
		ctx, cancel := context.WithCancel(context.Background())
		r, w := io.Pipe()
		over := make(chan bool)
		go func() {
			defer close(over)
			_, _, _ = s.request(ctx, "PUT", base+"/srv/gone", "application/x-tar", r)
		}()
		if _, err := w.Write(whole[:60_000]); err != nil {
			t.Fatal(err)
		}
		cancel()
		_ = w.CloseWithError(io.ErrUnexpectedEOF) // net/http waits for a read that is under way
		<-over
		s.want(id, "for i in $(seq 400); do [ \"$(ls -A /srv/gone 2>/dev/null)\" = a ] && exit 0; sleep 0.05; done; "+
			"ls -lA /srv/gone; exit 1")
	})
	t.Run("a full disk", func(t *testing.T) {
		small := s.create(object{"disk_size_mb": 64})
		defer s.destroy(small)
		var big []tar.Header
		for i := range 10 {
			big = append(big, tar.Header{Name: fmt.Sprint(i), Linkname: strings.Repeat("x", 10<<20)})
		}
		status, body := s.send("PUT", "/v1/sandboxes/"+small+"/files/tar?path=/srv/big", "application/x-tar",
			packed(t, big...))
		if status != 507 || text(body, "code") != "disk_full" {
			t.Errorf("%d %s", status, body)
		}
		if got := s.want(small, "ls -A /srv/big | grep -c cay-upload; find /srv/big -type f ! -size 10M"); got != "0" {
			t.Errorf("half a file is there: %s", got)
		}
		s.alive(small)
	})
	s.alive(id)
}

// sparseBomb returns an archive of a KiB whose one file claims a size of 8 GiB less a byte, with
// holes, twice.
func sparseBomb() *bytes.Buffer {
	head := make([]byte, 512)
	copy(head, "bomb")
	copy(head[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00")
	head[156] = 'S'
	copy(head[257:], "ustar  \x00")
	copy(head[386:], "77777777777\x0000000000000\x00") // a piece of no bytes at the end
	copy(head[483:], "77777777777\x00")                // the real size
	copy(head[148:], "        ")
	sum := 0
	for _, c := range head {
		sum += int(c)
	}
	copy(head[148:], fmt.Sprintf("%06o\x00 ", sum))
	second := bytes.Clone(head)
	return bytes.NewBuffer(append(append(head, second...), make([]byte, 1024)...))
}

func TestWatch(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.want(id, "mkdir -p /srv/w/sub")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := s.visit(ctx, "GET", "/v1/sandboxes/"+id+"/files/watch?path=/srv/w&recursive=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	next := func() (event, data string) {
		t.Helper()
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Fatalf("the stream ended: %v", err)
			}
			name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch name {
			case "event":
				event = value
			case "data":
				return event, value
			}
		}
	}
	if event, _ := next(); resp.StatusCode != 200 || event != "ready" {
		t.Fatalf("%s, %s", resp.Status, event)
	}
	s.want(id, "cd /srv/w && echo x >sub/f && chmod 600 sub/f && mv sub/f g && rm g && "+
		"mkdir -p new/deep && sleep 0.5 && echo y >new/deep/h")
	seen := map[string]bool{}
	for last := ""; last != "write /srv/w/new/deep/h"; {
		_, data := next()
		var change struct{ Type, Path string }
		if err := json.Unmarshal([]byte(data), &change); err != nil {
			t.Fatal(err)
		}
		last = change.Type + " " + change.Path
		seen[last] = true
	}
	for _, want := range []string{"create /srv/w/sub/f", "write /srv/w/sub/f", "chmod /srv/w/sub/f", "rename /srv/w/sub/f",
		"create /srv/w/g", "remove /srv/w/g", "create /srv/w/new"} {
		if !seen[want] {
			t.Errorf("%q is not in %v", want, seen)
		}
	}
	// The stream ends with the sandbox.
	s.destroy(id)
	if _, err := io.Copy(io.Discard, in); ctx.Err() != nil {
		t.Errorf("the stream goes on: %v", err)
	}
	for path, want := range map[string]int{"/none": 409, "": 400} {
		if resp, err := s.visit(ctx, "GET", "/v1/sandboxes/"+id+"/files/watch?path="+path, nil); err != nil ||
			resp.StatusCode != want {
			t.Errorf("watching %q afterwards: %v, %v", path, resp, err)
		} else {
			resp.Body.Close()
		}
	}
	if resp, err := s.visit(ctx, "GET", "/v1/sandboxes/"+id+"/files/watch?path=/srv", nil,
		func(r *http.Request) { r.Header.Del("Authorization") }); err != nil || resp.StatusCode != 401 {
		t.Errorf("without a key: %v, %v", resp, err)
	}
}

// listing returns names, modes and contents of everything below a local directory.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := ""
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			what, err = os.Readlink(p)
		case d.Type().IsRegular():
			var b []byte
			b, err = os.ReadFile(p)
			what = string(b)
		}
		all = append(all, fmt.Sprintf("%s %s %.50q", rel, info.Mode(), what))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

// TestCopy copies in both directions with the rules of cp.
func TestCopy(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	top := t.TempDir()
	src := filepath.Join(top, "src")
	for name, content := range map[string]string{"a.txt": "a", "deep/er/b": strings.Repeat("b", 1<<20),
		"name with spaces: and ü": "c", "empty": ""} {
		p := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("deep/er/b", filepath.Join(src, "link")),
		os.Symlink("/nowhere", filepath.Join(src, "dangling")),
		os.Chmod(filepath.Join(src, "a.txt"), 0o755), syscall.Mkfifo(filepath.Join(src, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	cp := func(want int, args ...string) string {
		t.Helper()
		out, errOut, code := s.cli("", append([]string{"sandbox", "cp"}, args...)...)
		if code != want {
			t.Fatalf("cp %q: exit status %d, want %d: %s%s", args, code, want, out, errOut)
		}
		return errOut
	}
	cp(0, "-r", src, id+":/srv/new")          // the target does not exist: it becomes a copy
	cp(0, "-r", src, id+":/srv")              // the target exists: the copy goes into it
	cp(0, "-r", src+"/.", id+":/srv/flat/er") // the content of the directory
	want := s.want(id, "cd /srv/new && find . -type f -exec sha256sum {} + | sort; readlink link dangling; "+
		"stat -c %a a.txt")
	for _, place := range []string{"/srv/src", "/srv/flat/er"} {
		if got := s.want(id, "cd "+place+
			" && find . -type f -exec sha256sum {} + | sort; readlink link dangling; stat -c %a a.txt"); got != want {
			t.Errorf("%s is\n%s\nand /srv/new\n%s", place, got, want)
		}
	}
	if err := os.Remove(filepath.Join(src, "pipe")); err != nil {
		t.Fatal(err)
	}
	back := filepath.Join(top, "back")
	cp(0, "-r", id+":/srv/new", back)           // the target does not exist
	cp(0, "-r", id+":/srv/new", back)           // the copy goes into the target
	cp(0, "-r", id+":/srv/new/.", back+"/flat") // the content of the directory
	for _, place := range []string{"new", "flat"} {
		if got, want := listing(t, filepath.Join(back, place)), listing(t, src); got != want {
			t.Errorf("%s is\n%s\nand was\n%s", place, got, want)
		}
	}
	// Copies of single files.
	cp(0, filepath.Join(src, "a.txt"), id+":/srv/single")
	cp(0, filepath.Join(src, "a.txt"), id+":/srv/")
	cp(0, "--owner", "user", filepath.Join(src, "a.txt"), id+":/srv/made/for/")
	if got := s.want(id,
		"cat /srv/single /srv/a.txt /srv/made/for/a.txt; stat -c ' %U' /srv/made/for/a.txt"); got != "aaa user" {
		t.Errorf("single files: %q", got)
	}
	cp(0, id+":/srv/single", top)
	if b, err := os.ReadFile(filepath.Join(top, "single")); err != nil || string(b) != "a" {
		t.Errorf("%q, %v", b, err)
	}
	for _, bad := range [][]string{
		{src, id + ":/srv/x"}, {id + ":/srv/new", top}, {src, top}, {id + ":/a", id + ":/b"}, {"-r", src, id + ":relative"},
		{filepath.Join(top, "none"), id + ":/x"}, {id + ":/none", top}, {"-r", src, id + ":/etc/passwd"}, {"-r", id + ":/srv/new", filepath.Join(src, "a.txt")},
	} {
		if said := cp(1, bad...); strings.Count(said, "\n") != 1 {
			t.Errorf("cp %q says %q", bad, said)
		}
	}
	// Files in a sandbox are hostile: cp does not follow its links here.
	s.want(id, "mkdir -p /srv/evil && ln -s "+src+" /srv/evil/l")
	out := filepath.Join(top, "out")
	cp(0, "-r", id+":/srv/evil", out)
	s.want(id, "rm /srv/evil/l && mkdir /srv/evil/l && echo evil >/srv/evil/l/a.txt")
	cp(1, "-r", id+":/srv/evil/.", out)
	if b, err := os.ReadFile(filepath.Join(src, "a.txt")); err != nil || string(b) != "a" {
		t.Errorf("a file outside became %q, %v", b, err)
	}

	cmd := s.command(context.Background(), "sandbox", "watch", id, "/srv", "--json")
	lines, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() }) // otherwise it waits for ever
	defer stop.Stop()
	seen, stopMaking := context.WithCancel(context.Background())
	making := make(chan bool)
	go func() { // until the watch is there
		defer close(making)
		for i := 0; seen.Err() == nil; i++ {
			_, _, _ = s.try(seen, "POST", "/v1/sandboxes/"+id+"/execute",
				object{"command": fmt.Sprintf("echo x >/srv/seen%d; sleep 0.1", i)})
		}
	}()
	defer func() { stopMaking(); <-making }()
	var change struct{ Type, Path string }
	if err := json.NewDecoder(lines).Decode(&change); err != nil || change.Type != "create" ||
		!strings.HasPrefix(change.Path, "/srv/seen") {
		t.Errorf("watch prints %+v, %v", change, err)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Error(err)
	}
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 130 {
		t.Errorf("watch ended with %s", cmd.ProcessState)
	}
}
