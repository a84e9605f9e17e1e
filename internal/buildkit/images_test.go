package buildkit

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cayhq/cay/internal/caytest"
)

// busybox makes an image with a shell, as a layout below dir.
func busybox(t testing.TB, dir string) Base {
	t.Helper()
	program, err := os.ReadFile(caytest.RequireProgram(t, "/bin/busybox"))
	if err != nil {
		t.Fatal(err)
	}
	files := []tar.Header{
		{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "root/", Typeflag: tar.TypeDir, Mode: 0o700}, {Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777},
		{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))},
	}
	for _, name := range strings.Fields("sh ash cat chmod chown cp dd df echo env false find grep head id ln ls mkdir " +
		"mount mv nc nslookup ps pwd rm sed seq sleep sort stat tail tar test touch tr true umount uname wc wget yes") {
		files = append(files, tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777})
	}
	contents := map[string]string{"bin/busybox": string(program),
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n", "etc/group": "root:x:0:\nuser:x:1000:\nstaff:x:50:user\n"}
	for _, name := range []string{"etc/passwd", "etc/group"} {
		files = append(files, tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(contents[name]))})
	}
	return image(t, dir, files, contents, v1.Config{Env: []string{"PATH=/bin", "BASE=busybox"}, Cmd: []string{"/bin/sh"}})
}

// image writes an image of one layer as a layout.
func image(t testing.TB, dir string, files []tar.Header, contents map[string]string, config v1.Config) Base {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, h := range files {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, contents[h.Name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file.OS, file.Architecture, file.Config = "linux", "amd64", config
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return Base{Layout: dir, Manifest: digest.String()}
}

// errNoImage is returned for names that no test image has.
var errNoImage = errors.New("there is no such template or image")

// testBases returns a Base function that has busybox under some names.
func testBases(t testing.TB) func(context.Context, string) (Base, error) {
	b := busybox(t, filepath.Join(t.TempDir(), "busybox"))
	return func(_ context.Context, name string) (Base, error) {
		switch name {
		case "base:latest", "busybox:1.36", "registry.example.com/a/b:v1", "base@" + b.Manifest:
			return b, nil
		}
		return Base{}, fmt.Errorf("%s: %w", name, errNoImage)
	}
}

// pack returns the path of a tar file of a build context.
func pack(t testing.TB, files map[string]string) string {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644,
			Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return write(t, archive.Bytes())
}

func write(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "context.tar")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// opened reads a result with another library than the code under test.
func opened(t testing.TB, r *Result) (v1.Image, map[string]string) {
	t.Helper()
	path, err := layout.FromPath(r.Layout)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := v1.NewHash(r.Manifest)
	if err != nil {
		t.Fatal(err)
	}
	img, err := path.Image(digest)
	if err != nil {
		t.Fatal(err)
	}
	flat := mutate.Extract(img)
	defer flat.Close()
	files := map[string]string{}
	for archive := tar.NewReader(flat); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return img, files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.TrimSuffix(string(content), "\n")
		if h.Typeflag == tar.TypeSymlink {
			text = "-> " + h.Linkname
		}
		files[strings.TrimSuffix(h.Name, "/")] = fmt.Sprintf("%c %04o %d:%d %s", h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid,
			text)
	}
}
