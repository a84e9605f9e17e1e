package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstandard(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

func plain(_ testing.TB, b []byte) []byte { return b }

func hashOf(b []byte) v1.Hash {
	sum := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
}

// parts are the files of an OCI layout by name.
type parts map[string][]byte

func (p parts) blob(kind types.MediaType, b []byte) v1.Descriptor {
	desc := describe(kind, b)
	p[blobPath(desc.Digest)] = b
	return desc
}

func (p parts) json(t testing.TB, kind types.MediaType, v any) v1.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return p.blob(kind, b)
}

// image adds an image and returns the descriptor of its manifest. pack compresses its layers.
func (p parts) image(t testing.TB, arch string, pack func(testing.TB, []byte) []byte, layers ...[]byte) v1.Descriptor {
	t.Helper()
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	c := v1.ConfigFile{OS: "linux", Architecture: arch, RootFS: v1.RootFS{Type: "layers"}}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, hashOf(l))
		m.Layers = append(m.Layers, p.blob(types.OCILayer, pack(t, l)))
	}
	m.Config = p.json(t, types.OCIConfigJSON, c)
	desc := p.json(t, types.OCIManifestSchema1, m)
	desc.Platform = &v1.Platform{OS: "linux", Architecture: arch}
	return desc
}

// index makes the layout's index.
func (p parts) index(t testing.TB, manifests ...v1.Descriptor) parts {
	t.Helper()
	b, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: manifests})
	if err != nil {
		t.Fatal(err)
	}
	p["index.json"] = b
	p["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	return p
}

// dir writes the parts into a directory.
func (p parts) dir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, b := range p {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, path.Dir(name)), 0o755),
			os.WriteFile(filepath.Join(dir, name), b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// tar writes the parts into an archive.
func (p parts) tar(t testing.TB, more ...member) []byte {
	t.Helper()
	members := []member{dir("blobs/"), dir("blobs/sha256/")}
	for name, b := range p {
		members = append(members, file("./"+name, string(b)))
	}
	return archive(t, append(members, more...)...)
}

// saved writes bytes to a file and returns its name.
func saved(t testing.TB, b []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestBuildFromLayoutsAndArchives(t *testing.T) {
	lower, upper := archive(t, file("a", "1"), file("b", "1")), archive(t, file("a", "2"), file(".wh.b", ""))
	p := parts{}
	other := p.image(t, "s390x", plain, archive(t, file("wrong", "architecture")))
	mine := p.image(t, runtime.GOARCH, gzipped, lower, upper)
	both := p.json(t, types.OCIImageIndex,
		v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{other, mine}})
	p.index(t, both)
	z := parts{}
	zstdDesc := z.image(t, runtime.GOARCH, zstandard, lower, upper)
	z.index(t, zstdDesc)
	docker := parts{"l1/layer.tar": lower, "l2/layer.tar": upper}
	config, err := json.Marshal(v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH,
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{hashOf(lower), hashOf(upper)}}})
	if err != nil {
		t.Fatal(err)
	}
	docker["c.json"] = config
	docker["manifest.json"] = []byte(`[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l3/layer.tar","l2/layer.tar"]}]`)
	dockerTar := docker.tar(t, symlink("l3/layer.tar", "../l1/layer.tar")) // as docker names a repeated layer
	inside := parts{"sub/docker.tar": dockerTar, "sub/docker.tar.gz": gzipped(t, dockerTar),
		"index.json": []byte("of something else")}
	for name, b := range p {
		inside["a/layout/"+name] = b
	}

	s := openStore(t)
	want, err := s.Build(t.Context(), Source{Layout: &Layout{Dir: p.dir(t)}}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if want.Source != "oci:"+mine.Digest.String() {
		t.Errorf("source is %q", want.Source)
	}
	listing := []string{
		"drwxr-xr-x 0:0 2 0.0 .",
		"-rw-r--r-- 0:0 1 1700000000.123456789 a \"2\"",
	}
	if diff := cmp.Diff(listing, list(t, s.file(want.Digest))); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	for name, src := range map[string]Source{
		"layout, by its index's digest":    {Layout: &Layout{Dir: p.dir(t), Manifest: both.Digest.String()}},
		"layout, by its manifest's digest": {Layout: &Layout{Dir: p.dir(t), Manifest: mine.Digest.String(), Reference: "forged"}},
		"layout of zstd layers":            {Layout: &Layout{Dir: z.dir(t)}},
		"archive":                          {Archive: saved(t, p.tar(t))},
		"archive, gzip":                    {Archive: saved(t, gzipped(t, p.tar(t)))},
		"archive, zstd":                    {Archive: saved(t, zstandard(t, p.tar(t)))},
		"archive of docker save":           {Archive: saved(t, dockerTar)},
		"archive of docker save, gzip":     {Archive: saved(t, gzipped(t, dockerTar))},
		"layout within an archive":         {Archive: saved(t, gzipped(t, inside.tar(t))), Within: "a/layout/"},
		"archive within an archive":        {Archive: saved(t, inside.tar(t)), Within: "./sub/docker.tar"},
		"packed archive within a packed":   {Archive: saved(t, gzipped(t, inside.tar(t))), Within: "sub/docker.tar.gz"},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			img, err := s.Build(t.Context(), src, quiet)
			if err != nil {
				t.Fatal(err)
			}
			if img.Digest != want.Digest || !strings.HasPrefix(img.Source, "oci:sha256:") {
				t.Errorf("built %+v, want the image %s", img, want.Digest)
			}
			var lines record
			if again, err := s.Build(t.Context(), src, lines.line); err != nil || again.Digest != want.Digest {
				t.Errorf("built again: %+v, %v", again, err)
			}
			lines.has(t, "earlier build with the same inputs")
			leftovers(t, s)
		})
	}
	for _, within := range []string{"nothing", "../sub/other", "sub/docker.tar/x"} {
		if img, err := s.Build(t.Context(), Source{Archive: saved(t, inside.tar(t)), Within: within}, quiet); err == nil {
			t.Errorf("what is within at %q: %+v", within, img)
		}
	}
}

