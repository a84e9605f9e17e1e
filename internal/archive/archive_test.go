package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/checkpoint"
	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

// world is a machine with checkpoints and records, and an archive that runs.
type world struct {
	*Archive
	bucket objects.Bucket
	db     *store.DB
	saved  *checkpoint.Store
	node   string
	dir    string // has the programs
	stop   func()

	mu  sync.Mutex
	now time.Time
}

func newWorld(t *testing.T, bucket objects.Bucket) *world {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	return newWorldOf(t, bucket, db, "")
}

// newWorldOf returns the machine of a node with records, which it closes.
func newWorldOf(t *testing.T, bucket objects.Bucket, db *store.DB, node string) *world {
	t.Helper()
	w := &world{bucket: bucket, db: db, node: node, dir: t.TempDir(), now: time.Now()}
	t.Cleanup(func() { w.db.Close() })
	var err error
	if w.saved, _, err = checkpoint.Open(filepath.Join(w.dir, "checkpoints"), 0); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"agent", "runsc"} {
		if err := os.WriteFile(filepath.Join(w.dir, name), []byte("program "+name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

// start starts an archive, as the next process would.
func (w *world) start() {
	w.Archive = New(Config{Bucket: w.bucket, Transfer: objects.NewTransfer(w.bucket), Node: w.node, Records: w.db,
		Source: w, Key: []byte("the key of the MACs"), Alone: w.db.Alone, Log: slog.New(slog.DiscardHandler),
		Now: w.clock})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Load(ctx)
		w.Run(ctx)
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
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

func (w *world) SavedNames() ([]string, error) { return w.saved.Names() }

func (w *world) OpenSaved(name string) (*Local, error) {
	c, err := w.saved.Latest(name)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return nil, fs.ErrNotExist
	}
	files, err := c.OpenAll()
	return &Local{MadeAt: c.At, CPUClass: "amd64-test", Agent: filepath.Join(w.dir, "agent"),
		Runsc: filepath.Join(w.dir, "runsc"),
		Files: files}, err
}

// sandbox inserts a sandbox and returns its ID.
func (w *world) sandbox(t *testing.T) string {
	t.Helper()
	s := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: "org_a", Mode: sandbox.Persistent, State: sandbox.Creating,
		CreatedAt: time.Now()}
	if _, _, err := w.db.Insert(t.Context(), s, sandbox.Quota{}, sandbox.Once{}); err != nil {
		t.Fatal(err)
	}
	return string(s.ID)
}

// save makes a checkpoint with a text in its pages, and offers it.
func (w *world) save(t *testing.T, name, text string) time.Time {
	t.Helper()
	return w.saveAt(t, name, text, time.Now())
}

func (w *world) saveAt(t *testing.T, name, text string, at time.Time) time.Time {
	t.Helper()
	d, err := w.saved.Begin(name, 1)
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{"pages.img": text, "config.json": "{}", "empty": ""} {
		if err := os.WriteFile(filepath.Join(d.Dir(), file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := d.Commit(at, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.Offer(name, c.Size)
	return c.At
}

// copied waits until a checkpoint is in the bucket and returns its row.
func (w *world) copied(t *testing.T, name string, made time.Time) sandbox.StoredCheckpoint {
	t.Helper()
	eventually(t, name+" is stored", func() bool { return w.Stored(name, made) })
	for _, c := range w.rows(t) {
		if c.Name == name && c.MadeAt.Equal(made) && !c.UploadedAt.IsZero() {
			return c
		}
	}
	t.Fatalf("there is no row of %s of %s: %+v", name, made, w.rows(t))
	return sandbox.StoredCheckpoint{}
}

func (w *world) rows(t *testing.T) []sandbox.StoredCheckpoint {
	t.Helper()
	rows, err := w.db.StoredCheckpoints(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// keys returns the keys of the bucket's objects, without checks' and owners'.
func (w *world) keys(t *testing.T, prefix string) (keys []string) {
	t.Helper()
	all, err := w.bucket.List(t.Context(), prefix, "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range all {
		keys = append(keys, o.Key)
	}
	return keys
}

// fetch returns the pages of a copy.
func (w *world) fetch(t *testing.T, c sandbox.StoredCheckpoint) (string, error) {
	t.Helper()
	dir := t.TempDir()
	if err := w.Fetch(t.Context(), c, dir, 0); err != nil {
		return "", err
	}
	for _, name := range []string{"manifest.json", "config.json", "empty"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, "pages.img"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data), nil
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never was so that %s", what)
		}
	}
}

func directory(t *testing.T) objects.Bucket {
	t.Helper()
	b, err := objects.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// collectTwice lets the grace pass and collects, which removes what was not needed all the time.
func (w *world) collectTwice(t *testing.T) {
	t.Helper()
	w.stop() // it collects at its start, and the test from here on
	for range 2 {
		if err := w.collect(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.pass(objects.Grace + time.Minute)
	}
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestArchiveLives follows the copies of a sandbox and a snapshot to their end.
func TestArchiveLives(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	snap := sandbox.Snapshot{ID: sandbox.NewSnapshotID(), OrgID: "org_a", State: sandbox.SnapshotCreating,
		CreatedAt: time.Now()}
	if err := w.db.AddSnapshot(t.Context(), snap, 0); err != nil {
		t.Fatal(err)
	}
	first := w.copied(t, id, w.save(t, id, "first"))
	saved := w.copied(t, string(snap.ID), w.save(t, string(snap.ID), "saved"))
	for _, c := range []struct {
		row  sandbox.StoredCheckpoint
		want string
	}{{first, "first"}, {saved, "saved"}} {
		if got, err := w.fetch(t, c.row); err != nil || got != c.want {
			t.Errorf("fetched %q, %v; want %q", got, err, c.want)
		}
		if c.row.CPUClass != "amd64-test" || c.row.Bytes == 0 || len(c.row.Runsc) != 64 || len(c.row.Agent) != 64 {
			t.Errorf("the row is %+v", c.row)
		}
	}
	if got := w.keys(t, programPrefix); len(got) != 2 {
		t.Errorf("the programs are %q", got)
	}

	second := w.copied(t, id, w.save(t, id, "second"))
	if second.Number <= first.Number {
		t.Errorf("the second copy has the number %d, the first %d", second.Number, first.Number)
	}
	if w.Stored(id, second.MadeAt.Add(time.Second)) {
		t.Error("a checkpoint that was not made is stored")
	}
	if got, err := w.fetch(t, first); err != nil || got != "first" {
		t.Errorf("the copy before, within the grace: %q, %v", got, err)
	}
	w.collectTwice(t)
	if _, err := w.fetch(t, first); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the copy before, after the grace: %v", err)
	}
	for _, c := range []sandbox.StoredCheckpoint{second, saved} {
		if _, err := w.fetch(t, c); err != nil {
			t.Errorf("a copy that is needed: %v", err)
		}
	}

	if _, err := w.db.Transition(t.Context(), sandbox.Change{ID: sandbox.ID(id), From: []sandbox.State{sandbox.Creating},
		To: sandbox.Destroyed, At: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if err := w.db.DropSnapshot(t.Context(), snap.ID); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.saved.Remove(id), w.saved.Remove(string(snap.ID))); err != nil {
		t.Fatal(err)
	}
	w.start() // a process that has uploaded no program
	w.collectTwice(t)
	if got := append(w.keys(t, checkpointPrefix), w.keys(t, programPrefix)...); len(got) != 0 || len(w.rows(t)) != 0 {
		t.Errorf("left are %q and %+v", got, w.rows(t))
	}
	if w.Stored(id, second.MadeAt) {
		t.Error("a copy that was removed is still stored")
	}
}

// TestArchiveClockSetBack makes a checkpoint whose time is before that of the one before, which is not taken for it.
func TestArchiveClockSetBack(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	now := time.Now()
	first := w.copied(t, id, w.saveAt(t, id, "first", now))
	made := w.saveAt(t, id, "second", now.Add(-time.Hour))
	second := w.copied(t, id, made)
	if got, err := w.fetch(t, second); err != nil || got != "second" || second.Number <= first.Number {
		t.Errorf("fetched %q of number %d after %d, %v", got, second.Number, first.Number, err)
	}
	if w.Stored(id, first.MadeAt) {
		t.Error("the checkpoint before is still the stored one")
	}
	w.stop()
	w.start()
	eventually(t, "the next process knows the newest copy", func() bool { return w.Stored(id, made) })
}

// TestArchiveUploadsAgain takes the copies out of the bucket, as files.url does that names another one.
func TestArchiveUploadsAgain(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	made := w.save(t, id, "text")
	before := w.copied(t, id, made)
	for _, key := range w.keys(t, checkpointPrefix) {
		if err := w.bucket.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	w.stop()
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.Load(t.Context())
	if w.Stored(id, made) {
		t.Error("a copy that is not in the bucket is taken for stored")
	}
	w.start()
	eventually(t, "it is uploaded again", func() bool {
		rows := w.rows(t)
		return len(rows) == 1 && rows[0].Number > before.Number && !rows[0].UploadedAt.IsZero()
	})
	if got, err := w.fetch(t, w.rows(t)[0]); err != nil || got != "text" {
		t.Errorf("fetched %q, %v", got, err)
	}
}

// TestArchiveUploadsProgramsAgain takes the programs out of the bucket, which the same process has uploaded.
func TestArchiveUploadsProgramsAgain(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	w.copied(t, id, w.save(t, id, "text"))
	w.stop()
	programs := w.keys(t, programPrefix)
	if err := w.bucket.Delete(t.Context(), programs[0]); err != nil {
		t.Fatal(err)
	}
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.Load(t.Context())
	if err := w.upload(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if got := w.keys(t, programPrefix); !slices.Equal(got, programs) {
		t.Errorf("the programs are %q, want %q", got, programs)
	}
}

// TestArchiveTriesAgainWithoutProgram removes a program of this machine after the checkpoint that needs it was found.
func TestArchiveTriesAgainWithoutProgram(t *testing.T) {
	w := newWorld(t, directory(t))
	w.stop()
	id := w.sandbox(t)
	made := w.save(t, id, "text")
	runsc := filepath.Join(w.dir, "runsc")
	if err := os.Rename(runsc, runsc+".away"); err != nil {
		t.Fatal(err)
	}
	if err := w.upload(t.Context(), id); err == nil {
		t.Error("an upload without a program is over")
	}
	if w.Stored(id, made) || len(w.rows(t)) != 0 || len(w.keys(t, checkpointPrefix)) != 0 {
		t.Errorf("without a program there are %+v", w.rows(t))
	}
	if err := os.Rename(runsc+".away", runsc); err != nil {
		t.Fatal(err)
	}
	if err := w.upload(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if got, err := w.fetch(t, w.copied(t, id, made)); err != nil || got != "text" {
		t.Errorf("fetched %q, %v", got, err)
	}
}

// paged is a bucket whose lists of programs have two pages. Between them it calls between.
type paged struct {
	objects.Bucket
	between func()
}

func (p *paged) List(ctx context.Context, prefix, after string, most int) ([]objects.Info, error) {
	if prefix != programPrefix || p.between == nil {
		return p.Bucket.List(ctx, prefix, after, most)
	}
	if after != "" {
		p.between()
		return nil, nil
	}
	all, err := p.Bucket.List(ctx, prefix, after, most)
	for len(all) < most {
		young := objects.Info{Key: fmt.Sprintf("%sz%d", prefix, len(all)), Modified: time.Now().Add(10 * objects.Grace)}
		all = append(all, young)
	}
	return all, err
}

// TestArchiveUploadsDuringCollection uploads a checkpoint while a collection lists programs, which have not been needed
// for long. They are found in the bucket, so they must not be removed.
func TestArchiveUploadsDuringCollection(t *testing.T) {
	b := &paged{Bucket: directory(t)}
	w := newWorld(t, b)
	w.stop()
	for i, name := range []string{"agent", "runsc"} {
		text, err := os.ReadFile(filepath.Join(w.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range [][]byte{text, fmt.Appendf(nil, "older program %d", i)} {
			_, err := objects.Write(t.Context(), b, programPrefix+sumOf(text).String(), text, objects.Condition{})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.pass(objects.Grace + time.Minute)
	if got := w.keys(t, programPrefix); len(got) != 4 {
		t.Fatalf("the programs are %q before the grace has passed", got)
	}
	id := w.sandbox(t)
	made := w.save(t, id, "text")
	b.between = func() {
		uploaded := make(chan error)
		go func() { uploaded <- w.upload(t.Context(), id) }()
		select {
		case err := <-uploaded:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Error("the upload waits for the collection")
		}
	}
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.between = nil
	if !w.Stored(id, made) {
		t.Error("the checkpoint is not stored")
	}
	row := w.rows(t)[0]
	want := []string{programPrefix + row.Agent, programPrefix + row.Runsc}
	slices.Sort(want)
	if got := w.keys(t, programPrefix); !slices.Equal(got, want) {
		t.Errorf("the programs are %q, want %q", got, want)
	}
}

// TestArchiveSkips offers what no row names, such as the state that a fork's children start from, and what is gone.
func TestArchiveSkips(t *testing.T) {
	w := newWorld(t, directory(t))
	w.save(t, string(sandbox.NewSnapshotID()), "of a fork")
	w.Offer(w.sandbox(t), 7)
	eventually(t, "nothing waits", func() bool { return w.Counts().Waiting == 0 })
	if got := w.keys(t, checkpointPrefix); len(got) != 0 || len(w.rows(t)) != 0 {
		t.Errorf("uploaded are %q and %+v", got, w.rows(t))
	}
}

// TestArchiveResumes makes checkpoints while the bucket is away, and uploads them when it is back: by the same process,
// and by the next one.
func TestArchiveResumes(t *testing.T) {
	s3 := caytest.StartS3(t)
	s3.Stop()
	l, err := objects.ParseURL(s3.URL("archive"))
	if err != nil {
		t.Fatal(err)
	}
	bucket, err := objects.Open(l, objects.Credentials{AccessKey: s3.AccessKey, SecretKey: s3.SecretKey})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, bucket)
	id := w.sandbox(t)
	for _, restart := range []bool{false, true} {
		s3.Stop()
		made := w.save(t, id, fmt.Sprint("restart ", restart))
		if c := w.Counts(); c.Waiting != 1 || c.WaitingBytes == 0 || w.Stored(id, made) {
			t.Errorf("without the bucket: %+v, stored %t", c, w.Stored(id, made))
		}
		w.pass(time.Hour)
		if c := w.Counts(); c.Lag < time.Hour {
			t.Errorf("it waits for %s, want an hour", c.Lag)
		}
		if restart {
			w.stop()
			w.start()
			eventually(t, "the next process knows what waits", func() bool { return w.Counts().Waiting == 1 })
		}
		s3.Start(t)
		eventually(t, "it is stored", func() bool {
			w.pass(time.Minute)
			return w.Stored(id, made)
		})
		if got, err := w.fetch(t, w.copied(t, id, made)); err != nil || got != fmt.Sprint("restart ", restart) {
			t.Errorf("fetched %q, %v", got, err)
		}
	}
	w.stop()
	w.start()
	newest := w.rows(t)[0].MadeAt
	eventually(t, "the next process knows what is stored", func() bool { return w.Stored(id, newest) })
	if c := w.Counts(); c.Waiting != 0 || c.Uploaded != 0 {
		t.Errorf("the next process has the counts %+v", c)
	}
}

// TestArchiveContinues ends a process after it has written all objects, and before it has recorded that.
func TestArchiveContinues(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	failing := &failingEnd{CheckpointStore: w.db, fail: true}
	w.stop()
	w.Archive = New(Config{Bucket: w.bucket, Transfer: objects.NewTransfer(w.bucket), Records: failing, Source: w,
		Key: w.cfg.Key, Log: w.cfg.Log, Now: w.clock})
	made := w.save(t, id, "text")
	if err := w.upload(t.Context(), id); err == nil || w.Stored(id, made) {
		t.Fatalf("the row was not written: %v, stored %t", err, w.Stored(id, made))
	}
	keys := w.keys(t, checkpointPrefix)
	w.start()
	w.copied(t, id, made)
	if got := w.keys(t, checkpointPrefix); strings.Join(got, " ") != strings.Join(keys, " ") {
		t.Errorf("the objects are %q, and were %q", got, keys)
	}
}

// failingEnd fails to record that a copy was uploaded.
type failingEnd struct {
	sandbox.CheckpointStore
	fail bool
}

func (f *failingEnd) EndCheckpoint(ctx context.Context, c sandbox.StoredCheckpoint) error {
	if f.fail {
		return errors.New("the database is away")
	}
	return f.CheckpointStore.EndCheckpoint(ctx, c)
}

// TestArchiveRefusesChanges changes objects as a program that can write to the bucket could.
func TestArchiveRefusesChanges(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	older := w.copied(t, id, w.save(t, id, "its memory some time ago"))
	row := w.copied(t, id, w.save(t, id, "the memory of a sandbox."))
	other := w.sandbox(t)
	otherRow := w.copied(t, other, w.save(t, other, "the memory of another one"))
	w.stop()
	get := func(key string) []byte {
		t.Helper()
		data, _, err := objects.Read(t.Context(), w.bucket, key, maxSeal)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	put := func(key string, data []byte) {
		t.Helper()
		if _, err := objects.Write(t.Context(), w.bucket, key, data, objects.Condition{}); err != nil {
			t.Fatal(err)
		}
	}
	keys := w.keys(t, home(row))
	if len(keys) != 5 {
		t.Fatalf("the objects are %q", keys)
	}
	for _, key := range keys {
		was := get(key)
		flipped := slices.Clone(was)
		if len(was) > 0 {
			flipped[len(was)/2] ^= 1
		}
		for name, data := range map[string][]byte{
			"longer":          append(slices.Clone(was), 0),
			"shorter":         was[:max(1, len(was))-1],
			"another bit":     flipped,
			"another's":       get(home(otherRow) + filepath.Base(key)),
			"older":           get(home(older) + filepath.Base(key)),
			"of another file": get(keys[(slices.Index(keys, key)+1)%len(keys)]),
		} {
			if string(data) == string(was) {
				continue // nothing changed
			}
			put(key, data)
			if _, err := w.fetch(t, row); !errors.Is(err, objects.ErrDamaged) {
				t.Errorf("%s, %s: %v", key, name, err)
			}
		}
		put(key, was)
	}
	if got, err := w.fetch(t, row); err != nil || got != "the memory of a sandbox." {
		t.Errorf("unchanged: %q, %v", got, err)
	}
	// A seal of its own does not help without the key, even if the row had its sum.
	s := newSeal(row)
	s.Files = []sealedFile{{Name: "pages.img", Size: 0, Pieces: objects.Pieces{Sums: []objects.Sum{sumOf(nil)}}}}
	forged, err := s.encode([]byte("a guess"))
	if err != nil {
		t.Fatal(err)
	}
	row.Sum = sumOf(forged).String()
	put(home(row)+sealName, forged)
	if _, err := w.fetch(t, row); !errors.Is(err, objects.ErrDamaged) {
		t.Errorf("a forged seal: %v", err)
	}
	for _, name := range []string{"../out", "/etc/passwd", ".", "", sealName, "a/b"} {
		s.Files[0].Name = name
		data, err := s.encode(w.cfg.Key)
		if err != nil {
			t.Fatal(err)
		}
		row.Sum = sumOf(data).String()
		if _, err := openSeal(w.cfg.Key, data, row); !errors.Is(err, objects.ErrDamaged) {
			t.Errorf("a seal that names %q: %v", name, err)
		}
	}
}

// TestArchiveBoundsUnneeded saves a sandbox again and again, whose earlier copies may take two copies' space.
func TestArchiveBoundsUnneeded(t *testing.T) {
	w := newWorld(t, directory(t))
	id := w.sandbox(t)
	const copies = 5
	var bytes int64
	for i := range copies {
		bytes = w.copied(t, id, w.save(t, id, fmt.Sprint("text ", i))).Bytes
	}
	w.stop()
	w.cfg.MaxUnneeded = 2 * bytes
	w.Archive = New(w.cfg)
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := len(w.keys(t, checkpointPrefix)); got != copies*5 {
		t.Errorf("at once there are %d objects", got)
	}
	w.pass(2 * time.Hour)
	if err := w.collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := w.keys(t, checkpointPrefix); len(got) >= copies*5 || len(got) < 2*5 {
		t.Errorf("after an hour there are %d objects: %q", len(got), got)
	}
	if _, err := w.fetch(t, w.rows(t)[0]); err != nil {
		t.Errorf("the newest copy: %v", err)
	}
}
