package buildkit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/network"
)

// sleeping is a Dockerfile that prints "asleep" and then sleeps.
const sleeping = "FROM base\nRUN echo before\nRUN echo asleep && sleep 1000\n"

// whenAsleep returns a progress function that calls f once the build sleeps.
func whenAsleep(f func()) func(Event) {
	return func(e Event) {
		if e.Kind == Log && strings.Contains(e.Text, "asleep") {
			f()
		}
	}
}

// build builds and fails the test on an error.
func (r *fixture) build(t testing.TB, request Request) *Result {
	t.Helper()
	var log strings.Builder
	result, err := r.Build(t.Context(), request, func(e Event) { fmt.Fprintln(&log, e.Kind, e.Name, e.Text, e.Error) })
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	t.Cleanup(func() { result.Close() })
	return result
}

// TestCancel ends a build while a step runs. All of it is gone when Build returns, and the next
// build finds the finished steps in the cache.
func TestCancel(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("nobody wants it")
	_, err := r.Build(ctx, Request{Dockerfile: sleeping, Base: find}, whenAsleep(func() { cancel(why) }))
	if !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	r.nothingLeft(t)
	cached := false
	_, err = r.Build(t.Context(), Request{Dockerfile: "FROM base\nRUN echo before\n", Base: find},
		func(e Event) { cached = cached || e.Cached && e.Name == "RUN echo before" })
	if err != nil || !cached {
		t.Errorf("after a cancelled build: cached is %v, %v", cached, err)
	}
}

// TestClose ends builds under way.
func TestClose(t *testing.T) {
	r := newFixture(t)
	closed := make(chan error, 1)
	_, err := r.Build(t.Context(), Request{Dockerfile: sleeping, Base: testBases(t)}, whenAsleep(func() {
		go func() { closed <- r.Close(context.Background()) }()
	}))
	if !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	r.nothingLeft(t)
	if _, err := r.Build(t.Context(), Request{Dockerfile: "FROM scratch\n", Base: testBases(t)}, nil); !errors.Is(err,
		ErrClosed) {
		t.Errorf("after that: %v", err)
	}
}

// TestProgramDies kills the program during a build. The build fails and reports it, nothing of it
// is left, and the next build starts another program with the same cache.
func TestProgramDies(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	r.build(t, Request{Dockerfile: "FROM base\nRUN echo before\n", Base: find})
	_, err := r.Build(t.Context(), Request{Dockerfile: sleeping, Base: find}, whenAsleep(func() {
		pids, err := processesOf(r.cfg.Program)
		if err != nil || len(pids) != 1 {
			t.Fatalf("the program has the processes %v, %v", pids, err)
		}
		if err := exec.Command("kill", "-9", pids[0]).Run(); err != nil {
			t.Fatal(err)
		}
	}))
	if err == nil || !strings.Contains(err.Error(), "the build program has ended: signal: killed") {
		t.Errorf("got %v", err)
	}
	if _, isStep := errors.AsType[*StepError](err); isStep {
		t.Errorf("it is no fault of the step: %v", err)
	}
	r.nothingLeft(t)
	cached := false
	result, err := r.Build(t.Context(), Request{Dockerfile: "FROM base\nRUN echo before\nRUN echo after\n", Base: find},
		func(e Event) { cached = cached || e.Cached && e.Name == "RUN echo before" })
	if err != nil || !cached {
		t.Fatalf("the next build: cached is %v, %v", cached, err)
	}
	if err := result.Close(); err != nil {
		t.Error(err)
	}
}

const serverVariable = "CAY_BUILDKIT_TEST_SERVER"

