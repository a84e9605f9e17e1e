package objects

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// testFile makes a file with content that differs from piece to piece, and zeros in its middle.
func testFile(t *testing.T, size int64) (*os.File, Sum) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	source := rand.NewChaCha8([32]byte{byte(size)})
	hash := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		buf = buf[:min(1<<20, size-off)]
		if clear(buf); off/(4<<20)%3 != 1 {
			source.Read(buf)
		}
		hash.Write(buf)
		if _, err := f.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	return f, Sum(hash.Sum(nil))
}

func emptyFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "empty"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// counted counts the requests with content to a bucket, and fails parts on demand.
type counted struct {
	Bucket
	puts, parts atomic.Int32
	failFrom    atomic.Int32 // number of the first part that fails; 0 is none
}

var errBroken = errors.New("the connection broke")

func (c *counted) Put(ctx context.Context, key string, body *io.SectionReader, sum Sum, when Condition) (string,
	error) {
	c.puts.Add(1)
	return c.Bucket.Put(ctx, key, body, sum, when)
}

func (c *counted) PutPart(ctx context.Context, key, id string, n int, body *io.SectionReader, crc uint32) (Part,
	error) {
	if from := c.failFrom.Load(); from > 0 && n >= int(from) {
		for c.parts.Load() == 0 && ctx.Err() == nil { // so that there is something to continue
			time.Sleep(time.Millisecond)
		}
		return Part{}, errBroken
	}
	p, err := c.Bucket.PutPart(ctx, key, id, n, body, crc)
	if err == nil {
		c.parts.Add(1)
	}
	return p, err
}

func TestTransfer(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		for _, size := range []int64{0, 1, minPart, minPart + 1, 3*minPart + 12345} {
			c := &counted{Bucket: b}
			transfer := NewTransfer(c)
			f, sum := testFile(t, size)
			for range 2 {
				if err := transfer.Upload(t.Context(), "transfer/"+sum.String(), f, size, sum); err != nil {
					t.Fatalf("uploading %d bytes: %v", size, err)
				}
			}
			if puts, parts := c.puts.Load(), c.parts.Load(); size <= minPart && (puts != 1 || parts != 0) ||
				size > minPart && (puts != 0 || parts != int32(size/minPart)+1) {
				t.Errorf("%d bytes took %d puts and %d parts; the second upload has nothing to do", size, puts, parts)
			}
			got := emptyFile(t)
			n, err := transfer.Download(t.Context(), "transfer/"+sum.String(), got, sum, size, 0)
			if err != nil || n != size {
				t.Fatalf("downloading %d bytes: %d, %v", size, n, err)
			}
			if left := promisedBy(transfer); left != 0 {
				t.Errorf("after the download of %d bytes %d are promised", size, left)
			}
			back, err := sumOf(t.Context(), io.NewSectionReader(got, 0, size+1), make([]byte, 1<<20))
			if err != nil || back != sum {
				t.Errorf("%d bytes came back with the sum %s, %v; want %s", size, back, err, sum)
			}
			if left, err := b.Uploads(t.Context(), ""); err != nil || len(left) != 0 {
				t.Errorf("left are the uploads %v, %v", left, err)
			}
		}
	})
}

