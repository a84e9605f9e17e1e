package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/caytest"
)

// entryTime is the time of all test files. It has nanoseconds, which must be kept.
var entryTime = time.Unix(1700000000, 123456789).UTC()

// file, dir, symlink and hardlink make the headers of test archives.
func file(name, content string, change ...func(*tar.Header)) member {
	return newMember(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}, content,
		change)
}

func dir(name string, change ...func(*tar.Header)) member {
	return newMember(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, "", change)
}

func symlink(name, target string) member {
	return newMember(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, "", nil)
}

func hardlink(name, target string) member {
	return newMember(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}, "", nil)
}

func mode(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }
func owner(uid, gid int) func(*tar.Header) {
	return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
}

type member struct {
	header  tar.Header
	content string
}

func newMember(h tar.Header, content string, change []func(*tar.Header)) member {
	h.ModTime = entryTime
	h.Format = tar.FormatPAX
	for _, f := range change {
		f(&h)
	}
	return member{h, content}
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		if err := w.WriteHeader(&m.header); err != nil {
			t.Fatalf("making test tar: %v", err)
		}
		if _, err := io.WriteString(w, m.content); err != nil {
			t.Fatalf("making test tar: %v", err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatalf("making test tar: %v", err)
	}
	return b.Bytes()
}

// layers unpacks archives one over the other, as the layers of an OCI image.
func layers(t testing.TB, archives ...[]byte) (*tree, error) {
	t.Helper()
	tree, err := newTree(t.TempDir(), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	for _, a := range archives {
		if err := tree.apply(context.Background(), bytes.NewReader(a), true); err != nil {
			return tree, err
		}
	}
	return tree, nil
}

// write writes a tree to a file and, if fsck.erofs is installed, has it checked.
func write(t testing.TB, tree *tree) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "test.erofs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeErofs(f, tree); err != nil {
		t.Fatalf("writing image: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	fsck(t, path)
	return path
}

// fsck checks an image with the format's own tool, if it is installed.
func fsck(t testing.TB, path string) {
	t.Helper()
	program, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Log("fsck.erofs is not installed: no second opinion")
		return
	}
	if out, err := exec.Command(program, "--extract", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// list reads an image with another implementation of the format. It returns one line per name:
// type, mode, owner, links, size, time, path, and content or target. Other names of an inode are
// shown as "= first name".
func list(t testing.TB, path string) []string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fsys, err := erofs.Open(f)
	if err != nil {
		t.Fatalf("opening image: %v", err)
	}
	var out []string
	first := map[int64]string{}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*erofs.Stat)
		// The other implementation does not show setuid and the like.
		var raw [2]byte
		if _, err := f.ReadAt(raw[:], blockSize+int64(st.Ino)*slotSize+4); err != nil {
			return err
		}
		mode := info.Mode()
		for bit, to := range map[uint16]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
			if binary.LittleEndian.Uint16(raw[:])&bit != 0 {
				mode |= to
			}
		}
		line := fmt.Sprintf("%v %d:%d %d %d.%d %s", mode, st.UID, st.GID, st.Nlink, st.Mtime, st.MtimeNs, name)
		switch {
		case info.Mode().IsRegular():
			b, err := fs.ReadFile(fsys, name)
			if err != nil {
				return err
			}
			if int64(len(b)) != info.Size() {
				return fmt.Errorf("%s: %d bytes, %d said", name, len(b), info.Size())
			}
			if len(b) > 40 {
				b = fmt.Appendf(nil, "%d bytes from %.10s to %s", len(b), b, b[len(b)-10:])
			}
			line += fmt.Sprintf(" %q", b)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := fsys.(fs.ReadLinkFS).ReadLink(name)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		if prior, ok := first[st.Ino]; ok {
			line = name + " = " + prior
		} else {
			first[st.Ino] = name
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatalf("listing image: %v", err)
	}
	return out
}

// names returns a listing with names and contents only, for tests that do not check the rest.
func names(t testing.TB, tree *tree) []string {
	t.Helper()
	var out []string
	for _, line := range list(t, write(t, tree)) {
		f := strings.Fields(line)
		if f[1] == "=" { // a hard link
			out = append(out, line)
			continue
		}
		s := f[4]
		if strings.HasPrefix(f[0], "d") {
			s += "/"
		}
		out = append(out, strings.Join(append([]string{s}, f[5:]...), " "))
	}
	return out[1:] // the root
}

func openStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "images"), RegistryTimeout: 2 * time.Second}
	for _, f := range change {
		f(&cfg)
	}
	s, err := Open(cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// leftovers fails the test if a build left something in the store's tmp.
func leftovers(t testing.TB, s *Store) {
	t.Helper()
	entries, err := os.ReadDir(s.tmpDir())
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) > 0 {
		t.Errorf("left in tmp: %v", entries)
	}
}