// TestServerDies kills a server during a build. The program and its steps end with it, and the
// next server removes the rest.
func TestServerDies(t *testing.T) {
	if dir := os.Getenv(serverVariable); dir != "" {
		r := newFixture(t, func(c *Config) {
			c.Dir, c.CgroupParent, c.RunDir = dir, "/cay-"+filepath.Base(dir)+"-build", "/run/cay-"+filepath.Base(dir)
		})
		_, err := r.Build(t.Context(), Request{Dockerfile: sleeping, Base: testBases(t)},
			whenAsleep(func() { fmt.Println("asleep", filepath.Base(r.slots.net.Slots()[0].Namespace)) }))
		t.Fatal("the build ended: ", err)
	}
	caytest.RequireRoot(t)
	dir := filepath.Join(t.TempDir(), caytest.Instance())
	server := exec.Command("/proc/self/exe", "-test.run=^TestServerDies$")
	server.Env = append(os.Environ(), serverVariable+"="+dir, "TMPDIR="+filepath.Dir(dir))
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	instance := ""
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if namespace, ok := strings.CutPrefix(lines.Text(), "asleep cay-"); ok {
			instance, _, _ = strings.Cut(namespace, "-")
			break
		}
	}
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = server.Wait() // it was killed
	if instance == "" {
		t.Fatal("the server's build did not get as far as to sleep")
	}
	t.Cleanup(func() {
		if err := network.Purge(instance); err != nil {
			t.Error(err)
		}
	})
	// Only the kernel has ended these.
	r := newFixture(t, func(c *Config) {
		c.Dir, c.CgroupParent, c.RunDir = dir, "/cay-"+filepath.Base(dir)+"-build", "/run/cay-"+filepath.Base(dir)
	})
	r.nothingLeft(t)
	if left := loops(t, dir); len(left) > 0 {
		t.Errorf("loop devices are left: %v", left)
	}
	if left, err := filepath.Glob(filepath.Join(r.builds(), "*/*")); err != nil || len(left) > 0 {
		t.Errorf("in the directory of builds are %v, %v", left, err)
	}
	result := r.build(t, Request{Dockerfile: "FROM base\nRUN echo before\n", Base: testBases(t)})
	if _, files := opened(t, result); len(files) == 0 {
		t.Error("the image is empty")
	}
}

// TestSameInputSameImage builds twice without the cache, the second time in a new directory. The images
// are the same but for the times of files, and the same in all if the build says which times, or
// everything comes from the cache.
func TestSameInputSameImage(t *testing.T) {
	request := Request{Base: testBases(t), NoCache: true, Context: pack(t, map[string]string{"f": "f", "d/g": "g"}),
		Dockerfile: "FROM base AS a\nRUN mkdir /made && echo x >/made/file && ln -s file /made/link\nFROM base\nCOPY . /ctx\nCOPY --from=a /made /made\nRUN date >/dev/null; rm /etc/group; touch /tmp/t\nWORKDIR /w\n"}
	dated, cached := request, request
	dated.Args = map[string]string{"SOURCE_DATE_EPOCH": "1000000000"}
	cached.NoCache = false
	same := map[string]bool{}
	var first map[string]string
	for range 2 {
		r := newFixture(t)
		for range 2 {
			same[r.build(t, dated).Manifest] = true
		}
		result := r.build(t, request)
		_, files := opened(t, result)
		if first == nil {
			first = files
		}
		if diff := cmp.Diff(first, files); diff != "" {
			t.Error(diff)
		}
		if again := r.build(t, cached); again.Manifest != result.Manifest {
			t.Errorf("out of the cache comes %s, and had been %s", again.Manifest, result.Manifest)
		}
	}
	if len(same) != 1 {
		t.Errorf("four builds gave the images %v", same)
	}
}

