package objects

import (
	"testing"
	"time"
)

// TestMirrorAbortsUploads begins uploads of a needed and of an unneeded object and lets time pass.
func TestMirrorAbortsUploads(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		w := newWorld(t, b, t.TempDir(), 0)
		needed, unneeded := w.shelf.put(t, "needed", time.Now()), w.shelf.put(t, "unneeded", time.Now())
		for _, name := range []string{needed, unneeded} {
			if _, err := b.Begin(t.Context(), "files/"+name); err != nil {
				t.Fatal(err)
			}
		}
		begun := func(name string) bool {
			t.Helper()
			left, err := b.Uploads(t.Context(), "files/"+name)
			if err != nil {
				t.Fatal(err)
			}
			return len(left) == 1
		}
		start := w.clock()
		for _, c := range []struct {
			age              time.Duration
			needed, unneeded bool
		}{{0, true, true}, {Grace - time.Minute, true, true}, {Grace + time.Minute, true, false},
			{UploadKept - time.Minute, true, false}, {UploadKept + time.Minute, false, false}} {
			w.pass(start.Add(c.age).Sub(w.clock()))
			w.keep(t, needed)
			if begun(needed) != c.needed || begun(unneeded) != c.unneeded {
				t.Errorf("after %s the needed upload stays: %t, the unneeded one: %t", c.age, begun(needed), begun(unneeded))
			}
		}
	})
}
