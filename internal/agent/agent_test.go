package agent

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

func testUsers(t testing.TB, passwd, group string) *users {
	t.Helper()
	dir := t.TempDir()
	u := &users{passwd: filepath.Join(dir, "passwd"), group: filepath.Join(dir, "group")}
	for path, text := range map[string]string{u.passwd: passwd, u.group: group} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return u
}

func TestUsers(t *testing.T) {
	u := testUsers(t, "# comment\nroot:x:0:0:root:/root:/bin/sh\nbroken:x:one\n"+
		"ann:x:10:20:Ann:/home/ann:/bin/sh\n4:x:11:11::relative:\n",
		"ann:x:20:\nextra:x:30:bob,ann\nbroken:x:no:ann\nalso:x:25:ann\n")
	for spec, want := range map[string]string{
		"root": "0:0 [0] /root", "ann": "10:20 [20 25 30] /home/ann", "10": "10:20 [20 25 30] /home/ann", "ann:extra": "10:30 [30] /home/ann", "10:77": "10:77 [77] /home/ann",
		"4": "11:11 [11] /", "77": "77:0 [0] /", "": "?", "bob": "?", "broken": "?", "ann:": "?", "ann:nosuch": "?", ":20": "?", "4294967295": "?", "-1": "?", "ann:4294967295": "?",
	} {
		got := "?"
		if who, err := u.lookup(spec); err == nil {
			got = fmt.Sprintf("%d:%d %v %s", who.uid, who.gid, who.groups, who.home)
		} else if !errors.Is(err, errUnknownUser) {
			t.Errorf("%q: %v", spec, err)
		}
		if got != want {
			t.Errorf("%q: %s, want %s", spec, got, want)
		}
	}
	o := u.owners()
	if got := o.user(10) + " " + o.group(30) + " " + o.user(99); got != "ann extra 99" {
		t.Errorf("names %q", got)
	}
	// The next lookup sees a change of the files.
	if err := os.WriteFile(u.passwd, []byte("ann:x:1234:1:::\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if who, err := u.lookup("ann"); err != nil || who.uid != 1234 {
		t.Errorf("after a change: %v, %v", who, err)
	}
	if got := u.owners().user(1234) + " " + u.owners().user(10) + " " + o.user(10); got != "ann 10 ann" {
		t.Errorf("after a change the names are %q", got)
	}
	// Root exists without files. A FIFO in the place of a file blocks nothing.
	if err := errors.Join(os.Remove(u.passwd), os.Remove(u.group)); err != nil {
		t.Fatal(err)
	}
	if who, err := u.lookup("root"); err != nil || who.uid != 0 || who.home != "/" {
		t.Errorf("without files: %v, %v", who, err)
	}
	if err := unix.Mkfifo(u.passwd, 0o600); err != nil {
		t.Fatal(err)
	}
	if who, err := u.lookup("root"); err != nil || who.uid != 0 {
		t.Errorf("from a fifo: %v, %v", who, err)
	}
}

func FuzzUsers(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\n", "root:x:0:\nextra:x:7:root,x\n", "root")
	f.Add(":::::\n::", "a:b:c", "a:b")
	f.Add("a:x:1:2::/h\x00:", "", "1:2")
	f.Fuzz(func(t *testing.T, passwd, group, spec string) {
		u := testUsers(t, passwd, group)
		who, err := u.lookup(spec)
		if err != nil {
			return
		}
		if !strings.HasPrefix(who.home, "/") || !slices.IsSorted(who.groups) || !slices.Contains(who.groups, who.gid) {
			t.Errorf("%q is %+v", spec, who)
		}
		u.owners().user(who.uid)
		u.owners().group(who.gid)
	})
}

func TestResolvePath(t *testing.T) {
	for p, want := range map[string]string{
		"": "/home/u", "~": "/home/u", "~/x": "/home/u/x", "x/y": "/home/u/x/y", "../x": "/home/x", "/a/../b": "/b", "/": "/", "~other/x": "?", "a\x00": "?", "./~": "/home/u/~",
	} {
		got, err := resolvePath(p, "/home/u")
		if err != nil {
			got = "?"
		}
		if got != want {
			t.Errorf("%q: %q, want %q", p, got, want)
		}
	}
}

func FuzzResolvePath(f *testing.F) {
	f.Add("~/x", "/home/u")
	f.Add("../..", "/")
	f.Fuzz(func(t *testing.T, p, home string) {
		if !strings.HasPrefix(home, "/") {
			home = "/" + home
		}
		got, err := resolvePath(p, home)
		if err == nil && (!filepath.IsAbs(got) || filepath.Clean(got) != got) {
			t.Errorf("%q in %q is %q", p, home, got)
		}
	})
}

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
		if p, err := resolvePath(filename, "/home/u"); err == nil && !filepath.IsAbs(p) {
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

func TestProcParsers(t *testing.T) {
	if got := residentPages([]byte("1000 250 30 1 0 1 0\n")); got != 250 {
		t.Errorf("statm: %d", got)
	}
	if state, ppid := parseStat([]byte("12 (a) Z) R) Z 7 12 12 0")); state != 'Z' || ppid != 7 {
		t.Errorf("stat: %c %d", state, ppid)
	}
	if got := nameOf([]byte("7:pids:/cay-12\n6:memory:/\n")); got != "cay-12" {
		t.Errorf("cgroup: %q", got)
	}
	if got := nameOf([]byte("7:pids:/\n6:memory:/cay-1\n")); got != "" {
		t.Errorf("not one of the agent's groups: %q", got)
	}
	if busy, idle := parseCPU("cpu  10 1 5 100 20 3 0\ncpu0 1 1 1\n"); busy != 19 || idle != 120 {
		t.Errorf("stat: %d busy, %d idle", busy, idle)
	}
}

func FuzzProcParsers(f *testing.F) {
	f.Add([]byte("12 (a) Z 7"))
	f.Add([]byte("7:pids:/cay-1\n"))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 4, '1', '2', 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		parseStat(data)
		nameOf(data)
		residentPages(data)
		parseCPU(string(data))
		eachPID(data, func(pid int) {
			if pid <= 0 {
				t.Errorf("pid %d", pid)
			}
		})
		// eachInotify never reads beyond the buffer. Only f returns errors.
		if err := eachInotify(data, func(int32, uint32, string) error { return nil }); err != nil {
			t.Error(err)
		}
	})
}

