package auth

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"
)

// useEvery is the shortest time between two writes of the last use of one key. Writing every use
// would cost a disk sync per call; people ask whether a key is still in use, and for that a
// minute is precise enough.
const useEvery = time.Minute

// uses writes the last uses of keys in the background.
type uses struct {
	store Store
	log   *slog.Logger

	wake chan struct{} // capacity 1; sent to when something is pending
	stop chan struct{} // closed by close
	done chan struct{} // closed by the goroutine

	mu sync.Mutex
	// +checklocks:mu
	pending map[string]time.Time // guarded by mu; by key ID
	// +checklocks:mu
	closed bool // guarded by mu
}

func newUses(store Store, log *slog.Logger) *uses {
	u := &uses{store: store, log: log, pending: make(map[string]time.Time),
		wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go u.run()
	return u
}

// note records that the key k, as it was just read, is used at now.
func (u *uses) note(k Key, now time.Time) {
	if now.Sub(k.LastUsedAt) < useEvery {
		return
	}
	u.mu.Lock()
	at := now.UTC().Truncate(useEvery)
	if at.Before(k.CreatedAt) {
		at = k.CreatedAt // a key cannot be used before it is made
	}
	u.pending[k.ID] = at
	u.mu.Unlock()
	select {
	case u.wake <- struct{}{}:
	default: // the goroutine has a wake-up to read, and will write this use too
	}
}

func (u *uses) run() {
	defer close(u.done)
	for {
		select {
		case <-u.wake:
			if err := u.write(context.Background()); err != nil {
				u.log.Warn("cannot record the use of API keys", "error", err)
			}
		case <-u.stop:
			return
		}
	}
}

// write writes what is pending. It forgets a use that could not be written; the next use of the
// key brings it back.
func (u *uses) write(ctx context.Context) error {
	u.mu.Lock()
	batch := maps.Clone(u.pending)
	clear(u.pending)
	u.mu.Unlock()
	for id, at := range batch {
		if err := u.store.TouchKey(ctx, id, at); err != nil {
			return fmt.Errorf("writing last use of %s: %w", id, err)
		}
	}
	return nil
}

// close ends the goroutine and writes what is pending. Closing again does nothing.
func (u *uses) close(ctx context.Context) error {
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		return nil
	}
	u.closed = true
	u.mu.Unlock()
	close(u.stop)
	select {
	case <-u.done:
	case <-ctx.Done():
		return fmt.Errorf("waiting for last uses to be written: %w", ctx.Err())
	}
	return u.write(ctx)
}