// TestReportsTheEndOfSteps checks that the event before the image is written comes once, and not after
// a step that failed.
func TestReportsTheEndOfSteps(t *testing.T) {
	r := newFixture(t)
	for dockerfile, want := range map[string]int{
		"FROM base\nRUN echo 1\nRUN echo 2\n": 1, "FROM base\n": 1, "FROM base\nRUN exit 3\n": 0,
	} {
		made := 0
		result, err := r.Build(t.Context(), Request{Dockerfile: dockerfile, Base: testBases(t)}, func(e Event) {
			if e.Kind == Made {
				made++
			}
		})
		if made != want || (err == nil) != (want == 1) {
			t.Errorf("%q: reported %d times, %v", dockerfile, made, err)
		}
		if err == nil {
			if err := result.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestCache checks that a step is run once, that cache mounts stay within a scope, and that the
// cache is cut to its size without harm to a running build.
func TestCache(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.CacheBytes = 40 << 20 })
	find := testBases(t)
	ran := func(request Request) (cached, all int) {
		_, err := r.Build(t.Context(), request, func(e Event) {
			if e.Kind == Ended && strings.HasPrefix(e.Name, "RUN") {
				all++
				if e.Cached {
					cached++
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return cached, all
	}
	request := Request{Dockerfile: "FROM base\nCOPY f /f\nRUN cat /f\nRUN echo 2\n", Base: find,
		Context: pack(t, map[string]string{"f": "1"})}
	if cached, all := ran(request); cached != 0 || all != 2 {
		t.Errorf("the first build: %d of %d steps cached", cached, all)
	}
	if cached, all := ran(request); cached != 2 || all != 2 {
		t.Errorf("the second build: %d of %d steps cached", cached, all)
	}
	request.Context = pack(t, map[string]string{"f": "2"})
	if cached, _ := ran(request); cached != 0 {
		t.Errorf("with another context: %d steps cached", cached)
	}
	for scope, want := range map[string]string{"a": "a", "b": "b"} {
		result := r.build(t, Request{Scope: scope, Base: find,
			Args:       map[string]string{"WHO": scope, "BUILDKIT_CACHE_MOUNT_NS": "mine"},
			Dockerfile: "FROM base\nARG WHO\nRUN --mount=type=cache,id=shared,target=/c echo $WHO >>/c/who && cat /c/who >/who\n"})
		if _, files := opened(t, result); files["who"] != "0 0644 0:0 "+want {
			t.Errorf("scope %s sees %q", scope, files["who"])
		}
	}
	random := Request{Base: find,
		Dockerfile: "FROM base\nRUN --mount=type=cache,id=r,target=/c head -c 9 /dev/urandom >/random\n" +
			"RUN head -c 9 /dev/urandom >/more\n"}
	seen := map[string]bool{}
	for _, scope := range []string{"a", "a", "b"} {
		random.Scope = scope
		_, files := opened(t, r.build(t, random))
		seen[files["random"]], seen[files["more"]] = true, true
	}
	if len(seen) != 4 {
		t.Errorf("two steps in two scopes, three builds, gave %d results, want 4", len(seen))
	}
	// Each leaves 30 MB, of which two do not fit.
	for i := range 3 {
		r.build(t, Request{Dockerfile: fmt.Sprintf("FROM base\nRUN dd if=/dev/zero of=/big bs=1M count=30 && echo %d >/n\n",
			i), Base: find})
	}
	if freed, err := r.Prune(t.Context(), "", 0); err != nil || freed < 1<<20 || freed > 80<<20 {
		t.Errorf("pruning the rest freed %d bytes, %v", freed, err)
	}
	var pruning sync.WaitGroup
	_, err := r.Build(t.Context(),
		Request{Dockerfile: "FROM base\nRUN echo 1 >/1\nRUN echo go; sleep 1; cat /1\nRUN cat /1\n", Base: find},
		func(e Event) {
			if e.Kind == Log && e.Text == "go\n" {
				pruning.Go(func() {
					if _, err := r.Prune(t.Context(), "", 0); err != nil {
						t.Error(err)
					}
				})
			}
		})
	pruning.Wait()
	if err != nil {
		t.Errorf("a build during a prune: %v", err)
	}
}

// TestIdle checks that the program is stopped after some time without a build, and started again.
func TestIdle(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.IdleTimeout = 10 * time.Millisecond })
	for range 2 {
		r.build(t, Request{Dockerfile: "FROM base\nRUN echo x\n", Base: testBases(t)})
		seat := r.seat("")
		seat.mu.Lock()
		p := seat.program
		seat.mu.Unlock()
		if p != nil {
			<-p.over
			if p.status != nil {
				t.Errorf("the program ended with %v", p.status)
			}
		}
		r.nothingLeft(t)
	}
}

// TestBrokenCache checks that a cache that cannot be read is made anew.
func TestBrokenCache(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.IdleTimeout = time.Millisecond })
	r.build(t, Request{Dockerfile: "FROM base\nRUN echo x\n", Base: testBases(t)})
	eventually(t, "the program rests", func() bool { return r.Running() == 0 })
	disk := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop", r.diskFile(""), disk).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH) // it is unmounted already if the test succeeded
	cache := filepath.Join(disk, "cache")
	for _, name := range []string{"metadata.db", "containerd.db", "cache.db", "history.db"} {
		if _, err := os.Stat(filepath.Join(cache, name)); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(filepath.Join(cache, name), []byte(strings.Repeat("nonsense", 4096)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Unmount(disk, 0); err != nil {
		t.Fatal(err)
	}
	r.build(t, Request{Dockerfile: "FROM base\nRUN echo x\n", Base: testBases(t)})
}

// TestWithoutOverlay builds on a file system that cannot carry overlayfs, as in a container whose
// root is overlayfs.
func TestWithoutOverlay(t *testing.T) {
	caytest.RequireRoot(t)
	dir := t.TempDir()
	for _, name := range []string{"lower", "upper", "work", "disk"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(dir, "disk")
	options := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	if err := unix.Mount("overlay", disk, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	r := newFixture(t, func(c *Config) { c.Dir = filepath.Join(disk, "buildkit"); c.BuildBytes = 50 << 20 })
	dockerfile := "FROM base\nRUN echo 1 >/1\nRUN cat /1 >/2 && rm /etc/group\n"
	// With an image as the disk it does not matter.
	r.build(t, Request{Dockerfile: dockerfile, Base: testBases(t), Scope: "image"})
	if !strings.HasSuffix(r.diskFile("image"), imageSuffix) {
		t.Errorf("the disk is %s", r.diskFile("image"))
	}
	t.Setenv("PATH", "/nowhere") // no mkfs.ext4
	_, files := opened(t, r.build(t, Request{Dockerfile: dockerfile, Base: testBases(t)}))
	if _, there := files["etc/group"]; there || files["2"] != "0 0644 0:0 1" {
		t.Errorf("the image has %v", files)
	}
	if _, err := os.Stat(filepath.Join(r.disk(""), "cache/snapshots/native")); err != nil {
		t.Errorf("this was not the case in question: %v", err)
	}
	_, err := r.Build(t.Context(),
		Request{Dockerfile: "FROM base\nRUN dd if=/dev/zero of=/a bs=1M count=100; sleep 1000\n", Base: testBases(t)}, nil)
	if !errors.Is(err, ErrDisk) {
		t.Errorf("a step that writes too much: %v", err)
	}
	r.nothingLeft(t)
}

// TestSideBySide runs several builds at once, some with the same steps.
func TestSideBySide(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	var builds sync.WaitGroup
	for i := range 4 {
		builds.Go(func() {
			result, err := r.Build(t.Context(), Request{Base: find, MemoryBytes: 256 << 20,
				Dockerfile: fmt.Sprintf("FROM base\nRUN echo same >/same; sleep 0.2\nRUN echo %d >/own\n", i/2)}, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer result.Close()
			if _, files := opened(t, result); files["own"] != fmt.Sprint("0 0644 0:0 ", i/2) ||
				files["same"] != "0 0644 0:0 same" {
				t.Errorf("build %d has %q, %q", i, files["own"], files["same"])
			}
		})
	}
	builds.Wait()
	r.nothingLeft(t)
}

// TestTurns checks that steps of one scope wait for each other, and not for those of another
// scope.
func TestTurns(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.Steps = 1 })
	find := testBases(t)
	dockerfile := "FROM base AS a\nRUN echo a-in; sleep 0.3; echo a-out >&2\nFROM base AS b\n" +
		"RUN echo b-in; sleep 0.3; echo b-out >&2\nFROM scratch\nCOPY --from=a /etc/passwd /a\nCOPY --from=b /etc/passwd /b\n"
	var order []string
	_, err := r.Build(t.Context(), Request{Dockerfile: dockerfile, Scope: "one", Base: find}, func(e Event) {
		if e.Kind == Log {
			order = append(order, strings.TrimSpace(e.Text))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(order, " "); got != "a-in a-out b-in b-out" && got != "b-in b-out a-in a-out" {
		t.Errorf("the steps ran in the order %s", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err = r.Build(ctx, Request{Dockerfile: sleeping, Scope: "one", Base: find}, whenAsleep(func() {
		defer cancel()
		r.build(t, Request{Dockerfile: "FROM base\nRUN echo x\n", Scope: "two", Base: find})
	}))
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestLongTexts checks that a step of any length is run and reported.
func TestLongTexts(t *testing.T) {
	r := newFixture(t)
	long := strings.Repeat("\x01\"", 30<<10)
	_, err := r.Build(t.Context(), Request{Dockerfile: "FROM base\nRUN exit 7 # " + long + "\n", Base: testBases(t)}, nil)
	if failed, ok := errors.AsType[*StepError](err); !ok ||
		failed.ExitCode != 7 && !strings.Contains(failed.Err.Error(), "too long") {
		t.Errorf("got %.300v", err)
	}
	_, err = r.Build(t.Context(), Request{Dockerfile: "FROM x\n",
		Base: func(context.Context, string) (Base, error) { return Base{}, errors.New(long) }}, nil)
	if failed, ok := errors.AsType[*StepError](err); !ok || failed.Err.Error() != long {
		t.Errorf("got %.300v", err)
	}
}

// TestProgress checks the events that a live view and a log are made of.
func TestProgress(t *testing.T) {
	r := newFixture(t)
	var got []string
	_, err := r.Build(t.Context(), Request{Dockerfile: "FROM base AS one\nRUN echo out; echo err >&2; exit 3\n",
		Base: testBases(t)}, func(e Event) {
		if e.Stage == "internal" {
			return
		}
		switch e.Kind {
		case Began:
			got = append(got, fmt.Sprintf("began line %d %s %d/%d %s", e.Line, e.Stage, e.Number, e.Total, e.Name))
		case Log:
			got = append(got, fmt.Sprintf("%s %q", e.Stream, e.Text))
		case Ended:
			got = append(got, fmt.Sprintf("ended %s failed=%v", e.Name, e.Error != ""))
		}
		if e.Time.IsZero() || e.Step == 0 {
			t.Errorf("%+v has no time or no step", e)
		}
	})
	if err == nil {
		t.Error("it succeeded")
	}
	text := strings.Join(got, "\n")
	for _, want := range []string{"began line 1  1/2 FROM base:latest\nended FROM base:latest failed=false\n" +
		"began line 2  2/2 RUN echo out; echo err >&2; exit 3\n", "stdout \"out\\n\"", "stderr \"err\\n\"",
		"\nended RUN echo out; echo err >&2; exit 3 failed=true"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// TestRequests checks that invalid requests are refused before anything is started.
func TestRequests(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	long := pack(t, map[string]string{"Dockerfile": "FROM scratch\n", ".dockerignore": strings.Repeat("x\n", 1<<20)})
	for want, request := range map[string]Request{
		`entry ".dockerignore": must`:  {Context: long, Base: find},
		"without Base":                 {Dockerfile: "FROM scratch"},
		"only one of":                  {Dockerfile: "FROM scratch", DockerfilePath: "x", Base: find},
		"neither a Dockerfile nor":     {Base: find},
		"must be a path":               {DockerfilePath: "../x", Context: "/x", Base: find},
		"must not be longer than 1048": {Dockerfile: strings.Repeat("#", 2<<20), Base: find},
		"args: must not be longer":     {Dockerfile: "FROM scratch", Args: map[string]string{"A": strings.Repeat("x", 200<<10)}, Base: find},
		"the scope":                    {Dockerfile: "FROM scratch", Scope: "a/b", Base: find},
		"is not the name":              {Dockerfile: "FROM scratch", Args: map[string]string{"A=B": "x"}, Base: find},
	} {
		if _, err := r.Build(t.Context(), request, nil); err == nil ||
			!strings.Contains("args: "+err.Error(), strings.TrimPrefix(want, "args: ")) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if r.Running() > 0 {
		t.Error("the program was started")
	}
}
