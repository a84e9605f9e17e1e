package objects

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// collect removes objects that are not needed, ends old uploads, and evicts local files.
func (m *Mirror) collect(ctx context.Context) {
	warn := func(err error) {
		if err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("cannot collect files of the bucket, and will try again", "prefix", m.cfg.Prefix, "error", err)
		}
	}
	// Another server may have taken the bucket since it was claimed; its records decide then what is needed.
	if err := m.cfg.Owned(ctx); err != nil {
		warn(err)
		return
	}
	warn(m.cfg.Alone(ctx, m.cfg.Prefix, func(ctx context.Context) error {
		return errors.Join(m.removeUnneeded(ctx), m.cfg.Transfer.abortOld(ctx, m.cfg.Prefix, m.cfg.Now,
			func(key string) bool {
				_, unneeded := m.unneededSince(strings.TrimPrefix(key, m.cfg.Prefix))
				return !unneeded
			}))
	}))
	warn(m.evict(ctx))
}

// unneeded describes an object that is not needed.
type unneeded struct {
	key   string
	size  int64         // bytes
	since time.Time     // when that was first seen
	age   time.Duration // since it was written
}

// removeUnneeded removes the objects that no call of Keep has named for Grace. Beyond MaxUnneeded it removes objects
// sooner, those first that have been unneeded for longest.
func (m *Mirror) removeUnneeded(ctx context.Context) error {
	all, err := m.listUnneeded(ctx)
	if err != nil {
		return err
	}
	for _, o := range expired(all, m.cfg.MaxUnneeded, m.cfg.Now()) {
		name := strings.TrimPrefix(o.key, m.cfg.Prefix)
		if !m.claimRemoval(name) {
			continue
		}
		err := m.cfg.Transfer.remove(ctx, o, m.cfg.Log)
		m.removed(name, err == nil)
		if err != nil {
			return err
		}
	}
	return nil
}

// expired returns the objects that have been unneeded for [Grace]. If all take more than most bytes, and most is not 0,
// it also returns the oldest beyond most that have been unneeded for leastGrace. It reorders all.
func expired(all []unneeded, most int64, now time.Time) (over []unneeded) {
	slices.SortFunc(all, func(a, b unneeded) int { return b.since.Compare(a.since) })
	var kept int64
	for _, o := range all {
		grace := Grace
		if kept += o.size; most > 0 && kept > most {
			grace = leastGrace
		}
		if o.age >= grace && now.Sub(o.since) >= grace {
			kept -= o.size
			over = append(over, o)
		}
	}
	return over
}

// remove removes an object that is not needed.
func (t *Transfer) remove(ctx context.Context, o unneeded, log *slog.Logger) error {
	if err := t.bucket.Delete(ctx, o.key); err != nil {
		return err
	}
	log.Info("removed an object that nothing needs", "object", o.key, "bytes", o.size)
	return nil
}

// listUnneeded returns the objects that are not needed, at most maxRemembered, and remembers since when.
func (m *Mirror) listUnneeded(ctx context.Context) (all []unneeded, err error) {
	found := map[string]time.Time{}
	_, err = m.cfg.Transfer.each(ctx, m.cfg.Prefix, m.cfg.Now, func(o Info, age time.Duration) {
		name := strings.TrimPrefix(o.Key, m.cfg.Prefix)
		if _, err := ParseSum(name); err != nil || len(all) == maxRemembered {
			return // not of this mirror, or for a later collection
		}
		if since, is := m.unneededSince(name); is {
			found[name] = since
			all = append(all, unneeded{o.Key, o.Size, since, age})
		}
	})
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unneeded = found
	return all, nil
}

// each calls f with each object of a prefix and the time since it was written, for at most maxObjects objects.
// It reports whether these were all.
func (t *Transfer) each(ctx context.Context, prefix string, now func() time.Time, f func(o Info,
	age time.Duration)) (whole bool, err error) {
	skew, err := t.bucket.Skew(ctx)
	if err != nil {
		return false, err
	}
	for after, seen := "", 0; seen < maxObjects; {
		page, err := t.bucket.List(ctx, prefix, after, 1000)
		if err != nil {
			return false, err
		}
		for _, o := range page {
			if strings.HasPrefix(o.Key, prefix) {
				f(o, now().Add(skew).Sub(o.Modified))
			}
		}
		if len(page) < 1000 {
			return true, nil
		}
		after, seen = page[len(page)-1].Key, seen+len(page)
	}
	return false, nil
}

// unneededSince reports whether an object is not needed, and since when that is known. Then it is not taken for stored
// any more, so that a later Offer asks the bucket.
func (m *Mirror) unneededSince(name string) (time.Time, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.needed[name] || m.queue.Waits(name) {
		return time.Time{}, false
	}
	delete(m.stored, name)
	since, known := m.unneeded[name]
	if !known {
		since = m.cfg.Now()
	}
	return since, true
}

// claimRemoval reports whether an object is still not needed. If so, its file is not uploaded until [Mirror.removed].
func (m *Mirror) claimRemoval(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.needed[name] || !m.queue.Hold(name) {
		return false
	}
	delete(m.stored, name)
	return true
}

// removed ends the removal of an object.
func (m *Mirror) removed(name string, done bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if done {
		delete(m.unneeded, name)
	}
	m.queue.Release(name)
}

// abortOld removes the uploads of a prefix that are not complete [UploadKept] after they were begun, or [Grace] after
// it if their objects are not needed.
func (t *Transfer) abortOld(ctx context.Context, prefix string, now func() time.Time,
	needed func(key string) bool) error {
	skew, err := t.bucket.Skew(ctx)
	if err != nil {
		return err
	}
	uploads, err := t.bucket.Uploads(ctx, prefix)
	if err != nil {
		return err
	}
	for _, u := range uploads {
		age := now().Add(skew).Sub(u.Begun)
		if age < Grace || age < UploadKept && needed(u.Key) {
			continue
		}
		if err := t.bucket.Abort(ctx, u.Key, u.ID); err != nil {
			return err
		}
	}
	return nil
}

// evict removes local files that the bucket has too, the least recently used first, until the rest fits.
func (m *Mirror) evict(ctx context.Context) error {
	if m.cfg.MaxLocal == 0 {
		return nil
	}
	type file struct {
		name string
		size int64
		used time.Time
	}
	var all []file
	var total int64
	err := m.cfg.Local.EachFile(func(name string, size int64, used time.Time) {
		all, total = append(all, file{name, size, used}), total+size
	})
	if err != nil {
		return fmt.Errorf("listing local files: %w", err)
	}
	slices.SortFunc(all, func(a, b file) int { return a.used.Compare(b.used) })
	for _, f := range all {
		if total <= m.cfg.MaxLocal {
			return nil
		}
		there, err := m.cfg.Transfer.has(ctx, m.key(f.name), f.size)
		if err != nil && !errors.Is(err, ErrDamaged) {
			return err
		}
		if !there {
			m.missing(f.name)
			continue
		}
		gone, err := m.cfg.Local.Evict(f.name)
		if err != nil {
			return fmt.Errorf("evicting a local file: %w", err)
		}
		if gone {
			total -= f.size
			m.cfg.Log.Info("evicted a local file that the bucket has", "file", m.key(f.name), "bytes", f.size)
		}
	}
	return nil
}

// missing has a needed file uploaded again that the bucket has lost.
func (m *Mirror) missing(name string) {
	m.mu.Lock()
	delete(m.stored, name)
	if m.needed[name] {
		m.offerLocked(name)
	}
	m.mu.Unlock()
}
