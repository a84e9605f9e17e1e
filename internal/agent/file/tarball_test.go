package file

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

// me returns the user of this process, to whom files can be given without being root.
func me() *account.User { return &account.User{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())} }

var at = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// archive returns a tar with the entries. The content of a file is its name.
func archive(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := ""
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			body = h.Name
			h.Size = int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.ModTime = at
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// tree lists the entries below a directory with their modes and contents.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := info.Mode().String()
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			what = "-> " + target
		case d.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			what += " " + string(b)
		}
		rel, err := filepath.Rel(dir, p)
		all[rel] = what
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestUnpack(t *testing.T) {
	outside := t.TempDir()
	dir := filepath.Join(t.TempDir(), "new", "dir")
	long := strings.Repeat("x", 200) + "/" + strings.Repeat("y", 200)
	f := &Files{}
	err := f.unpack(dir, me(), bytes.NewReader(archive(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700},
		tar.Header{Name: "a", Mode: 0o4755},
		tar.Header{Name: "./b/c/d", Mode: 0o600},
		tar.Header{Name: "b/", Typeflag: tar.TypeDir, Mode: 0o750},
		tar.Header{Name: long},
		tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside},
		tar.Header{Name: "in", Typeflag: tar.TypeSymlink, Linkname: "b"},
		tar.Header{Name: "in/through"},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "b/c/d"},
		tar.Header{Name: "out"}, // replaces the link and does not follow it
		tar.Header{Name: "a"},   // a second time
	)))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"a": "-rw-r--r-- a", "b": "drwxr-x---", "b/c": "drwxr-xr-x", "b/c/d": "-rw------- ./b/c/d",
		"b/through": "-rw-r--r-- in/through", "hard": "-rw------- ./b/c/d", "in": "-> b", "out": "-rw-r--r-- out",
		long: "-rw-r--r-- " + long, filepath.Dir(long): "drwxr-xr-x"}
	if d := cmp.Diff(want, tree(t, dir)); d != "" {
		t.Errorf("unpacked (-want +got):\n%s", d)
	}
	if st, err := os.Stat(filepath.Join(dir, "a")); err != nil || !st.ModTime().Equal(at) {
		t.Errorf("its time is %v, %v", st.ModTime(), err)
	}
	if left := tree(t, outside); len(left) != 0 {
		t.Errorf("outside there is %v", left)
	}
}

