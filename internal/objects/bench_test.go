package objects

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// BenchmarkTransfer moves a file of 1 GiB, with -short of 256 MiB, to an S3 server on this machine and back. Four
// clients do so in turn: one that makes a single request; one that moves the same parts as a Transfer, as many at once;
// both sum and compare nothing; a Transfer with a file whose sum is known before, such as an image; and a Transfer with
// one whose sum is not, such as a checkpoint's.
//
// For each it reports the speed, and the CPU time that it and the server took together. The metrics with a "/" are the
// Transfer's speed divided by another client's. RSS-MiB is the largest resident memory of this process during a
// Transfer, its 20 MiB before included.
func BenchmarkTransfer(b *testing.B) {
	size := int64(1 << 30)
	if testing.Short() {
		size /= 4
	}
	m := &mover{server: caytest.StartS3(b), size: size}
	l, err := ParseURL(m.server.URL(""))
	if err != nil {
		b.Fatal(err)
	}
	m.bucket, err = OpenS3(l, Credentials{AccessKey: m.server.AccessKey, SecretKey: m.server.SecretKey})
	if err != nil {
		b.Fatal(err)
	}
	m.transfer = NewTransfer(m.bucket)
	m.file, m.sum = benchFile(b, size)
	b.Run("up", func(b *testing.B) {
		m.compare(b, []func(ctx context.Context) error{
			m.absent("plain", m.put), m.absent("parts", m.putParts),
			m.absent("image", func(ctx context.Context) error {
				return m.transfer.Upload(ctx, "image", m.file, size, m.sum)
			}),
			m.absent("checkpoint", func(ctx context.Context) (err error) {
				m.pieces, err = m.transfer.UploadPieces(ctx, "checkpoint", m.file, size, testSecret)
				return err
			}),
		})
	})
	dir := b.TempDir()
	b.Run("down", func(b *testing.B) {
		m.compare(b, []func(ctx context.Context) error{
			into(dir, m.get), into(dir, m.getParts),
			into(dir, func(ctx context.Context, to *os.File) error {
				_, err := m.transfer.Download(ctx, "image", to, m.sum, size, 0)
				return err
			}),
			into(dir, func(ctx context.Context, to *os.File) error {
				return m.transfer.DownloadPieces(ctx, "checkpoint", to, size, m.pieces, testSecret, 0)
			}),
		})
	})
}

// mover moves a file.
type mover struct {
	server   *caytest.S3
	bucket   *S3
	transfer *Transfer
	file     *os.File
	size     int64
	sum      Sum
	pieces   Pieces // of the checkpoint
}

// absent returns a function that removes an object and calls upload.
func (m *mover) absent(key string, upload func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := m.bucket.Delete(ctx, key); err != nil {
			return err
		}
		return upload(ctx)
	}
}

// into returns a function that calls download with a new file, and removes it.
func into(dir string, download func(context.Context, *os.File) error) func(context.Context) error {
	return func(ctx context.Context) error {
		to, err := os.CreateTemp(dir, "to-")
		if err != nil {
			return err
		}
		defer os.Remove(to.Name()) // the directory goes with the test
		defer to.Close()
		return download(ctx, to)
	}
}

// put uploads the file in one request.
func (m *mover) put(ctx context.Context) error {
	_, err := m.bucket.client.PutObject(ctx, &s3.PutObjectInput{Bucket: m.bucket.bucket, Key: aws.String("plain"),
		Body: io.NewSectionReader(m.file, 0, m.size)}, signed(unsigned))
	return err
}

// putParts uploads the file in parts.
func (m *mover) putParts(ctx context.Context) error {
	key := aws.String("parts")
	begun, err := m.bucket.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: m.bucket.bucket,
		Key: key})
	if err != nil {
		return err
	}
	parts := make([]types.CompletedPart, pieces(m.size))
	g, sending := errgroup.WithContext(ctx)
	g.SetLimit(perFile)
	for i := range parts {
		g.Go(func() error {
			number := aws.Int32(int32(i + 1))
			sent, err := m.bucket.client.UploadPart(sending, &s3.UploadPartInput{Bucket: m.bucket.bucket, Key: key,
				UploadId: begun.UploadId, PartNumber: number, Body: pieceOf(m.file, m.size, i)}, signed(unsigned))
			if err != nil {
				return err
			}
			parts[i] = types.CompletedPart{PartNumber: number, ETag: sent.ETag}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	_, err = m.bucket.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: m.bucket.bucket,
		Key: key, UploadId: begun.UploadId, MultipartUpload: &types.CompletedMultipartUpload{Parts: parts}})
	return err
}

