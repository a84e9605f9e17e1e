package image

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var account = User{Name: "user", UID: 1000, Home: "/home/user", Shell: "/bin/bash",
	Groups: []string{"sudo", "users", "nogroup"}, Sudo: true}

// content returns a file of the tree.
func content(t *testing.T, tree *tree, path string) string {
	t.Helper()
	n, err := tree.lookup(path)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	b, err := tree.read(n.inode, 1<<20)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return string(b)
}

func TestUserIsAdded(t *testing.T) {
	tests := []struct {
		name                           string
		base                           []member
		passwd, group, shadow, gshadow string
	}{
		{name: "an empty image", passwd: "user:x:1000:1000::/home/user:/bin/bash\n", group: "user:x:1000:\n",
			shadow: "user:*:19000:0:99999:7:::\n", gshadow: "user:!::\n"},
		{name: "Debian", base: []member{
			file("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n"), file("etc/group", "root:x:0:\nsudo:x:27:\nusers:x:100:bob\n"),
			file("etc/shadow", "root:*:1:::::::\n", mode(0o640), owner(0, 42)), file("etc/gshadow", "sudo:*::\n", mode(0o640), owner(0, 42))},
			passwd: "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n",
			group:  "root:x:0:\nsudo:x:27:user\nusers:x:100:bob,user\nuser:x:1000:\n",
			shadow: "root:*:1:::::::\nuser:*:19000:0:99999:7:::\n", gshadow: "sudo:*::user\nuser:!::\n"},
		{name: "the number and the name are taken", base: []member{
			file("etc/passwd", "root:x:0:0::/root:/bin/sh\nvscode:x:1000:1000::/home/vscode:/bin/zsh\nuser:x:7:7::/:/bin/false"),
			file("etc/group", "vscode:x:1000:\nsudo:x:27:vscode,user\n"), file("etc/shadow", "user:!:1::::::\n")},
			passwd: "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n", group: "sudo:x:27:vscode,user\nuser:x:1000:\n",
			shadow: "user:*:19000:0:99999:7:::\n", gshadow: "user:!::\n"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			tree, err := layers(t, archive(t, tc.base...))
			if err != nil {
				t.Fatal(err)
			}
			if err := tree.setUp(Setup{Users: []User{account}}); err != nil {
				t.Fatal(err)
			}
			got := []string{content(t, tree, "/etc/passwd"), content(t, tree, "/etc/group"), content(t, tree, "/etc/shadow"),
				content(t, tree, "/etc/gshadow")}
			if diff := cmp.Diff([]string{tc.passwd, tc.group, tc.shadow, tc.gshadow}, got); diff != "" {
				t.Errorf("accounts (-want +got):\n%s", diff)
			}
			if got := content(t, tree, "/etc/sudoers.d/90-user"); got != "user ALL=(ALL:ALL) NOPASSWD:ALL\n" {
				t.Errorf("sudoers file is %q", got)
			}
		})
	}
}

