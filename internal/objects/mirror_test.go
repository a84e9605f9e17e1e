package objects

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// shelf is a Local in a directory.
type shelf struct {
	dir string

	mu    sync.Mutex
	inUse map[string]bool
}

func (s *shelf) OpenFile(name string) (*os.File, error) { return os.Open(filepath.Join(s.dir, name)) }

func (s *shelf) EachFile(f func(string, int64, time.Time)) error {
	entries, err := os.ReadDir(s.dir)
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			f(e.Name(), info.Size(), info.ModTime())
		}
	}
	return err
}

func (s *shelf) Evict(name string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inUse[name] {
		return false, nil
	}
	return true, os.Remove(filepath.Join(s.dir, name))
}

// put makes a file on the shelf and returns its name.
func (s *shelf) put(t *testing.T, text string, used time.Time) string {
	t.Helper()
	name := Sum(sha256.Sum256([]byte(text))).String()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, used, used); err != nil {
		t.Fatal(err)
	}
	return name
}

func (s *shelf) has(name string) bool {
	_, err := os.Stat(filepath.Join(s.dir, name))
	return err == nil
}

// world is a mirror of a shelf that runs until the test ends.
type world struct {
	*Mirror
	shelf *shelf
	stop  func()

	mu  sync.Mutex
	now time.Time
}

func newWorld(t *testing.T, b Bucket, dir string, maxLocal int64) *world {
	t.Helper()
	w := &world{shelf: &shelf{dir: dir, inUse: map[string]bool{}}, now: time.Now()}
	w.Mirror = NewMirror(MirrorConfig{Transfer: NewTransfer(b), Prefix: "files/", Local: w.shelf, MaxLocal: maxLocal,
		MaxFile: 1 << 30, Log: slog.New(slog.DiscardHandler), Now: w.clock})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx)
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(w.stop)
	return w
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// pass lets time pass.
func (w *world) pass(d time.Duration) {
	w.mu.Lock()
	w.now = w.now.Add(d)
	w.mu.Unlock()
	w.queue.Stir()
}

// tries returns how often the upload of a waiting file failed.
func (w *world) tries(name string) int {
	w.queue.mu.Lock()
	defer w.queue.mu.Unlock()
	if file := w.queue.waiting[name]; file != nil {
		return file.tries
	}
	return 0
}

// keep calls Keep and waits for the end of its collection.
func (w *world) keep(t *testing.T, names ...string) {
	t.Helper()
	w.Keep(names)
	eventually(t, "the collection is over", func() bool {
		w.Mirror.mu.Lock()
		defer w.Mirror.mu.Unlock()
		return !w.due && len(w.turn) == 0
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never was so that %s", what)
		}
	}
}

func there(t *testing.T, b Bucket, name string) bool {
	t.Helper()
	_, err := b.Stat(t.Context(), "files/"+name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// fetch fetches a file and returns its text.
func (w *world) fetch(t *testing.T, name string) (string, error) {
	t.Helper()
	f := emptyFile(t)
	if err := w.Fetch(t.Context(), name, f); err != nil {
		return "", err
	}
	text, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(text), nil
}

func TestMirrorCopies(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		w := newWorld(t, b, t.TempDir(), 0)
		name := w.shelf.put(t, "hello", time.Now())
		w.Offer(name)
		w.Offer(name)
		w.Offer(strings.Repeat("0", 64)) // of which there is no file
		w.Offer("no sum")
		eventually(t, "all is uploaded", func() bool { return w.Counts().Waiting == 0 })
		if c := w.Counts(); c.Uploaded != 5 || !w.Stored(name) || !there(t, b, name) {
			t.Errorf("the counts are %+v, and it is stored: %t", c, w.Stored(name))
		}
		other := newWorld(t, b, t.TempDir(), 0)
		if text, err := other.fetch(t, name); err != nil || text != "hello" {
			t.Errorf("fetched %q, %v", text, err)
		}
		if _, err := other.fetch(t, strings.Repeat("0", 64)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what was never there: %v", err)
		}
		if c := other.Counts(); c.Fetches != 2 || c.Fetched != 5 {
			t.Errorf("the counts are %+v", c)
		}
	})
}

