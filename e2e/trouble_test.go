package e2e

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	cay "github.com/cayhq/cay/sdk/go"
)

// checkpointFiles returns the paths of the files of a sandbox's only checkpoint, by name.
func (s *server) checkpointFiles(id string) map[string]string {
	s.t.Helper()
	paths, err := filepath.Glob(filepath.Join(s.dataDir, "checkpoints", id, "*", "*"))
	if err != nil {
		s.t.Fatal(err)
	}
	files := map[string]string{}
	for _, path := range paths {
		if files[filepath.Base(path)] != "" {
			s.t.Fatalf("there are two checkpoints: %v", paths)
		}
		files[filepath.Base(path)] = path
	}
	if len(files) < 3 || files["pages.img"] == "" {
		s.t.Fatalf("the checkpoint's files are %v", paths)
	}
	return files
}

// flip changes a byte in the middle of a file. A second call restores it.
func flip(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, info.Size()/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, info.Size()/2); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedCheckpoint damages each file of a checkpoint. The sandbox stays suspended with an
// error that says why, and wakes with its old state when the file is repaired.
func TestDamagedCheckpoint(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.persistent(nil)
	defer s.destroy(id)
	w := s.startWorker(id, 4)
	w.check()
	s.suspend(id)
	files := s.checkpointFiles(id)
	for name := range files {
		path := s.checkpointFiles(id)[name] // each check made another checkpoint
		flip(t, path)
		if name == "pages.img" {
			// A quick wake reads memory later. The damage is found then, and the sandbox that has begun to
			// run is ended.
			if _, err := s.api().Wake(t.Context(), id); err != nil && !cay.HasCode(err, "wake_failed") {
				t.Errorf("a wake with damaged memory: %v", err)
			}
			s.waitState(id, "suspended")
		}
		s.doesNotWake(id, "the checkpoint is damaged: "+name)
		flip(t, path)
		w.check()
		if got := s.field(id, "error"); got != "" {
			t.Errorf("%s is repaired, and the error is %q", name, got)
		}
		s.suspend(id)
	}
	pages := s.checkpointFiles(id)["pages.img"]
	info, err := os.Stat(pages)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(pages, info.Size()-1); err != nil {
		t.Fatal(err)
	}
	s.doesNotWake(id, "the checkpoint is damaged: pages.img")
	s.destroy(id)
	s.gone(id)
}

// tmpfs mounts a small file system for the test.
func tmpfs(t testing.TB, dir, size string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill leaves so many bytes free in the file system of dir. It returns the path of the file that
// takes the rest.
func fill(t testing.TB, dir string, leave int64) string {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Small pieces, because a write that does not fit is undone as a whole.
	const piece = 1 << 20
	for size := int64(0); ; size += piece {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		n := min(piece, int64(st.Bavail)*st.Bsize-leave)
		if n <= 0 {
			return path
		}
		if err := unix.Fallocate(int(f.Fd()), 0, size, n); err == unix.ENOSPC {
			return path // another writer took the space, so it is full, too
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// fillsUp fills the disk once a suspend of the sandbox has begun. It sends the path of the file
// that it wrote.
func fillsUp(t *testing.T, dir, id string) <-chan string {
	full := make(chan string)
	go func() {
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
			if _, err := os.Stat(filepath.Join(dir, id, "draft")); err == nil {
				break
			}
		}
		full <- fill(t, dir, 0)
	}()
	return full
}

// TestNoDiskToSleep fills the disk of the checkpoints before and while one is written. The sandbox
// runs on, and is suspended when there is space.
func TestNoDiskToSleep(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it waits a minute
	s := newServer(t, "CAY_CAPACITY_MIN_FREE_DISK_MB=1")
	dir := filepath.Join(s.dataDir, "checkpoints")
	tmpfs(t, dir, "256m")
	t.Cleanup(func() { s.stop(syscall.SIGTERM) }) // before the disk is unmounted
	s.start()
	s.needTemplate("python")
	w := s.startWorker(s.persistent(nil), 16)
	idle := s.startWorker(s.persistent(object{"idle_timeout": "10s"}), 4)
	idle.check()
	suspend := func() error {
		_, err := s.api().Suspend(t.Context(), w.id)
		return err
	}

	filler := fill(t, dir, 10<<20)
	for range 2 {
		w.check()
		if err := suspend(); !isRefused(err, 507, "disk_full") {
			t.Errorf("suspend without room: %v", err)
		}
		if _, err := s.api().Checkpoint(t.Context(), w.id); !isRefused(err, 507, "disk_full") {
			t.Errorf("checkpoint without room: %v", err)
		}
	}
	w.check()
	for deadline := time.Now().Add(patience); s.events(idle.id)[0].Reason != "suspend_failed"; {
		if time.Now().After(deadline) {
			t.Fatalf("the idle sandbox has the events %+v", s.events(idle.id))
		}
		time.Sleep(50 * time.Millisecond) // a poll with a deadline
	}
	if e := s.events(idle.id)[0]; e.To != "running" || !strings.Contains(e.Detail, "disk") {
		t.Errorf("the last event of the sandbox is %+v", e)
	}
	failed := time.Now()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}

	// Another writer takes the space after the suspend has begun. On a busy machine it may come too
	// late: then the sandbox is suspended, and is woken for another try.
	const tries = 10
	for try := 1; ; try++ {
		late := fillsUp(t, dir, w.id)
		err := suspend()
		if err := os.Remove(<-late); err != nil {
			t.Fatal(err)
		}
		if err == nil && try < tries {
			w.check()
			continue
		}
		if !isRefused(err, 507, "disk_full") || !strings.Contains(refusal(err).Detail, "filled up") {
			t.Errorf("suspend while the disk fills up: %v", err)
		}
		break
	}
	w.check()
	s.suspend(w.id)
	w.check()

	// The server tries to suspend the idle sandbox again a minute after a failure.
	for s.field(idle.id, "state") != "suspended" {
		if time.Since(failed) > time.Minute+patience {
			t.Fatalf("with free space the idle sandbox is not suspended: %+v", s.events(idle.id))
		}
		time.Sleep(100 * time.Millisecond) // a poll with a deadline
	}
	idle.check()
	for _, id := range []string{w.id, idle.id} {
		s.destroy(id)
		s.gone(id)
	}
}

// TestDestroyWins destroys sandboxes at any moment of a suspend or a wake.
func TestDestroyWins(t *testing.T) {
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	for _, verb := range []string{"suspend", "wake"} {
		t.Run(verb, func(t *testing.T) {
			s := s.in(t)
			interrupted := 0
			for range 10 {
				id := s.persistent(nil)
				s.want(id, "head -c 8M /dev/urandom >/dev/shm/memory")
				if verb == "wake" {
					s.suspend(id)
				}
				answer := make(chan error)
				go func() {
					do := s.api().Suspend
					if verb == "wake" {
						do = s.api().Wake
					}
					_, err := do(context.Background(), id)
					answer <- err
				}()
				time.Sleep(time.Duration(rand.IntN(250)) * time.Millisecond) // until the destroy
				s.destroy(id)
				s.gone(id)
				if err := <-answer; err != nil {
					if refusal(err) == nil || refusal(err).Status != 409 {
						t.Errorf("%s of a destroyed sandbox: %v", verb, err)
					}
					interrupted++
				}
				if state, reason := s.state(id); state != "destroyed" || reason != "requested" {
					t.Errorf("it is %s, reason %q", state, reason)
				}
			}
			t.Logf("%d of 10 were interrupted", interrupted)
			if interrupted == 0 {
				t.Error("no destroy came in between")
			}
		})
	}
}