// TestVolumes checks that the directories of an image's volumes are made, unless something is
// there.
func TestVolumes(t *testing.T) {
	lower := archive(t, file("taken", "1"), symlink("way", "srv"))
	p := parts{}
	config := v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH,
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{hashOf(lower)}},
		Config: v1.Config{Volumes: map[string]struct{}{"/var/lib/data": {}, "way/in": {}, "/taken": {}}}}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: p.json(t, types.OCIConfigJSON, config),
		Layers: []v1.Descriptor{p.blob(types.OCILayer, lower)}}
	p.index(t, p.json(t, types.OCIManifestSchema1, m))
	s := openStore(t)
	img, err := s.Build(t.Context(), Source{Layout: &Layout{Dir: p.dir(t)}}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(list(t, s.file(img.Digest)), "\n")
	for _, want := range []string{"drwxr-xr-x 0:0 2 0.0 var/lib/data", "drwxr-xr-x 0:0 2 0.0 srv/in", " taken \"1\""} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	config.Config.Volumes = map[string]struct{}{"/a/../../b": {}}
	bad := parts{}
	m.Config = bad.json(t, types.OCIConfigJSON, config)
	m.Layers = []v1.Descriptor{bad.blob(types.OCILayer, lower)}
	bad.index(t, bad.json(t, types.OCIManifestSchema1, m))
	if img, err := s.Build(t.Context(), Source{Layout: &Layout{Dir: bad.dir(t)}}, quiet); err == nil {
		t.Errorf("a volume outside: %+v", img)
	}
}

// TestHasUser looks for accounts of an image.
func TestHasUser(t *testing.T) {
	s := openStore(t)
	for passwd, want := range map[string]bool{"root:x:0:0::/:\napp:x:5:5::/:/bin/sh\n": true, "happy:x:5:5:app::\n": false,
		"app\n": false, "": false} {
		layers := [][]byte{archive(t, file("etc/passwd", passwd))}
		if passwd == "" {
			layers = [][]byte{archive(t, file("a", "1"))}
		}
		p := parts{}
		p.index(t, p.image(t, runtime.GOARCH, plain, layers...))
		made := 0
		img, err := s.Build(t.Context(), Source{Layout: &Layout{Dir: p.dir(t)}, Made: func() { made++ }}, quiet)
		if err != nil || made != 1 {
			t.Fatalf("%v; said %d times that all files are there", err, made)
		}
		if got, err := s.HasUser(t.Context(), img.Digest, "app"); got != want || err != nil {
			t.Errorf("%q: %v, %v", passwd, got, err)
		}
	}
}

