package buildkit

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// hostileOutside adds answers of the machine outside that exhaust their clients. Endless ones end
// when the client leaves, or after so many bytes that the test has failed.
func hostileOutside(mux *http.ServeMux) {
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		zeros := make([]byte, 1<<20)
		for range 4 << 10 {
			if _, err := w.Write(zeros); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/slow/", func(w http.ResponseWriter, r *http.Request) {
		slow.count(1)
		defer slow.count(-1)
		for range 600 {
			if _, err := io.WriteString(w, "."); err != nil {
				return
			}
			http.NewResponseController(w).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
}

// slow counts the slow answers under way.
var slow counter

type counter struct {
	mu sync.Mutex
	// +checklocks:mu
	n int
}

func (c *counter) count(by int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += by
	return c.n
}

// zeroArchive returns a gzip of a tar with one file of size zeros. It is a thousand times
// smaller.
func zeroArchive(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "zeros.tar.gz")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(w, zeroReader{}, size); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// allocated returns the space that a scope's disk takes on the host's disk, in bytes.
func (r *fixture) allocated(t testing.TB, scope string) (total int64) {
	t.Helper()
	err := filepath.WalkDir(r.diskFile(scope), func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			return nil // removed meanwhile
		}
		if info, err := d.Info(); err == nil {
			total += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

const (
	boundedBuild = 64 << 20
	boundedCache = 32 << 20
)

// filling returns builds that write more than boundedBuild, each in another way.
func filling(t *testing.T) map[string]Request {
	t.Helper()
	bomb, err := os.ReadFile(zeroArchive(t, 160<<20))
	if err != nil {
		t.Fatal(err)
	}
	some := strings.Repeat("0123456789abcdef", 20<<20/16)
	var copies, stages strings.Builder
	for i := range 8 {
		fmt.Fprintf(&copies, "COPY some /%d\n", i)
		fmt.Fprintf(&stages, "FROM scratch AS s%d\nCOPY some /some-%d\n", i, i)
	}
	stages.WriteString("FROM scratch\n")
	for i := range 8 {
		fmt.Fprintf(&stages, "COPY --from=s%d / /\n", i)
	}
	return map[string]Request{
		"archive":  {Dockerfile: "FROM scratch\nADD zeros.tar.gz /\n", Context: pack(t, map[string]string{"zeros.tar.gz": string(bomb)})},
		"http":     {Dockerfile: "FROM scratch\nADD http://" + outsideAddr + "/endless /x\n"},
		"git":      {Dockerfile: "FROM scratch\nADD http://" + outsideAddr + "/git/big.git /x\n"},
		"copies":   {Dockerfile: "FROM scratch\n" + copies.String(), Context: pack(t, map[string]string{"some": some})},
		"stages":   {Dockerfile: stages.String(), Context: pack(t, map[string]string{"some": some})},
		"run":      {Dockerfile: "FROM base\nRUN dd if=/dev/zero of=/a bs=1M count=100\n"},
		"run on":   {Dockerfile: "FROM base\nRUN dd if=/dev/zero of=/a bs=1M count=100; sleep 1000\n"},
		"exported": {Dockerfile: "FROM base\nRUN dd if=/dev/zero of=/a bs=1M count=40\n"},
	}
}

// TestBuildDisk fills the disk in every way that a build can. The build fails and names the step
// and the limit, what it wrote stays within the limit and is freed, and another organization's
// build succeeds.
func TestBuildDisk(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.BuildBytes, c.CacheBytes, c.Builds = boundedBuild, boundedCache, 1 })
	find := testBases(t)
	bigRepository(t)
	names := map[string]string{"archive": "ADD", "http": "ADD", "git": anyStep, "copies": "COPY", "stages": "COPY",
		"run": "RUN", "run on": "RUN", "exported": ""}
	requests := filling(t)
	for name, request := range requests {
		t.Run(name, func(t *testing.T) {
			// Each has a scope of its own, since what an earlier build left goes while the next
			// runs.
			scope := "hostile-" + strings.ReplaceAll(name, " ", "-")
			request.Base, request.Scope, request.MemoryBytes = find, scope, 192<<20
			_, err := r.Build(t.Context(), request, nil)
			checkDiskError(t, err, names[name])
			limit := int64(boundedBuild + boundedCache + 2*diskMargin)
			if got := r.allocated(t, scope); got > limit {
				t.Errorf("the disk takes %d MiB, want %d at most", got>>20, limit>>20)
			}
			eventually(t, "the disk's blocks are given back",
				func() bool { return r.allocated(t, scope) < boundedCache+diskMargin/2 })
			r.nothingLeft(t)
			other := Request{Dockerfile: "FROM base\nRUN echo " + name + " >/x\n", Base: find, Scope: "other"}
			if _, files := opened(t, r.build(t, other)); files["x"] != "0 0644 0:0 "+name {
				t.Errorf("another organization's build gave %q", files["x"])
			}
		})
	}
	// The disk is usable as before.
	r.build(t, Request{Dockerfile: "FROM base\nRUN dd if=/dev/zero of=/a bs=1M count=15\n", Base: find,
		Scope: "hostile-copies"})
}

// anyStep stands for a step that may be unknown, since a repository is fetched before its step
// begins.
const anyStep = "?"

func checkDiskError(t *testing.T, err error, step string) {
	t.Helper()
	if !errors.Is(err, ErrDisk) || !strings.Contains(err.Error(), "build.disk_mb") {
		t.Errorf("got %v, want an error that names build.disk_mb", err)
	}
	failed, ok := errors.AsType[*StepError](err)
	if step == anyStep && ok {
		return
	}
	if !ok || !strings.HasPrefix(failed.Step, step) || (step != "") != (failed.Line > 0) {
		t.Errorf("got %+v, want a step that begins with %q", failed, step)
	}
}

// bigRepository makes a small git repository with a large file on the machine outside.
func bigRepository(t *testing.T) {
	t.Helper()
	caytest.RequireProgram(t, "git")
	work := t.TempDir()
	if err := os.WriteFile(filepath.Join(work, "big"), make([]byte, 80<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	serveRepository(t, work, "big.git")
}

// serveRepository commits the files in a directory, and the index entries in add, and serves the
// repository.
func serveRepository(t *testing.T, work, name string, add ...string) {
	t.Helper()
	dir := filepath.Join(repositories, name)
	for _, args := range [][]string{{"init", "-q", "-b", "main", work}, {"-C", work, "add", "."},
		append([]string{"-C", work, "update-index"}, add...),
		{"-C", work, "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", "one"}, {"clone", "-q", "--bare", work, dir}} {
		if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
}

// TestBuildDiskSideBySide checks that concurrent builds of one organization share their space,
// and that a build of another organization succeeds when they have filled it.
func TestBuildDiskSideBySide(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.BuildBytes, c.CacheBytes, c.Builds = boundedBuild, boundedCache, 2 })
	find := testBases(t)
	_, err := r.Build(t.Context(),
		Request{Dockerfile: "FROM base\nRUN echo asleep && sleep 4 && dd if=/dev/zero of=/a bs=1M count=15\n", Scope: "other",
			Base: find}, whenAsleep(func() {
			var builds sync.WaitGroup
			for range 2 {
				builds.Go(func() {
					_, err := r.Build(t.Context(), Request{Dockerfile: "FROM scratch\nADD http://" + outsideAddr + "/endless /x\n",
						Scope: "hostile", Base: find}, nil)
					checkDiskError(t, err, "ADD")
				})
			}
			builds.Wait()
		}))
	if err != nil {
		t.Errorf("another organization's build: %v", err)
	}
	r.nothingLeft(t)
}

// TestWithoutImages checks the limits on a machine that cannot mount an image, where they are
// checked from time to time.
func TestWithoutImages(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.BuildBytes, c.CacheBytes = boundedBuild, boundedCache })
	find := testBases(t)
	t.Setenv("PATH", "/nowhere") // no mkfs.ext4
	for name, c := range map[string]struct{ dockerfile, step string }{
		"http": {"FROM scratch\nADD http://" + outsideAddr + "/endless /x\n", "ADD"},
		"run":  {"FROM base\nRUN dd if=/dev/zero of=/a bs=1M count=3000; sleep 1000\n", "RUN"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.Build(t.Context(), Request{Dockerfile: c.dockerfile, Scope: "hostile", Base: find}, nil)
			checkDiskError(t, err, c.step)
			eventually(t, "what was written is removed", func() bool { return r.allocated(t, "hostile") < 2*boundedCache })
			r.nothingLeft(t)
		})
	}
	if info, err := os.Stat(r.disk("hostile")); err != nil || !info.IsDir() {
		t.Errorf("this was not the case in question: %v, %v", info, err)
	}
}

