package objects

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
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
	p := newParts(f, size)
	p.whole = &sum
	return t.settled(ctx, key, size, t.upload(ctx, key, p))
}

// UploadPieces makes an object of a file whose SHA-256 is not known, and returns the description of its pieces, by
// MACs with a secret of 32 bytes or more, for [Transfer.DownloadPieces]. It describes the file, whichever upload made
// the object. Otherwise it behaves like [Transfer.Upload].
func (t *Transfer) UploadPieces(ctx context.Context, key string, f io.ReaderAt, size int64, secret []byte) (Pieces,
	error) {
	p := newParts(f, size)
	salt := newSalt()
	keys, err := newMACKeys(secret, salt, key)
	if err != nil {
		return Pieces{}, err
	}
	p.keys, p.macs = keys, make([]MAC, pieces(size))
	there, err := t.has(ctx, key, size)
	if !there && err == nil {
		err = t.settled(ctx, key, size, t.upload(ctx, key, p))
	}
	buf := make([]byte, bufferSize)
	for i := range p.macs { // those of an object that another upload made are missing
		if err == nil && p.macs[i] == (MAC{}) {
			_, err = p.read(ctx, i, io.Discard, buf)
		}
	}
	if err != nil {
		return Pieces{}, err
	}
	return Pieces{Salt: salt, MACs: p.macs}, nil
}

// pieces returns the number of pieces of a file. An empty file has one.
func pieces(size int64) int64 {
	step := partSize(size)
	return max(1, (size+step-1)/step)
}

// pieceOf returns a piece of a file.
func pieceOf(f io.ReaderAt, size int64, i int) *io.SectionReader {
	off := int64(i) * partSize(size)
	return io.NewSectionReader(f, off, min(partSize(size), size-off))
}

// settled returns the error of an upload, nil if the object is there all the same: another upload made it and ended
// this one, or the answer that this one had made it was lost.
func (t *Transfer) settled(ctx context.Context, key string, size int64, err error) error {
	if errors.Is(err, ErrCondition) || errors.Is(err, fs.ErrNotExist) {
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

// upload uploads a file, in parts if it has several pieces. It makes no object if the file does not have its SHA-256.
func (t *Transfer) upload(ctx context.Context, key string, p *parts) error {
	if pieces(p.size) > 1 {
		return t.uploadParts(ctx, key, p)
	}
	hash := sha256.New()
	body, err := p.read(ctx, 0, hash, make([]byte, bufferSize))
	sum := Sum(hash.Sum(nil))
	if err != nil || p.whole != nil && sum != *p.whole {
		return wrongSum(key, err)
	}
	if err := t.up.acquire(ctx); err != nil {
		return err
	}
	defer t.up.release()
	_, err = t.bucket.Put(ctx, key, body, sum, Condition{Absent: true})
	return err
}

// errWrongSum reports a local file that does not have its SHA-256.
var errWrongSum = fmt.Errorf("the local file: %w", ErrDamaged)

// wrongSum returns the error of a local file that could not be read or has another sum.
func wrongSum(key string, err error) error {
	if err != nil {
		return fmt.Errorf("reading the file of object %s: %w", key, err)
	}
	return fmt.Errorf("object %s: %w", key, errWrongSum)
}

// sumOf returns the SHA-256 of what r has, and rewinds it. With an error it returns the zero Sum.
func sumOf(ctx context.Context, r *io.SectionReader, buf []byte) (Sum, error) {
	hash := sha256.New()
	if err := readAll(ctx, r, hash, buf); err != nil {
		return Sum{}, err
	}
	return Sum(hash.Sum(nil)), nil
}

// readAll writes what r has to sums, and rewinds it.
func readAll(ctx context.Context, r *io.SectionReader, sums io.Writer, buf []byte) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{sums}, onlyReader{ctx, r}, buf)
	if err == nil {
		_, err = r.Seek(0, io.SeekStart)
	}
	return err
}

// parts reads the parts of a file, which several goroutines take one after the other.
type parts struct {
	file io.ReaderAt
	size int64 // bytes
	// whole is the SHA-256 that the file must have, nil if it is not known.
	whole *Sum
	keys  *macKeys // of macs; nil if none are needed
	macs  []MAC    // of the parts that were read, if keys is set
	taken atomic.Int64

	inOrder sync.Mutex // held while a part is taken and read, if whole is set
	// +checklocks:inOrder
	soFar hash.Hash // of the parts that were taken, if whole is set
}

