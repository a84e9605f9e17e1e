package objects

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Grace is the time for which an object stays in the bucket after the last moment at which it was needed, and after
	// it was written. Within it a backup of the database that is a little older still finds its files. A shorter one
	// loses them; a longer one keeps unneeded files.
	Grace = 24 * time.Hour
	// leastGrace is the same for objects beyond MaxUnneeded. Within it a file that was just made is recorded as needed;
	// with a shorter one its object could go before that.
	leastGrace = time.Hour
	// UploadKept is the time after which an upload that was begun and not completed is removed, even if its object is
	// needed. With a shorter one, a large file over a slow line starts again from its beginning.
	UploadKept = 7 * 24 * time.Hour
	// maxObjects bounds the objects that one collection looks at, so that a listing without end ends. With more, some
	// unneeded ones stay.
	maxObjects = 1_000_000
)

// Local is a directory of files that never change and are named by their SHA-256 in hexadecimal.
type Local interface {
	// OpenFile opens a file, or returns fs.ErrNotExist.
	OpenFile(name string) (*os.File, error)
	// EachFile calls f with every file, its size in bytes and the time of its last use.
	EachFile(f func(name string, size int64, used time.Time)) error
	// Evict removes a file that the bucket has too and reports whether it did. It keeps a file that is in use.
	Evict(name string) (bool, error)
}

// MirrorConfig configures a Mirror.
type MirrorConfig struct {
	Transfer *Transfer
	// Prefix begins the keys of the mirror's objects, such as "images/". No other mirror may have it.
	Prefix string
	Local  Local
	// MaxLocal is the size of the local files, in bytes, from which on those are evicted that were not used the longest
	// time and that the bucket has. 0 is no limit.
	MaxLocal int64
	// MaxUnneeded is the size of the objects, in bytes, that stay for Grace. It bounds what tenants whose files change
	// all the time make the bucket keep. 0 is no limit.
	MaxUnneeded int64
	// MaxFile bounds one file in bytes.
	MaxFile int64
	// MinFree is the space in bytes that a download leaves free on the local disk.
	MinFree int64
	// Owned returns an error if the bucket may belong to other records; then a collection removes nothing. It is nil for a
	// bucket that no other server can use.
	Owned func(ctx context.Context) error
	// Foreign reports whether the bucket belongs to other records; then nothing is uploaded, and what is needed later has
	// to be named to Keep again. nil is never.
	Foreign func() bool
	// Alone calls f, unless another process is in such a call under the same name. Objects are removed only within it. If
	// it is nil, f is always called.
	Alone func(ctx context.Context, name string, f func(context.Context) error) error
	Log   *slog.Logger
	// Now replaces the clock in tests; nil is time.Now.
	Now func() time.Time
}

// Mirror keeps copies of local files in a bucket. [Mirror.Run] does the work in the background.
type Mirror struct {
	cfg   MirrorConfig
	queue *Queue        // of the files to upload
	wake  chan struct{} // has room for one
	turn  chan struct{} // has one token while a collection runs

	mu sync.Mutex // taken before the queue's
	// +checklocks:mu
	stored map[string]bool // needed files that the bucket has
	// +checklocks:mu
	needed map[string]bool // nil until Keep was called
	// +checklocks:mu
	due bool // whether a collection is due
	// +checklocks:mu
	unneeded map[string]time.Time // since when, by name of the object
	// +checklocks:mu
	damaged map[string]bool // objects that an upload of their file replaces

	uploaded, fetched, fetches atomic.Int64
}

// NewMirror returns a Mirror.
func NewMirror(cfg MirrorConfig) *Mirror {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Owned == nil {
		cfg.Owned = func(context.Context) error { return nil }
	}
	if cfg.Alone == nil {
		cfg.Alone = func(ctx context.Context, _ string, f func(context.Context) error) error { return f(ctx) }
	}
	return &Mirror{cfg: cfg, queue: NewQueue(cfg.Prefix, cfg.Foreign, cfg.Log, cfg.Now), wake: make(chan struct{}, 1),
		turn: make(chan struct{}, 1), stored: map[string]bool{},
		unneeded: map[string]time.Time{}, damaged: map[string]bool{}}
}

func (m *Mirror) key(name string) string { return m.cfg.Prefix + name }

func (m *Mirror) stir() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Offer has a file uploaded in the background, unless the bucket has it. It does not wait.
func (m *Mirror) Offer(name string) {
	m.mu.Lock()
	m.offerLocked(name)
	m.mu.Unlock()
}

// +checklocks:m.mu
func (m *Mirror) offerLocked(name string) {
	if m.stored[name] || m.queue.Waits(name) {
		return
	}
	var size int64
	if f, err := m.cfg.Local.OpenFile(name); err == nil { // else the upload finds out
		if info, err := f.Stat(); err == nil {
			size = info.Size()
		}
		_ = f.Close() // it was only read
	}
	m.queue.Add(name, size)
}

// Keep sets the names of all files that are needed. Those that the bucket lacks are uploaded, objects with other names
// are removed after [Grace], and local files are evicted if they take too much space. It does not wait.
func (m *Mirror) Keep(names []string) {
	m.mu.Lock()
	m.needed = make(map[string]bool, len(names))
	for _, name := range names {
		m.needed[name] = true
	}
	for name := range m.stored {
		if !m.needed[name] {
			delete(m.stored, name)
		}
	}
	for _, name := range names {
		m.offerLocked(name)
	}
	m.due = true
	m.mu.Unlock()
	m.stir()
}