func TestLargestFirst(t *testing.T) {
	m := newMemory(nil)
	for i := range 200 {
		m.consider(victim{pid: i + 1, rss: int64(i * 37 % 200)})
	}
	if len(m.victims) != maxVictims || m.victims[0].rss != 199 ||
		!slices.IsSortedFunc(m.victims, func(a, b victim) int { return int(b.rss - a.rss) }) {
		t.Errorf("kept %v", m.victims)
	}
}

func TestCommandEnv(t *testing.T) {
	who := &user{name: "ann", home: "/home/ann"}
	env, err := commandEnv(who, false, map[string]string{"A": "sandbox", "B": "sandbox"},
		map[string]string{"B": "call", "HOME": "/x"})
	slices.Sort(env)
	got, want := strings.Join(env, " "), "A=sandbox B=call HOME=/x LOGNAME=ann PATH="+defaultPath+" USER=ann"
	if err != nil || got != want {
		t.Errorf("got %s, %v\nwant %s", got, err, want)
	}
	for _, bad := range []map[string]string{{"": "x"}, {"A=B": "x"}, {"A": "\x00"}} {
		if _, err := commandEnv(who, false, nil, bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
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
	f := &files{settings: &settings{}, users: testUsers(t, "root:x:0:0::/root:\n", ""), maxEntries: most}
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
	f := &files{settings: &settings{}, users: testUsers(t, passwd("before"), ""), maxEntries: agentapi.MaxEntries}
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
		if err := os.WriteFile(f.users.passwd, []byte(passwd("afterwards")), 0o600); err != nil {
			t.Error(err)
		}
	}}
	f.list(w, httptest.NewRequest("GET", "/files/list?username=0&path="+dir, nil))
	if n := strings.Count(w.Body.String(), `"owner":"before"`); n != many || !renamed {
		t.Errorf("%d of %d entries have the first name, renamed: %v; %.300s", n, many, renamed, w.Body)
	}
	if got := f.users.owners().user(me); got != "afterwards" {
		t.Errorf("later the name is %q", got)
	}
}