// newParts returns the parts of a file, none of them taken.
func newParts(f io.ReaderAt, size int64) *parts {
	return &parts{file: f, size: size, soFar: sha256.New()}
}

// read reads a part once, for sums and for its MAC, and returns its content. After an error the part has no MAC.
func (p *parts) read(ctx context.Context, i int, sums io.Writer, buf []byte) (*io.SectionReader, error) {
	body := pieceOf(p.file, p.size, i)
	to := sums
	var mac *pieceMAC
	if p.keys != nil {
		mac = p.keys.piece(i)
		to = io.MultiWriter(to, mac)
	}
	if err := readAll(ctx, body, to, buf); err != nil {
		return nil, err
	}
	if mac != nil {
		p.macs[i] = mac.mac()
	}
	return body, nil
}

// next takes the next part and returns its index, its content and its CRC-32C. The content is nil if all parts are
// taken. It returns [ErrDamaged] with the last part of a file that does not have the SHA-256 whole.
func (p *parts) next(ctx context.Context, key string, buf []byte) (i int, body *io.SectionReader, crc uint32,
	err error) {
	check := crc32.New(castagnoli)
	sums := io.Writer(check)
	var soFar hash.Hash
	if p.whole != nil {
		p.inOrder.Lock()
		defer p.inOrder.Unlock()
		soFar = p.soFar
		sums = io.MultiWriter(check, soFar)
	}
	n := int(pieces(p.size))
	i = int(p.taken.Add(1)) - 1
	if i >= n {
		return i, nil, 0, nil
	}
	body, err = p.read(ctx, i, sums, buf)
	if err != nil {
		p.taken.Store(int64(n)) // soFar lacks a part of this one
		return i, nil, 0, wrongSum(key, err)
	}
	if soFar != nil && i == n-1 && Sum(soFar.Sum(nil)) != *p.whole {
		return i, nil, 0, wrongSum(key, nil)
	}
	return i, body, check.Sum32(), nil
}

// uploadParts uploads a file in parts. Each of several goroutines takes the next part, sums it, and sends it unless it
// has arrived, so that some sum while others wait for the server.
func (t *Transfer) uploadParts(ctx context.Context, key string, p *parts) error {
	id, arrived, err := t.resume(ctx, key)
	if err != nil {
		return err
	}
	sent := make([]Part, pieces(p.size))
	g, sending := errgroup.WithContext(ctx)
	for range min(perFile, len(sent)) {
		g.Go(func() error {
			buf := make([]byte, bufferSize)
			for {
				i, body, crc, err := p.next(sending, key, buf)
				if body == nil || err != nil {
					return err
				}
				if old := arrived[i+1]; old.CRC == crc && old.Size == body.Size() {
					sent[i] = old
				} else if sent[i], err = t.sendPart(sending, key, id, i+1, body, crc); err != nil {
					return err
				}
			}
		})
	}
	err = g.Wait()
	if errors.Is(err, errWrongSum) {
		return errors.Join(err, t.bucket.Abort(ctx, key, id))
	}
	if err != nil {
		return err
	}
	_, err = t.bucket.Complete(ctx, key, id, sent, Condition{Absent: true})
	if errors.Is(err, ErrCondition) {
		_ = t.bucket.Abort(ctx, key, id) // the object is there; UploadKept ends what stays
	}
	return err
}

