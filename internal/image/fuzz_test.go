package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
)

func FuzzReference(f *testing.F) {
	for _, s := range []string{"python", "docker.io/library/python:3.13-slim",
		"ghcr.io/a/b@sha256:" + strings.Repeat("0", 64), "localhost:5000/x", "UPPER", "a b", "", "://", "x@sha256:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := parseReference(s)
		if err != nil {
			return
		}
		// The full name can be longer than a name may be; otherwise it must parse as itself.
		if again, err := parseReference(ref.Name()); err == nil && again.Name() != ref.Name() {
			t.Errorf("%q reads as %q, and that as %q", s, ref.Name(), again.Name())
		}
		if strings.ContainsAny(ref.Context().RegistryStr(), "/ @") {
			t.Errorf("%q has the registry %q", s, ref.Context().RegistryStr())
		}
	})
}

// FuzzTarNames checks that accepted names of any archive stay in the tree and make an image that
// another reader can walk.
func FuzzTarNames(f *testing.F) {
	f.Add("a", "b", "c", byte(tar.TypeReg))
	f.Add("d/e", "d/.wh.e", "d/.wh..wh..opq", byte(tar.TypeSymlink))
	f.Add("../a", "/", "a/../b", byte(tar.TypeLink))
	f.Add("l", "l/x", "/etc", byte(tar.TypeSymlink))
	f.Add("l", attributesFile, "/", byte(tar.TypeSymlink))           // a list of attributes from a layer
	f.Add("l", "x", strings.Repeat("b", 300), byte(tar.TypeSymlink)) // dangling, with a name that is too long
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
			// A refused entry ends a build; continuing is the harder test.
			_ = tree.entry(&h, strings.NewReader("z"), true)
			tree.layer++
		}
		checkImage(t, tree)
	})
}

// FuzzTar checks that any bytes as a tar break nothing, and that an accepted tar makes an image.
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

// checkImage checks that a tree makes an image with the tree's names.
func checkImage(t *testing.T, tree *tree) {
	t.Helper()
	if err := tree.writeAttributes(); err != nil {
		return // too many attributes
	}
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
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > maxName ||
				c.parent != n || c.name != name {
				t.Fatalf("the tree has the name %q in %q", name, path)
			}
			walk(c, strings.TrimPrefix(path+"/"+name, "./"))
		}
	}
	walk(tree.root, ".")
	if seen != tree.nodes {
		t.Fatalf("tree has %d names and counts %d", seen, tree.nodes)
	}
	comesBack(t, b.Bytes())
}

// comesBack checks that an image, exported as a layer, makes the same image.
func comesBack(t *testing.T, image []byte) {
	t.Helper()
	read, err := readErofs(onDisk(t, image))
	if err != nil {
		t.Fatalf("reading image: %v", err)
	}
	defer read.Close()
	var layer, again bytes.Buffer
	if err := read.writeTar(t.Context(), &layer); err != nil {
		t.Fatalf("writing layer: %v", err)
	}
	tree, err := newTree(t.TempDir(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if err := tree.apply(t.Context(), &layer, false); err != nil {
		t.Fatalf("reading layer: %v", err)
	}
	if err := tree.writeAttributes(); err != nil {
		t.Fatalf("writing attributes: %v", err)
	}
	if err := writeErofs(&again, tree); err != nil {
		t.Fatalf("writing image again: %v", err)
	}
	if !bytes.Equal(image, again.Bytes()) {
		t.Fatal("another image came back")
	}
}

// onDisk returns an unlinked file with the bytes.
func onDisk(t *testing.T, b []byte) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f
}

// FuzzImage checks that reading any image ends, and that what was read can be exported.
func FuzzImage(f *testing.F) {
	tree, err := newTree(f.TempDir(), 1<<20)
	if err != nil {
		f.Fatal(err)
	}
	defer tree.Close()
	if err := tree.apply(f.Context(), bytes.NewReader(everything(f)), true); err != nil {
		f.Fatal(err)
	}
	if err := tree.writeAttributes(); err != nil {
		f.Fatal(err)
	}
	var b bytes.Buffer
	if err := writeErofs(&b, tree); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes(), uint32(superOffset), []byte{0})
	f.Add(b.Bytes(), uint32(blockSize), []byte{1, 0, 0, 0})
	// Change only a few bytes, since images made by the fuzzer would be refused early.
	f.Fuzz(func(t *testing.T, image []byte, at uint32, change []byte) {
		if len(image) == 0 || len(image) > 1<<20 {
			return
		}
		image = bytes.Clone(image)
		copy(image[int(at)%len(image):], change)
		file := onDisk(t, image)
		defer file.Close()
		read, err := readErofs(file)
		if err != nil {
			return
		}
		if err := read.writeTar(t.Context(), io.Discard); err != nil {
			t.Logf("writing layer: %v", err) // a file may be cut off
		}
	})
}

// FuzzArchive checks that looking for the image in any archive ends.
func FuzzArchive(f *testing.F) {
	p := parts{}
	p.index(f, p.image(f, platform.Architecture, gzipped, archive(f, file("a", "1"))))
	f.Add(p.tar(f))
	f.Add(archive(f, file("manifest.json", `[{"Config":"c.json","Layers":["l"]}]`), file("c.json", "{}"),
		symlink("l", "c.json")))
	f.Fuzz(func(t *testing.T, b []byte) {
		file := onDisk(t, b)
		defer file.Close()
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		a := &tarBlobs{f: file, at: map[string]section{}}
		if err := a.list(t.Context()); err != nil {
			return
		}
		img, err := a.image(1 << 20)
		if err != nil {
			return
		}
		tree, err := newTree(t.TempDir(), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer tree.Close()
		if _, err := img.unpack(t.Context(), tree, quiet); err == nil {
			checkImage(t, tree)
		}
	})
}
