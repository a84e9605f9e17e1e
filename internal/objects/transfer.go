package objects

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/hostfile"
)

const (
	// maxRequests is the number of requests with content that all uploads together make at once, and all downloads, which
	// callers wait for and which uploads do not delay. Each takes about half a MiB of buffers. Fewer do not fill a line
	// with a long way to the server.
	maxRequests = 6
	// perFile is the number of requests at once for one file, so that a large file does not delay the small ones.
	perFile = 4
	// minPart is the size of the parts of a file, in bytes. Smaller ones take more requests; larger ones are more to
	// send again when a connection breaks. S3 allows no less than 5 MiB.
	minPart = 16 << 20
	// mostParts keeps the number of parts below S3's limit of 10,000.
	mostParts = 9000
	// pieceTries limits the requests for a piece of a download, which continues after its connection broke. More
	// delay the error of a bucket that is away.
	pieceTries = 3
)

// partSize returns the size of the parts of a file. It depends on the file's size alone, so that an upload can be
// continued by another process.
func partSize(size int64) int64 {
	const mib = 1 << 20
	return max(minPart, (size/mostParts+mib-1)/mib*mib)
}

// Transfer uploads and downloads whole files.
type Transfer struct {
	bucket Bucket
	up     slots
	down   slots

	mu sync.Mutex
	// +checklocks:mu
	promised int64 // bytes that the downloads under way have still to write, so that no two count on the same free space
}

// NewTransfer returns a Transfer over a bucket.
func NewTransfer(b Bucket) *Transfer {
	return &Transfer{bucket: b, up: make(slots, maxRequests), down: make(slots, maxRequests)}
}

// slots has a token for each request under way.
type slots chan struct{}

// acquire waits until another request may be made.
func (s slots) acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s slots) release() { <-s }

// Upload makes an object of a file with a SHA-256. The key must belong to the content: an object that is there already
// is taken for the same. An upload that an error or a crash ended continues with the parts that arrived. A file that
// does not have the sum gives [ErrDamaged], and no object is made.
func (t *Transfer) Upload(ctx context.Context, key string, f io.ReaderAt, size int64, sum Sum) error {
	there, err := t.has(ctx, key, size)
	if there || err != nil {
		return err
	}
	if size <= partSize(size) {
		err = t.uploadWhole(ctx, key, io.NewSectionReader(f, 0, size), sum)
	} else {
		err = t.uploadParts(ctx, key, f, size, sum)
	}
	if errors.Is(err, ErrCondition) || errors.Is(err, fs.ErrNotExist) {
		// Another upload made the object and ended this one, or the answer that this one had made it was lost.
		if there, lookErr := t.has(ctx, key, size); there || lookErr != nil {
			return lookErr
		}
	}
	return err
}

// errWrongSize reports an object that cannot have the content that belongs to its key.
var errWrongSize = fmt.Errorf("wrong size: %w", ErrDamaged)

// has reports whether there is an object of the key. One with another size is an error.
func (t *Transfer) has(ctx context.Context, key string, size int64) (bool, error) {
	info, err := t.bucket.Stat(ctx, key)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil && info.Size != size {
		return false, fmt.Errorf("object %s has %d bytes instead of %d: %w", key, info.Size, size, errWrongSize)
	}
	return err == nil, err
}

// uploadWhole uploads a file in one request.
func (t *Transfer) uploadWhole(ctx context.Context, key string, body *io.SectionReader, sum Sum) error {
	if got, err := sumOf(ctx, body, make([]byte, bufferSize)); err != nil || got != sum {
		return wrongSum(key, err)
	}
	if err := t.up.acquire(ctx); err != nil {
		return err
	}
	defer t.up.release()
	_, err := t.bucket.Put(ctx, key, body, sum, Condition{Absent: true})
	return err
}

// wrongSum returns the error of a file that could not be read or has another sum.
func wrongSum(key string, err error) error {
	if err != nil {
		return fmt.Errorf("reading the file of object %s: %w", key, err)
	}
	return fmt.Errorf("object %s: %w", key, ErrDamaged)
}