// TestBrokenDisk checks that a damaged disk is made anew.
func TestBrokenDisk(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.IdleTimeout = time.Millisecond })
	request := Request{Dockerfile: "FROM base\nRUN echo x\n", Base: testBases(t)}
	r.build(t, request)
	for name, at := range map[string]int64{"magic": superblock + magicOffset, "feature": superblock + 0x60} {
		t.Run(name, func(t *testing.T) {
			eventually(t, "the program rests", func() bool { return r.Running() == 0 })
			f, err := os.OpenFile(r.diskFile(""), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt([]byte{0xff, 0xff, 0xff, 0xff}, at)
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			r.build(t, request)
			if !strings.HasSuffix(r.diskFile(""), imageSuffix) {
				t.Error("the disk is no image any more")
			}
		})
	}
}

// TestSlowSources checks that sources that never end are ended when the build's time is over, and
// that no connection is left.
func TestSlowSources(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	for _, source := range []string{"http://" + outsideAddr + "/slow/file",
		"http://" + outsideAddr + "/slow/repository.git"} {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		_, err := r.Build(ctx, Request{Dockerfile: "FROM scratch\nADD " + source + " /x\n", Base: find}, func(Event) {})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v after %v", source, err, time.Since(began))
		}
		eventually(t, "the connection is over", func() bool { return slow.count(0) == 0 })
		r.nothingLeft(t)
	}
}