// Run uploads and collects until ctx ends.
func (m *Mirror) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { m.queue.Run(ctx, m.upload) })
	for ctx.Err() == nil {
		if m.beginCollection() {
			wg.Go(func() {
				m.collect(ctx)
				<-m.turn
			})
		}
		select {
		case <-m.wake:
		case <-ctx.Done():
		}
	}
}

// beginCollection reports whether a collection is due and none runs, and takes the turn for it.
func (m *Mirror) beginCollection() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.due {
		return false
	}
	m.due = false
	select {
	case m.turn <- struct{}{}:
		return true
	default:
		return false // the next call of Keep brings another one
	}
}

// upload uploads a file. It returns an error if it is to be tried again.
func (m *Mirror) upload(ctx context.Context, name string) error {
	sent, err := m.send(ctx, name)
	m.mu.Lock()
	defer m.mu.Unlock()
	wrongSize := errors.Is(err, errWrongSize)
	if wrongSize {
		m.damaged[name] = true // the next try replaces it
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // no longer needed, or evicted, since the bucket has it
	case errors.Is(err, errWrongSum): // it is found and moved away at its next use
		m.cfg.Log.Error("cannot upload a file, which is damaged", "file", m.key(name), "error", err)
		return nil
	case err == nil:
		m.stored[name] = true
		m.uploaded.Add(sent)
	}
	return err
}

// send uploads a file and returns the number of bytes, 0 if the bucket has it. A local file that is missing gives
// fs.ErrNotExist, which nothing else does.
func (m *Mirror) send(ctx context.Context, name string) (sent int64, err error) {
	sum, err := ParseSum(name)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	f, err := m.cfg.Local.OpenFile(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("looking at a file: %w", err)
	}
	err = m.replaceDamaged(ctx, name, sum, io.NewSectionReader(f, 0, info.Size()))
	there := false
	if err == nil {
		there, err = m.cfg.Transfer.has(ctx, m.key(name), info.Size())
	}
	if there {
		return 0, nil
	}
	if err == nil {
		err = m.cfg.Transfer.Upload(ctx, m.key(name), f, info.Size(), sum)
	}
	if errors.Is(err, fs.ErrNotExist) { // of the upload, which another process ended
		err = fmt.Errorf("uploading %s: %v", name, err)
	}
	return info.Size(), err
}

// replaceDamaged removes the object of a file if it is damaged and the file is not.
func (m *Mirror) replaceDamaged(ctx context.Context, name string, sum Sum, file *io.SectionReader) error {
	m.mu.Lock()
	damaged := m.damaged[name]
	m.mu.Unlock()
	if !damaged {
		return nil
	}
	if got, err := sumOf(ctx, file, make([]byte, bufferSize)); err != nil || got != sum {
		return wrongSum(m.key(name), err)
	}
	m.cfg.Log.Warn("replacing a damaged object", "object", m.key(name))
	if err := m.cfg.Transfer.bucket.Delete(ctx, m.key(name)); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.damaged, name)
	return nil
}

// ErrUnreachable reports that the bucket could not be asked or did not serve a file, which may be there.
var ErrUnreachable = errors.New("the bucket cannot be reached")

// Fetch writes a file of the bucket to an empty file and verifies it. It returns fs.ErrNotExist if the bucket does not
// have it or has a damaged one, [unix.ENOSPC] if the local disk has no room for it, and [ErrUnreachable] if it is
// unknown whether the bucket has it.
func (m *Mirror) Fetch(ctx context.Context, name string, to *os.File) error {
	m.fetches.Add(1)
	sum, err := ParseSum(name)
	if err != nil {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	size, err := m.cfg.Transfer.Download(ctx, m.key(name), to, sum, m.cfg.MaxFile, m.cfg.MinFree)
	switch {
	case err == nil:
		m.fetched.Add(size)
		return nil
	case errors.Is(err, ErrDamaged):
		m.mu.Lock()
		m.damaged[name] = true
		delete(m.stored, name)
		m.mu.Unlock()
		m.cfg.Log.Error("an object is damaged", "object", m.key(name), "error", err)
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOSPC), ctx.Err() != nil:
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// Find returns nil if the bucket has a file, and fs.ErrNotExist if it has not. The object may be damaged.
func (m *Mirror) Find(ctx context.Context, name string) error {
	if _, err := ParseSum(name); err != nil {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	_, err := m.cfg.Transfer.bucket.Stat(ctx, m.key(name))
	return err
}

// Counts describes the work of a mirror.
type Counts struct {
	Waiting      int           // files that are not uploaded yet
	WaitingBytes int64         // their size
	Lag          time.Duration // time since which the oldest of them waits
	Uploaded     int64         // bytes, since the start
	Fetched      int64         // bytes, since the start
	Fetches      int64         // files that were missing here, since the start
}

// Counts returns what the mirror has done and has still to do.
func (m *Mirror) Counts() Counts {
	c := Counts{Uploaded: m.uploaded.Load(), Fetched: m.fetched.Load(), Fetches: m.fetches.Load()}
	c.Waiting, c.WaitingBytes, c.Lag = m.queue.Counts()
	return c
}

// Stored reports whether the bucket is known to have a needed file.
func (m *Mirror) Stored(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stored[name]
}