// TestMirrorOutlivesOutage takes the server away, offers files, and starts the process and the server again.
func TestMirrorOutlivesOutage(t *testing.T) {
	s3 := caytest.StartS3(t)
	b, dir := openS3(t, s3, "p"), t.TempDir()
	w := newWorld(t, b, dir, 0)
	first := w.shelf.put(t, "first", time.Now())
	w.Offer(first)
	eventually(t, "the first is uploaded", func() bool { return w.Stored(first) })
	s3.Stop()
	second := w.shelf.put(t, "second", time.Now())
	w.Offer(second)
	if c := w.Counts(); c.Waiting != 1 || c.WaitingBytes != int64(len("second")) {
		t.Errorf("the counts are %+v", c)
	}
	eventually(t, "a try failed", func() bool { return w.tries(second) > 0 })
	if _, err := w.fetch(t, first); !errors.Is(err, ErrUnreachable) || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a fetch without the server: %v", err)
	}
	w.stop()
	s3.Start(t)
	w = newWorld(t, b, dir, 0)
	w.keep(t, first, second)
	eventually(t, "the second is uploaded", func() bool { return w.Stored(second) && w.Stored(first) })
	if c := w.Counts(); c.Uploaded != int64(len("second")) {
		t.Errorf("%d bytes were uploaded, and the bucket had the first", c.Uploaded)
	}
	if text, err := w.fetch(t, second); err != nil || text != "second" {
		t.Errorf("fetched %q, %v", text, err)
	}
}

// TestMirrorRetries lets the server come back while the process lives.
func TestMirrorRetries(t *testing.T) {
	s3 := caytest.StartS3(t)
	s3.Stop()
	w := newWorld(t, openS3(t, s3, ""), t.TempDir(), 0)
	name := w.shelf.put(t, "text", time.Now())
	w.Offer(name)
	eventually(t, "a try failed", func() bool { return w.tries(name) > 0 })
	w.pass(time.Hour)
	if c := w.Counts(); c.Lag < time.Hour {
		t.Errorf("it waits for %s, want an hour", c.Lag)
	}
	s3.Start(t)
	eventually(t, "it is uploaded", func() bool {
		w.pass(lastRetry)
		return w.Stored(name)
	})
}

// faulty is a bucket that finds the first content changed on the way.
type faulty struct {
	Bucket
	puts atomic.Int32
}

func (f *faulty) Put(ctx context.Context, key string, body *io.SectionReader, sum Sum, when Condition) (string, error) {
	if f.puts.Add(1) == 1 {
		return "", ErrDamaged
	}
	return f.Bucket.Put(ctx, key, body, sum, when)
}

// TestMirrorRetriesFaultOnTheWay lets the bucket refuse content that is not damaged here.
func TestMirrorRetriesFaultOnTheWay(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := &faulty{Bucket: dir}
	w := newWorld(t, b, t.TempDir(), 0)
	name := w.shelf.put(t, "text", time.Now())
	w.Offer(name)
	eventually(t, "it is uploaded", func() bool {
		w.pass(lastRetry)
		return w.Stored(name)
	})
	if tries := b.puts.Load(); tries != 2 {
		t.Errorf("it was sent %d times, want 2", tries)
	}
}

