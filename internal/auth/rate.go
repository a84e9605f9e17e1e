package auth

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// sweepEvery is the interval at which full buckets are dropped. A bucket takes about 150
	// bytes; a longer interval would let the buckets of millions of short-lived keys pile up, a
	// shorter one would cost CPU for nothing.
	sweepEvery = time.Minute

	// maxBuckets bounds the number of buckets; together they take some 15 MB. Callers beyond it
	// share one bucket, which takes that many addresses within a minute. A lower bound would let
	// fewer addresses slow down all new callers.
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

// NewBuckets returns buckets that let perSecond calls through in the long run, and burst at once.
func NewBuckets(perSecond float64, burst int) *Buckets {
	return &Buckets{rate: perSecond, burst: max(burst, 1), byKey: make(map[string]*rate.Limiter)}
}

// Take takes a token and returns 0, or the time until there is one.
func (b *Buckets) Take(key string, now time.Time) time.Duration {
	_, wait := b.take(key, now)
	return wait
}

// take takes a token as Take does. giveBack returns the token.
func (b *Buckets) take(key string, now time.Time) (giveBack func(), wait time.Duration) {
	if b.rate <= 0 {
		return func() {}, 0
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
	giveBack = func() { r.CancelAt(now) }
	if wait = r.DelayFrom(now); wait > 0 {
		giveBack() // a refused call costs nothing, so a client that retries in a loop is not locked out
	}
	return giveBack, wait
}

// sweepLocked drops full buckets, which are no different from new ones.
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

// Address returns the name under which callers without a key are counted: the address of a connection, or for IPv6 its
// /64 network, since one subscriber has all of that. All rooms that count by address count by this name.
func Address(remote string) string {
	at, err := netip.ParseAddrPort(remote)
	ip := at.Addr()
	if err != nil {
		if ip, err = netip.ParseAddr(remote); err != nil {
			return remote
		}
	}
	// A zone names the machine's own interface, and the same address of IPv4 has a second form.
	if ip = ip.WithZone("").Unmap(); ip.Is4() {
		return ip.String()
	}
	return netip.PrefixFrom(ip, 64).Masked().Addr().String()
}
