package account

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/answer"
)

func testUsers(t testing.TB, passwd, group string) *Users {
	t.Helper()
	dir := t.TempDir()
	u := &Users{passwd: filepath.Join(dir, "passwd"), group: filepath.Join(dir, "group")}
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
		if who, err := u.Lookup(spec); err == nil {
			got = fmt.Sprintf("%d:%d %v %s", who.UID, who.GID, who.Groups, who.Home)
		} else if !errors.Is(err, answer.ErrUnknownUser) {
			t.Errorf("%q: %v", spec, err)
		}
		if got != want {
			t.Errorf("%q: %s, want %s", spec, got, want)
		}
	}
	o := u.Owners()
	if got := o.User(10) + " " + o.Group(30) + " " + o.User(99); got != "ann extra 99" {
		t.Errorf("names %q", got)
	}
	// The next lookup sees a change of the files.
	if err := os.WriteFile(u.passwd, []byte("ann:x:1234:1:::\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if who, err := u.Lookup("ann"); err != nil || who.UID != 1234 {
		t.Errorf("after a change: %v, %v", who, err)
	}
	if got := u.Owners().User(1234) + " " + u.Owners().User(10) + " " + o.User(10); got != "ann 10 ann" {
		t.Errorf("after a change the names are %q", got)
	}
	// Root exists without files. A FIFO in the place of a file blocks nothing.
	if err := errors.Join(os.Remove(u.passwd), os.Remove(u.group)); err != nil {
		t.Fatal(err)
	}
	if who, err := u.Lookup("root"); err != nil || who.UID != 0 || who.Home != "/" {
		t.Errorf("without files: %v, %v", who, err)
	}
	if err := unix.Mkfifo(u.passwd, 0o600); err != nil {
		t.Fatal(err)
	}
	if who, err := u.Lookup("root"); err != nil || who.UID != 0 {
		t.Errorf("from a fifo: %v, %v", who, err)
	}
}

func FuzzUsers(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\n", "root:x:0:\nextra:x:7:root,x\n", "root")
	f.Add(":::::\n::", "a:b:c", "a:b")
	f.Add("a:x:1:2::/h\x00:", "", "1:2")
	f.Fuzz(func(t *testing.T, passwd, group, spec string) {
		u := testUsers(t, passwd, group)
		who, err := u.Lookup(spec)
		if err != nil {
			return
		}
		if !strings.HasPrefix(who.Home, "/") || !slices.IsSorted(who.Groups) || !slices.Contains(who.Groups, who.GID) {
			t.Errorf("%q is %+v", spec, who)
		}
		u.Owners().User(who.UID)
		u.Owners().Group(who.GID)
	})
}

func TestResolvePath(t *testing.T) {
	for p, want := range map[string]string{
		"": "/home/u", "~": "/home/u", "~/x": "/home/u/x", "x/y": "/home/u/x/y", "../x": "/home/x", "/a/../b": "/b", "/": "/", "~other/x": "?", "a\x00": "?", "./~": "/home/u/~",
	} {
		got, err := ResolvePath(p, "/home/u")
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
		got, err := ResolvePath(p, home)
		if err == nil && (!filepath.IsAbs(got) || filepath.Clean(got) != got) {
			t.Errorf("%q in %q is %q", p, home, got)
		}
	})
}