// get downloads the file in one request.
func (m *mover) get(ctx context.Context, to *os.File) error { return m.getRange(ctx, to, 0, m.size) }

// getRange downloads n bytes of the file from off on in one request.
func (m *mover) getRange(ctx context.Context, to *os.File, off, n int64) error {
	r, err := m.bucket.Get(ctx, "plain", off, n)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.NewOffsetWriter(to, off)}, r, make([]byte, bufferSize))
	return err
}

// getParts downloads the file in parts.
func (m *mover) getParts(ctx context.Context, to *os.File) error {
	g, receiving := errgroup.WithContext(ctx)
	g.SetLimit(perFile)
	for i := range pieces(m.size) {
		g.Go(func() error {
			piece := pieceOf(m.file, m.size, int(i))
			return m.getRange(receiving, to, i*minPart, piece.Size())
		})
	}
	return g.Wait()
}

// benchFile returns a file without zeros, which the page cache has, and its sum.
func benchFile(b *testing.B, size int64) (*os.File, Sum) {
	f, err := os.Create(filepath.Join(b.TempDir(), "file"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	hash, piece := sha256.New(), make([]byte, 1<<20)
	for i := range size / int64(len(piece)) {
		for j := range piece {
			piece[j] = byte(int(i)+j>>8^j) | 1
		}
		hash.Write(piece)
		if _, err := f.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil { // else the disk is busy with it during the first measurement
		b.Fatal(err)
	}
	return f, Sum(hash.Sum(nil))
}

// compare runs the four clients in turn and reports what they took.
func (m *mover) compare(b *testing.B, moves []func(context.Context) error) {
	names := []string{"plain", "parts", "image", "checkpoint"}
	took, busy := make([]time.Duration, len(moves)), make([]time.Duration, len(moves))
	var peak int64
	rounds := 0
	for b.Loop() {
		for i, move := range moves {
			resetPeak(b)
			began, before := time.Now(), m.busy(b)
			if err := move(b.Context()); err != nil {
				b.Fatal(err)
			}
			took[i] += time.Since(began)
			busy[i] += m.busy(b) - before
			if i > 1 {
				peak = max(peak, peakMemory(b))
			}
		}
		rounds++
	}
	b.ReportMetric(0, "ns/op") // of all four together it says nothing
	for i, name := range names {
		b.ReportMetric(float64(m.size)*float64(rounds)/1e6/took[i].Seconds(), name+"-MB/s")
		b.ReportMetric(busy[i].Seconds()/float64(rounds), name+"-CPU-s")
		for j := range 2 {
			if i > 1 {
				b.ReportMetric(took[j].Seconds()/took[i].Seconds(), name+"/"+names[j])
			}
		}
	}
	b.ReportMetric(float64(peak)/(1<<20), "RSS-MiB")
}

// busy returns the CPU time that this process and the server have taken.
func (m *mover) busy(b *testing.B) time.Duration {
	var self unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &self); err != nil {
		b.Fatal(err)
	}
	return time.Duration(self.Utime.Nano()+self.Stime.Nano()) + m.server.Busy(b)
}

// resetPeak makes peakMemory begin anew.
func resetPeak(b *testing.B) {
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		b.Fatal(err)
	}
}

// peakMemory returns the largest resident memory of this process in bytes.
func peakMemory(b *testing.B) int64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, peak, _ := strings.Cut(string(text), "VmHWM:")
	var kib int64
	if _, err := fmt.Sscan(peak, &kib); err != nil {
		b.Fatal(err)
	}
	return kib << 10
}