// TestSame compares images with one that has a bit of everything.
func TestSame(t *testing.T) {
	s := openStore(t)
	build := func(members ...member) string {
		t.Helper()
		p := parts{}
		p.index(t, p.image(t, runtime.GOARCH, plain, archive(t, members...)))
		img, err := s.Build(t.Context(), Source{Layout: &Layout{Dir: p.dir(t)}}, quiet)
		if err != nil {
			t.Fatal(err)
		}
		return img.Digest
	}
	late := func(h *tar.Header) { h.ModTime = h.ModTime.Add(time.Hour) }
	with := func(value string) func(*tar.Header) {
		return func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": value} }
	}
	long := strings.Repeat("x", 3<<20)
	all := func(last ...member) []member {
		return append([]member{dir("d"), file("d/long", long), file("d/attributed", "1", with("a")), symlink("l", "d"),
			file("one", "1"), hardlink("two", "one"), file("empty", "")}, last...)
	}
	was := build(all()...)
	for name, tt := range map[string]struct {
		members []member
		want    bool
	}{
		"the same": {all(), true},
		"other times": {[]member{dir("d", late), file("d/long", long, late), file("d/attributed", "1", with("a"), late),
			symlink("l", "d"), file("one", "1", late), hardlink("two", "one"), file("empty", "", late)}, true},
		"one more":             {all(file("e", "")), false},
		"other bytes":          {all(file("one", "2"), hardlink("two", "one")), false},
		"other bytes far in":   {all(file("d/long", long[1:]+"y")), false},
		"another size":         {all(file("empty", "1")), false},
		"another mode":         {all(file("empty", "", mode(0o600))), false},
		"another owner":        {all(file("empty", "", owner(1, 0))), false},
		"another target":       {all(symlink("l", "one")), false},
		"another attribute":    {all(file("d/attributed", "1", with("b"))), false},
		"two files of one":     {all(file("two", "1")), false},
		"one file of two":      {all(file("d/a", "1"), hardlink("d/b", "d/a")), false},
		"a link, not a folder": {all(symlink("empty", "one")), false},
	} {
		other := build(tt.members...)
		if name == "other times" && other == was {
			t.Error("other times give the same image")
		}
		for _, pair := range [][2]string{{was, other}, {other, was}} {
			if got, err := s.Same(t.Context(), pair[0], pair[1]); got != tt.want || err != nil {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		}
	}
	if _, err := s.Same(t.Context(), was, strings.Repeat("0", 64)); !errors.Is(err, ErrMissing) {
		t.Errorf("with an image that is not there: %v", err)
	}
}

func TestBadLayoutsAreRefused(t *testing.T) {
	layer := archive(t, file("a", strings.Repeat("a", 1000)))
	// change makes a layout with a defect.
	change := func(f func(t *testing.T, p parts, d v1.Descriptor) string) func(*testing.T) string {
		return func(t *testing.T) string {
			p := parts{}
			d := p.image(t, runtime.GOARCH, gzipped, layer)
			p.index(t, d)
			if dir := f(t, p, d); dir != "" {
				return dir
			}
			return p.dir(t)
		}
	}
	layerBlob := func(p parts) string {
		for name, b := range p {
			if bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
				return name
			}
		}
		return ""
	}
	tests := []struct {
		name string
		dir  func(*testing.T) string
		want string
	}{
		{"empty directory", func(t *testing.T) string { return t.TempDir() }, "reading the index of the layout"},
		{"no directory", func(t *testing.T) string { return filepath.Join(t.TempDir(), "none") }, "opening layout"},
		{"index that leads out", change(func(t *testing.T, p parts, _ v1.Descriptor) string {
			outside := saved(t, p["index.json"])
			delete(p, "index.json")
			dir := p.dir(t)
			if err := os.Symlink(outside, filepath.Join(dir, "index.json")); err != nil {
				t.Fatal(err)
			}
			return dir
		}), "escapes"},
		{"pipe in place of a blob", change(func(t *testing.T, p parts, d v1.Descriptor) string {
			dir := p.dir(t)
			name := filepath.Join(dir, blobPath(d.Digest))
			if err := errors.Join(os.Remove(name), syscall.Mkfifo(name, 0o644)); err != nil {
				t.Fatal(err)
			}
			return dir
		}), "not a regular file"},
		{"index that is none", change(func(_ *testing.T, p parts, _ v1.Descriptor) string { p["index.json"] = []byte("{"); return "" }), "reading the index"},
		{"index without an image", change(func(t *testing.T, p parts, _ v1.Descriptor) string { p.index(t); return "" }), "only for nothing"},
		{"index for others", change(func(t *testing.T, p parts, d v1.Descriptor) string {
			d.Platform = &v1.Platform{OS: "plan9", Architecture: "mips"}
			p.index(t, d)
			return ""
		}), "only for plan9/mips"},
		{"huge index", change(func(_ *testing.T, p parts, _ v1.Descriptor) string {
			p["index.json"] = bytes.Repeat([]byte(" "), maxManifest+1)
			return ""
		}), "are allowed"},
		{"changed manifest", change(func(_ *testing.T, p parts, d v1.Descriptor) string {
			b := bytes.Clone(p[blobPath(d.Digest)])
			b[len(b)-2] ^= 1
			p[blobPath(d.Digest)] = b
			return ""
		}), "the image is damaged"},
		{"missing layer", change(func(_ *testing.T, p parts, _ v1.Descriptor) string { delete(p, layerBlob(p)); return "" }), "no such file"},
		{"changed layer", change(func(_ *testing.T, p parts, _ v1.Descriptor) string {
			name := layerBlob(p)
			b := bytes.Clone(p[name])
			b[len(b)-1] ^= 1
			p[name] = b
			return ""
		}), "have the digest"},
		{"layer cut off", change(func(_ *testing.T, p parts, _ v1.Descriptor) string {
			name := layerBlob(p)
			p[name] = p[name][:len(p[name])-1]
			return ""
		}), "the manifest names"},
		{"endless indexes", change(func(t *testing.T, p parts, d v1.Descriptor) string {
			d.Platform = nil
			for range maxIndexes + 1 {
				d = p.json(t, types.OCIImageIndex, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{d}})
			}
			p.index(t, d)
			return ""
		}), "lead to no manifest"},
		{"layers of absurd sizes", change(func(t *testing.T, p parts, _ v1.Descriptor) string {
			m := v1.Manifest{SchemaVersion: 2, Config: v1.Descriptor{Digest: hashOf(nil)}}
			for range 3 {
				m.Layers = append(m.Layers, v1.Descriptor{Digest: hashOf(nil), Size: 1 << 62})
			}
			p.index(t, p.json(t, types.OCIManifestSchema1, m))
			return ""
		}), "larger than it may be"},
		{"negative sizes", change(func(t *testing.T, p parts, _ v1.Descriptor) string {
			p.index(t, p.json(t, types.OCIManifestSchema1,
				v1.Manifest{SchemaVersion: 2, Config: v1.Descriptor{Digest: hashOf(nil), Size: -1}}))
			return ""
		}), "larger than it may be"},
		{"too many layers", change(func(t *testing.T, p parts, _ v1.Descriptor) string {
			m := v1.Manifest{SchemaVersion: 2, Config: v1.Descriptor{Digest: hashOf(nil)},
				Layers: make([]v1.Descriptor, maxLayers+1)}
			for n := range m.Layers {
				m.Layers[n].Digest = hashOf(nil)
			}
			p.index(t, p.json(t, types.OCIManifestSchema1, m))
			return ""
		}), "513 layers"},
		{"configuration of another image", change(func(t *testing.T, p parts, _ v1.Descriptor) string {
			m := v1.Manifest{SchemaVersion: 2, Layers: []v1.Descriptor{p.blob(types.OCILayer, layer)}}
			m.Config = p.json(t, types.OCIConfigJSON, v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH})
			p.index(t, p.json(t, types.OCIManifestSchema1, m))
			return ""
		}), "1 layers, 0 of them named"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			_, err := s.Build(t.Context(), Source{Layout: &Layout{Dir: tc.dir(t)}}, quiet)
			step := new(StepError)
			if !errors.As(err, &step) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want a StepError with %q", err, tc.want)
			}
			leftovers(t, s)
		})
	}
	for _, bad := range []Source{{Layout: &Layout{Dir: t.TempDir(), Manifest: "sha256:../../x"}},
		{Layout: &Layout{Dir: t.TempDir(), Manifest: "md5:0"}},
		{Layout: &Layout{}, Archive: "x"}, {Image: "x", Archive: "x"}, {}} {
		if _, err := openStore(t).Build(t.Context(), bad, quiet); err == nil {
			t.Errorf("built %+v", bad)
		}
	}
}