// sumOf returns the SHA-256 of what r has, and rewinds it. Further writers get the same bytes.
func sumOf(ctx context.Context, r *io.SectionReader, buf []byte, more ...io.Writer) (Sum, error) {
	hash := sha256.New()
	_, err := io.CopyBuffer(io.MultiWriter(append(more, hash)...), onlyReader{ctx, r}, buf)
	if err == nil {
		_, err = r.Seek(0, io.SeekStart)
	}
	return Sum(hash.Sum(nil)), err
}

// uploadParts uploads a file in parts. One goroutine sums them, the others send those that have not arrived.
func (t *Transfer) uploadParts(ctx context.Context, key string, f io.ReaderAt, size int64, sum Sum) error {
	id, arrived, err := t.resume(ctx, key)
	if err != nil {
		return err
	}
	step := partSize(size)
	parts := make([]Part, (size+step-1)/step)
	whole, buf := sha256.New(), make([]byte, bufferSize)
	g, sending := errgroup.WithContext(ctx)
	g.SetLimit(perFile)
	for i := range parts {
		off := int64(i) * step
		body := io.NewSectionReader(f, off, min(step, size-off))
		partSum, err := sumOf(sending, body, buf, whole)
		if err != nil {
			if sendErr := g.Wait(); sendErr != nil {
				return sendErr // which ended the reading
			}
			return wrongSum(key, err)
		}
		if old := arrived[i+1]; old.Sum == partSum && old.Size == body.Size() {
			parts[i] = old
			continue
		}
		g.Go(func() error {
			if err := t.up.acquire(sending); err != nil {
				return err
			}
			defer t.up.release()
			var err error
			parts[i], err = t.bucket.PutPart(sending, key, id, i+1, body, partSum)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if Sum(whole.Sum(nil)) != sum {
		return errors.Join(wrongSum(key, nil), t.bucket.Abort(ctx, key, id))
	}
	_, err = t.bucket.Complete(ctx, key, id, parts, Condition{Absent: true})
	if errors.Is(err, ErrCondition) {
		_ = t.bucket.Abort(ctx, key, id) // the object is there; UploadKept ends what stays
	}
	return err
}

// resume returns an upload of a key with the parts that arrived, by their numbers. It begins one if there is none.
func (t *Transfer) resume(ctx context.Context, key string) (id string, arrived map[int]Part, err error) {
	uploads, err := t.bucket.Uploads(ctx, key)
	if err != nil {
		return "", nil, err
	}
	uploads = slices.DeleteFunc(uploads, func(u Upload) bool { return u.Key != key })
	if len(uploads) == 0 {
		id, err := t.bucket.Begin(ctx, key)
		return id, nil, err
	}
	newest := slices.MaxFunc(uploads, func(a, b Upload) int { return a.Begun.Compare(b.Begun) })
	parts, err := t.bucket.Parts(ctx, key, newest.ID)
	if err != nil {
		return "", nil, err
	}
	arrived = map[int]Part{}
	for _, p := range parts {
		if p.Sum != (Sum{}) {
			arrived[p.Number] = p
		}
	}
	return newest.ID, arrived, nil
}

// Download writes the object of a key to an empty file and verifies it. A longer object than most bytes, and one with
// another SHA-256, gives [ErrDamaged]. One that would not leave minFree bytes of the file's disk free gives
// [unix.ENOSPC], which says nothing about the object. After an error the file may have any content.
func (t *Transfer) Download(ctx context.Context, key string, f *os.File, sum Sum, most, minFree int64) (size int64,
	err error) {
	info, err := t.bucket.Stat(ctx, key)
	if err != nil {
		return 0, err
	}
	if size = info.Size; size < 0 || size > most {
		return 0, fmt.Errorf("object %s has %d bytes, more than %d: %w", key, size, most, ErrDamaged)
	}
	if err := t.promise(f, size, minFree); err != nil {
		return 0, fmt.Errorf("making room for object %s: %w", key, err)
	}
	var left atomic.Int64 // of the promise
	left.Store(size)
	defer func() { t.fulfil(left.Load()) }()
	if err := f.Truncate(size); err != nil {
		return 0, fmt.Errorf("making room for object %s: %w", key, err)
	}
	step := int64(minPart)
	arrived := make([]chan struct{}, (size+step-1)/step)
	for i := range arrived {
		arrived[i] = make(chan struct{})
	}
	g, receiving := errgroup.WithContext(ctx)
	g.SetLimit(perFile + 1)
	g.Go(func() error { // sums the pieces in their order, while later ones arrive
		hash, buf := sha256.New(), make([]byte, bufferSize)
		for i := range arrived {
			select {
			case <-arrived[i]:
			case <-receiving.Done():
				return context.Cause(receiving)
			}
			off := int64(i) * step
			piece := io.NewSectionReader(f, off, min(step, size-off))
			if _, err := io.CopyBuffer(hash, onlyReader{receiving, piece}, buf); err != nil {
				return fmt.Errorf("reading back object %s: %w", key, err)
			}
		}
		if Sum(hash.Sum(nil)) != sum {
			return fmt.Errorf("object %s: %w", key, ErrDamaged)
		}
		return nil
	})
	for i := range arrived {
		g.Go(func() error {
			if err := t.down.acquire(receiving); err != nil {
				return err
			}
			defer t.down.release()
			off := int64(i) * step
			n := min(step, size-off)
			if err := t.piece(receiving, key, f, off, n); err != nil {
				return err
			}
			t.fulfil(n)
			left.Add(-n)
			close(arrived[i])
			return nil
		})
	}
	return size, g.Wait()
}

// promise reserves size bytes of a file's disk until [Transfer.fulfil]. It returns [unix.ENOSPC] if they are not free
// beside minFree and what was promised already. All files are taken to be on one disk.
func (t *Transfer) promise(f *os.File, size, minFree int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("looking at the free space: %w", err)
	}
	if free := int64(st.Bavail)*st.Bsize - minFree - t.promised; size > free {
		return fmt.Errorf("it has %d bytes, and %d may be written: %w", size, max(free, 0), unix.ENOSPC)
	}
	t.promised += size
	return nil
}

// fulfil takes n bytes from what is promised, since they are written or will not be.
func (t *Transfer) fulfil(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.promised -= n
}

// piece writes n bytes of an object from off on to the same place of a file. If the connection breaks, it continues
// behind what arrived.
func (t *Transfer) piece(ctx context.Context, key string, f *os.File, off, n int64) error {
	buf := make([]byte, bufferSize)
	for try := 1; ; try++ {
		got, err := t.copyPiece(ctx, key, f, off, n, buf)
		off, n = off+got, n-got
		if err == nil || try == pieceTries || ctx.Err() != nil || errors.Is(err, fs.ErrNotExist) {
			return err
		}
		select {
		case <-time.After(time.Duration(try) * time.Second):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// copyPiece copies with one request and returns the number of bytes that arrived.
func (t *Transfer) copyPiece(ctx context.Context, key string, f *os.File, off, n int64, buf []byte) (got int64,
	err error) {
	r, err := t.bucket.Get(ctx, key, off, n)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	for got < n {
		// Full buffers, so that runs of zeros are found whole.
		k, err := io.ReadFull(r, buf[:min(int64(len(buf)), n-got)])
		if !hostfile.IsZero(buf[:k]) { // the file has zeros there already, which take no room
			if _, err := f.WriteAt(buf[:k], off+got); err != nil {
				return got, fmt.Errorf("writing object %s: %w", key, err)
			}
		}
		got += int64(k)
		if err != nil {
			return got, fmt.Errorf("reading object %s: %w", key, err)
		}
	}
	return got, nil
}
