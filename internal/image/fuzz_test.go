package image

import (
	"archive/tar"
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
)

func FuzzReference(f *testing.F) {
	for _, s := range []string{"python", "docker.io/library/python:3.13-slim", "ghcr.io/a/b@sha256:" + strings.Repeat("0", 64), "localhost:5000/x", "UPPER", "a b", "", "://", "x@sha256:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := parseReference(s)
		if err != nil {
			return
		}
		// The full name can be longer than a name may be; if not, it is itself.
		if again, err := parseReference(ref.Name()); err == nil && again.Name() != ref.Name() {
			t.Errorf("%q reads as %q, and that as %q", s, ref.Name(), again.Name())
		}
		if strings.ContainsAny(ref.Context().RegistryStr(), "/ @") {
			t.Errorf("%q has the registry %q", s, ref.Context().RegistryStr())
		}
	})
}

// Whatever the names in an archive are, what is accepted stays in the tree and
// makes an image that another reader can walk.
func FuzzTarNames(f *testing.F) {
	f.Add("a", "b", "c", byte(tar.TypeReg))
	f.Add("d/e", "d/.wh.e", "d/.wh..wh..opq", byte(tar.TypeSymlink))
	f.Add("../a", "/", "a/../b", byte(tar.TypeLink))
	f.Add("l", "l/x", "/etc", byte(tar.TypeSymlink))
	f.Add("l", "x", strings.Repeat("b", 300), byte(tar.TypeSymlink)) // dangling, and too long to be made
	f.Add("\x00", strings.Repeat("a/", 2000), strings.Repeat("b", 300), byte(tar.TypeDir))
	f.Fuzz(func(t *testing.T, one, two, link string, kind byte) {
		tree, err := newTree(t.TempDir(), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer tree.Close()
		tree.layer++
		for _, h := range []tar.Header{
			{Typeflag: tar.TypeReg, Name: "x/y", Size: 1},
			{Typeflag: kind, Name: one, Linkname: link},
			{Typeflag: tar.TypeReg, Name: two, Size: 1},
			{Typeflag: tar.TypeLink, Name: link, Linkname: one},
			{Typeflag: tar.TypeReg, Name: one + "/" + two, Size: 1},
		} {
			// A refused entry ends a build; going on is the harder test.
			_ = tree.entry(&h, strings.NewReader("z"), true)
			tree.layer++
		}
		checkImage(t, tree)
	})
}

// Whatever bytes come as a tar, nothing breaks, and what is accepted makes an image.
func FuzzTar(f *testing.F) {
	f.Add(archive(f, dir("./"), file("a/b", "x"), symlink("l", "a"), hardlink("h", "a/b"), file("a/.wh.b", "")))
	f.Add([]byte("x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		tree, err := newTree(t.TempDir(), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer tree.Close()
		if err := tree.apply(t.Context(), bytes.NewReader(b), true); err != nil {
			return
		}
		checkImage(t, tree)
	})
}

// checkImage fails unless a tree makes an image with the tree's names.
func checkImage(t *testing.T, tree *tree) {
	t.Helper()
	var b bytes.Buffer
	if err := writeErofs(&b, tree); err != nil {
		t.Fatalf("writing image: %v", err)
	}
	if b.Len()%blockSize != 0 {
		t.Fatalf("image of %d bytes is not whole blocks", b.Len())
	}
	fsys, err := erofs.Open(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatalf("opening image: %v", err)
	}
	seen := 0
	var walk func(n *node, path string)
	walk = func(n *node, path string) {
		seen++
		if n.inode.kind() == typeRegular {
			r, err := fsys.Open(path)
			if err != nil {
				t.Fatalf("opening %q: %v", path, err)
			}
			if n, err := io.Copy(io.Discard, r); err != nil {
				t.Fatalf("reading %q: %d bytes, %v", path, n, err)
			}
		}
		for name, c := range n.children {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > maxName || c.parent != n || c.name != name {
				t.Fatalf("the tree has the name %q in %q", name, path)
			}
			walk(c, strings.TrimPrefix(path+"/"+name, "./"))
		}
	}
	walk(tree.root, ".")
	if seen != tree.nodes {
		t.Fatalf("tree has %d names and counts %d", seen, tree.nodes)
	}
}