func TestOneLayerComesBackWhole(t *testing.T) {
	long := strings.Repeat("n", maxName)
	block := strings.Repeat("b", blockSize)
	tree, err := layers(t, archive(t,
		dir("./", mode(0o751), owner(3, 4)),
		dir("usr/"), dir("usr/bin/"),
		file("usr/bin/sudo", "suid", mode(0o4755)),
		file("usr/bin/wall", "sgid", mode(0o2755), owner(0, 5)),
		dir("tmp/", mode(0o1777)),
		file("etc/shadow", "secret", mode(0o640), owner(0, 42)), // etc is implied
		file("big/uids", "x", owner(4000000000, 3000000000)),
		file("empty", ""),
		file("block", block), file("block+1", block+"!"), file("block-1", block[1:]),
		file("-before-dot", "sorts before . and .."),
		symlink("lib", "usr/lib"), symlink("abs", "/etc/shadow"), symlink("up", "../../../etc"),
		symlink("long-target", strings.Repeat("t", maxTarget)),
		file(long, "long name"), dir("deep/"+long+"/"+long+"/"),
		file("name with spaces and ünï/\t\n", "odd"),
		hardlink("usr/bin/sudoedit", "usr/bin/sudo"), hardlink("zz", "./usr/bin/sudo"), hardlink("lib2", "lib"),
		newMember(tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600}, "", nil),
		newMember(tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}, "", nil),
		newMember(tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Mode: 0o660, Devmajor: 8}, "", nil),
		file("bin/ping", "cap", func(h *tar.Header) {
			h.PAXRecords = map[string]string{"SCHILY.xattr.security.selinux": "system_u",
				"LIBARCHIVE.xattr.security.selinux": "c3lz"}
		}),
		file("old", "from 1901", func(h *tar.Header) { h.ModTime = time.Unix(-2177452800, 0) }),
	))
	if err != nil {
		t.Fatal(err)
	}
	if tree.droppedDevices != 2 || tree.droppedXattrs != 1 {
		t.Errorf("dropped %d devices and %d xattrs, want 2 and 1", tree.droppedDevices, tree.droppedXattrs)
	}
	const at = "1700000000.123456789"
	want := []string{
		"drwxr-x--x 3:4 9 " + at + " .",
		"-rw-r--r-- 0:0 1 " + at + ` -before-dot "sorts before . and .."`,
		"Lrwxrwxrwx 0:0 1 " + at + " abs -> /etc/shadow",
		"drwxr-xr-x 0:0 2 0.0 big",
		"-rw-r--r-- 4000000000:3000000000 1 " + at + ` big/uids "x"`,
		"drwxr-xr-x 0:0 2 0.0 bin",
		"-rw-r--r-- 0:0 1 " + at + ` bin/ping "cap"`,
		"-rw-r--r-- 0:0 1 " + at + ` block "4096 bytes from bbbbbbbbbb to bbbbbbbbbb"`,
		"-rw-r--r-- 0:0 1 " + at + ` block+1 "4097 bytes from bbbbbbbbbb to bbbbbbbbb!"`,
		"-rw-r--r-- 0:0 1 " + at + ` block-1 "4095 bytes from bbbbbbbbbb to bbbbbbbbbb"`,
		"drwxr-xr-x 0:0 3 0.0 deep",
		"drwxr-xr-x 0:0 3 0.0 deep/" + long,
		"drwxr-xr-x 0:0 2 " + at + " deep/" + long + "/" + long,
		"-rw-r--r-- 0:0 1 " + at + ` empty ""`,
		"drwxr-xr-x 0:0 2 0.0 etc",
		"-rw-r----- 0:42 1 " + at + ` etc/shadow "secret"`,
		"Lrwxrwxrwx 0:0 2 " + at + " lib -> usr/lib",
		"lib2 = lib",
		"Lrwxrwxrwx 0:0 1 " + at + " long-target -> " + strings.Repeat("t", maxTarget),
		"drwxr-xr-x 0:0 2 0.0 name with spaces and ünï",
		"-rw-r--r-- 0:0 1 " + at + " name with spaces and ünï/\t\n \"odd\"",
		"-rw-r--r-- 0:0 1 " + at + " " + long + ` "long name"`,
		"-rw-r--r-- 0:0 1 0.0 old \"from 1901\"",
		"prw------- 0:0 1 " + at + " pipe",
		"dtrwxrwxrwx 0:0 2 " + at + " tmp",
		"Lrwxrwxrwx 0:0 1 " + at + " up -> ../../../etc",
		"drwxr-xr-x 0:0 3 " + at + " usr",
		"drwxr-xr-x 0:0 2 " + at + " usr/bin",
		"urwxr-xr-x 0:0 3 " + at + ` usr/bin/sudo "suid"`,
		"usr/bin/sudoedit = usr/bin/sudo",
		"grwxr-xr-x 0:5 1 " + at + ` usr/bin/wall "sgid"`,
		"zz = usr/bin/sudo",
	}
	if diff := cmp.Diff(want, list(t, write(t, tree))); diff != "" {
		t.Errorf("image (-want +got):\n%s", diff)
	}
}