// sendPart sends a part when a request may be made.
func (t *Transfer) sendPart(ctx context.Context, key, id string, number int, body *io.SectionReader, crc uint32) (Part,
	error) {
	if err := t.up.acquire(ctx); err != nil {
		return Part{}, err
	}
	defer t.up.release()
	return t.bucket.PutPart(ctx, key, id, number, body, crc)
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
	if errors.Is(err, fs.ErrNotExist) { // it ended meanwhile, or an earlier version began it; UploadKept ends what stays
		id, err = t.bucket.Begin(ctx, key)
		return id, nil, err
	}
	if err != nil {
		return "", nil, err
	}
	arrived = map[int]Part{}
	for _, p := range parts {
		if p.CRC != 0 {
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
	arrived := make([]chan struct{}, (size+minPart-1)/minPart)
	for i := range arrived {
		arrived[i] = make(chan struct{})
	}
	readBack := func(ctx context.Context) error { // sums the pieces in their order, while later ones arrive
		hash, buf := sha256.New(), make([]byte, bufferSize)
		for i := range arrived {
			select {
			case <-arrived[i]:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			off := int64(i) * minPart
			piece := io.NewSectionReader(f, off, min(minPart, size-off))
			if _, err := io.CopyBuffer(hash, onlyReader{ctx, piece}, buf); err != nil {
				return fmt.Errorf("reading back object %s: %w", key, err)
			}
		}
		if Sum(hash.Sum(nil)) != sum {
			return fmt.Errorf("object %s: %w", key, ErrDamaged)
		}
		return nil
	}
	return size, t.download(ctx, key, f, size, minPart, minFree, readBack, func(ctx context.Context, i int, off,
		n int64) error {
		if err := t.piece(ctx, key, f, off, n, nil); err != nil {
			return err
		}
		close(arrived[i])
		return nil
	})
}

// DownloadPieces writes the object of a key to an empty file. An object without size bytes, or with other pieces than
// those that [Transfer.UploadPieces] described for the key and the secret, gives [ErrDamaged]. The pieces are verified
// by their MACs, or by their SHA-256 if an earlier version described them. Otherwise it behaves like
// [Transfer.Download], but verifies each piece as it arrives.
func (t *Transfer) DownloadPieces(ctx context.Context, key string, f *os.File, size int64, p Pieces, secret []byte,
	minFree int64) error {
	v, err := p.verifier(key, size, secret)
	if err != nil {
		return err
	}
	if there, err := t.has(ctx, key, size); err != nil {
		return err
	} else if !there {
		return notExist(key)
	}
	return t.download(ctx, key, f, size, partSize(size), minFree, nil, func(ctx context.Context, i int, off,
		n int64) error {
		content, ok := v.piece(i)
		if err := t.piece(ctx, key, f, off, n, content); err != nil {
			return err
		}
		if !ok() {
			return fmt.Errorf("piece %d of object %s: %w", i, key, ErrDamaged)
		}
		return nil
	})
}

// download makes room for a file and calls get with each of its pieces of step bytes, several at a time. beside runs
// meanwhile, if it is not nil.
func (t *Transfer) download(ctx context.Context, key string, f *os.File, size, step, minFree int64,
	beside func(context.Context) error, get func(ctx context.Context, i int, off, n int64) error) error {
	if err := t.promise(f, size, minFree); err != nil {
		return fmt.Errorf("making room for object %s: %w", key, err)
	}
	var left atomic.Int64 // of the promise
	left.Store(size)
	defer func() { t.fulfil(left.Load()) }()
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("making room for object %s: %w", key, err)
	}
	g, receiving := errgroup.WithContext(ctx)
	g.SetLimit(perFile)
	if beside != nil {
		g.SetLimit(perFile + 1)
		g.Go(func() error { return beside(receiving) })
	}
	for i := range int((size + step - 1) / step) {
		g.Go(func() error {
			if err := t.down.acquire(receiving); err != nil {
				return err
			}
			defer t.down.release()
			off := int64(i) * step
			n := min(step, size-off)
			if err := get(receiving, i, off, n); err != nil {
				return err
			}
			t.fulfil(n)
			left.Add(-n)
			return nil
		})
	}
	return g.Wait()
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
// behind what arrived. What arrives is written to also, unless that is nil.
func (t *Transfer) piece(ctx context.Context, key string, f *os.File, off, n int64, also io.Writer) error {
	buf := make([]byte, bufferSize)
	for try := 1; ; try++ {
		got, err := t.copyPiece(ctx, key, f, off, n, also, buf)
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

// copyPiece copies with one request and returns the number of bytes that arrived and were written, to also too.
func (t *Transfer) copyPiece(ctx context.Context, key string, f *os.File, off, n int64, also io.Writer,
	buf []byte) (got int64, err error) {
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
		if also != nil {
			if _, err := also.Write(buf[:k]); err != nil { // while the processor's cache has it
				return got, err
			}
		}
		got += int64(k)
		if err != nil {
			return got, fmt.Errorf("reading object %s: %w", key, err)
		}
	}
	return got, nil
}
