package file

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

func TestPartNames(t *testing.T) {
	for disposition, want := range map[string][2]string{
		`form-data; name="file"; filename="a/b c.txt"`: {"file", "a/b c.txt"}, `form-data; name="file"`: {"file", ""},
		`form-data; name=file; filename="/tmp/ü.txt"`: {"file", "/tmp/ü.txt"}, `form-data; name="file"; filename*=UTF-8''%C3%BC`: {"file", "ü"},
		`attachment; name="file"`: {}, `form-data; name="`: {}, ``: {},
	} {
		name, filename := partNames(disposition)
		if name != want[0] || filename != want[1] {
			t.Errorf("%s: %q %q, want %q", disposition, name, filename, want)
		}
	}
}

func FuzzPartNames(f *testing.F) {
	f.Add(`form-data; name="file"; filename="a/b"`)
	f.Add(`form-data; name="file"; filename*0="a"; filename*1="b"`)
	f.Fuzz(func(t *testing.T, disposition string) {
		_, filename := partNames(disposition)
		if p, err := account.ResolvePath(filename, "/home/u"); err == nil && !filepath.IsAbs(p) {
			t.Errorf("%q gives %q", disposition, p)
		}
	})
}

func TestMetadataLimits(t *testing.T) {
	header := func(key, value string) http.Header { return http.Header{"X-Metadata-" + key: {value}} }
	for name, c := range map[string]struct {
		h  http.Header
		ok bool
	}{
		"usual": {header("Key", "value"), true}, "key at its limit": {header(strings.Repeat("k", 246), "v"), true}, "key over it": {header(strings.Repeat("k", 247), "v"), false},
		"not ascii": {header("Key", "ü"), false}, "control": {header("Key", "a\tb"), false}, "too much": {header("Key", strings.Repeat("v", 4096)), false}, "none": {http.Header{}, true},
	} {
		meta, err := metadataOf(c.h)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v, %v", name, meta, err)
		}
	}
}

func FuzzInotify(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 'a', 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 4, '1', '2', 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		// eachInotify never reads beyond the buffer. Only f returns errors.
		if err := eachInotify(data, func(int32, uint32, string) error { return nil }); err != nil {
			t.Error(err)
		}
	})
}

// changing is a ResponseWriter that calls change at the first write.
type changing struct {
	*httptest.ResponseRecorder
	change func()
}

func (c *changing) Write(b []byte) (int, error) {
	if c.change != nil {
		c.change()
		c.change = nil
	}
	return c.ResponseRecorder.Write(b)
}

// TestDeepListingIsRefusedWhole checks that a listing of too many entries, which are levels below its
// directory, is refused before its first entry, and that one entry fewer is listed.
func TestDeepListingIsRefusedWhole(t *testing.T) {
	const most = 1000
	passwd := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(passwd, []byte("root:x:0:0::/root:\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := New(&account.Settings{}, account.NewUsers(passwd, passwd))
	f.maxEntries = most
	dir := t.TempDir()
	const dirs, levels = 4, 2
	entries, last := 0, ""
	for d := range dirs {
		below := dir
		for range levels {
			below = filepath.Join(below, strconv.Itoa(d))
			if err := os.Mkdir(below, 0o700); err != nil {
				t.Fatal(err)
			}
			entries++
		}
		for n := range (most + 1 - dirs*levels) / dirs {
			last = filepath.Join(below, strconv.Itoa(n))
			if err := unix.Mknod(last, unix.S_IFREG, 0); err != nil {
				t.Fatal(err)
			}
			entries++
		}
	}
	for ; entries <= most; entries++ {
		last = filepath.Join(dir, fmt.Sprint("more", entries))
		if err := unix.Mknod(last, unix.S_IFREG, 0); err != nil {
			t.Fatal(err)
		}
	}
	list := func(depth int) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		f.list(w, httptest.NewRequest("GET", fmt.Sprintf("/files/list?username=0&depth=%d&path=%s", depth, dir), nil))
		return w
	}
	if w := list(levels); w.Code != http.StatusOK {
		t.Errorf("the levels above: %d %.300s", w.Code, w.Body)
	}
	if w := list(levels + 1); w.Code != http.StatusRequestEntityTooLarge || w.Body.Len() > 1000 ||
		w.Header().Get(agentapi.CodeHeader) != fault.CodeListingTooLarge {
		t.Errorf("%d entries: %d, %d bytes: %.300s", entries, w.Code, w.Body.Len(), w.Body)
	}
	if err := os.Remove(last); err != nil {
		t.Fatal(err)
	}
	if w := list(levels + 1); w.Code != http.StatusOK || bytes.Count(w.Body.Bytes(), []byte("\n")) != entries-1 {
		t.Errorf("%d entries: %d, %d lines", entries-1, w.Code, bytes.Count(w.Body.Bytes(), []byte("\n")))
	}
}

// TestListingAsksForNamesOnce renames the owner of files in the middle of a listing. All entries of the listing
// have the old name: a check for a change at each entry would take longer than a stat of the entry.
func TestListingAsksForNamesOnce(t *testing.T) {
	me := uint32(os.Getuid())
	passwd := func(name string) string { return fmt.Sprintf("root:x:0:0::/root:\n%s:x:%d:1::/:\n", name, me) }
	if me == 0 {
		passwd = func(name string) string { return name + ":x:0:0::/root:\n" }
	}
	accounts := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(accounts, []byte(passwd("before")), 0o600); err != nil {
		t.Fatal(err)
	}
	f := New(&account.Settings{}, account.NewUsers(accounts, "/nonexistent"))
	dir := t.TempDir()
	const many = 1000 // more than the buffer of an answer holds
	for n := range many {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(n)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	renamed := false
	w := &changing{httptest.NewRecorder(), func() {
		renamed = true
		if err := os.WriteFile(accounts, []byte(passwd("afterwards")), 0o600); err != nil {
			t.Error(err)
		}
	}}
	f.list(w, httptest.NewRequest("GET", "/files/list?username=0&path="+dir, nil))
	if n := strings.Count(w.Body.String(), `"owner":"before"`); n != many || !renamed {
		t.Errorf("%d of %d entries have the first name, renamed: %v; %.300s", n, many, renamed, w.Body)
	}
	if got := f.users.Owners().User(me); got != "afterwards" {
		t.Errorf("later the name is %q", got)
	}
}
