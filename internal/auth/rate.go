package auth

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// sweepEvery is how often full buckets are dropped. A bucket is about 150 bytes,
// so this only has to be often enough that keys made and thrown away by the
// million do not pile up.
const sweepEvery = time.Minute

// buckets is one token bucket per key. The zero rate lets everything through.
type buckets struct {
	rate  float64 // constant after construction
	burst int     // constant after construction

	mu    sync.Mutex
	byKey map[string]*rate.Limiter // guarded by mu
	swept time.Time                // guarded by mu
}

// take takes a token and returns 0, or how long it is until there is one.
func (b *buckets) take(key string, now time.Time) time.Duration {
	if b.rate <= 0 {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweepLocked(now)
	l := b.byKey[key]
	if l == nil {
		l = rate.NewLimiter(rate.Limit(b.rate), b.burst)
		b.byKey[key] = l
	}
	r := l.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now) // a refused call costs nothing, so a client that hammers is not locked out
	}
	return wait
}

// sweepLocked drops the buckets that are full: a new one is no different.
func (b *buckets) sweepLocked(now time.Time) {
	if b.byKey == nil {
		b.byKey = make(map[string]*rate.Limiter)
	}
	if now.Sub(b.swept) < sweepEvery {
		return
	}
	b.swept = now
	for key, l := range b.byKey {
		if l.TokensAt(now) >= float64(b.burst) {
			delete(b.byKey, key)
		}
	}
}