// TestTransferPieces moves files whose sum is not known before.
func TestTransferPieces(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		transfer := NewTransfer(b)
		for _, size := range []int64{0, 100, minPart, 2*minPart + 12345} {
			f, sum := testFile(t, size)
			key := "pieces/" + sum.String()
			p, err := transfer.UploadPieces(t.Context(), key, f, size, testSecret)
			if err != nil || int64(len(p.MACs)) != pieces(size) {
				t.Fatalf("uploading %d bytes: %d MACs, %v", size, len(p.MACs), err)
			}
			again, err := transfer.UploadPieces(t.Context(), key, f, size, testSecret)
			if err != nil || slices.Equal(again.Salt, p.Salt) || slices.Equal(again.MACs, p.MACs) {
				t.Errorf("the second upload of %d bytes gives %v, %v; the first gave %v", size, again, err, p)
			}
			// Earlier versions described the pieces by sums, and later by both.
			sums := sumsOf(t, f, size)
			for _, p := range []Pieces{p, again, {Sums: sums}, {p.Salt, p.MACs, sums}} {
				if err := p.Verify(t.Context(), key, f, size, testSecret); err != nil {
					t.Errorf("the file of %d bytes: %v", size, err)
				}
				got := emptyFile(t)
				if err := transfer.DownloadPieces(t.Context(), key, got, size, p, testSecret, 0); err != nil {
					t.Fatalf("downloading %d bytes: %v", size, err)
				}
				back, err := sumOf(t.Context(), io.NewSectionReader(got, 0, size+1), make([]byte, 1<<20))
				if err != nil || back != sum {
					t.Errorf("%d bytes came back with the sum %s, %v; want %s", size, back, err, sum)
				}
			}
			for name, d := range damages(p, again, sums) {
				if size == 0 && d.content {
					continue // nothing is there that could be verified
				}
				err := transfer.DownloadPieces(t.Context(), key, emptyFile(t), size+d.longer, d.pieces, d.secret, 0)
				if !errors.Is(err, ErrDamaged) {
					t.Errorf("%d bytes with %s: %v", size, name, err)
				}
				if err := d.pieces.Verify(t.Context(), key, f, size+d.longer, d.secret); !errors.Is(err, ErrDamaged) {
					t.Errorf("the file of %d bytes with %s: %v", size, name, err)
				}
			}
			if left := promisedBy(transfer); left != 0 {
				t.Errorf("%d bytes are still promised", left)
			}
		}
		err := transfer.DownloadPieces(t.Context(), "pieces/none", emptyFile(t), 1, Pieces{Sums: make([]Sum, 1)}, nil, 0)
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("an object that does not exist: %v", err)
		}
	})
}

// damage is a description of pieces that does not fit an object.
type damage struct {
	pieces  Pieces
	secret  []byte
	longer  int64 // than the object, in bytes
	content bool  // whether only the content shows it
}

// sumsOf returns the SHA-256 of the pieces of a file.
func sumsOf(t *testing.T, f io.ReaderAt, size int64) []Sum {
	t.Helper()
	sums := make([]Sum, pieces(size))
	for i := range sums {
		sum, err := sumOf(t.Context(), pieceOf(f, size, i), make([]byte, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = sum
	}
	return sums
}

// damages returns, by name, what does not fit the object of p, whose pieces have the sums. Another upload of the same
// file gave again.
func damages(p, again Pieces, sums []Sum) map[string]damage {
	last := len(sums) - 1
	wrongSum, wrongMAC, wrongSalt := slices.Clone(sums), slices.Clone(p.MACs), slices.Clone(p.Salt)
	wrongSum[last][0]++
	wrongMAC[last][0]++
	wrongSalt[0]++
	return map[string]damage{
		"another sum":            {Pieces{Sums: wrongSum}, testSecret, 0, true},
		"another MAC":            {Pieces{Salt: p.Salt, MACs: wrongMAC}, testSecret, 0, true},
		"another MAC and a sum":  {Pieces{p.Salt, wrongMAC, sums}, testSecret, 0, true},
		"another salt":           {Pieces{Salt: wrongSalt, MACs: p.MACs}, testSecret, 0, true},
		"MACs of another upload": {Pieces{Salt: p.Salt, MACs: again.MACs}, testSecret, 0, true},
		"another secret":         {p, []byte("another secret"), 0, true},
		"another size":           {p, testSecret, 1, false},
		"no size":                {p, testSecret, -1 << 40, false},
		"no description":         {Pieces{}, testSecret, 0, false},
		"no salt":                {Pieces{MACs: p.MACs}, testSecret, 0, false},
		"a short salt":           {Pieces{Salt: p.Salt[1:], MACs: p.MACs}, testSecret, 0, false},
		"a salt without MACs":    {Pieces{p.Salt, nil, sums}, testSecret, 0, false},
		"a MAC less":             {Pieces{Salt: p.Salt, MACs: p.MACs[1:]}, testSecret, 0, false},
		"a MAC more":             {Pieces{Salt: p.Salt, MACs: append(wrongMAC, MAC{})}, testSecret, 0, false},
		"a sum more":             {Pieces{p.Salt, p.MACs, append(wrongSum, Sum{})}, testSecret, 0, false},
	}
}

// TestTransferResumes breaks an upload and continues it, as another process would.
func TestTransferResumes(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		const size = 5*minPart - 1
		f, sum := testFile(t, size)
		c := &counted{Bucket: b}
		c.failFrom.Store(4)
		if err := NewTransfer(c).Upload(t.Context(), "resumes/a", f, size, sum); !errors.Is(err, errBroken) {
			t.Fatalf("the upload was broken, and returned %v", err)
		}
		uploads, err := b.Uploads(t.Context(), "resumes/")
		if err != nil || len(uploads) != 1 {
			t.Fatalf("the uploads are %v, %v", uploads, err)
		}
		arrived, err := b.Parts(t.Context(), "resumes/a", uploads[0].ID)
		if err != nil || len(arrived) == 0 {
			t.Fatalf("the parts are %v, %v", arrived, err)
		}
		c.failFrom.Store(0)
		c.parts.Store(0)
		if err := NewTransfer(c).Upload(t.Context(), "resumes/a", f, size, sum); err != nil {
			t.Fatal(err)
		}
		// A server may still take a part whose request was given up.
		if again := int(c.parts.Load()); again > 5-len(arrived) {
			t.Errorf("%d parts had arrived, and %d were uploaded after that; want 5 in all", len(arrived), again)
		}
		if _, err := NewTransfer(b).Download(t.Context(), "resumes/a", emptyFile(t), sum, size, 0); err != nil {
			t.Error(err)
		}
	})
}