// TestUnpackHostile unpacks hostile archives. None writes outside the directory.
func TestUnpackHostile(t *testing.T) {
	for name, entries := range map[string][]tar.Header{
		"dots":                        {{Name: "../evil"}},
		"dots within":                 {{Name: "a/../../evil"}},
		"absolute":                    {{Name: "/OUTSIDE/evil"}},
		"through a link":              {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUTSIDE"}, {Name: "l/evil"}},
		"a directory through a link":  {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUTSIDE"}, {Name: "l/evil", Typeflag: tar.TypeDir}},
		"through a relative link":     {{Name: "d/l", Typeflag: tar.TypeSymlink, Linkname: "../../outside"}, {Name: "d/l/evil"}},
		"through two links":           {{Name: "a", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "b", Typeflag: tar.TypeSymlink, Linkname: "a/outside"}, {Name: "b/evil"}},
		"a link made in the middle":   {{Name: "d/", Typeflag: tar.TypeDir}, {Name: "d/x"}, {Name: "e", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, {Name: "e/x/evil"}},
		"a hard link to the outside":  {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../outside/there"}},
		"a hard link, absolute":       {{Name: "h", Typeflag: tar.TypeLink, Linkname: "OUTSIDE/there"}},
		"a hard link through a link":  {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUTSIDE"}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "l/there"}},
		"a hard link to a link":       {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUTSIDE/there"}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "l"}},
		"the mode of a link's target": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUTSIDE"}, {Name: "l", Typeflag: tar.TypeDir, Mode: 0o777}},
		"a device":                    {{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		"a pipe":                      {{Name: "pipe", Typeflag: tar.TypeFifo}},
		"no name":                     {{Name: ""}},
		"too deep":                    {{Name: strings.Repeat("d/", maxTarDepth+1) + "x"}},
		"too long an element":         {{Name: strings.Repeat("x", 300)}},
		"a file for a directory":      {{Name: "f"}, {Name: "f/x"}},
		"a directory for a file":      {{Name: "d/x"}, {Name: "d"}},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			outside, dir := filepath.Join(top, "outside"), filepath.Join(top, "dir")
			if err := os.Mkdir(outside, 0o711); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(outside, "there"), []byte("safe"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := tree(t, outside)
			for i := range entries {
				entries[i].Name = strings.ReplaceAll(entries[i].Name, "/OUTSIDE", outside)
				entries[i].Linkname = strings.ReplaceAll(entries[i].Linkname, "OUTSIDE", outside)
			}
			err := (&Files{}).unpack(dir, me(), bytes.NewReader(archive(t, entries...)))
			var known *answer.Problem
			codes := []string{fault.CodeInvalidTar, fault.CodePathIsDirectory, fault.CodePathNotDirectory}
			if !errors.As(err, &known) || !slices.Contains(codes, known.Code) {
				t.Errorf("unpacked: %v", err)
			}
			if d := cmp.Diff(before, tree(t, outside)); d != "" {
				t.Errorf("outside (-before +after):\n%s", d)
			}
			if st, err := os.Stat(outside); err != nil || st.Mode().Perm() != 0o711 {
				t.Errorf("outside is %v, %v", st.Mode(), err)
			}
			if st, err := os.Stat(filepath.Join(outside, "there")); err != nil || st.Sys().(*syscall.Stat_t).Nlink != 1 {
				t.Errorf("a file outside has another name, %v", err)
			}
			for p := range tree(t, top) {
				if strings.Contains(p, "evil") && !strings.HasPrefix(p, "dir/") || strings.Contains(p, ".cay-upload") {
					t.Errorf("there is %s", p)
				}
			}
		})
	}
}

func TestUnpackBroken(t *testing.T) {
	whole := archive(t, tar.Header{Name: "a"}, tar.Header{Name: "b"})
	huge := archive(t, tar.Header{Name: "x"})
	// Give the entry the largest size that the field's eleven octal digits can hold.
	copy(huge[124:136], "77777777777\x00")
	sum := 0
	copy(huge[148:156], "        ")
	for _, c := range huge[:512] {
		sum += int(c)
	}
	copy(huge[148:156], []byte{'0' + byte(sum>>15&7), '0' + byte(sum>>12&7), '0' + byte(sum>>9&7), '0' + byte(sum>>6&7),
		'0' + byte(sum>>3&7), '0' + byte(sum&7), 0, ' '})
	half := archive(t, tar.Header{Name: "big"})
	for name, body := range map[string][]byte{
		"no tar": bytes.Repeat([]byte("x"), 2000), "cut in a head": whole[:100], "cut after a head": whole[:512],
		"cut in a body": half[:514], "too large": huge,
	} {
		dir := t.TempDir()
		err := (&Files{}).unpack(dir, me(), bytes.NewReader(body))
		var known *answer.Problem
		if !errors.As(err, &known) || known.Code != fault.CodeInvalidTar {
			t.Errorf("%s: %v", name, err)
		}
		if left := tree(t, dir); len(left) != 0 {
			t.Errorf("%s: there is %v", name, left)
		}
	}
	// An archive without its end mark is complete; a pipe that was closed early gives such an archive.
	if err := (&Files{}).unpack(t.TempDir(), me(), bytes.NewReader(whole[:2048])); err != nil {
		t.Errorf("without an end: %v", err)
	}
	if err := (&Files{}).unpack(filepath.Join(t.TempDir(), "empty"), me(), bytes.NewReader(nil)); err != nil {
		t.Errorf("empty: %v", err)
	}
}

func TestPackAndUnpack(t *testing.T) {
	caytest.RequireRoot(t) // the test sets owners
	from, to := t.TempDir(), t.TempDir()
	for _, dir := range []string{"empty", "d/e"} {
		if err := os.MkdirAll(filepath.Join(from, dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	names := []string{"a", "d/b", "d/e/" + strings.Repeat("ü", 120), "new\nline", "\xff"}
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(from, name), bytes.Repeat([]byte(name), 1000), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"in": "d/b", "out": "/etc/passwd", "dangling": "nowhere"} {
		if err := os.Symlink(target, filepath.Join(from, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(from, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := New(&account.Settings{}, account.NewUsers("/etc/passwd", "/etc/group"))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /files/tar", f.getTar)
	mux.HandleFunc("PUT /files/tar", f.putTar)
	down := httptest.NewRecorder()
	mux.ServeHTTP(down, httptest.NewRequest("GET", "/files/tar?path="+from, nil))
	if down.Code != 200 {
		t.Fatalf("%d %s", down.Code, down.Body)
	}
	up := httptest.NewRecorder()
	mux.ServeHTTP(up, httptest.NewRequest("PUT", "/files/tar?path="+to, down.Body))
	if up.Code != 204 {
		t.Fatalf("%d %s", up.Code, up.Body)
	}
	want := tree(t, from)
	delete(want, "pipe")
	if d := cmp.Diff(want, tree(t, to)); d != "" {
		t.Errorf("came back (-want +got):\n%s", d)
	}
	for path, status := range map[string]int{from + "/none": 404, from + "/a": 400, from + "/a/b": 400} {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest("GET", "/files/tar?path="+path, nil))
		if w.Code != status {
			t.Errorf("%s: %d, want %d", path, w.Code, status)
		}
	}
}

// TestPackContent packs files whose size has changed. The archive stays intact.
func TestPackContent(t *testing.T) {
	for content, want := range map[string]string{
		"exact": "exact", "longer": "longe", "le": "le\x00\x00\x00", "": "\x00\x00\x00\x00\x00",
	} {
		var out bytes.Buffer
		if err := packContent(&out, strings.NewReader(content), 5); err != nil || out.String() != want {
			t.Errorf("%q became %q, %v", content, &out, err)
		}
	}
}

func TestMove(t *testing.T) {
	dir := t.TempDir()
	p := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string) {
		t.Helper()
		if err := os.WriteFile(p(name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a")
	write("b")
	if err := os.MkdirAll(p("full/x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(p("void"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		from, to  string
		overwrite bool
		code      string
		field     string
	}{
		"nothing there":           {"none", "x", false, fault.CodeFileNotFound, ""},
		"below a file":            {"a/b", "x", false, fault.CodeFileNotFound, ""},
		"taken":                   {"a", "b", false, fault.CodePathExists, ""},
		"to below a file":         {"a", "b/c", false, fault.CodePathNotDirectory, "to"},
		"into itself":             {"full", "full/x/y", false, fault.CodeInvalidPath, "to"},
		"a full directory":        {"void", "full", true, fault.CodeDirectoryNotEmpty, "to"},
		"a file over a directory": {"a", "void", true, fault.CodePathIsDirectory, "to"},
	} {
		err := move(p(c.from), p(c.to), me(), c.overwrite)
		var known *answer.Problem
		if !errors.As(err, &known) || known.Code != c.code || known.Field != c.field {
			t.Errorf("%s: %v (%+v), want %s in %q", name, err, known, c.code, c.field)
		}
	}
	if err := move("/", p("x"), me(), false); err == nil {
		t.Error("the root was renamed")
	}
	for _, step := range []struct {
		from, to  string
		overwrite bool
	}{{"a", "new/dir/a", false}, {"b", "new/dir/a", true}, {"full", "void", true}} {
		if err := move(p(step.from), p(step.to), me(), step.overwrite); err != nil {
			t.Errorf("%+v: %v", step, err)
		}
	}
	if b, err := os.ReadFile(p("new/dir/a")); err != nil || string(b) != "b" {
		t.Errorf("%q, %v", b, err)
	}
}

// FuzzUnpack unpacks randomly changed archives into a directory beside another one.
func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, tar.Header{Name: "a/b"}, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../out"},
		tar.Header{Name: "l/x"}))
	f.Add(archive(f, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "a/b"},
		tar.Header{Name: "d/", Typeflag: tar.TypeDir}))
	f.Fuzz(func(t *testing.T, b []byte) {
		top := t.TempDir()
		if err := os.Mkdir(filepath.Join(top, "out"), 0o700); err != nil {
			t.Fatal(err)
		}
		// Skip sparse entries: one of a few bytes may claim gigabytes, which is allowed.
		if len(b) > 1<<16 || bytes.Contains(b, []byte("GNU.sparse")) || bytes.Contains(b, []byte("S")) {
			t.Skip()
		}
		_ = (&Files{}).unpack(filepath.Join(top, "dir"), me(), bytes.NewReader(b))
		left, err := os.ReadDir(filepath.Join(top, "out"))
		if err != nil || len(left) != 0 {
			t.Errorf("outside there is %v, %v", left, err)
		}
		above, err := os.ReadDir(top)
		if err != nil || len(above) > 2 {
			t.Errorf("above there is %v, %v", above, err)
		}
		for p := range tree(t, top) {
			if strings.Contains(p, ".cay-upload") {
				t.Errorf("left: %s", p)
			}
		}
	})
}
