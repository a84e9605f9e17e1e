package auth

import (
	"net"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// sweepEvery is how often full buckets are dropped. A bucket is about 150 bytes, so this only
	// has to be often enough that keys made and thrown away by the million do not pile up.
	sweepEvery = time.Minute

	// maxBuckets bounds the buckets, some 15 MB of them. Callers beyond it, which takes as many
	// addresses within a minute, share one.
	maxBuckets = 100_000
)

// Buckets holds one token bucket for each API key, address or other name of a caller. A rate of 0
// lets everything through. It is safe for concurrent use.
type Buckets struct {
	rate  float64 // constant after construction
	burst int     // constant after construction

	mu sync.Mutex
	// +checklocks:mu
	byKey map[string]*rate.Limiter
	// +checklocks:mu
	swept time.Time
}

// NewBuckets makes buckets that take so much a second in the long run, and burst at once.
func NewBuckets(perSecond float64, burst int) *Buckets {
	return &Buckets{rate: perSecond, burst: max(burst, 1), byKey: make(map[string]*rate.Limiter)}
}

// Take takes a token and returns 0, or how long it is until there is one.
func (b *Buckets) Take(key string, now time.Time) time.Duration {
	if b.rate <= 0 {
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweepLocked(now)
	if len(b.byKey) >= maxBuckets && b.byKey[key] == nil {
		key = ""
	}
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
//
// +checklocks:b.mu
func (b *Buckets) sweepLocked(now time.Time) {
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

// Address returns the name of a caller without a key: the address of its connection, of IPv6 the
// network of 64 bits, since one subscriber has all of that.
func Address(remote string) string {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	ip := net.ParseIP(host)
	if ip == nil || ip.To4() != nil {
		return host
	}
	return ip.Mask(net.CIDRMask(64, 128)).String()
}