// TestTransferPassesOlderUploads begins an upload as an earlier version did, with a checksum that parts do not have.
func TestTransferPassesOlderUploads(t *testing.T) {
	b := openS3(t, caytest.StartS3(t), "").(*S3)
	const size = minPart + 1
	f, sum := testFile(t, size)
	key := "older/a"
	begun, err := b.client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: b.bucket, Key: &key,
		ChecksumAlgorithm: types.ChecksumAlgorithmSha256})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.PutPart(t.Context(), key, *begun.UploadId, 1, section([]byte("a")), crcOf([]byte("a"))); err == nil {
		t.Error("the older upload took a part with another checksum, so the test shows nothing")
	}
	if err := NewTransfer(b).Upload(t.Context(), key, f, size, sum); err != nil {
		t.Fatal(err)
	}
	if _, err := NewTransfer(b).Download(t.Context(), key, emptyFile(t), sum, size, 0); err != nil {
		t.Error(err)
	}
	if left, err := b.Uploads(t.Context(), key); err != nil || len(left) != 1 || left[0].ID != *begun.UploadId {
		t.Errorf("the uploads are %v, %v; want the older one", left, err)
	}
}

func promisedBy(transfer *Transfer) int64 {
	transfer.mu.Lock()
	defer transfer.mu.Unlock()
	return transfer.promised
}

// stuck is a bucket whose reads tell that they began, and wait for the end of their context.
type stuck struct {
	Bucket
	reading chan struct{} // has room for one
}

func (s stuck) Get(ctx context.Context, _ string, _, _ int64) (io.ReadCloser, error) {
	select {
	case s.reading <- struct{}{}:
	default:
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestTransferPromisesRoom downloads two files at once of which the disk has room for one.
func TestTransferPromisesRoom(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := emptyFile(t)
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	free := int64(st.Bavail) * st.Bsize
	big := &inflated{Bucket: dir}
	big.size.Store(free / 4)
	b := stuck{big, make(chan struct{}, 1)}
	transfer := NewTransfer(b)
	download := func(ctx context.Context, f *os.File) error {
		_, err := transfer.Download(ctx, "promise/a", f, Sum{}, free, free*5/8) // of which 3/8 may be written
		return err
	}
	for range 2 { // what the first one did not write is free for the next one
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- download(ctx, f) }()
		select {
		case <-b.reading:
		case err := <-ended:
			t.Fatalf("a download with room: %v", err)
		}
		expiring, stop := context.WithTimeout(t.Context(), 5*time.Second) // else it would wait with the other
		if err := download(expiring, emptyFile(t)); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("another download at once: %v", err)
		}
		stop()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the download that was ended: %v", err)
		}
		select {
		case <-b.reading: // of another piece
		default:
		}
		if left := promisedBy(transfer); left != 0 {
			t.Errorf("%d bytes are still promised", left)
		}
	}
}