// TestMirrorReplacesDamage changes objects in the server's own files.
func TestMirrorReplacesDamage(t *testing.T) {
	for change, content := range map[string]string{"other bytes": "hallo", "another size": "hello!", "nothing": ""} {
		t.Run(change, func(t *testing.T) {
			s3 := caytest.StartS3(t)
			b := openS3(t, s3, "")
			w := newWorld(t, b, t.TempDir(), 0)
			name := w.shelf.put(t, "hello", time.Now())
			w.Offer(name)
			eventually(t, "it is uploaded", func() bool { return w.Stored(name) })
			if err := os.WriteFile(filepath.Join(s3.Dir, "files", name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if text, err := w.fetch(t, name); !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, ErrDamaged) {
				t.Errorf("fetched %q, %v", text, err)
			}
			w.Offer(name)
			eventually(t, "it is uploaded again", func() bool { return w.Stored(name) })
			if text, err := w.fetch(t, name); err != nil || text != "hello" {
				t.Errorf("fetched %q, %v", text, err)
			}
		})
	}
}

// inflated is a bucket that tells a size of every object, even of one that it does not have, if that is not 0.
type inflated struct {
	Bucket
	size atomic.Int64
}

func (i *inflated) Stat(ctx context.Context, key string) (Info, error) {
	if size := i.size.Load(); size > 0 {
		return Info{Key: key, Size: size}, nil
	}
	return i.Bucket.Stat(ctx, key)
}

// TestMirrorOnFullDisk fetches an object for which there is no room. That must not count as damage, by which the object
// would be removed.
func TestMirrorOnFullDisk(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		big := &inflated{Bucket: b}
		w := newWorld(t, big, t.TempDir(), 0)
		name := w.shelf.put(t, "hello", time.Now())
		w.Offer(name)
		eventually(t, "it is uploaded", func() bool { return w.Stored(name) })
		var st unix.Statfs_t
		if err := unix.Statfs(w.shelf.dir, &st); err != nil {
			t.Fatal(err)
		}
		free := int64(st.Bavail) * st.Bsize
		big.size.Store(free)
		w.cfg.MaxFile, w.cfg.MinFree = 2*free, free/2
		if _, err := w.fetch(t, name); !errors.Is(err, unix.ENOSPC) || errors.Is(err, fs.ErrNotExist) ||
			errors.Is(err, ErrUnreachable) {
			t.Errorf("fetching without room: %v", err)
		}
		w.Mirror.mu.Lock()
		if w.damaged[name] || !w.stored[name] {
			t.Errorf("it is taken for damaged: %t, and for stored: %t", w.damaged[name], w.stored[name])
		}
		w.Mirror.mu.Unlock()
		w.cfg.MaxFile = free / 4 // beyond which it cannot be what was stored
		if _, err := w.fetch(t, name); !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, ErrDamaged) {
			t.Errorf("fetching what is too large: %v", err)
		}
		big.size.Store(0)
		if text, err := w.fetch(t, name); err != nil || text != "hello" {
			t.Errorf("fetched with room: %q, %v", text, err)
		}
	})
}

// TestMirrorPausesOnWrongSize uploads to a bucket that tells a wrong size even of what was just replaced.
func TestMirrorPausesOnWrongSize(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		wrong := &inflated{Bucket: b}
		w := newWorld(t, wrong, t.TempDir(), 0)
		name := w.shelf.put(t, "hello", time.Now())
		write(t, b, "files/"+name, "of another size", Condition{})
		wrong.size.Store(100)
		w.Offer(name)
		for try := 1; try <= 3; try++ {
			eventually(t, "a try failed and the next one waits", func() bool {
				w.queue.mu.Lock()
				defer w.queue.mu.Unlock()
				file := w.queue.waiting[name]
				return file != nil && file.tries == try && !file.busy && file.next.After(w.clock())
			})
			w.pass(lastRetry)
		}
		wrong.size.Store(0)
		eventually(t, "it is uploaded", func() bool {
			w.pass(lastRetry)
			return w.Stored(name)
		})
		if got := read(t, b, "files/"+name); got != "hello" {
			t.Errorf("the object is %q", got)
		}
	})
}

