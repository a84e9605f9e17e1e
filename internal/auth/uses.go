package auth

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"
)

// useEvery is how often the last use of one key is written, at most. Writing each
// would cost a disk sync per call; people ask "is this key still used", and for
// that a minute is plenty.
const useEvery = time.Minute

// uses writes when keys were last used, behind the calls' backs.
type uses struct {
	store Store
	log   *slog.Logger

	wake chan struct{} // capacity 1: there is something pending
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

// note remembers that the key, as it was just read, is used at now.
func (u *uses) note(k Key, now time.Time) {
	if now.Sub(k.LastUsedAt) < useEvery {
		return
	}
	u.mu.Lock()
	at := now.UTC().Truncate(useEvery)
	if at.Before(k.CreatedAt) {
		at = k.CreatedAt // nobody uses a key before it is made
	}
	u.pending[k.ID] = at
	u.mu.Unlock()
	select {
	case u.wake <- struct{}{}:
	default: // the goroutine will see this one too
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

// write writes what is pending. What could not be written is forgotten: the next
// use of the key brings it back.
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

// close ends the goroutine and writes what is left. Closing again does nothing.
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