// TestTransferRefusesDamage changes the file before it is uploaded, and the object after that.
func TestTransferRefusesDamage(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		transfer := NewTransfer(b)
		for _, size := range []int64{100, minPart + 100} {
			f, sum := testFile(t, size)
			wrong := sum
			wrong[0]++
			if err := transfer.Upload(t.Context(), "damage/a", f, size, wrong); !errors.Is(err, ErrDamaged) {
				t.Errorf("a damaged file of %d bytes was uploaded: %v", size, err)
			}
			if _, err := b.Stat(t.Context(), "damage/a"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is an object of it: %v", err)
			}
			if left, err := b.Uploads(t.Context(), "damage/"); err != nil || len(left) != 0 {
				t.Errorf("left are the uploads %v, %v", left, err)
			}
			if err := transfer.Upload(t.Context(), "damage/a", f, size, sum); err != nil {
				t.Fatal(err)
			}
			_, err := transfer.Download(t.Context(), "damage/a", emptyFile(t), wrong, size, 0)
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("another content than the wanted one: %v", err)
			}
			_, err = transfer.Download(t.Context(), "damage/a", emptyFile(t), sum, size-1, 0)
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("a longer object than allowed: %v", err)
			}
			other, otherSum := testFile(t, size+1)
			if err := transfer.Upload(t.Context(), "damage/a", other, size+1, otherSum); !errors.Is(err, ErrDamaged) {
				t.Errorf("an object with another size was taken for the same: %v", err)
			}
			if err := b.Delete(t.Context(), "damage/a"); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestTransferTwice uploads the same file from several processes at once.
func TestTransferTwice(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		const size = 3 * minPart
		f, sum := testFile(t, size)
		var wg sync.WaitGroup
		var done atomic.Int32
		for range 4 {
			wg.Go(func() {
				// An upload that another one ended may fail; the caller tries again, and finds the object.
				for try := range 5 {
					err := NewTransfer(b).Upload(t.Context(), "twice/a", f, size, sum)
					if err == nil {
						done.Add(1)
						return
					}
					t.Logf("try %d: %v", try, err)
				}
			})
		}
		wg.Wait()
		if done.Load() != 4 {
			t.Errorf("%d of 4 uploads succeeded", done.Load())
		}
		if _, err := NewTransfer(b).Download(t.Context(), "twice/a", emptyFile(t), sum, size, 0); err != nil {
			t.Error(err)
		}
	})
}

// brittle is a bucket whose answers break behind their middle, the first one from each offset.
type brittle struct {
	Bucket

	mu     sync.Mutex
	broken map[int64]bool // by offset
	asked  []int64        // bytes, of each request
}

func (b *brittle) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, error) {
	r, err := b.Bucket.Get(ctx, key, off, n)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, n)
	if err != nil || b.broken[off] || n < minPart {
		return r, err
	}
	b.broken[off] = true
	half := io.MultiReader(io.LimitReader(r, n/2+1), iotest.ErrReader(errBroken))
	return struct {
		io.Reader
		io.Closer
	}{half, r}, nil
}

