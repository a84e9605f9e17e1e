// Package budget bounds the memory that callers and sandboxes can make the server hold.
//
// A [Budget] has a number of bytes for the whole server and a share for each organization. A call
// has an [Account], which takes bytes before the call holds them and gives them back afterwards;
// closing it gives all of them back. [Bytes] is a buffer that takes its memory from an account.
// The bytes taken are an estimate of the memory held, never less than the bytes of a body or an
// answer.
//
// Taking never waits, so it cannot deadlock: a call either gets the bytes or is refused. An
// organization may hold at most its own limit, and at most as much as is left for all others: the more
// organizations hold much, the less each may hold, and something is always left for one that holds
// nothing yet.
//
// Everything here but Bytes is safe for concurrent use.
package budget

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// retryAfter is the time after which a caller that the server had no memory for should try again.
// Answers are read within milliseconds; a shorter time would make clients try in a loop, a longer
// one would leave memory idle.
const retryAfter = time.Second

// Budget bounds the bytes held by the server and by each organization. Make it with [New].
type Budget struct {
	limit int64
	share int64 // of each organization
	used  atomic.Int64

	mu sync.Mutex
	// +checklocks:mu
	orgs map[string]*org
}

// org counts what an organization holds. It exists while the organization has accounts.
type org struct {
	name string
	used atomic.Int64

	accounts int // guarded by the budget's mu
}

// New returns a budget of limit bytes, of which each organization may hold share.
func New(limit, share int64) *Budget {
	return &Budget{limit: limit, share: share, orgs: map[string]*org{}}
}

// Used returns how many bytes are held.
func (b *Budget) Used() int64 { return b.used.Load() }

// Limit returns how many bytes may be held.
func (b *Budget) Limit() int64 { return b.limit }

// enter finds or adds the organization and counts one more account.
func (b *Budget) enter(name string) *org {
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.orgs[name]
	if o == nil {
		o = &org{name: name}
		b.orgs[name] = o
	}
	o.accounts++
	return o
}

// leave counts one account less and removes an organization that has none left.
func (b *Budget) leave(o *org) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if o.accounts--; o.accounts == 0 {
		delete(b.orgs, o.name)
	}
}

// take takes n bytes for the organization, or none on error.
func (b *Budget) take(o *org, n int64) error {
	mine, all := o.used.Add(n), b.used.Add(n)
	before := all - n
	var err error
	switch {
	case mine > b.share:
		err = fault.New(fault.Exhausted, fault.CodeBuffersExceeded,
			"the organization's calls hold all the memory they may, %d MiB; wait until some have ended", b.share>>20)
	case mine > b.limit-before:
		err = fault.New(fault.Unavailable, fault.CodeServerBusy,
			"the server has too little memory left for this call at the moment").After(retryAfter)
	default:
		return nil
	}
	b.give(o, n)
	return err
}

func (b *Budget) give(o *org, n int64) {
	o.used.Add(-n)
	b.used.Add(-n)
}

// Account holds the bytes that one call has taken. The zero value and nil belong to no budget and
// take any number of bytes.
type Account struct {
	mu sync.Mutex
	// +checklocks:mu
	budget *Budget
	// +checklocks:mu
	org *org
	// +checklocks:mu
	held int64
}

// Open assigns the account to an organization and takes n bytes. Later calls only take the bytes.
// After an error the account is unchanged.
func (a *Account) Open(b *Budget, org string, n int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if b == nil || a.budget != nil {
		return a.takeLocked(n)
	}
	o := b.enter(org)
	if err := b.take(o, n); err != nil {
		b.leave(o)
		return err
	}
	a.budget, a.org, a.held = b, o, n
	return nil
}

// Take takes n bytes, or none on error. Errors: Exhausted [CodeOrganization], Unavailable
// [CodeServer].
func (a *Account) Take(n int64) error {
	if a == nil || n <= 0 {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.takeLocked(n)
}

// +checklocks:a.mu
func (a *Account) takeLocked(n int64) error {
	if a.budget == nil {
		return nil
	}
	if err := a.budget.take(a.org, n); err != nil {
		return err
	}
	a.held += n
	return nil
}

// Give gives back n bytes that were taken.
func (a *Account) Give(n int64) {
	if a == nil || n <= 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.budget == nil {
		return
	}
	n = min(n, a.held) // after Close nothing is held
	a.held -= n
	a.budget.give(a.org, n)
}

// Close gives everything back. It may be called more than once.
func (a *Account) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.budget == nil {
		return
	}
	a.budget.give(a.org, a.held)
	a.budget.leave(a.org)
	a.budget, a.org, a.held = nil, nil, 0
}

type key struct{}

// With returns a copy of ctx that carries the account.
func With(ctx context.Context, a *Account) context.Context { return context.WithValue(ctx, key{}, a) }

// From returns the account that ctx carries, or nil.
func From(ctx context.Context) *Account {
	a, _ := ctx.Value(key{}).(*Account)
	return a
}
