package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// hub is a registry on the loopback interface.
type hub struct {
	host   string
	asked  atomic.Int64                                                  // number of requests
	tamper func(w http.ResponseWriter, r *http.Request, b []byte) []byte // changes answers
	// answers instead of the registry if it returns true
	front func(w http.ResponseWriter, r *http.Request) bool
}

func newHub(t testing.TB) *hub {
	t.Helper()
	h := new(hub)
	real := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.asked.Add(1)
		if h.front != nil && h.front(w, r) {
			return
		}
		if h.tamper == nil {
			real.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		real.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(h.tamper(w, r, rec.Body.Bytes()))
	}))
	t.Cleanup(server.Close)
	h.host = strings.TrimPrefix(server.URL, "http://")
	return h
}

// picture makes an OCI image of layers, for an architecture.
func picture(t testing.TB, arch string, config v1.Config, archives ...[]byte) v1.Image {
	t.Helper()
	img := v1.Image(empty.Image)
	for _, a := range archives {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(a)), nil },
			tarball.WithCompressionLevel(gzip.BestSpeed))
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", arch, config
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	return img
}

// push puts an image into the registry and returns its reference.
func (h *hub) push(t testing.TB, tag string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(h.host + "/" + tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// program is an executable file.
func program(name string) member { return file(name, "#!/bin/sh\n", mode(0o755)) }

// record collects progress lines.
type record []string

func (r *record) line(s string) { *r = append(*r, s) }

func (r record) has(t *testing.T, text string) {
	t.Helper()
	if !slices.ContainsFunc(r, func(line string) bool { return strings.Contains(line, text) }) {
		t.Errorf("no progress line with %q in %q", text, r)
	}
}

func TestBuildFromRegistry(t *testing.T) {
	h := newHub(t)
	other := picture(t, "s390x", v1.Config{}, archive(t, file("wrong", "architecture")))
	mine := picture(t, runtime.GOARCH, v1.Config{Env: []string{"A=1"}, User: "app", WorkingDir: "/srv",
		Entrypoint: []string{"/e"}, Cmd: []string{"c"}},
		archive(t, dir("./"), program("usr/bin/tool"), file("a", "1"), file("b", "1")),
		archive(t, file("a", "2"), file(".wh.b", "")))
	both := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: other,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: mine,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}}})
	ref, err := name.ParseReference(h.host + "/lib/tool:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, both); err != nil {
		t.Fatal(err)
	}
	s := openStore(t)
	var lines record
	img, err := s.Build(t.Context(), Source{Image: ref.String(), Require: []string{"tool"}}, lines.line)
	if err != nil {
		t.Fatal(err)
	}
	lines.has(t, "layer 2 of 2")
	digest, err := mine.Digest()
	if err != nil {
		t.Fatal(err)
	}
	want := Image{Digest: img.Digest, Size: img.Size, Source: h.host + "/lib/tool@" + digest.String(),
		Config: Runtime{Env: []string{"A=1"}, User: "app", Workdir: "/srv", Entrypoint: []string{"/e"}, Cmd: []string{"c"}}}
	if diff := cmp.Diff(want, img); diff != "" {
		t.Errorf("image (-want +got):\n%s", diff)
	}
	path, err := s.Path(t.Context(), img.Digest)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() != img.Size || info.Mode().Perm() != 0o444 {
		t.Errorf("file is %v (%v), want %d bytes, read-only", info, err, img.Size)
	}
	fsck(t, path)
	const at = "1700000000.123456789"
	listing := []string{
		"drwxr-xr-x 0:0 3 " + at + " .",
		"-rw-r--r-- 0:0 1 " + at + ` a "2"`,
		"drwxr-xr-x 0:0 3 0.0 usr",
		"drwxr-xr-x 0:0 2 0.0 usr/bin",
		"-rwxr-xr-x 0:0 1 " + at + ` usr/bin/tool "#!/bin/sh\n"`,
	}
	if diff := cmp.Diff(listing, list(t, path)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	leftovers(t, s)
}