// TestDownloadContinues breaks the connection of a download, which continues behind what has arrived.
func TestDownloadContinues(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const size = minPart + 1000
	f, sum := testFile(t, size)
	p, err := NewTransfer(dir).UploadPieces(t.Context(), "a", f, size, testSecret)
	if err != nil {
		t.Fatal(err)
	}
	for how, download := range map[string]func(b Bucket) error{
		"whole": func(b Bucket) error {
			_, err := NewTransfer(b).Download(t.Context(), "a", emptyFile(t), sum, size, 0)
			return err
		},
		"pieces": func(b Bucket) error {
			return NewTransfer(b).DownloadPieces(t.Context(), "a", emptyFile(t), size, p, testSecret, 0)
		},
		"pieces without MACs": func(b Bucket) error {
			return NewTransfer(b).DownloadPieces(t.Context(), "a", emptyFile(t), size, Pieces{Sums: sumsOf(t, f, size)}, nil, 0)
		},
	} {
		b := &brittle{Bucket: dir, broken: map[int64]bool{}}
		if err := download(b); err != nil {
			t.Errorf("%s: %v", how, err)
		}
		slices.Sort(b.asked)
		if want := []int64{1000, minPart/2 - 1, minPart}; !slices.Equal(b.asked, want) {
			t.Errorf("%s: the requests were for %d bytes, want %d", how, b.asked, want)
		}
	}
}

// crowded is a bucket that counts the requests with content at once: uploading and downloading ones, of all and of each
// key.
type crowded struct {
	Bucket

	mu        sync.Mutex
	now, most map[string]int // by direction and key; with an empty key all of them
}

// begin counts a request until the returned function is called.
func (c *crowded) begin(direction, key string) (end func()) {
	add := func(n int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, of := range []string{direction + " ", direction + " " + key} {
			c.now[of] += n
			c.most[of] = max(c.most[of], c.now[of])
		}
	}
	add(1)
	return sync.OnceFunc(func() { add(-1) })
}

func (c *crowded) PutPart(ctx context.Context, key, id string, n int, body *io.SectionReader, crc uint32) (Part,
	error) {
	defer c.begin("up", key)()
	return c.Bucket.PutPart(ctx, key, id, n, body, crc)
}

func (c *crowded) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, error) {
	end := c.begin("down", key)
	r, err := c.Bucket.Get(ctx, key, off, n)
	if err != nil {
		end()
		return nil, err
	}
	return &endingBody{r, end}, nil
}

// check compares the largest numbers with the bounds.
func (c *crowded) check(t *testing.T) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for of, most := range c.most {
		least, bound := 1, perFile
		if strings.HasSuffix(of, " ") {
			least, bound = 2, maxRequests
		}
		if most < least || most > bound {
			t.Errorf("%s: %d requests at once, want %d to %d", of, most, least, bound)
		}
	}
	if len(c.most) == 0 {
		t.Error("no request was counted")
	}
}

// TestTransferMemory bounds the heap, and the requests at once, while many large files go up and down at once.
func TestTransferMemory(t *testing.T) {
	b := &crowded{Bucket: openS3(t, caytest.StartS3(t), ""), now: map[string]int{}, most: map[string]int{}}
	transfer := NewTransfer(b)
	const files, size = 6, 3*minPart + 1
	f, sum := testFile(t, size)
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	defer debug.SetGCPercent(debug.SetGCPercent(50))
	most, stop := uint64(0), make(chan struct{})
	var watch, wg sync.WaitGroup
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
				runtime.ReadMemStats(&now)
				most = max(most, now.HeapInuse)
			}
		}
	})
	for i := range files {
		key := "memory/" + strings.Repeat("x", i+1)
		wg.Go(func() {
			if i%2 == 0 {
				p, err := transfer.UploadPieces(t.Context(), key, f, size, testSecret)
				if err == nil {
					err = transfer.DownloadPieces(t.Context(), key, emptyFile(t), size, p, testSecret, 0)
				}
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err := transfer.Upload(t.Context(), key, f, size, sum); err != nil {
				t.Error(err)
			}
			if _, err := transfer.Download(t.Context(), key, emptyFile(t), sum, size, 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	close(stop)
	watch.Wait()
	if used := int64(most) - int64(before.HeapInuse); used > 64<<20 {
		t.Errorf("%d files took %d MiB of memory", files, used>>20)
	} else {
		t.Logf("%d files took at most %d KiB of memory", files, used>>10)
	}
	b.check(t)
}
