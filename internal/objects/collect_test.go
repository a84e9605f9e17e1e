package objects

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
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

// overfull is a bucket that lists more objects than a collection remembers.
type overfull struct{ Bucket }

func (o overfull) List(_ context.Context, prefix, after string, most int) (all []Info, _ error) {
	n := 0
	if after != "" {
		if _, err := fmt.Sscanf(strings.TrimPrefix(after, prefix), "%d", &n); err != nil {
			return nil, err
		}
	}
	for ; len(all) < most && n <= maxRemembered; n++ {
		all = append(all, Info{Key: fmt.Sprintf("%s%064d", prefix, n+1)})
	}
	return all, nil
}

// TestCollectionsRememberLess collects what is not needed from a bucket with more of it than a collection remembers.
func TestCollectionsRememberLess(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	transfer, log := NewTransfer(overfull{dir}), slog.New(slog.DiscardHandler)
	m := NewMirror(MirrorConfig{Transfer: transfer, Prefix: "files/", Log: log})
	all, err := m.listUnneeded(t.Context())
	if err != nil || len(all) != maxRemembered || len(m.unneeded) != maxRemembered {
		t.Errorf("a mirror lists %d objects and remembers %d, %v", len(all), len(m.unneeded), err)
	}
	s := NewSweep(transfer, "files/", 0, log, nil)
	whole, err := s.Run(t.Context(), func(Info) {}, func(string) bool { return false })
	if err != nil || !whole || len(s.unneeded) != maxRemembered {
		t.Errorf("a sweep remembers %d objects, whole %t, %v", len(s.unneeded), whole, err)
	}
}