func TestBadArchivesAreRefused(t *testing.T) {
	layer := archive(t, file("a", "1"))
	good := parts{}
	good.index(t, good.image(t, runtime.GOARCH, plain, layer))
	config := fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":[%q]}}`, runtime.GOARCH,
		hashOf(layer))
	dockerSave := func(manifest string, more ...member) []byte {
		return archive(t, append([]member{file("manifest.json", manifest), file("c.json", config)}, more...)...)
	}
	many := make([]member, maxParts+1)
	for n := range many {
		many[n] = file(fmt.Sprint(n), "")
	}
	tests := []struct {
		name string
		b    []byte
		want string
	}{
		{"nothing", nil, "neither index.json"},
		{"no tar", bytes.Repeat([]byte("x"), 1024), "reading archive"},
		{"no image", archive(t, file("x", "1")), "neither index.json"},
		{"cut off", good.tar(t)[:1500], ""},
		{"gzip cut off", gzipped(t, good.tar(t))[:100], "unexpected EOF"},
		{"too many files", archive(t, many...), "more than 16384 files"},
		{"two images", dockerSave(`[{},{}]`), "2 images"},
		{"no image of docker's", dockerSave(`[]`), "0 images"},
		{"manifest.json that is none", dockerSave(`{`), "manifest.json"},
		{"configuration outside", dockerSave(`[{"Config":"../../../etc/passwd","Layers":[]}]`), "the archive has no"},
		{"layer outside", dockerSave(`[{"Config":"c.json","Layers":["/etc/passwd"]}]`), "the archive has no"},
		{"layer linked outside", dockerSave(`[{"Config":"c.json","Layers":["l"]}]`, symlink("l", "/etc/passwd")), "the archive has no"},
		{"another layer than its configuration names", dockerSave(`[{"Config":"c.json","Layers":["l"]}]`, file("l", string(archive(t, file("b", "1"))))), "have the digest"},
		{"sparse part", sparseTar(t, "index.json", 1<<20), "is sparse"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t)
			_, err := s.Build(t.Context(), Source{Archive: saved(t, tc.b)}, quiet)
			step := new(StepError)
			if !errors.As(err, &step) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want a StepError with %q", err, tc.want)
			}
			leftovers(t, s)
		})
	}
	s := openStore(t)
	for _, name := range []string{"/dev/zero", t.TempDir(), "/nonexistent"} {
		if _, err := s.Build(t.Context(), Source{Archive: name}, quiet); err == nil {
			t.Errorf("built from %s", name)
		}
	}
}

