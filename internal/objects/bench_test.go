package objects

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/cayhq/cay/internal/caytest"
)

// BenchmarkTransfer moves a file of 1 GiB, beside a plain client that sends and reads the same in one request.
func BenchmarkTransfer(b *testing.B) {
	const size = 1 << 30
	server := caytest.StartS3(b)
	l, err := ParseURL(server.URL(""))
	if err != nil {
		b.Fatal(err)
	}
	bucket, err := OpenS3(l, Credentials{AccessKey: server.AccessKey, SecretKey: server.SecretKey})
	if err != nil {
		b.Fatal(err)
	}
	f, err := os.Create(filepath.Join(b.TempDir(), "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	hash := sha256.New()
	for i := range size / (1 << 20) {
		piece := make([]byte, 1<<20)
		for j := range piece {
			piece[j] = byte(i + j>>8 ^ j)
		}
		hash.Write(piece)
		if _, err := f.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	sum := Sum(hash.Sum(nil))
	transfer := NewTransfer(bucket)
	to := func(b *testing.B) *os.File {
		f, err := os.Create(filepath.Join(b.TempDir(), "to"))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Close() })
		return f
	}
	made := 0 // objects of each kind
	for _, c := range []struct {
		name string
		run  func(ctx context.Context, b *testing.B) error
	}{
		{"up/plain", func(ctx context.Context, b *testing.B) error {
			_, err := bucket.client.PutObject(ctx, &s3.PutObjectInput{Bucket: bucket.bucket, Key: aws.String("plain"),
				Body: io.NewSectionReader(f, 0, size)}, s3.WithAPIOptions(v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware))
			return err
		}},
		{"up/cay", func(ctx context.Context, b *testing.B) error {
			made++
			return transfer.Upload(ctx, fmt.Sprint("cay/", made), f, size, sum)
		}},
		{"down/plain", func(ctx context.Context, b *testing.B) error {
			r, err := bucket.Get(ctx, "cay/1", 0, size)
			if err != nil {
				return err
			}
			defer r.Close()
			_, err = io.CopyBuffer(struct{ io.Writer }{to(b)}, r, make([]byte, bufferSize))
			return err
		}},
		{"down/cay", func(ctx context.Context, b *testing.B) error {
			_, err := transfer.Download(ctx, "cay/1", to(b), sum, size, 0)
			return err
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				if err := c.run(b.Context(), b); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