func TestBadImagesAreRefused(t *testing.T) {
	layer := archive(t, file("a", strings.Repeat("a", 10000)))
	t.Run("wrong architecture", func(t *testing.T) {
		h := newHub(t)
		refused(t, h.push(t, "x", picture(t, "s390x", v1.Config{}, layer)), "it is for linux/s390x")
	})
	t.Run("no such image", func(t *testing.T) {
		refused(t, newHub(t).host+"/x:none", "asking the registry: GET http")
	})
	t.Run("lacks a program", func(t *testing.T) {
		h := newHub(t)
		refused(t, h.push(t, "x", picture(t, runtime.GOARCH, v1.Config{}, layer)), "it lacks git, sudo", "git", "sudo")
	})
	t.Run("hostile names", func(t *testing.T) {
		h := newHub(t)
		refused(t, h.push(t, "x", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("../../etc/passwd", "x")))),
			".. element")
	})
	t.Run("not a reference", func(t *testing.T) {
		refused(t, "UPPER CASE", "not an image reference")
	})
	t.Run("a configuration that names other layers", func(t *testing.T) {
		h := newHub(t)
		img := picture(t, runtime.GOARCH, v1.Config{}, layer)
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		config = config.DeepCopy()
		config.RootFS.DiffIDs[0].Hex = strings.Repeat("0", 64)
		if img, err = mutate.ConfigFile(img, config); err != nil {
			t.Fatal(err)
		}
		refused(t, h.push(t, "x", img), "the image names sha256:000")
	})
	for _, what := range []string{"manifests", "blobs"} {
		t.Run("changed "+what, func(t *testing.T) {
			h := newHub(t)
			img := picture(t, runtime.GOARCH, v1.Config{}, layer)
			h.push(t, "x", img)
			digest, err := img.Digest()
			if err != nil {
				t.Fatal(err)
			}
			changed := 0
			h.tamper = func(_ http.ResponseWriter, r *http.Request, b []byte) []byte {
				if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/"+what+"/") && len(b) > 20 {
					b = bytes.Clone(b)
					b[len(b)/2] ^= 1
					changed++
				}
				return b
			}
			refused(t, h.host+"/x@"+digest.String(), "")
			if changed == 0 {
				t.Error("nothing was changed on its way: the test tests nothing")
			}
		})
	}
}

// refused checks that building from an image alone fails with a text, and leaves nothing.
func refused(t *testing.T, ref, want string, require ...string) {
	t.Helper()
	s := openStore(t)
	img, err := s.Build(t.Context(), Source{Image: ref, Require: require}, quiet)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("built %+v, error %v; want an error with %q", img, err, want)
	}
	leftovers(t, s)
	if found, err := filepath.Glob(filepath.Join(s.cfg.Dir, "*"+suffix)); err != nil || len(found) > 0 {
		t.Errorf("images in the store: %v %v", found, err)
	}
}

// fakeDebian puts a mmdebstrap on PATH that writes a given tar, and returns the file with its
// arguments.
func fakeDebian(t *testing.T, tar []byte, script string) (argsFile string) {
	t.Helper()
	dir := t.TempDir()
	argsFile = filepath.Join(dir, "args")
	tarFile := filepath.Join(dir, "tar")
	if err := os.WriteFile(tarFile, tar, 0o644); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("#!/bin/sh\nprintf '%%s\\n' \"$@\" >%s\n%s\ncat %s\n", argsFile, script, tarFile)
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return argsFile
}

// mirror makes a source that needs no keyring on the machine.
var mirror = []string{"deb [trusted=yes] http://127.0.0.1:9/debian x main"}

