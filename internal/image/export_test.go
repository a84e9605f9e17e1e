package image

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ocilayout "github.com/google/go-containerregistry/pkg/v1/layout"
)

func xattrs(records map[string]string) func(*tar.Header) {
	return func(h *tar.Header) {
		h.PAXRecords = map[string]string{}
		for name, value := range records {
			h.PAXRecords["SCHILY.xattr."+name] = value
		}
	}
}

// everything returns a layer with every kind of file that an image can hold.
func everything(t testing.TB) []byte {
	long := strings.Repeat("n", maxName)
	return archive(t,
		dir("./", mode(0o751), owner(3, 4)),
		dir("bin/"), file("bin/suid", "suid", mode(0o4755)), file("bin/sgid", "sgid", mode(0o2755), owner(5, 6)),
		dir("tmp/", mode(0o1777)),
		file("bin/ping", "cap", mode(0o755), xattrs(map[string]string{
			"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00" +
				"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"})),
		file("attributes", "x", xattrs(map[string]string{"user.b": "\x00\xff", "user.a": "", "user.ünï": "value"})),
		dir("attributed/", xattrs(map[string]string{"user.dir": "d"})),
		hardlink("attributes2", "attributes"),
		file("uids", "x", owner(4000000000, 3000000000)), dir("no/children/"), file("empty", ""),
		file("block", strings.Repeat("b", blockSize)), file("more", strings.Repeat("m", 10*blockSize+7)),
		file("zeros", strings.Repeat("\x00", 3*hole+1)),
		symlink("abs", "/etc/shadow"), symlink("long-target", strings.Repeat("t", maxTarget)), hardlink("abs2", "abs"),
		file(long, "long name"), dir("deep/"+long+"/"+long+"/"), file("deep/"+long+"/"+long+"/"+long, "far down"),
		file("odd/\xff\xfe not utf-8", "1"), file("odd/ünï \t\n", "2"), file("-before-dot", "3"),
		file("odd/back\\slash", "4"),
		file("a/first", "linked"), hardlink("z/last", "a/first"), hardlink("a/second", "a/first"),
		newMember(tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600}, "", nil),
		file("old", "from 1901", func(h *tar.Header) { h.ModTime = entryTime.AddDate(-122, 0, 0) }),
	)
}

// TestExportComesBack checks that an exported image makes the same image again, and is a valid
// OCI image.
func TestExportComesBack(t *testing.T) {
	h := newHub(t)
	s := openStore(t)
	rt := Runtime{Env: []string{"A=1", "B=ü"}, User: "app", Workdir: "/srv", Entrypoint: []string{"/e"},
		Cmd: []string{"c", "d"}}
	img, err := s.Build(t.Context(),
		Source{Image: h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, everything(t)))}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := s.Export(t.Context(), img.Digest, rt, dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Export(t.Context(), img.Digest, rt, filepath.Join(t.TempDir(), "again"))
	if err != nil || again.Manifest != l.Manifest {
		t.Errorf("exported twice: %s and %s, %v", l.Manifest, again.Manifest, err)
	}
	others, err := ocilayout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := v1.NewHash(l.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	oci, err := others.Image(digest)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := oci.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("the library for OCI images finds %d layers, %v", len(layers), err)
	}
	config, err := oci.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if got, _, err := v1.SHA256(plain); err != nil || got != config.RootFS.DiffIDs[0] {
		t.Errorf("the layer has the digest %v, %v; the configuration names %v", got, err, config.RootFS.DiffIDs)
	}
	back, err := openStore(t).Build(t.Context(), Source{Layout: &l}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	want := Image{Digest: img.Digest, Size: img.Size, Source: "oci:" + l.Manifest, Config: rt}
	if diff := cmp.Diff(want, back); diff != "" {
		t.Errorf("what came back (-want +got):\n%s", diff)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("the layout holds %v (%v), want blobs, index.json and oci-layout", entries, err)
	}
	leftovers(t, s)
}

// TestAttributesFileOfALayerIsDropped checks that a list of attributes that a layer contains is ignored.
func TestAttributesFileOfALayerIsDropped(t *testing.T) {
	tree, err := layers(t, archive(t, symlink("l", "/"), file("l/"+attributesFile, "not a tar"),
		file("a", "1", xattrs(map[string]string{"user.a": "1"}))))
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.writeAttributes(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(write(t, tree))
	if err != nil {
		t.Fatal(err)
	}
	read, err := readErofs(f)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if got := read.root.children["a"].inode.xattrs; len(got) != 1 || got[0] != (xattr{"user.a", "1"}) ||
		read.root.children[attributesFile] != nil {
		t.Errorf("attributes are %q, beside %v", got, read.root.children)
	}
}

func TestExportRefuses(t *testing.T) {
	s := openStore(t)
	if _, err := s.Export(t.Context(), strings.Repeat("0", 64), Runtime{}, t.TempDir()); !errors.Is(err, ErrMissing) {
		t.Errorf("error is %v, want that it is missing", err)
	}
	h := newHub(t)
	img, err := s.Build(t.Context(),
		Source{Image: h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", "1"))))}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "mine"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Export(t.Context(), img.Digest, Runtime{}, full); err == nil ||
		!strings.Contains(err.Error(), "holds 1 files") {
		t.Errorf("error is %v, want that the directory is not empty", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Export(ctx, img.Digest, Runtime{}, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want that it was cancelled", err)
	}
}
