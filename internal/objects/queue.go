package objects

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// firstRetry and lastRetry bound the pause between two tries of an upload, which doubles. A longer last one delays
	// uploads after the bucket is back; a shorter one asks a bucket that is down more often.
	firstRetry = time.Second
	lastRetry  = time.Minute
	// uploaders is the number of things of a queue that are uploaded at once.
	uploaders = 2
)

// Queue holds the names of files to upload. It uploads the newest and the longest waiting in turn, so that files
// which are added all the time keep no other waiting for ever, and tries each until it succeeds.
type Queue struct {
	prefix string      // of the names in the log
	closed func() bool // whether nothing may be uploaded
	log    *slog.Logger
	now    func() time.Time
	wake   chan struct{} // has room for one

	mu sync.Mutex
	// +checklocks:mu
	waiting map[string]*waiting // by name
	// +checklocks:mu
	held map[string]bool // names that are not uploaded meanwhile
	// +checklocks:mu
	oldest bool // the longest waiting is the next
}

// waiting describes a thing that is to be uploaded.
type waiting struct {
	name  string
	since time.Time
	size  int64
	tries int
	next  time.Time // of the next try
	busy  bool
	again bool // it was added once more while it was busy
}

// NewQueue returns an empty queue. The log has the names behind the prefix. While closed returns true, the queue drops
// what is added or has its turn, so that it does not grow for ever, and its caller has to add it again later; nil is
// never. now replaces the clock in tests; nil is time.Now.
func NewQueue(prefix string, closed func() bool, log *slog.Logger, now func() time.Time) *Queue {
	if closed == nil {
		closed = func() bool { return false }
	}
	if now == nil {
		now = time.Now
	}
	return &Queue{prefix: prefix, closed: closed, log: log, now: now, wake: make(chan struct{}, 1),
		waiting: map[string]*waiting{}, held: map[string]bool{}}
}

// Add adds a thing of size bytes. One that is being uploaded is uploaded once more after that.
func (q *Queue) Add(name string, size int64) {
	closed := q.closed()
	q.mu.Lock()
	switch w := q.waiting[name]; {
	case closed:
	case w != nil:
		w.again, w.size = w.busy, max(w.size, size)
	default:
		q.waiting[name] = &waiting{name: name, since: q.now(), size: size}
	}
	q.mu.Unlock()
	q.Stir()
}

// Waits reports whether a thing is to be uploaded or is being uploaded.
func (q *Queue) Waits(name string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.waiting[name] != nil
}

// Hold keeps a thing from being uploaded until Release. It returns false, and does nothing, if the thing waits already.
func (q *Queue) Hold(name string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.waiting[name] != nil {
		return false
	}
	q.held[name] = true
	return true
}

// Release ends a Hold.
func (q *Queue) Release(name string) {
	q.mu.Lock()
	delete(q.held, name)
	q.mu.Unlock()
	q.Stir()
}

// Counts returns the number of things that are to be uploaded, their size in bytes, and the time that the oldest of
// them has waited.
func (q *Queue) Counts() (n int, bytes int64, lag time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range q.waiting {
		n, bytes, lag = n+1, bytes+w.size, max(lag, q.now().Sub(w.since))
	}
	return n, bytes, lag
}

// Stir makes Run look at the queue again.
func (q *Queue) Stir() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Run calls upload with the names, some at once, until ctx ends. After an error it calls upload again later.
func (q *Queue) Run(ctx context.Context, upload func(ctx context.Context, name string) error) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, uploaders)
	for ctx.Err() == nil {
		w, next := q.take(len(slots) < uploaders)
		if w != nil {
			slots <- struct{}{}
			wg.Go(func() {
				if q.closed() {
					q.drop(w)
				} else {
					q.end(ctx, w, upload(ctx, w.name))
				}
				<-slots
				q.Stir()
			})
			continue
		}
		var retry <-chan time.Time
		if !next.IsZero() {
			retry = time.After(next.Sub(q.now()))
		}
		select {
		case <-q.wake:
		case <-retry:
		case <-ctx.Done():
		}
	}
}

// take returns the thing to upload next, the newest and the longest waiting in turn, or else the time of the next try;
// zero if there is none.
func (q *Queue) take(free bool) (*waiting, time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !free {
		return nil, time.Time{}
	}
	var best *waiting
	var next time.Time
	for _, w := range q.waiting {
		switch {
		case w.busy, q.held[w.name]:
		case w.next.After(q.now()):
			if next.IsZero() || w.next.Before(next) {
				next = w.next
			}
		case best == nil || w.since.After(best.since) != q.oldest:
			best = w
		}
	}
	if best != nil {
		best.busy = true
		q.oldest = !q.oldest
	}
	return best, next
}

// drop removes a thing that is not uploaded.
func (q *Queue) drop(w *waiting) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.waiting, w.name)
}

// end removes a thing that was uploaded, or sets the time of its next try.
func (q *Queue) end(ctx context.Context, w *waiting, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case err == nil && !w.again:
		delete(q.waiting, w.name)
		return
	case err == nil:
		w.since, w.tries, w.next = q.now(), 0, time.Time{}
	default:
		w.tries++
		w.next = q.now().Add(min(lastRetry, firstRetry<<min(w.tries-1, 10)))
		if w.tries == 1 && ctx.Err() == nil {
			q.log.Warn("cannot upload a file, and will try again", "file", q.prefix+w.name, "error", err)
		}
	}
	w.busy, w.again = false, false
}
