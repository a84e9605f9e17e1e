package objects

import (
	"context"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/cayhq/cay/internal/caytest"
)

// BenchmarkTransfer moves a file of 1 GiB, with -short of 256 MiB, to an S3 server on this machine and back: as a file
// whose sum is known before, such as an image, and as one whose is not, such as a checkpoint's. In turn, a plain
// client sends and reads the same file in one request, and compares nothing. The metric ratio is the speed of the
// transfer divided by the plain client's.
func BenchmarkTransfer(b *testing.B) {
	size := int64(1 << 30)
	if testing.Short() {
		size /= 4
	}
	server := caytest.StartS3(b)
	l, err := ParseURL(server.URL(""))
	if err != nil {
		b.Fatal(err)
	}
	bucket, err := OpenS3(l, Credentials{AccessKey: server.AccessKey, SecretKey: server.SecretKey})
	if err != nil {
		b.Fatal(err)
	}
	f, sum := benchFile(b, size)
	transfer := NewTransfer(bucket)
	var sums []Sum
	up := func(b *testing.B, key string, upload func(ctx context.Context) error) {
		compare(b, size, func(ctx context.Context) error {
			_, err := bucket.client.PutObject(ctx, &s3.PutObjectInput{Bucket: bucket.bucket, Key: aws.String("plain"),
				Body: io.NewSectionReader(f, 0, size)}, signed(unsigned))
			return err
		}, func(ctx context.Context) error {
			if err := bucket.Delete(ctx, key); err != nil {
				return err
			}
			return upload(ctx)
		})
	}
	b.Run("up", func(b *testing.B) {
		up(b, "cay", func(ctx context.Context) error { return transfer.Upload(ctx, "cay", f, size, sum) })
	})
	b.Run("up/pieces", func(b *testing.B) {
		up(b, "pieces", func(ctx context.Context) (err error) {
			sums, err = transfer.UploadPieces(ctx, "pieces", f, size)
			return err
		})
	})
	down := func(b *testing.B, download func(ctx context.Context, to *os.File) error) {
		into := func(get func(ctx context.Context, to *os.File) error) func(context.Context) error {
			return func(ctx context.Context) error {
				to, err := os.CreateTemp(b.TempDir(), "to-")
				if err != nil {
					return err
				}
				defer os.Remove(to.Name()) // the directory goes with the test
				defer to.Close()
				return get(ctx, to)
			}
		}
		compare(b, size, into(func(ctx context.Context, to *os.File) error {
			r, err := bucket.Get(ctx, "plain", 0, size)
			if err != nil {
				return err
			}
			defer r.Close()
			_, err = io.CopyBuffer(struct{ io.Writer }{to}, r, make([]byte, bufferSize))
			return err
		}), into(download))
	}
	b.Run("down", func(b *testing.B) {
		down(b, func(ctx context.Context, to *os.File) error {
			_, err := transfer.Download(ctx, "cay", to, sum, size, 0)
			return err
		})
	})
	b.Run("down/pieces", func(b *testing.B) {
		down(b, func(ctx context.Context, to *os.File) error {
			return transfer.DownloadPieces(ctx, "pieces", to, size, sums, 0)
		})
	})
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

// compare reports the speeds of a plain client and of a transfer, which move size bytes in turn.
func compare(b *testing.B, size int64, plain, cay func(context.Context) error) {
	var took [2]time.Duration
	rounds := 0
	for b.Loop() {
		for i, move := range []func(context.Context) error{plain, cay} {
			began := time.Now()
			if err := move(b.Context()); err != nil {
				b.Fatal(err)
			}
			took[i] += time.Since(began)
		}
		rounds++
	}
	speed := func(d time.Duration) float64 { return float64(size) * float64(rounds) / 1e6 / d.Seconds() }
	b.ReportMetric(speed(took[0]), "plain-MB/s")
	b.ReportMetric(speed(took[1]), "cay-MB/s")
	b.ReportMetric(speed(took[1])/speed(took[0]), "ratio")
}