func TestSetUpKeepsOwnersAndReplacesLinks(t *testing.T) {
	tree, err := layers(t, archive(t, dir("./"),
		file("etc/shadow", "", mode(0o640), owner(0, 42)), file("etc/skel/.bashrc", "# bash\n", mode(0o600)),
		symlink("etc/skel/link", "x"),
		file("home/user/kept", "mine", owner(9, 9)),
		symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"), symlink("etc/mtab", "/proc/mounts"),
		file("var/lib/apt/lists/a", ""), dir("var/lib/apt/lists/partial"), file("usr/lib/python3.11/EXTERNALLY-MANAGED", ""),
		file("usr/lib/python3.11/os.py", ""),
		symlink("var/log", "/etc")))
	if err != nil {
		t.Fatal(err)
	}
	err = tree.setUp(Setup{Users: []User{account},
		Files: []File{{Path: "/etc/resolv.conf", Mode: 0o644},
			{Path: "/srv/app/run", Mode: 0o4755, UID: 7, GID: 8, Content: "x"}},
		Remove: []string{"/var/lib/apt/lists/*", "/usr/lib/python3*/EXTERNALLY-MANAGED", "/var/log/shadow", "/not/there"}})
	if err != nil {
		t.Fatal(err)
	}
	const at = "1700000000.123456789"
	want := []string{ // without what TestUserIsAdded checks
		"Lrwxrwxrwx 0:0 1 " + at + " etc/mtab -> /proc/mounts",
		"-rw-r--r-- 0:0 1 " + at + ` etc/resolv.conf ""`,
		"-rw-r----- 0:42 1 " + at + ` etc/shadow "user:*:19000:0:99999:7:::\n"`,
		"-rw------- 0:0 1 " + at + ` etc/skel/.bashrc "# bash\n"`,
		"-r--r----- 0:0 1 " + at + ` etc/sudoers.d/90-user "user ALL=(ALL:ALL) NOPASSWD:ALL\n"`,
		"drwxr-xr-x 1000:1000 2 " + at + " home/user",
		"-rw------- 1000:1000 1 " + at + ` home/user/.bashrc "# bash\n"`,
		"-rw-r--r-- 9:9 1 " + at + ` home/user/kept "mine"`,
		"urwxr-xr-x 7:8 1 " + at + ` srv/app/run "x"`,
		"-rw-r--r-- 0:0 1 " + at + ` usr/lib/python3.11/os.py ""`,
		"drwxr-xr-x 0:0 2 0.0 var/lib/apt/lists",
	}
	all := strings.Join(list(t, write(t, tree)), "\n")
	for _, line := range want {
		if !strings.Contains(all, line) {
			t.Errorf("not there: %s", line)
		}
	}
	for _, gone := range []string{"lists/", "EXTERNALLY-MANAGED"} {
		if strings.Contains(all, gone) {
			t.Errorf("still there: %s", gone)
		}
	}
	if t.Failed() {
		t.Logf("the image:\n%s", all)
	}
}

func TestBadSetUpIsRefused(t *testing.T) {
	for _, bad := range []Setup{
		{Users: []User{{Name: "a:b", UID: 1, Home: "/h", Shell: "/s"}}}, {Users: []User{{Name: "", UID: 1, Home: "/h"}}}, {Users: []User{{Name: "a", UID: 0, Home: "/h"}}},
		{Users: []User{{Name: "a", UID: 1, Home: "/"}}}, {Users: []User{{Name: "a", UID: 1, Home: "h"}}}, {Users: []User{{Name: "a", UID: 1, Home: "/h\nroot"}}},
		{Files: []File{{Path: "/"}}}, {Files: []File{{Path: "/a/../b"}}}, {Files: []File{{Path: "/file/x"}}},
		{Remove: []string{"/"}}, {Remove: []string{"/[a"}}, {Remove: []string{"/../x"}},
	} {
		t.Run(fmt.Sprintf("%+v", bad), func(t *testing.T) {
			tree, err := layers(t, archive(t, file("file", ""), file("[a", "")))
			if err != nil {
				t.Fatal(err)
			}
			if err := tree.setUp(bad); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestMissingPrograms(t *testing.T) {
	tree, err := layers(t, archive(t, symlink("bin", "usr/bin"), program("usr/bin/real"), file("usr/bin/data", ""),
		symlink("usr/bin/link", "/etc/alternatives/link"), symlink("etc/alternatives/link", "/usr/bin/real"),
		symlink("usr/bin/dangling", "/no"), dir("usr/bin/dir"),
		program("opt/far"), program("usr/local/sbin/admin")))
	if err != nil {
		t.Fatal(err)
	}
	got := tree.missing([]string{"real", "link", "admin", "data", "dangling", "dir", "far"})
	if diff := cmp.Diff([]string{"data", "dangling", "dir", "far"}, got); diff != "" {
		t.Errorf("missing (-want +got):\n%s", diff)
	}
}
