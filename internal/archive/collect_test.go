package archive

import (
	"context"
	"errors"
	"io"
	"path"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

// TestArchiveUploadsDamagedCopyAgain takes one object of a copy out of the bucket, or cuts it, and leaves the seal.
func TestArchiveUploadsDamagedCopyAgain(t *testing.T) {
	for name, damage := range map[string]func(*world, sandbox.StoredCheckpoint) error{
		"a file is gone": func(w *world, c sandbox.StoredCheckpoint) error {
			return w.bucket.Delete(t.Context(), home(c)+"pages.img")
		},
		"a file is shorter": func(w *world, c sandbox.StoredCheckpoint) error {
			_, err := objects.Write(t.Context(), w.bucket, home(c)+"pages.img", []byte("tex"), objects.Condition{})
			return err
		},
	} {
		w := newWorld(t, directory(t))
		id, other := w.sandbox(t), w.sandbox(t)
		made, otherMade := w.save(t, id, "text"), w.save(t, other, "other text")
		before := w.copied(t, id, made)
		w.copied(t, other, otherMade)
		w.stop()
		if err := damage(w, before); err != nil {
			t.Fatal(err)
		}
		if err := w.collect(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.Load(t.Context())
		if w.Stored(id, made) || !w.queue.Waits(id) {
			t.Errorf("%s: the copy is stored: %t, waits: %t", name, w.Stored(id, made), w.queue.Waits(id))
		}
		if !w.Stored(other, otherMade) || w.queue.Waits(other) {
			t.Errorf("%s: another copy, which is whole, is uploaded again", name)
		}
		if err := w.upload(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		after := w.copied(t, id, made)
		if got, err := w.fetch(t, after); err != nil || got != "text" || after.Number <= before.Number {
			t.Errorf("%s: fetched %q of number %d, %v", name, got, after.Number, err)
		}
	}
}

// unsealed is a bucket that takes no seals.
type unsealed struct{ objects.Bucket }

func (u unsealed) Put(ctx context.Context, key string, body *io.SectionReader, sum objects.Sum,
	when objects.Condition) (string, error) {
	if path.Base(key) == sealName {
		return "", errors.New("it takes no seals")
	}
	return u.Bucket.Put(ctx, key, body, sum, when)
}

// TestArchiveDropsBegunCopies makes checkpoints while no copy gets whole. What was begun for the earlier ones goes
// after the grace.
func TestArchiveDropsBegunCopies(t *testing.T) {
	b := directory(t)
	w := newWorld(t, unsealed{b})
	w.stop()
	id := w.sandbox(t)
	var rows []sandbox.StoredCheckpoint // of each try
	for _, text := range []string{"first", "second"} {
		w.save(t, id, text)
		if err := w.upload(t.Context(), id); err == nil {
			t.Fatal("a copy without a seal is whole")
		}
		all := w.rows(t)
		if len(all) != 1 {
			t.Errorf("after the %s try there are the rows %+v", text, all)
		}
		row := all[len(all)-1]
		if _, err := b.Begin(t.Context(), home(row)+"pages.img"); err != nil {
			t.Fatal(err)
		}
		rows = append(rows, row)
	}
	collect := func() {
		t.Helper()
		if err := w.collect(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	check := func(try, uploads, files int) {
		t.Helper()
		left, err := b.Uploads(t.Context(), home(rows[try]))
		keys := w.keys(t, home(rows[try]))
		if err != nil || len(left) != uploads || len(keys) != files {
			t.Errorf("try %d has the uploads %v and the objects %q, %v", try, left, keys, err)
		}
	}
	const files = 4
	collect()
	w.pass(objects.Grace - time.Minute)
	collect()
	check(0, 1, files)
	w.pass(2 * time.Minute)
	collect()
	check(0, 0, 0)
	check(1, 1, files)
	w.pass(objects.UploadKept)
	collect()
	check(1, 0, files)
}

// TestArchiveOfTakenOverBucket makes a checkpoint while the bucket is another server's, which then gives it back.
func TestArchiveOfTakenOverBucket(t *testing.T) {
	w := newWorld(t, directory(t))
	w.stop()
	var foreign, back atomic.Bool
	foreign.Store(true)
	w.cfg.Foreign = foreign.Load
	w.cfg.Alone = func(ctx context.Context, _ string, f func(context.Context) error) error {
		if !back.Load() {
			return objects.ErrForeign
		}
		foreign.Store(false) // as a look at the owner does
		return f(ctx)
	}
	w.Archive = New(w.cfg)
	id := w.sandbox(t)
	made := w.save(t, id, "text")
	w.Load(t.Context())
	if n := w.Counts().Waiting; n != 0 || w.Stored(id, made) {
		t.Errorf("in a foreign bucket %d uploads wait, stored %t", n, w.Stored(id, made))
	}
	back.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx)
	}()
	defer func() {
		cancel()
		<-done
	}()
	w.copied(t, id, made)
}

// nodes returns the machines of two nodes with the same records in PostgreSQL and the same bucket. No archive runs.
func nodes(t *testing.T, bucket objects.Bucket) (a, b *world) {
	t.Helper()
	url, err := caytest.StartPostgres(t).Create("cay", "")
	if err != nil {
		t.Fatal(err)
	}
	open := func(node string) *world {
		db, err := store.OpenPostgres(t.Context(), store.PostgresConfig{URL: url, MaxConns: 4})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.StartSession(t.Context(), node, false); err != nil {
			t.Fatal(err)
		}
		w := newWorldOf(t, bucket, db, node)
		w.stop()
		return w
	}
	return open("aaaaaa"), open("bbbbbb")
}

// runUntil runs an archive, while another process collects, until a checkpoint has a copy with a number above one.
func (w *world) runUntil(t *testing.T, id string, above int64) {
	t.Helper()
	w.cfg.Alone = func(context.Context, string, func(context.Context) error) error { return nil }
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx)
	}()
	eventually(t, "it is uploaded", func() bool {
		rows, err := w.db.StoredCheckpoints(ctx)
		return err == nil && slices.ContainsFunc(rows, func(c sandbox.StoredCheckpoint) bool {
			return c.Name == id && c.Number > above && !c.UploadedAt.IsZero()
		})
	})
	stop()
	<-done
}

// TestArchiveOfAnotherNode has one node find that the bucket lacks a file or a program of the copy of another node,
// which uploads it again. The node that collects has no such checkpoint.
func TestArchiveOfAnotherNode(t *testing.T) {
	bucket := directory(t)
	a, b := nodes(t, bucket)
	ctx := t.Context()
	id, other := a.sandbox(t), b.sandbox(t)
	made, otherMade := a.save(t, id, "text"), b.save(t, other, "other")
	a.runUntil(t, id, 0)
	if err := b.upload(ctx, other); err != nil {
		t.Fatal(err)
	}
	whole := b.copied(t, other, otherMade)
	b.Load(ctx)
	if !b.Stored(id, made) {
		t.Error("a node does not know the copy of another one")
	}
	for what, key := range map[string]func(sandbox.StoredCheckpoint) string{
		"a file":    func(c sandbox.StoredCheckpoint) string { return home(c) + "pages.img" },
		"a program": func(c sandbox.StoredCheckpoint) string { return programPrefix + c.Runsc },
	} {
		before := a.copied(t, id, made)
		if err := bucket.Delete(ctx, key(before)); err != nil {
			t.Fatal(err)
		}
		if err := b.collect(ctx); err != nil {
			t.Fatal(err)
		}
		b.Load(ctx)
		if b.Stored(id, made) || b.queue.Waits(id) {
			t.Errorf("without %s the copy is stored: %t; the node that has no such checkpoint uploads it: %t", what,
				b.Stored(id, made), b.queue.Waits(id))
		}
		a.runUntil(t, id, before.Number)
		if got, err := b.fetch(t, a.copied(t, id, made)); err != nil || got != "text" {
			t.Errorf("after %s was lost: fetched %q, %v", what, got, err)
		}
		if _, err := bucket.Stat(ctx, programPrefix+before.Runsc); err != nil {
			t.Errorf("after %s was lost: the program: %v", what, err)
		}
		if err := b.upload(ctx, other); err != nil { // with the program, it was not whole either
			t.Fatal(err)
		}
	}
	if err := b.collect(ctx); err != nil {
		t.Fatal(err)
	}
	for _, c := range b.rows(t) {
		if c.Lost() || c.Name == other && c.Number < whole.Number {
			t.Errorf("at the end there is the row %+v", c)
		}
	}
}

// TestArchiveFindsCopyAgain takes the copy of a node that is away out of the bucket, and puts it back.
func TestArchiveFindsCopyAgain(t *testing.T) {
	bucket := directory(t)
	a, b := nodes(t, bucket)
	ctx := t.Context()
	id := a.sandbox(t)
	made := a.save(t, id, "text")
	if err := a.upload(ctx, id); err != nil {
		t.Fatal(err)
	}
	row := a.copied(t, id, made)
	key := home(row) + "pages.img"
	text, _, err := objects.Read(ctx, bucket, key, 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(bucket.Delete(ctx, key), b.collect(ctx)); err != nil {
		t.Fatal(err)
	}
	if lost := b.rows(t)[0]; !lost.Lost() || lost.Sum != row.Sum || lost.Bytes != row.Bytes {
		t.Errorf("the row of a lost copy is %+v", lost)
	}
	if _, err := objects.Write(ctx, bucket, key, text, objects.Condition{}); err != nil {
		t.Fatal(err)
	}
	if err := b.collect(ctx); err != nil {
		t.Fatal(err)
	}
	if b.Load(ctx); !b.Stored(id, made) {
		t.Errorf("the copy that is whole again is not stored: %+v", b.rows(t))
	}
	if got, err := b.fetch(t, b.rows(t)[0]); err != nil || got != "text" {
		t.Errorf("fetched %q, %v", got, err)
	}
}