// TestMirrorCollects lets time pass over objects that are needed and that are not.
func TestMirrorCollects(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		w := newWorld(t, b, t.TempDir(), 0)
		kept, gone := w.shelf.put(t, "kept", time.Now()), w.shelf.put(t, "gone", time.Now())
		w.Offer(kept)
		w.Offer(gone)
		eventually(t, "both are uploaded", func() bool { return w.Stored(kept) && w.Stored(gone) })
		write(t, b, "files/notes", "of the operator", Condition{})
		write(t, b, "other/"+gone, "of another mirror", Condition{})
		id, err := b.Begin(t.Context(), "files/"+gone)
		if err != nil {
			t.Fatal(err)
		}
		// Objects have the times of the server, whose clock is real. So they are old for a process that starts later,
		// which must still keep what it has only just learnt to be unneeded.
		w.pass(10 * Grace)
		w.keep(t, kept)
		if !there(t, b, gone) {
			t.Error("it went before its grace")
		}
		w.pass(Grace - time.Second)
		w.keep(t, kept)
		if !there(t, b, gone) {
			t.Error("it went before its grace")
		}
		w.Offer(gone) // which needs nothing uploaded
		w.keep(t, kept, gone)
		w.pass(2 * time.Second)
		w.keep(t, kept, gone)
		w.keep(t, kept)
		w.pass(Grace - time.Second)
		w.keep(t, kept)
		if !there(t, b, gone) {
			t.Error("it was needed again, and went")
		}
		w.pass(2 * time.Second)
		w.keep(t, kept)
		if there(t, b, gone) || !there(t, b, kept) {
			t.Errorf("after the grace there is the unneeded: %t, and the needed: %t", there(t, b, gone), there(t, b, kept))
		}
		if read(t, b, "files/notes") == "" || read(t, b, "other/"+gone) == "" {
			t.Error("what is not the mirror's was removed")
		}
		if _, err := b.Parts(t.Context(), "files/"+gone, id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("an old upload stays: %v", err)
		}
		// Made again, it is uploaded again.
		w.Offer(gone)
		eventually(t, "it is uploaded again", func() bool { return w.Stored(gone) && there(t, b, gone) })
	})
}

// TestMirrorBoundsUnneeded makes unneeded objects beyond the bound, which go sooner, the oldest first.
func TestMirrorBoundsUnneeded(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		w := newWorld(t, b, t.TempDir(), 0)
		w.cfg.MaxUnneeded = 20
		needed := w.shelf.put(t, "needed, and longer than the bound", time.Now())
		var names []string
		w.Offer(needed)
		for i := range 3 {
			names = append(names, w.shelf.put(t, fmt.Sprintf("ten bytes%d", i), time.Now()))
			w.Offer(names[i])
			eventually(t, "it is uploaded", func() bool { return w.Stored(names[i]) })
			w.keep(t, needed)
			w.pass(time.Minute)
		}
		are := func(want ...bool) {
			t.Helper()
			for i, name := range names {
				if there(t, b, name) != want[i] {
					t.Errorf("object %d is there: %t, want %t", i, !want[i], want[i])
				}
			}
		}
		w.keep(t, needed)
		are(true, true, true)
		w.pass(leastGrace)
		w.keep(t, needed)
		are(false, true, true)
		w.pass(Grace)
		w.keep(t, needed)
		are(false, false, false)
		if !there(t, b, needed) {
			t.Error("the needed one is gone")
		}
	})
}

func TestMirrorEvicts(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		w := newWorld(t, b, t.TempDir(), 20)
		var names []string
		for i := range 5 { // the first was not used the longest time
			names = append(names, w.shelf.put(t, fmt.Sprintf("ten bytes%d", i), time.Now().Add(time.Duration(i-10)*time.Hour)))
		}
		w.shelf.inUse[names[0]] = true
		for _, name := range names {
			w.Offer(name)
		}
		eventually(t, "all are uploaded", func() bool { return w.Counts().Waiting == 0 })
		// One that the bucket lost must stay.
		if err := b.Delete(t.Context(), "files/"+names[1]); err != nil {
			t.Fatal(err)
		}
		w.keep(t, names...)
		eventually(t, "what the bucket lost is uploaded again", func() bool { return there(t, b, names[1]) })
		var got []bool
		for _, name := range names {
			got = append(got, w.shelf.has(name))
		}
		if want := []bool{true, true, false, false, false}; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("on the shelf are %v, want %v", got, want)
		}
		for i, name := range names {
			if text, err := w.fetch(t, name); err != nil || text != fmt.Sprintf("ten bytes%d", i) {
				t.Errorf("fetched %q, %v", text, err)
			}
		}
	})
}

