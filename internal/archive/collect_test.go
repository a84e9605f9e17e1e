package archive

import (
	"testing"

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