// TestHostileRepositories adds repositories whose submodules lead elsewhere. None is followed,
// and none runs a program.
func TestHostileRepositories(t *testing.T) {
	caytest.RequireProgram(t, "git")
	r := newFixture(t)
	find := testBases(t)
	secret := t.TempDir()
	if err := os.WriteFile(filepath.Join(secret, "secret"), []byte("a secret of the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	serveRepository(t, secret, "secret.git")
	marker := filepath.Join(t.TempDir(), "marker")
	for name, url := range map[string]string{
		"file":    "file://" + repositories + "/secret.git",
		"path":    repositories + "/secret.git",
		"ext":     "ext::sh -c touch% " + marker,
		"ssh":     "ssh://git@" + outsideAddr + "/x.git",
		"git":     "git://" + outsideAddr + "/x.git",
		"command": "http://" + outsideAddr + "/git/secret.git", // an update that is a command
	} {
		t.Run(name, func(t *testing.T) {
			work := t.TempDir()
			modules := "[submodule \"sub\"]\n\tpath = sub\n\turl = " + url + "\n"
			if name == "command" {
				modules += "\tupdate = !touch " + marker + "\n"
			}
			if err := os.WriteFile(filepath.Join(work, ".gitmodules"), []byte(modules), 0o644); err != nil {
				t.Fatal(err)
			}
			commit, err := exec.Command("git", "-C", filepath.Join(repositories, "secret.git"), "rev-parse", "HEAD").Output()
			if err != nil {
				t.Fatal(err)
			}
			serveRepository(t, work, name+".git", "--add", "--cacheinfo", "160000,"+strings.TrimSpace(string(commit))+",sub")
			_, err = r.Build(t.Context(),
				Request{Dockerfile: "FROM scratch\nADD http://" + outsideAddr + "/git/" + name + ".git /x\n", Base: find}, nil)
			if err == nil {
				t.Error("the submodule was added")
			} else if failed, ok := errors.AsType[*StepError](err); !ok || !strings.HasPrefix(failed.Step, "ADD") {
				t.Errorf("got %v", err)
			}
			if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a program of the repository's ran: %v", err)
			}
			r.nothingLeft(t)
		})
	}
}

// TestOldCache checks that Open removes the cache that all organizations shared in older
// versions.
func TestOldCache(t *testing.T) {
	r := newFixture(t, func(c *Config) {
		for _, name := range []string{"cache/snapshots/overlayfs", "builds/123/context", "scratch/steps"} {
			if err := os.MkdirAll(filepath.Join(c.Dir, name), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	})
	entries, err := os.ReadDir(r.cfg.Dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("in the directory are %v, %v", entries, err)
	}
	r.build(t, Request{Dockerfile: "FROM base\nRUN echo x\n", Base: testBases(t)})
}

// TestForget checks that only the disk of an organization that has not built for a long time is
// removed.
func TestForget(t *testing.T) {
	var disks string
	r := newFixture(t, func(c *Config) {
		disks = filepath.Join(c.Dir, "disks")
		if err := os.MkdirAll(disks, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, age := range map[string]time.Duration{"scope-old.ext4": diskAge + time.Hour,
			"scope-new.ext4": diskAge - time.Hour} {
			path := filepath.Join(disks, name)
			date := time.Now().Add(-age)
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, date, date)); err != nil {
				t.Fatal(err)
			}
		}
	})
	if entries, err := os.ReadDir(r.disks()); err != nil || len(entries) != 1 || entries[0].Name() != "scope-new.ext4" {
		t.Errorf("left are %v, %v", entries, err)
	}
}

// TestManyOrganizations checks that idle programs make room for others.
func TestManyOrganizations(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.Programs = 2 })
	for i := range 4 {
		r.build(t, Request{Dockerfile: "FROM scratch\n", Base: testBases(t), Scope: fmt.Sprint("org", i)})
	}
	if n := r.Running(); n != 2 {
		t.Errorf("%d programs run, want 2", n)
	}
	r.nothingLeft(t)
}

// loops returns the loop devices whose files are below a directory.
func loops(t testing.TB, dir string) (left []string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(data), dir) {
			left = append(left, file)
		}
	}
	return left
}

// eventually waits until so returns true.
func eventually(t testing.TB, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not after 20 seconds: %s", what)
		}
	}
}