func TestLayersMerge(t *testing.T) {
	tests := []struct {
		name   string
		layers [][]byte
		want   []string
	}{
		{"a file replaces a file", [][]byte{archive(t, file("a", "old")), archive(t, file("a", "new"))}, []string{`a "new"`}},
		{"a directory keeps what is in it",
			[][]byte{archive(t, dir("d"), file("d/a", "1")), archive(t, dir("d"), file("d/b", "2"))},
			[]string{"d/", `d/a "1"`, `d/b "2"`}},
		{"a file replaces a directory", [][]byte{archive(t, file("d/a", "1")), archive(t, file("d", "2"))}, []string{`d "2"`}},
		{"a directory replaces a file", [][]byte{archive(t, file("d", "1")), archive(t, dir("d"), file("d/a", "2"))}, []string{"d/", `d/a "2"`}},
		{"a directory replaces a link", [][]byte{archive(t, dir("x"), symlink("d", "x")),
			archive(t, dir("d"), file("d/a", "2"))},
			[]string{"d/", `d/a "2"`, "x/"}},
		{"files go where a link of a lower layer leads",
			[][]byte{archive(t, dir("usr/lib"), symlink("lib", "/usr/lib")), archive(t, file("lib/new/a", "1"))},
			[]string{"lib -> /usr/lib", "usr/", "usr/lib/", "usr/lib/new/", `usr/lib/new/a "1"`}},
		{"the last of two entries counts", [][]byte{archive(t, file("a", "1"), file("a", "2"), dir("a"), symlink("a", "b"), file("a", "3"))}, []string{`a "3"`}},
		{"whiteout", [][]byte{archive(t, file("d/a", "1"), file("d/b", "2")), archive(t, file("d/.wh.a", ""))}, []string{"d/", `d/b "2"`}},
		{"whiteout of a directory", [][]byte{archive(t, file("d/e/a", "1")), archive(t, file(".wh.d", ""))}, []string{}},
		{"whiteout of nothing there", [][]byte{archive(t, file("a", "1")), archive(t, file("x/.wh.a", ""), file(".wh.b", ""))}, []string{`a "1"`}},
		{"whiteout before the same layer's file",
			[][]byte{archive(t, file("d/a", "1"), file("d/b", "1")), archive(t, file(".wh.d", ""), file("d/a", "2"))},
			[]string{"d/", `d/a "2"`}},
		{"whiteout after the same layer's file",
			[][]byte{archive(t, file("d/a", "1"), file("d/b", "1")), archive(t, file("d/a", "2"), file(".wh.d", ""))},
			[]string{"d/", `d/a "2"`}},
		{"opaque directory", [][]byte{archive(t, file("d/a", "1"), file("d/e/f", "1")),
			archive(t, dir("d"), file("d/.wh..wh..opq", ""), file("d/b", "2"))},
			[]string{"d/", `d/b "2"`}},
		{"opaque marker after the files", [][]byte{archive(t, file("d/a", "1"), file("d/e/f", "1")),
			archive(t, dir("d"), file("d/e/g", "2"), file("d/.wh..wh..opq", ""))},
			[]string{"d/", "d/e/", `d/e/g "2"`}},
		{"what AUFS kept for itself", [][]byte{archive(t, file("a", "1"), file(".wh..wh.plnk", ""), dir(".wh..wh.orph"))}, []string{`a "1"`}},
		{"a hard link to a lower layer's file", [][]byte{archive(t, file("a", "1")), archive(t, hardlink("b", "a"))}, []string{`a "1"`, "b = a"}},
		{"a link outlives the name it was made from", [][]byte{archive(t, file("a", "1"), hardlink("b", "a")), archive(t, file(".wh.a", ""))}, []string{`b "1"`}},
		{"one name of two gets a new file", [][]byte{archive(t, file("a", "1"), hardlink("b", "a")), archive(t, file("a", "2"))}, []string{`a "2"`, `b "1"`}},
		{"a hard link to itself", [][]byte{archive(t, file("a", "1"), hardlink("a", "a"))}, []string{`a "1"`}},
		{"absolute names are relative", [][]byte{archive(t, file("/a", "1"), file("//b//c", "2"), hardlink("/d", "/a"))}, []string{`a "1"`, "b/", `b/c "2"`, "d = a"}},
		{"links never lead out",
			[][]byte{archive(t, symlink("up", "../../.."), symlink("abs", "/"), file("up/a", "1"), file("abs/b", "2"))},
			[]string{`a "1"`, "abs -> /", `b "2"`, "up -> ../../.."}},
		{"where a link to nowhere leads is made", [][]byte{archive(t, symlink("l", "/no/where"), file("l/a", "1"))},
			[]string{"l -> /no/where", "no/", "no/where/", `no/where/a "1"`}},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			tree, err := layers(t, tc.layers...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, names(t, tree)); diff != "" {
				t.Errorf("image (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSparseTarContent(t *testing.T) {
	tree, err := layers(t, sparseTar(t, "a", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	b, err := tree.read(tree.root.children["a"].inode, 1<<20)
	if err != nil || len(b) != 1<<20 || b[1<<20-1] != 'x' || bytes.Count(b, []byte{0}) != 1<<20-1 {
		t.Errorf("read %d bytes, %v; want zeros and an x at the end", len(b), err)
	}
}

func TestPlainTarHasNoWhiteouts(t *testing.T) {
	tree, err := newTree(t.TempDir(), 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if err := tree.apply(t.Context(), bytes.NewReader(archive(t, file("a", "1"), file(".wh.a", "2"))), false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{`.wh.a "2"`, `a "1"`}, names(t, tree)); diff != "" {
		t.Errorf("image (-want +got):\n%s", diff)
	}
}

func TestBadTarsAreRefused(t *testing.T) {
	loop := []member{symlink("a", "b"), symlink("b", "a")}
	var deep []member
	for k := range 3 { // each link leads a thousand directories further down
		deep = append(deep, file(fmt.Sprintf("l%d/", k)+strings.Repeat("d/", 500)+"f", ""),
			symlink(fmt.Sprintf("l%d", k+1), fmt.Sprintf("l%d/", k)+strings.Repeat("d/", 500)))
	}
	attribute := func(name, value string) []byte {
		return archive(t, file("a", "1", xattrs(map[string]string{name: value})))
	}
	device := func(name string) []byte {
		return archive(t, newMember(tar.Header{Typeflag: tar.TypeChar, Name: name, Mode: 0o666}, "", nil))
	}
	tests := []struct {
		name string
		tar  []byte
		want string // part of the error
	}{
		{"device node", device("var/x"), "a device node outside /dev"}, // for overlayfs it would be a whiteout
		{"capabilities that are none", attribute("security.capability", "\x01"), "file capabilities are not"},
		{"attribute with a huge name", attribute("user."+strings.Repeat("n", maxName), "1"), "a name of 260 bytes"},
		{"attribute with a huge value", attribute("user.a", strings.Repeat("v", maxValue+1)), "a value of 65537"},
		{"sparse file of a petabyte", sparseTar(t, "a", 1<<50), "larger than 1073741824 bytes"},
		{"socket or the like", archive(t, newMember(tar.Header{Typeflag: 'Z', Name: "a"}, "", nil)), "unknown"},
		{"parent in a name", archive(t, file("../a", "1")), ".. element"},
		{"parent inside a name", archive(t, file("a/../../b", "1")), ".. element"},
		{"parent in a hard link", archive(t, file("a", "1"), hardlink("b", "../a")), ".. element"},
		{"parent in a whiteout", archive(t, file("../.wh.a", "")), ".. element"},
		{"whiteout of ..", archive(t, file("d/.wh...", "")), "whiteout of nothing"},
		{"whiteout of .", archive(t, file("d/.wh..", "")), "whiteout of nothing"},
		{"whiteout without a name", archive(t, file("d/.wh.", "")), "whiteout of nothing"},
		{"hard link to nothing", archive(t, hardlink("b", "a")), errNotThere.Error()},
		{"hard link to a directory", archive(t, dir("a"), hardlink("b", "a")), "is a directory"},
		{"below a file", archive(t, file("a", "1"), file("a/b", "2")), "not a directory"},
		{"a root that is no directory", archive(t, symlink("./", "x")), "only be a directory"},
		{"links in a circle", archive(t, append(loop, file("a/c", ""))...), "too many symbolic links"},
		{"too deep", archive(t, deep...), "directories deep"},
		{"name too long", archive(t, file(strings.Repeat("n", maxName+1), "")), "256 bytes"},
		{"link target too long", archive(t, symlink("a", strings.Repeat("n", maxTarget+1))), "target of 4096 bytes"},
		{"owner out of range", archive(t, file("a", "", owner(1<<33, 0))), "owner"},
		{"cut off", archive(t, file("a", strings.Repeat("x", 3000)))[:2048], "unexpected EOF"},
		{"no tar at all", bytes.Repeat([]byte("x"), 1024), "reading tar"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := layers(t, tc.tar); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want one with %q", err, tc.want)
			}
		})
	}
}

// TestTooMuchWorkIsRefused checks that a small archive cannot make the machine work for a long
// time.
func TestTooMuchWorkIsRefused(t *testing.T) {
	var members []member
	for k := range 5000 {
		members = append(members, file(fmt.Sprintf("d/%d", k), ""))
	}
	for range 5000 { // each visits all nodes
		members = append(members, file("d/.wh..wh..opq", ""))
	}
	if _, err := layers(t, archive(t, members...)); err == nil || !strings.Contains(err.Error(), "steps") {
		t.Errorf("whiteouts of a large directory: %v", err)
	}
	members = []member{symlink("l0", "x")}
	for k := range 39 { // links through links, each with the longest target
		members = append(members, symlink(fmt.Sprintf("l%d", k+1), strings.Repeat("./", 2000)+fmt.Sprintf("l%d", k)))
	}
	for k := range 2000 {
		members = append(members, file(fmt.Sprintf("l39/%d", k), ""))
	}
	if _, err := layers(t, archive(t, members...)); err == nil || !strings.Contains(err.Error(), "steps") {
		t.Errorf("links through links: %v", err)
	}
	tree, err := layers(t)
	if err != nil {
		t.Fatal(err)
	}
	tree.text = maxText - 10 // as if that much text had come
	if err := tree.apply(t.Context(), bytes.NewReader(archive(t, symlink("l", "of ten bytes"))), true); err == nil ||
		!strings.Contains(err.Error(), "names and links of more than") {
		t.Errorf("text that fills memory: %v", err)
	}
	tree.entries = maxEntries
	if err := tree.apply(t.Context(), bytes.NewReader(archive(t, file("a", ""))), true); err == nil ||
		!strings.Contains(err.Error(), "entries") {
		t.Errorf("entries without end: %v", err)
	}
}

func TestBombsAreRefused(t *testing.T) {
	solid := readerFunc(func(p []byte) (int, error) { p[0] = 'x'; return len(p), nil })
	hollow := readerFunc(func(p []byte) (int, error) { clear(p); return len(p), nil })
	for _, tc := range []struct {
		name   string
		plain  io.Reader
		packed int64
		max    int64
		want   string
	}{
		{"more than its size allows", solid, 1 << 20, 1 << 40, "decompression bomb"},
		{"zeros without end", hollow, 1 << 20, 1 << 20, "larger than 1048576 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tree, err := newTree(t.TempDir(), tc.max)
			if err != nil {
				t.Fatal(err)
			}
			defer tree.Close()
			n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{tree.metered(tc.plain, &counted{n: tc.packed})},
				make([]byte, hole))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("after %d bytes: %v", n, err)
			}
		})
	}
}

func TestTooManyAttributesAreRefused(t *testing.T) {
	var many []member
	for k := range maxAttributed + 1 {
		many = append(many, file(fmt.Sprint(k), "", xattrs(map[string]string{"user.a": "1"})))
	}
	tree, err := layers(t, archive(t, many...))
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.writeAttributes(); err == nil ||
		!strings.Contains(err.Error(), "too many extended attributes: 4097 files") {
		t.Errorf("error is %v", err)
	}
}

func TestTooMuchDataIsRefused(t *testing.T) {
	tree, err := newTree(t.TempDir(), 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	a := archive(t, file("a", strings.Repeat("x", 600)), file("b", strings.Repeat("x", 600)))
	if err := tree.apply(t.Context(), bytes.NewReader(a), true); err == nil ||
		!strings.Contains(err.Error(), "larger than 1000 bytes") {
		t.Errorf("error is %v", err)
	}
}

// TestLargeDirectories makes directories that cross block boundaries in every way.
func TestLargeDirectories(t *testing.T) {
	for _, n := range []int{1, 100, 203, 204, 205, 4000, 100_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			var members []member
			var want []string
			for k := range n {
				// 12 bytes per entry and 8 of name sometimes fill a block exactly.
				name := fmt.Sprintf("f%07d", k)
				members = append(members, file("d/"+name, name))
				want = append(want, fmt.Sprintf("d/%s %q", name, name))
			}
			slices.Reverse(members)
			tree, err := layers(t, archive(t, members...))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(append([]string{"d/"}, want...), names(t, tree)); diff != "" {
				t.Errorf("image (-want +got):\n%s", diff)
			}
		})
	}
}

// TestSameTreeSameBytes checks that the same files give the same bytes, in any order in the
// archive and over any lower layers.
func TestSameTreeSameBytes(t *testing.T) {
	members := []member{dir("./"), dir("d"), file("d/a", "1"), file("d/b", "2"), symlink("l", "d"),
		file("c", strings.Repeat("c", 5000))}
	read := func(archives ...[]byte) []byte {
		tree, err := layers(t, archives...)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(write(t, tree))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	want := read(archive(t, members...))
	slices.Reverse(members)
	if !bytes.Equal(want, read(archive(t, members...))) {
		t.Error("another order in the archive gives another image")
	}
	if !bytes.Equal(want, read(archive(t, file("c", "old"), file("x", "gone")),
		archive(t, append(members, file(".wh.x", ""))...))) {
		t.Error("what a lower layer had gives another image")
	}
}

func quiet(string) {}

// needsNamespaces skips a test that makes process and mount namespaces.
func needsNamespaces(t *testing.T) {
	t.Helper()
	caytest.RequireRoot(t)
}
