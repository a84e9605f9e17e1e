package objects

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestFleetSharesBucket has two servers of a fleet claim a bucket at once and upload to it, and refuses servers with a
// restored copy of the records, with other records, and outside the fleet.
func TestFleetSharesBucket(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		log := slog.New(slog.DiscardHandler)
		var names []string
		var stores []*Store
		for _, text := range []string{"of the first", "of the second"} {
			local := &shelf{dir: t.TempDir()}
			s := NewStore(b, Owner{Cluster: "records", Directory: Fleet, Generation: 2, Before: text}, log)
			m := s.Mirror(MirrorConfig{Prefix: "files/", Local: local, MaxFile: 1 << 30})
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- s.Run(ctx) }()
			t.Cleanup(func() {
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
			name := local.put(t, text, time.Now())
			m.Offer(name)
			names, stores = append(names, name), append(stores, s)
		}
		for _, name := range names {
			eventually(t, "both have uploaded", func() bool { return there(t, b, name) })
		}
		for _, s := range stores {
			if err := s.Owned(t.Context()); err != nil || !s.Claimed() || s.Foreign() {
				t.Errorf("a server of the fleet: %v, claimed %t, foreign %t", err, s.Claimed(), s.Foreign())
			}
		}
		for want, o := range map[string]Owner{
			"generation 2":  {Cluster: "records", Directory: Fleet, Generation: 3},
			"the owner":     {Cluster: "others", Directory: Fleet, Generation: 2},
			"names a fleet": {Cluster: "records", Directory: "of the first"},
		} {
			if err := Claim(t.Context(), b, o); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), want) {
				t.Errorf("claimed by %+v: %v, want %q", o, err, want)
			}
		}
	})
}

// TestBucketBecomesTheFleets turns the owner of a bucket, a single server, into a server of a fleet.
func TestBucketBecomesTheFleets(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		ctx := t.Context()
		single := Owner{Cluster: "records", Directory: "here"}
		if err := Claim(ctx, b, single); err != nil {
			t.Fatal(err)
		}
		fleet := Owner{Cluster: "records", Directory: Fleet, Generation: 1}
		other, same := fleet, fleet
		other.Before, same.Before = "there", "here"
		for _, o := range []Owner{fleet, other, {Cluster: "others", Directory: Fleet, Generation: 1, Before: "here"}} {
			if err := Claim(ctx, b, o); !errors.Is(err, ErrForeign) {
				t.Errorf("claimed from a single server by %+v: %v", o, err)
			}
		}
		before := NewStore(b, same, slog.New(slog.DiscardHandler))
		if err := before.Owned(ctx); !errors.Is(err, ErrForeign) {
			t.Errorf("a bucket that the fleet has not claimed: %v", err)
		}
		for _, o := range []Owner{same, same, other, fleet} {
			if err := Claim(ctx, b, o); err != nil {
				t.Errorf("claimed by %+v: %v", o, err)
			}
		}
		if err := errors.Join(before.Owned(ctx), NewStore(b, other, slog.New(slog.DiscardHandler)).Owned(ctx)); err != nil {
			t.Error(err)
		}
		if err := Claim(ctx, b, single); !errors.Is(err, ErrForeign) {
			t.Errorf("claimed by the single server again: %v", err)
		}
	})
}