func TestFallsBackToDebian(t *testing.T) {
	needsNamespaces(t)
	args := fakeDebian(t, archive(t, program("usr/bin/git")), "echo 'I: working' >&2")
	debian := &Debian{Suite: "bookworm", Packages: []string{"git", "curl"}, Mirrors: mirror,
		Exclude: []string{"/usr/share/man/*"}}

	h := newHub(t)
	lacking := h.push(t, "lacking", picture(t, runtime.GOARCH, v1.Config{User: "app"}, archive(t, file("a", "1"))))
	closed := closedPort(t)
	hanging := hangingPort(t)
	tests := []struct{ name, image, source string }{
		{"no image wanted", "", "debian:bookworm"},
		{"image lacks a program", lacking, "debian:bookworm (not " + lacking + ": it lacks git)"},
		{"no such image", h.host + "/none:1", ""},
		{"no registry", closed + "/x:1", "debian:bookworm (not " + closed + "/x:1: its registry is not reachable)"},
		{"registry that does not answer", hanging + "/x:1", "debian:bookworm (not " + hanging + "/x:1: its registry is not reachable)"},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			s := openStore(t, func(c *Config) { c.RegistryTimeout = 100 * time.Millisecond })
			var lines record
			img, err := s.Build(t.Context(), Source{Image: tc.image, Debian: debian, Require: []string{"git"}}, lines.line)
			if err != nil {
				t.Fatal(err)
			}
			lines.has(t, "installing Debian bookworm: working")
			if tc.source != "" && img.Source != tc.source {
				t.Errorf("source is %q, want %q", img.Source, tc.source)
			}
			if !strings.HasPrefix(img.Source, "debian:bookworm") || !cmp.Equal(img.Config, Runtime{}) {
				t.Errorf("image is %+v, want one of Debian", img)
			}
			leftovers(t, s)
		})
	}
	got, err := os.ReadFile(args)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"--variant=minbase", "--mode=root", "--format=tar", "--dpkgopt=force-unsafe-io", "--include=git,curl",
		"--dpkgopt=path-exclude=/usr/share/man/*", "bookworm", "-", mirror[0]}
	if diff := cmp.Diff(want, strings.Split(strings.TrimSpace(string(got)), "\n")); diff != "" {
		t.Errorf("mmdebstrap's arguments (-want +got):\n%s", diff)
	}
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// hangingPort returns the address of a port that accepts connections and sends nothing.
func hangingPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func TestDebianFailuresSayWhatHappened(t *testing.T) {
	needsNamespaces(t)
	debian := &Debian{Suite: "bookworm", Packages: []string{"git"}, Mirrors: mirror}
	t.Run("exit code and last lines", func(t *testing.T) {
		fakeDebian(t, nil, "for i in $(seq 50); do echo \"E: line $i\" >&2; done; exit 25")
		s := openStore(t)
		_, err := s.Build(t.Context(), Source{Debian: debian}, quiet)
		var step *StepError
		if !errors.As(err, &step) {
			t.Fatalf("error is %v, want a StepError", err)
		}
		if step.ExitCode != 25 || len(step.Tail) != tailLines || step.Tail[tailLines-1] != "E: line 50" ||
			step.Step != "installing Debian bookworm" {
			t.Errorf("error is %+v", step)
		}
		leftovers(t, s)
	})
	t.Run("half a tar", func(t *testing.T) {
		fakeDebian(t, archive(t, file("a", strings.Repeat("x", 5000)))[:3000], "")
		s := openStore(t)
		if _, err := s.Build(t.Context(), Source{Debian: debian}, quiet); err == nil ||
			!strings.Contains(err.Error(), "unexpected EOF") {
			t.Errorf("error is %v", err)
		}
		leftovers(t, s)
	})
	t.Run("a whole tar but a failure after it", func(t *testing.T) {
		fakeDebian(t, archive(t, file("a", "1")), "trap 'exit 3' EXIT")
		s := openStore(t)
		if _, err := s.Build(t.Context(), Source{Debian: debian}, quiet); err == nil ||
			!strings.Contains(err.Error(), "exit code 3") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("not installed", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		if _, err := openStore(t).Build(t.Context(), Source{Debian: debian}, quiet); err == nil ||
			!strings.Contains(err.Error(), "apt-get install mmdebstrap") {
			t.Errorf("error is %v", err)
		}
	})
	for _, bad := range []Debian{
		{Suite: "--help"}, {Suite: ""}, {Suite: "a b"}, {Suite: "sid", Packages: []string{"--aptopt=x"}}, {Suite: "sid", Packages: []string{"a,b"}},
		{Suite: "sid", Variant: "x y"}, {Suite: "sid", Mirrors: []string{"/etc/passwd"}}, {Suite: "sid", Exclude: []string{"x"}},
	} {
		t.Run(fmt.Sprintf("refused %+v", bad), func(t *testing.T) {
			if _, err := openStore(t).Build(t.Context(), Source{Debian: &bad}, quiet); err == nil ||
				!strings.Contains(err.Error(), "is not") {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// TestCancelledBuildLeavesNothing checks that a cancelled build leaves neither processes nor
// files.
func TestCancelledBuildLeavesNothing(t *testing.T) {
	needsNamespaces(t)
	pidFile := filepath.Join(t.TempDir(), "started")
	// The grandchild leaves its session and process group, so only the namespace holds it.
	fakeDebian(t, nil, "setsid sleep 1000 & echo 'I: started' >&2; touch "+pidFile+"; wait")
	s := openStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	done := make(chan error)
	go func() {
		_, err := s.Build(ctx, Source{Debian: &Debian{Suite: "x", Mirrors: mirror}}, func(line string) {
			if strings.HasSuffix(line, ": started") {
				close(started)
			}
		})
		done <- err
	}()
	<-started
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want that it was cancelled", err)
	}
	leftovers(t, s)
	for deadline := time.Now().Add(5 * time.Second); ; {
		found := processesOf(t, s.cfg.Dir)
		if len(found) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes left: %q", found)
		}
		runtime.Gosched()
	}
}

// processesOf returns the processes that have the store's directory in their environment.
func processesOf(t *testing.T, dir string) []string {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, p := range environs {
		b, err := os.ReadFile(p) // a process that has gone counts as absent
		if err == nil && bytes.Contains(b, []byte("TMPDIR="+dir)) {
			found = append(found, p)
		}
	}
	return found
}

func TestSameInputsAreBuiltOnce(t *testing.T) {
	h := newHub(t)
	src := Source{Image: h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", "1")))),
		Setup: Setup{Files: []File{{Path: "/b"}}}}
	clock := time.Now()
	cache := filepath.Join(t.TempDir(), "cache")
	config := func(c *Config) { c.Now, c.CacheDir = func() time.Time { return clock }, cache }
	s := openStore(t, config)
	build := func(s *Store, src Source) (Image, int64) {
		t.Helper()
		before := h.asked.Load()
		img, err := s.Build(t.Context(), src, quiet)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Path(t.Context(), img.Digest); err != nil {
			t.Fatal(err)
		}
		leftovers(t, s)
		return img, h.asked.Load() - before
	}
	first, asked := build(s, src)
	if asked == 0 {
		t.Fatal("the first build asked nobody")
	}
	if again, asked := build(s, src); asked != 0 || !cmp.Equal(first, again) {
		t.Errorf("second build asked %d times and gave %+v", asked, again)
	}
	other := src
	other.Setup.Files = []File{{Path: "/c"}}
	if img, asked := build(s, other); asked == 0 || img.Digest == first.Digest {
		t.Errorf("other inputs asked %d times and gave %+v", asked, img)
	}
	second := openStore(t, config)
	if img, asked := build(second, src); asked != 0 || !cmp.Equal(first, img) {
		t.Errorf("a store with the same cache asked %d times and gave %+v", asked, img)
	}

	cached := filepath.Join(cache, first.Digest+suffix)
	if err := os.Chmod(cached, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(cached, first.Size-1); err != nil {
		t.Fatal(err)
	}
	if img, asked := build(openStore(t, config), src); asked == 0 || img.Digest != first.Digest {
		t.Errorf("with a corrupt file in the cache the registry was asked %d times, image %+v", asked, img)
	}
	if got, err := hashFile(t.Context(), cached); err != nil || got != first.Digest {
		t.Errorf("the cache was not mended: %s %v", got, err)
	}
	if err := os.RemoveAll(cache); err != nil {
		t.Fatal(err)
	}
	if _, asked := build(second, src); asked != 0 {
		t.Error("an image taken from the cache is gone with it")
	}
	clock = clock.Add(DefaultMovingFor)
	if _, asked := build(s, src); asked == 0 {
		t.Error("after a week a tag was not looked at again")
	}
}

func TestDigestDoesNotExpire(t *testing.T) {
	h := newHub(t)
	img := picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", "1")))
	h.push(t, "x:1", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	clock := time.Now()
	s := openStore(t, func(c *Config) { c.Now = func() time.Time { return clock } })
	src := Source{Image: h.host + "/x@" + digest.String()}
	if _, err := s.Build(t.Context(), src, quiet); err != nil {
		t.Fatal(err)
	}
	clock = clock.Add(10 * DefaultMovingFor)
	before := h.asked.Load()
	if _, err := s.Build(t.Context(), src, quiet); err != nil || h.asked.Load() != before {
		t.Errorf("asked %d times again, error %v", h.asked.Load()-before, err)
	}
}

func TestCorruptImage(t *testing.T) {
	h := newHub(t)
	src := Source{Image: h.push(t, "x:1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", "1"))))}
	s := openStore(t)
	img, err := s.Build(t.Context(), src, quiet)
	if err != nil {
		t.Fatal(err)
	}
	path := s.file(img.Digest)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := errors.Join(os.Remove(path), os.WriteFile(path, b, 0o444)); err != nil {
		t.Fatal(err)
	}
	// A new process verifies every image once.
	if s, err = Open(s.cfg, s.log); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Path(t.Context(), img.Digest); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("error is %v, want that it is corrupt", err)
	}
	if _, err := s.Path(t.Context(), img.Digest); !errors.Is(err, ErrMissing) {
		t.Errorf("error is %v, want that it is missing: it was moved aside", err)
	}
	if _, err := os.Stat(filepath.Join(s.cfg.Dir, img.Digest+".corrupt")); err != nil {
		t.Errorf("looking for the corrupt file: %v", err)
	}
	again, err := s.Build(t.Context(), src, quiet)
	if err != nil || again.Digest != img.Digest {
		t.Errorf("built %+v, %v; want the same image", again, err)
	}
	if _, err := s.Path(t.Context(), img.Digest); err != nil {
		t.Errorf("opening the image made again: %v", err)
	}
}

func TestPathRefusesOtherNames(t *testing.T) {
	s := openStore(t)
	for _, bad := range []string{"", "../x", strings.Repeat("A", 64), strings.Repeat("0", 63), strings.Repeat("0", 64)} {
		if p, err := s.Path(t.Context(), bad); !errors.Is(err, ErrMissing) {
			t.Errorf("Path(%q) is %q, %v", bad, p, err)
		}
	}
}

func TestCollect(t *testing.T) {
	h := newHub(t)
	clock := time.Now()
	s := openStore(t, func(c *Config) { c.Now = func() time.Time { return clock } })
	var digests []string
	for n := range 3 {
		ref := h.push(t, fmt.Sprintf("x:%d", n),
			picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", fmt.Sprint(n)))))
		img, err := s.Build(t.Context(), Source{Image: ref}, quiet)
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, img.Digest)
	}
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, "README"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	collect := func(keep []string, want ...string) {
		t.Helper()
		removed, freed, err := s.Collect(keep, nil)
		slices.Sort(removed)
		slices.Sort(want)
		if err != nil || !slices.Equal(removed, want) || (freed > 0) != (len(want) > 0) {
			t.Errorf("removed %v (%d bytes, %v), want %v", removed, freed, err, want)
		}
	}
	collect(nil) // just built, so no caller can have named them yet
	clock = clock.Add(collectGrace)
	if _, err := s.Path(t.Context(), digests[1]); err != nil {
		t.Fatal(err)
	}
	collect(digests[:1], digests[2]) // 0 is needed, 1 was used just now
	clock = clock.Add(collectGrace)
	collect(nil, digests[0], digests[1])
	if _, err := s.Path(t.Context(), digests[0]); !errors.Is(err, ErrMissing) {
		t.Errorf("error is %v, want that it is missing", err)
	}
	if notes, err := filepath.Glob(filepath.Join(s.cfg.Dir, inputsDir, "*")); err != nil || len(notes) > 0 {
		t.Errorf("notes about images that are gone: %v, %v", notes, err)
	}
	if _, err := os.Stat(filepath.Join(s.cfg.Dir, "README")); err != nil {
		t.Errorf("a file that is no image: %v", err)
	}
}

func TestOpenRemovesWhatACrashLeft(t *testing.T) {
	s := openStore(t)
	left := filepath.Join(s.tmpDir(), "debian-1", "root", "etc")
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.cfg, s.log); err != nil {
		t.Fatal(err)
	}
	leftovers(t, s)
}

func TestDownloadThatStallsIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, err := newLayout(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		out, in := io.Pipe()
		b := archive(t, file("a", strings.Repeat("x", 10000)))
		desc := v1.Descriptor{Size: int64(len(b)), Digest: v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}}
		go func() {
			for len(b) > 5000 { // slow, but not stalled
				time.Sleep(stallTimeout - time.Second)
				if _, err := in.Write(b[:1000]); err != nil {
					t.Errorf("a slow download was given up: %v", err)
				}
				b = b[1000:]
			}
		}()
		start := time.Now()
		err = w.layer(t.Context(), desc, func() (io.ReadCloser, error) { return out, nil })
		if err == nil || !strings.Contains(err.Error(), "nothing came for 1m0s") || time.Since(start) < 5*stallTimeout {
			t.Errorf("after %v the error is %v", time.Since(start), err)
		}
	})
}

