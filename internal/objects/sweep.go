package objects

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// maxRemembered bounds the unneeded objects that a collection remembers, so that a bucket that lists objects without
// end does not use up the memory. If there are more, later collections remove the rest.
const maxRemembered = 100_000

// Sweep removes the objects of a prefix that nothing needs, as a [Mirror] does, but its caller decides which these are.
// Its methods must not be called concurrently.
type Sweep struct {
	// Guard, if it is not nil, is held while Run asks once more whether an object is needed, and removes it. A caller that
	// holds it when an object becomes needed thus knows that the object is not being removed. It is set before Run.
	Guard sync.Locker

	transfer *Transfer
	prefix   string
	most     int64
	log      *slog.Logger
	now      func() time.Time
	unneeded map[string]time.Time // since when, by key
}

// NewSweep returns a Sweep of the objects whose keys have the prefix. Unneeded objects stay for [Grace], or if they
// take more than most bytes, the oldest of them for an hour; 0 is no limit. now replaces the clock in tests; nil is
// time.Now.
func NewSweep(t *Transfer, prefix string, most int64, log *slog.Logger, now func() time.Time) *Sweep {
	if now == nil {
		now = time.Now
	}
	return &Sweep{transfer: t, prefix: prefix, most: most, log: log, now: now}
}

// Run removes the objects that no run has needed for the grace, uploads of unneeded objects that were begun that long
// ago, and all that were begun [UploadKept] ago. An object that was written after the caller found out what is needed
// stays too, since it is younger than the grace. Run calls seen with each object of the prefix, and reports whether
// these were all.
func (s *Sweep) Run(ctx context.Context, seen func(Info), needed func(key string) bool) (whole bool, err error) {
	found := map[string]time.Time{}
	var all []unneeded
	whole, err = s.transfer.each(ctx, s.prefix, s.now, func(o Info, age time.Duration) {
		seen(o)
		if needed(o.Key) || len(all) == maxRemembered {
			return
		}
		since, known := s.unneeded[o.Key]
		if !known {
			since = s.now()
		}
		found[o.Key] = since
		all = append(all, unneeded{o.Key, o.Size, since, age})
	})
	if err != nil {
		return false, err
	}
	s.unneeded = found
	for _, o := range expired(all, s.most, s.now()) {
		if err := s.remove(ctx, o, needed); err != nil {
			return false, err
		}
		delete(s.unneeded, o.key)
	}
	return whole, s.transfer.abortOld(ctx, s.prefix, s.now, needed)
}

// remove removes an object, unless it is needed by now.
func (s *Sweep) remove(ctx context.Context, o unneeded, needed func(key string) bool) error {
	if s.Guard != nil {
		s.Guard.Lock()
		defer s.Guard.Unlock()
	}
	if needed(o.key) {
		return nil
	}
	return s.transfer.remove(ctx, o, s.log)
}
