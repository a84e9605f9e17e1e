package e2e

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// anotherBuild builds cay with programs of the same sources but with other hashes, like those of
// another version. It returns the path of the binary.
func anotherBuild(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cay-older-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	root := filepath.Dir(filepath.Dir(cayBinary(t)))
	build := func(output, flags string, args ...string) {
		t.Helper()
		cmd := exec.Command(caytest.RequireProgram(t, "go"), append([]string{"build", "-trimpath", "-o", output, "-ldflags",
			"-s -w " + flags}, args...)...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", cmd, err, out)
		}
	}
	replace := map[string]string{}
	for name, flags := range map[string]string{"cay-agent": "-buildid=another",
		"cay-runsc": "-E main.entry -buildid=another"} {
		path := filepath.Join(dir, name)
		build(path, flags, "-modfile=bin/gvisor/go.mod", "./cmd/"+name)
		pack(t, path)
		replace[filepath.Join(root, "internal/embedded/programs", name+".gz")] = path + ".gz"
	}
	overlay, err := json.Marshal(object{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	build(filepath.Join(dir, "cay"), "-X main.version=another", "-overlay="+filepath.Join(dir, "overlay.json"),
		"./cmd/cay")
	return filepath.Join(dir, "cay")
}

// olderBinary returns the cay of an older version that CAY_TEST_OLDER names, or else another build of this one.
var olderBinary = sync.OnceValue(func() string {
	if path := os.Getenv("CAY_TEST_OLDER"); path != "" {
		return path
	}
	return anotherBuild(suite)
})

// pack compresses a file into one beside it.
func pack(t testing.TB, path string) {
	t.Helper()
	from, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.Create(path + ".gz")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	w, err := gzip.NewWriterLevel(to, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(w, from); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// programs lists the versions of the agent and of the runtime that the server keeps.
func (s *server) programs() []string {
	s.t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.dataDir, "programs"))
	if err != nil {
		s.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		// The build program does not belong to a sandbox.
		if _, err := os.Stat(filepath.Join(s.dataDir, "programs", e.Name(), "cay-buildkit")); err != nil {
			names = append(names, e.Name())
		}
	}
	return names
}

// runtimeOf returns the version of the runtime of a running sandbox.
func (s *server) runtimeOf(id string) string {
	s.t.Helper()
	running, err := os.Stat(fmt.Sprintf("/proc/%d/exe", s.sentry(id)))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, name := range s.programs() {
		program, err := os.Stat(filepath.Join(s.dataDir, "programs", name, "cay-runsc"))
		if err == nil && os.SameFile(running, program) {
			return name
		}
	}
	s.t.Fatalf("sandbox %s runs with none of the programs %v", id, s.programs())
	return ""
}

// TestUpgrade starts another build of cay on the data of an older one. Sandboxes that the older one
// has started keep the older programs until they are destroyed, however often they are suspended.
// CAY_TEST_OLDER may name the binary of an older version, for this test and for TestUpgradeOfThePool.
func TestUpgrade(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	current := s.binary
	s.binary = olderBinary()
	s.start()
	s.needTemplate("python")
	asleep, running, saved := s.startWorker(s.persistent(nil), 4), s.startWorker(s.persistent(nil), 4),
		s.startWorker(s.persistent(nil), 4)
	old := s.programs()
	runtime := s.runtimeOf(asleep.id)
	asleep.check()
	s.suspend(asleep.id)
	running.check()
	least := saved.check()
	checkpoint := s.checkpoint(saved.id)
	saved.check()
	snap := s.snapshot(running.id, nil)
	_, events := s.call("GET", "/v1/sandboxes/"+saved.id+"/events", nil)

	s.stop(syscall.SIGTERM)
	s.binary = current
	s.start()
	if _, after := s.call("GET", "/v1/sandboxes/"+saved.id+"/events", nil); string(after) != string(events) {
		t.Errorf("the events of a sandbox were %s and are %s", events, after)
	}
	if kept := s.programs(); len(old) != 2 || len(kept) != 4 || !slices.Contains(kept, old[0]) ||
		!slices.Contains(kept, old[1]) {
		t.Fatalf("the programs of the older build are %v; those after the upgrade %v", old, kept)
	}
	fresh := s.startWorker(s.persistent(nil), 4)
	if version := s.runtimeOf(fresh.id); slices.Contains(old, version) {
		t.Errorf("a new sandbox runs with the older runtime, %s", version)
	}
	asleep.check()
	running.check()
	s.suspend(running.id)
	running.check()
	s.killSentry(saved.id)
	s.waitState(saved.id, "suspended")
	s.fellBackTo(saved.id, checkpoint)
	saved.fellBack(least)
	s.suspend(fresh.id)
	fresh.check()
	child := &worker{s: s, id: s.from(snap, nil)}
	child.check()
	for _, w := range []*worker{asleep, running, saved, child} {
		if version := s.runtimeOf(w.id); version != runtime {
			t.Errorf("a sandbox of the older build runs with the runtime %s and began with %s", version, runtime)
		}
	}
	s.withoutRuntime(asleep, runtime)

	s.destroy(asleep.id)
	s.suspend(running.id)
	s.destroy(saved.id)
	if kept := s.programs(); len(kept) != 4 {
		t.Errorf("a sandbox of the older build is suspended, and the programs are %v", kept)
	}
	running.check()
	s.destroy(running.id)
	s.destroy(child.id)
	if kept := s.programs(); len(kept) != 4 {
		t.Errorf("there is a snapshot of the older build, and the programs are %v", kept)
	}
	if err := s.api().DeleteSnapshot(t.Context(), snap); err != nil {
		t.Error(err)
	}
	if kept := s.programs(); len(kept) != 2 || slices.Contains(kept, old[0]) || slices.Contains(kept, old[1]) {
		t.Errorf("no sandbox of the older build is left, and the programs are %v", kept)
	}
	// The next start removes programs that a crash has left.
	s.stop(syscall.SIGKILL)
	if err := os.Mkdir(filepath.Join(s.dataDir, "programs", runtime), 0o755); err != nil {
		t.Fatal(err)
	}
	s.start()
	if kept := s.programs(); len(kept) != 2 || slices.Contains(kept, runtime) {
		t.Errorf("after the next start the programs are %v", kept)
	}
	fresh.check()
}

// TestUpgradeOfThePool starts another build of cay on the data of an older one that has a pool, an ephemeral sandbox
// and a template of a user.
func TestUpgradeOfThePool(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true")
	current := s.binary
	s.binary = olderBinary()
	s.start()
	s.needTemplate("python")
	s.needBuilt(object{"name": "mine", "dockerfile": "Dockerfile"}, tarOf(t, map[string]string{
		"Dockerfile": "FROM python\nCOPY hello /hello\nRUN echo built >> /hello\n", "hello": "hello "}))
	ephemeral := s.createFrom("cold", nil)
	s.want(ephemeral, "echo before > /tmp/mark")
	s.awaitPool(2)
	before := s.groupsOnHost()

	s.stop(syscall.SIGTERM)
	s.binary = current
	s.start()
	if got := s.want(ephemeral, "cat /tmp/mark"); got != "before" {
		t.Errorf("the ephemeral sandbox of the older build has %q", got)
	}
	for _, id := range s.groupsOnHost() {
		if id != ephemeral && slices.Contains(before, id) {
			t.Errorf("%s of the older build's pool is still there", id)
		}
	}
	cold := s.createFrom("cold", nil)
	s.awaitPool(2)
	warm := s.createFrom("warm", nil)
	s.alive(warm)
	if got := s.inside("mine", "cat /hello"); got != "hello built" {
		t.Errorf("the template of a user has %q", got)
	}
	s.needBuilt(object{"name": "mine-too", "dockerfile": "Dockerfile"}, tarOf(t, map[string]string{
		"Dockerfile": "FROM mine\nRUN echo again >> /hello\n"}))
	if got := s.inside("mine-too", "cat /hello"); got != "hello built\nagain" {
		t.Errorf("a template from it has %q", got)
	}
	for _, id := range []string{ephemeral, cold, warm} {
		s.destroy(id)
	}
	s.stop(syscall.SIGTERM)
	s.env = append(s.env, "CAY_POOL_ENABLED=false")
	s.start()
	s.agree(time.Now())
}

// withoutRuntime moves away the runtime that a sandbox needs to wake, and puts it back.
func (s *server) withoutRuntime(w *worker, version string) {
	s.t.Helper()
	s.suspend(w.id)
	path := filepath.Join(s.dataDir, "programs", version)
	aside := filepath.Join(filepath.Dir(s.dataDir), "aside")
	if err := os.Rename(path, aside); err != nil {
		s.t.Fatal(err)
	}
	s.doesNotWake(w.id, version)
	if err := os.Rename(aside, path); err != nil {
		s.t.Fatal(err)
	}
	w.check()
	if got := s.field(w.id, "error"); got != "" {
		s.t.Errorf("the woken sandbox has the error %q", got)
	}
}

// doesNotWake checks that a sandbox cannot be woken, and that its error says why.
func (s *server) doesNotWake(id, why string) {
	s.t.Helper()
	for range 2 { // the second try fails, too
		_, err := s.api().Execute(context.Background(), id, cay.ExecuteRequest{Command: new("true")})
		if !isRefused(err, 500, "wake_failed") || !strings.Contains(refusal(err).Detail, why) {
			s.t.Errorf("waking it answers %v, want 500 wake_failed and %q", err, why)
		}
		if state := s.field(id, "state"); state != "suspended" {
			s.t.Errorf("the sandbox that cannot be woken is %s", state)
		}
		if got := s.field(id, "error"); !strings.Contains(got, why) {
			s.t.Errorf("the error of the sandbox is %q, want %q", got, why)
		}
	}
	if left := s.onHost(id); len(left) > 0 {
		s.t.Errorf("a wake that failed has left %v", left)
	}
}
