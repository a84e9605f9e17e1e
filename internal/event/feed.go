package event

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Query selects events of one organization.
type Query struct {
	OrgID     string
	After     Seq    // only events after it; [Oldest] is no bound
	Before    Seq    // only events before it, the newest first; [Newest] is no bound, 0 is the usual order
	Types     []Type // any of them; none is all
	SandboxID string // "" is any
	Limit     int    // events in a page, 1 or more
}

// Page is a piece of the sequence, in its order, or from its end if the query has Before.
type Page struct {
	Events  []Event
	Through Seq  // the page has all events up to it that match, or down to it
	More    bool // there are events beyond Through now
}

// Store keeps the sequence.
type Store interface {
	// SettleEvents returns when the events that were written before can be read. If that fails, they can be read later.
	SettleEvents(ctx context.Context)
	// ReadEvents returns the page after q.After, or the one before q.Before. It looks at a bounded number of
	// events, so that a page may be short, or empty, while there is more. Gone, code "events_gone", when events
	// of the organization after q.After have been dropped, unless that is [Oldest].
	ReadEvents(ctx context.Context, q Query) (Page, error)
	// LastEvent returns the place of the organization's last event, 0 if it never had one.
	LastEvent(ctx context.Context, orgID string) (Seq, error)
	// TrimEvents drops the events of every organization from before the time, and the oldest of one
	// that has more than most (0 is no limit); but nothing that a consumer has not read, nor the
	// last event of all, which the next one is numbered after. Events that the listing of a
	// sandbox still has stay for that, and are in no page any more. It works in short transactions.
	TrimEvents(ctx context.Context, before time.Time, most int) (int, error)

	// Consumed returns the place up to which a consumer of the server's own has read, and whether
	// it has one.
	Consumed(ctx context.Context, consumer string) (Seq, bool, error)
	// SetConsumed moves it. From the first time on nothing after it is dropped.
	SetConsumed(ctx context.Context, consumer string, through Seq) error
	// EndConsumer forgets a consumer. None is no error.
	EndConsumer(ctx context.Context, consumer string) error
	// ReadAllEvents returns at most limit events of all organizations after a place.
	ReadAllEvents(ctx context.Context, after Seq, limit int) ([]Event, error)
	// NewEvents returns the organizations that have events after a place, and the place of the last of these events,
	// or the one that was given if there are none. After [Newest] it returns the place of the last event of all.
	NewEvents(ctx context.Context, after Seq) (orgs []string, last Seq, err error)
}

// Gone returns the error of a store for events that have been dropped.
func Gone() error {
	return fault.New(fault.Gone, fault.CodeEventsGone,
		"events after this one have been dropped: begin again without it, and read the present state of what you keep")
}

// Config holds the operator's settings for events.
type Config struct {
	Keep         time.Duration // events are dropped after it
	MaxPerOrg    int           // the oldest above it are dropped earlier; 0 is no limit
	MaxFollowers int           // of one organization at a time
	// Shared says that other processes write to the store too. Their events cause no call of [Feed.Wake], so the
	// feed looks for them while it has a follower or a consumer.
	Shared bool
	// Now tells the time by which events are old, which servers with the same store must share. A nil Now is the
	// clock of this machine.
	Now func() time.Time
}

// Feed reads the sequence for organizations.
type Feed struct {
	cfg   Config
	store Store
	log   *slog.Logger

	mu sync.Mutex
	// +checklocks:mu
	changed map[string]chan struct{} // by organization; closed when it has another event
	// +checklocks:mu
	anyChanged chan struct{} // closed when there is another event of any
	// +checklocks:mu
	followers map[string]int // by organization
	// +checklocks:mu
	readers int // followers and consumers that wait for events of other processes
	// +checklocks:mu
	poller *poller // of the readers; it has ended if there are none
}

// poller is a goroutine in [Feed.poll].
type poller struct {
	stop  context.CancelFunc
	ended chan struct{}
}

// New makes a Feed. The store must call [Feed.Wake].
func New(cfg Config, store Store, log *slog.Logger) *Feed {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Feed{cfg: cfg, store: store, log: log, changed: map[string]chan struct{}{},
		anyChanged: make(chan struct{}), followers: map[string]int{}}
}

// Wake tells the followers of organizations that there are new events. It does not block.
func (f *Feed) Wake(orgs []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.anyChanged)
	f.anyChanged = make(chan struct{})
	for _, org := range orgs {
		if c := f.changed[org]; c != nil {
			close(c)
			delete(f.changed, org)
		}
	}
}

// wakeAll tells all followers and consumers that there may be new events.
func (f *Feed) wakeAll() {
	f.mu.Lock()
	orgs := slices.Collect(maps.Keys(f.changed))
	f.mu.Unlock()
	f.Wake(orgs)
}

// pollInterval is the time between two looks for events of other processes, each of which is one query that finds
// its rows by an index. A longer one delays these events; a shorter one asks the database more often.
const pollInterval = 250 * time.Millisecond