func TestBuildsWaitForTheirTurn(t *testing.T) {
	s := openStore(t)
	s.turn <- struct{}{} // a build is under way
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Build(ctx, Source{Image: "x"}, quiet); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want that waiting was given up", err)
	}
}

// TestCacheIsBounded checks that the shared cache keeps the images used last within its budget, and that an image which
// it removed is built again.
func TestCacheIsBounded(t *testing.T) {
	h := newHub(t)
	cache := filepath.Join(t.TempDir(), "cache")
	var budget int64
	store := func() *Store {
		return openStore(t, func(c *Config) { c.CacheDir, c.CacheBudget = cache, budget })
	}
	build := func(s *Store, name string) Image {
		t.Helper()
		ref := h.push(t, name+":1", picture(t, runtime.GOARCH, v1.Config{}, archive(t, file(name, name))))
		img, err := s.Build(t.Context(), Source{Image: ref}, quiet)
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	age := func(img Image, by time.Duration) {
		t.Helper()
		then := time.Now().Add(-by)
		if err := os.Chtimes(filepath.Join(cache, img.Digest+suffix), then, then); err != nil {
			t.Fatal(err)
		}
	}
	cached := func(img Image) bool {
		_, err := os.Stat(filepath.Join(cache, img.Digest+suffix))
		return err == nil
	}
	a, b := build(store(), "a"), build(store(), "b")
	age(a, 2*time.Hour)
	age(b, time.Hour)
	budget = 2 * a.Size // all have one size
	build(store(), "a") // uses it
	c := build(store(), "c")
	if !cached(a) || cached(b) || !cached(c) {
		t.Errorf("the cache has a %t, b %t, c %t; want a and c, which were used last", cached(a), cached(b), cached(c))
	}
	asked := h.asked.Load()
	if again := build(store(), "b"); again.Digest != b.Digest || h.asked.Load() == asked {
		t.Errorf("the removed image is %s now, was %s", again.Digest, b.Digest)
	}
}

// TestCacheKeepsOtherFiles checks that the shared cache, which has no room for anything, loses its own files alone, and
// none that another process may be writing.
func TestCacheKeepsOtherFiles(t *testing.T) {
	cache := t.TempDir()
	s := openStore(t, func(c *Config) { c.CacheDir, c.CacheBudget = cache, 1 })
	hash := strings.Repeat("0", 64)
	stays := map[string]bool{hash + suffix: false, ".new-12": false, ".new-34": true, ".new-": true, ".new-mine": true,
		"disk.img": true, "thesis.erofs": true, hash: true, hash + suffix + ".bak": true, hash + ".json": true}
	old := time.Now().Add(-2 * partialAge)
	for name := range stays {
		path := filepath.Join(cache, name)
		if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
			t.Fatal(err)
		}
		if name == ".new-34" {
			continue
		}
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(cache, inputsDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.trimCache(); err != nil {
		t.Fatal(err)
	}
	for name, want := range stays {
		if _, err := os.Stat(filepath.Join(cache, name)); (err == nil) != want {
			t.Errorf("%s is there: %t, want %t (%v)", name, err == nil, want, err)
		}
	}
}