// sparseTar returns an archive with a sparse file of the size whose last byte is its only data,
// as GNU tar writes it with --format=pax.
func sparseTar(t testing.TB, name string, size int64) []byte {
	t.Helper()
	content := append(fmt.Appendf(nil, "1\n%d\n1\n", size-1), make([]byte, 512)...)[:512]
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	// The library writes no sparse files and refuses their records, so they are put in
	// afterwards, in place of records of the same length.
	records := map[string]string{"XNU.sparse.major": "1", "XNU.sparse.minor": "0", "XNU.sparse.name": name,
		"XNU.sparse.realsize": fmt.Sprint(size)}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "sparse", Size: 513, Mode: 0o644, ModTime: entryTime,
		Format: tar.FormatPAX, PAXRecords: records}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(append(content, 'x')); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return bytes.ReplaceAll(b.Bytes(), []byte("XNU.sparse"), []byte("GNU.sparse"))
}

func TestLimitOfOneBuild(t *testing.T) {
	p := parts{}
	p.index(t, p.image(t, runtime.GOARCH, gzipped, archive(t, file("a", strings.Repeat("a", 5000)))))
	l := Layout{Dir: p.dir(t)}
	s := openStore(t, func(c *Config) { c.MaxSize = 10000 })
	if _, err := s.Build(t.Context(), Source{Layout: &l, MaxSize: 4999}, quiet); err == nil ||
		!strings.Contains(err.Error(), "larger than 4999 bytes") || !strings.Contains(err.Error(), `tar entry "a"`) {
		t.Errorf("error is %v, want the entry and the limit of the build", err)
	}
	for _, max := range []int64{0, 5000, 1 << 40} {
		if _, err := s.Build(t.Context(), Source{Layout: &l, MaxSize: max}, quiet); err != nil {
			t.Errorf("with a limit of %d: %v", max, err)
		}
	}
	s = openStore(t, func(c *Config) { c.MaxSize = 4000 })
	if _, err := s.Build(t.Context(), Source{Layout: &l, MaxSize: 5000}, quiet); err == nil ||
		!strings.Contains(err.Error(), "larger than 4000 bytes") {
		t.Errorf("error is %v, want the limit of the store", err)
	}
	leftovers(t, s)
}