// awaitOthers makes the feed notice the events of other processes until leave is called.
func (f *Feed) awaitOthers() (leave func()) {
	if !f.cfg.Shared {
		return func() {}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readers++; f.readers == 1 {
		ctx, stop := context.WithCancel(context.Background())
		p := &poller{stop, make(chan struct{})}
		f.poller = p
		go func() {
			defer close(p.ended)
			f.poll(ctx)
		}()
	}
	return func() {
		f.mu.Lock()
		f.readers--
		left, p := f.readers, f.poller
		f.mu.Unlock()
		if left == 0 {
			p.stop()
			<-p.ended
		}
	}
}

// poll wakes the readers of events that other processes have written, until ctx ends.
func (f *Feed) poll(ctx context.Context) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for place := Newest; ; {
		orgs, last, err := f.store.NewEvents(ctx, place)
		switch {
		case err != nil: // the database is away, of which readers learn by themselves; the next look finds the events
		case place == Newest:
			f.wakeAll() // an event from before this look may be one that a reader has not seen
			place = last
		case len(orgs) > 0:
			f.Wake(orgs)
			place = last
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// watch returns a channel that is closed when the organization has another event.
func (f *Feed) watch(org string) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed[org] == nil {
		f.changed[org] = make(chan struct{})
	}
	return f.changed[org]
}

// Read returns a page, with the events of all that was done before. Errors are as [Store].ReadEvents's.
func (f *Feed) Read(ctx context.Context, q Query) (Page, error) {
	f.store.SettleEvents(ctx)
	return f.store.ReadEvents(ctx, q)
}

// Last returns the place after which the organization has no event yet.
func (f *Feed) Last(ctx context.Context, orgID string) (Seq, error) {
	return f.store.LastEvent(ctx, orgID)
}

// Follow hands pages after q.After to emit, the first one at once, which may be empty, and others
// when there are new events, until ctx ends, emit fails, or events were dropped before they were read (as for
// Read). While nothing comes it calls emit with an empty page each time that idle has passed. Exhausted, code
// "too_many_followers", when the organization has as many as it may. It holds one page at a time
// and none while it waits, so a slow reader costs no memory.
func (f *Feed) Follow(ctx context.Context, q Query, idle time.Duration, emit func(Page) error) error {
	leave, err := f.join(q.OrgID)
	if err != nil {
		return err
	}
	defer leave()
	defer f.awaitOthers()()
	tick := time.NewTicker(idle)
	defer tick.Stop()
	for first := true; ; first = false {
		changed := f.watch(q.OrgID) // before reading, so that nothing falls between
		page, err := f.store.ReadEvents(ctx, q)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		if first || page.Through > q.After {
			q.After = page.Through
			if err := emit(page); err != nil {
				return err
			}
		}
		if page.More {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			if err := emit(Page{Through: q.After}); err != nil {
				return err
			}
		}
	}
}

// join counts a follower until leave is called.
func (f *Feed) join(org string) (leave func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.followers[org] >= f.cfg.MaxFollowers {
		return nil, fault.New(fault.Exhausted, fault.CodeTooManyFollowers,
			"the organization may follow its events %d times at once", f.cfg.MaxFollowers)
	}
	f.followers[org]++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.followers[org]--; f.followers[org] == 0 {
			delete(f.followers, org)
			delete(f.changed, org) // others would be in followers
		}
	}, nil
}

// consumeBatch is the most events that a consumer handles at once, some 100 KiB: more would be repeated
// after a crash, with fewer the place is written more often.
const consumeBatch = 100

// Consume hands the events of all organizations to handle, oldest first and as they come, until ctx
// ends or handle fails. It is for consumers within the server, whose place is kept under their name:
// the next Consume goes on there, and a new consumer begins with the oldest event that is kept. What
// handle has returned from is not handed over again, unless the server dies right after. Nothing
// that a consumer has not handled is dropped, so one that is given up must be ended with
// [Store].EndConsumer.
func (f *Feed) Consume(ctx context.Context, consumer string, handle func([]Event) error) error {
	defer f.awaitOthers()()
	place, found, err := f.store.Consumed(ctx, consumer)
	if err == nil && !found {
		err = f.store.SetConsumed(ctx, consumer, place) // before reading, so that nothing is dropped
	}
	for err == nil {
		f.mu.Lock()
		changed := f.anyChanged // before reading, so that nothing falls between
		f.mu.Unlock()
		var events []Event
		if events, err = f.store.ReadAllEvents(ctx, place, consumeBatch); err != nil {
			break
		}
		if len(events) == 0 {
			select {
			case <-changed:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			continue
		}
		if err := handle(events); err != nil {
			return err
		}
		place = events[len(events)-1].Seq
		err = f.store.SetConsumed(ctx, consumer, place)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// TrimInterval is the interval between two calls of [Feed.Trim], each of which reads the oldest
// events of every organization. A longer interval lets an organization exceed its number for
// longer: one that makes 100 events a second by 60,000.
const TrimInterval = 10 * time.Minute

// Trim drops old events. Of the processes with the same store one does it.
func (f *Feed) Trim(ctx context.Context) {
	n, err := f.store.TrimEvents(ctx, f.cfg.Now().Add(-f.cfg.Keep), f.cfg.MaxPerOrg)
	if err != nil && ctx.Err() == nil {
		f.log.ErrorContext(ctx, "dropping old events", "error", err)
	} else if n > 0 {
		f.log.InfoContext(ctx, "dropped old events", "count", n)
	}
}
