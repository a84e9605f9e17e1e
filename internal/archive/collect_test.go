package archive

import (
	"context"
	"errors"
	"io"
	"path"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
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