// TestDamagedPullIsPulledAgain checks that a damaged layout of the store is removed and pulled
// again.
func TestDamagedPullIsPulledAgain(t *testing.T) {
	h := newHub(t)
	ref := h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", strings.Repeat("a", 1000)))))
	for _, kind := range []string{"layer", "manifest"} {
		t.Run(kind, func(t *testing.T) {
			s := openStore(t)
			l, err := s.Pull(t.Context(), ref, nil, quiet)
			if err != nil {
				t.Fatal(err)
			}
			blobs, err := filepath.Glob(filepath.Join(l.Dir, "blobs", "sha256", "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range blobs {
				b, err := os.ReadFile(name)
				if err != nil {
					t.Fatal(err)
				}
				if isLayer := bytes.HasPrefix(b, []byte{0x1f, 0x8b}); isLayer != (kind == "layer") {
					continue
				}
				b[len(b)/2] ^= 1
				if err := os.WriteFile(name, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.Build(t.Context(), Source{Image: ref}, quiet); err == nil {
				t.Error("built from a damaged layout")
			}
			if _, err := s.Build(t.Context(), Source{Image: ref}, quiet); err != nil {
				t.Errorf("building again: %v", err)
			}
			leftovers(t, s)
		})
	}
}

func TestSparseFilesTakeNoRoom(t *testing.T) {
	const size = 1 << 30
	zerosOf := func(n int64) io.Reader {
		return io.LimitReader(readerFunc(func(p []byte) (int, error) { clear(p); return len(p), nil }), n)
	}
	tree, err := newTree(t.TempDir(), size+1000)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	tree.layer++
	content := io.MultiReader(zerosOf(size/2), strings.NewReader("middle"), zerosOf(size/2-6))
	for _, step := range []error{
		tree.entry(&tar.Header{Typeflag: tar.TypeReg, Name: "sparse", Size: size}, content, true),
		tree.entry(&tar.Header{Typeflag: tar.TypeReg, Name: "zzz", Size: 4}, strings.NewReader("last"), true),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	s := openStore(t)
	img, err := s.write(tree)
	if err != nil {
		t.Fatal(err)
	}
	small := func(path string) {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if took := info.Sys().(*syscall.Stat_t).Blocks * 512; info.Size() < size || took > 1<<20 {
			t.Errorf("%s has %d bytes and takes %d on the disk", path, info.Size(), took)
		}
	}
	small(s.file(img.Digest))
	l, err := s.Export(t.Context(), img.Digest, Runtime{}, filepath.Join(t.TempDir(), "layout"))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := filepath.Glob(filepath.Join(l.Dir, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range layers {
		if info, err := os.Stat(name); err == nil && info.Size() > 1<<20 {
			small(name)
		}
	}
	back, err := openStore(t).Build(t.Context(), Source{Layout: &l}, quiet)
	if err != nil || back.Digest != img.Digest {
		t.Errorf("what came back: %+v, %v; want %s", back, err, img.Digest)
	}
}