// TestClaim claims a bucket for several servers at once: of other records, of copies of the same ones, and where an
// earlier version has claimed it for the records alone.
func TestClaim(t *testing.T) {
	for name, c := range map[string]struct {
		before string
		owner  func(i int) Owner
	}{
		"other records": {"", func(i int) Owner { return Owner{Cluster: fmt.Sprint("records-", i%2), Directory: "here"} }},
		"a copy":        {"", func(i int) Owner { return Owner{Cluster: "records", Directory: fmt.Sprint("dir-", i%2)} }},
		"by before": {`{"owner":"records"}`,
			func(i int) Owner { return Owner{Cluster: "records", Directory: fmt.Sprint("dir-", i%2)} }},
	} {
		eachBucket(t, func(t *testing.T, b Bucket) {
			if c.before != "" {
				if _, err := Write(t.Context(), b, ownerKey, []byte(c.before), Condition{}); err != nil {
					t.Fatal(err)
				}
			}
			var wg sync.WaitGroup
			var mu sync.Mutex
			owners := map[Owner]bool{}
			for i := range 8 {
				wg.Go(func() {
					owner := c.owner(i)
					err := Claim(t.Context(), b, owner)
					if errors.Is(err, ErrCondition) { // another one wrote it twice meanwhile
						err = Claim(t.Context(), b, owner)
					}
					if err != nil && !errors.Is(err, ErrForeign) {
						t.Errorf("%s: %v", name, err)
					}
					if err == nil {
						mu.Lock()
						owners[owner] = true
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			if len(owners) != 1 {
				t.Errorf("%s: the owners are %v", name, owners)
			}
			for owner := range owners {
				if err := Claim(t.Context(), b, owner); err != nil {
					t.Errorf("%s: claiming again: %v", name, err)
				}
			}
		})
	}
}

// TestStoreIsTakenOver gives a bucket to a copy of the records while the first server runs. It checks that the first
// one removes and uploads nothing any more.
func TestStoreIsTakenOver(t *testing.T) {
	b, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	now := time.Now()
	me := Owner{Cluster: "records", Directory: "here"}
	s := NewStore(b, me, slog.New(slog.DiscardHandler))
	m := s.Mirror(MirrorConfig{Prefix: "files/", Local: &shelf{dir: t.TempDir()}, MaxFile: 1 << 30,
		Now: func() time.Time { return now }})
	write := func(key, text string) {
		t.Helper()
		if _, err := Write(ctx, b, key, []byte(text), Condition{}); err != nil {
			t.Fatal(err)
		}
	}
	key := "files/" + Sum(sha256.Sum256([]byte("theirs"))).String()
	write(key, "theirs")
	if err := Claim(ctx, b, me); err != nil {
		t.Fatal(err)
	}
	s.claimed.Store(true)
	m.collect(ctx) // sees that nothing needs it
	now = now.Add(2 * Grace)
	for _, other := range []string{`{"owner":"records","directory":"there"}`, `{"owner":"others","directory":"here"}`,
		`{"owner":"records"}`, "{"} {
		write(ownerKey, other)
		m.collect(ctx)
		if _, err := b.Stat(ctx, key); err != nil || s.Claimed() || !s.Foreign() {
			t.Errorf("with the owner %s: the object %v, claimed %v, foreign %v", other, err, s.Claimed(), s.Foreign())
		}
		if m.Offer(other); m.Counts().Waiting != 0 {
			t.Errorf("with the owner %s what is offered waits", other)
		}
	}
	if err := b.Delete(ctx, ownerKey); err != nil {
		t.Fatal(err)
	}
	m.collect(ctx)
	if _, err := b.Stat(ctx, key); err != nil {
		t.Errorf("without an owner: %v", err)
	}
	if err := Claim(ctx, b, me); err != nil {
		t.Fatal(err)
	}
	m.collect(ctx)
	if _, err := b.Stat(ctx, key); !errors.Is(err, fs.ErrNotExist) || !s.Claimed() || s.Foreign() {
		t.Errorf("the owner does not remove what nothing needs: %v", err)
	}
	if m.Offer(key); m.Counts().Waiting != 1 {
		t.Error("the owner does not upload what is offered")
	}
}

// TestStore runs a store whose bucket is away at first, and one of another owner.
func TestStore(t *testing.T) {
	s3 := caytest.StartS3(t)
	s3.Stop()
	log := slog.New(slog.DiscardHandler)
	local := &shelf{dir: t.TempDir()}
	s := NewStore(openS3(t, s3, ""), Owner{Cluster: "me", Directory: "here"}, log)
	m := s.Mirror(MirrorConfig{Prefix: "files/", Local: local, MaxFile: 1 << 30})
	name := local.put(t, "text", time.Now())
	m.Offer(name)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	if s.Claimed() {
		t.Error("it is claimed without its server")
	}
	s3.Start(t)
	eventually(t, "the file is uploaded", func() bool { return s.Claimed() && m.Stored(name) })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	foreign := NewStore(openS3(t, s3, ""), Owner{Cluster: "other", Directory: "here"}, log)
	m = foreign.Mirror(MirrorConfig{Prefix: "files/", Local: local, MaxFile: 1 << 30})
	if err := foreign.Run(t.Context()); !errors.Is(err, ErrForeign) || !foreign.Foreign() {
		t.Errorf("the store of another owner: %v", err)
	}
	if m.Offer(name); m.Counts().Waiting != 0 {
		t.Error("what is offered waits for ever")
	}
}

// TestQueueDropsWhileClosed closes a queue while one thing waits for its next try.
func TestQueueDropsWhileClosed(t *testing.T) {
	var closed atomic.Bool
	now := time.Now()
	q := NewQueue("x/", closed.Load, slog.New(slog.DiscardHandler), func() time.Time { return now })
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		q.Run(ctx, func(_ context.Context, name string) error {
			if name == "failing" && !closed.Swap(true) {
				return errBroken
			}
			t.Errorf("%s is uploaded", name)
			return nil
		})
	}()
	q.Add("failing", 1)
	eventually(t, "it was tried", closed.Load)
	eventually(t, "nothing waits", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		if w := q.waiting["failing"]; w != nil {
			w.next = time.Time{}
		}
		q.Stir()
		return len(q.waiting) == 0
	})
	q.Add("later", 1)
	if n, _, _ := q.Counts(); n != 0 {
		t.Errorf("while it is closed %d things wait", n)
	}
	stop()
	<-done
	closed.Store(false)
	q.Add("later", 1)
	if n, _, _ := q.Counts(); n != 1 {
		t.Errorf("in the open queue %d things wait", n)
	}
}

// TestQueueStarvesNone adds two things again as soon as they are uploaded. One that was added before is uploaded too.
func TestQueueStarvesNone(t *testing.T) {
	q := NewQueue("x/", nil, slog.New(slog.DiscardHandler), nil)
	q.Add("old", 1)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	const enough = 100
	tries := 0 // Run has several uploads at once
	var mu sync.Mutex
	q.Add("a", 1)
	q.Add("b", 1)
	uploaded := false
	q.Run(ctx, func(_ context.Context, name string) error {
		mu.Lock()
		defer mu.Unlock()
		if tries++; name == "old" || tries == enough {
			uploaded = name == "old"
			stop()
			return nil
		}
		q.Add(name, 1)
		return nil
	})
	if !uploaded {
		t.Errorf("in %d uploads the oldest was none", enough)
	}
}
