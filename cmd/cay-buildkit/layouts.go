package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// layouts is a read-only content store of a build's images. The server sends their blobs as open
// files. It is safe for concurrent use.
type layouts struct {
	content.Store // nil: other methods are not called

	conn *wire.Conn
	gone <-chan struct{} // closed when the connection has ended

	mu sync.Mutex
	// +checklocks:mu
	last int64
	// +checklocks:mu
	waiting map[int64]chan blobGift
}

type blobGift struct {
	file *os.File
	err  string
}

// given is called with every answer about a blob.
func (l *layouts) given(a wire.Answer, file *os.File) {
	l.mu.Lock()
	answer := l.waiting[a.Blob]
	delete(l.waiting, a.Blob)
	l.mu.Unlock()
	if answer == nil {
		if file != nil {
			file.Close()
		}
		return
	}
	answer <- blobGift{file, a.Error}
}

func (l *layouts) open(ctx context.Context, d digest.Digest) (*os.File, os.FileInfo, error) {
	if err := d.Validate(); err != nil {
		return nil, nil, fmt.Errorf("digest %q: %w", d, errdefs.ErrInvalidArgument)
	}
	answer := make(chan blobGift, 1)
	l.mu.Lock()
	l.last++
	id := l.last
	l.waiting[id] = answer
	l.mu.Unlock()
	if err := l.conn.Send(wire.Report{Blob: &wire.BlobAsk{ID: id, Digest: d.String()}}, nil); err != nil {
		return nil, nil, err
	}
	var g blobGift
	select {
	case g = <-answer:
	case <-l.gone:
		return nil, nil, errors.New("the build was cancelled")
	case <-ctx.Done():
		// The answer still comes.
		go func() {
			select {
			case g := <-answer:
				if g.file != nil {
					g.file.Close()
				}
			case <-l.gone:
			}
		}()
		return nil, nil, context.Cause(ctx)
	}
	if g.file == nil {
		return nil, nil, fmt.Errorf("blob %s: %s: %w", d, g.err, errdefs.ErrNotFound)
	}
	info, err := g.file.Stat()
	if err != nil {
		g.file.Close()
		return nil, nil, fmt.Errorf("blob %s: %w", d, err)
	}
	return g.file, info, nil
}

// Info returns the length of a blob.
func (l *layouts) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	f, info, err := l.open(ctx, d)
	if err != nil {
		return content.Info{}, err
	}
	f.Close()
	return content.Info{Digest: d, Size: info.Size(), CreatedAt: info.ModTime(), UpdatedAt: info.ModTime()}, nil
}

// ReaderAt opens a blob. The reader checks it against its digest.
func (l *layouts) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	f, info, err := l.open(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	return blob{f, info.Size()}, nil
}

type blob struct {
	*os.File
	size int64
}

// Size returns the blob's length.
func (b blob) Size() int64 { return b.size }

// output receives the blobs of a result from the exporter. They are already in the cache's
// content, from where the server takes them as open files, so nothing is copied here.
type output struct {
	content.Store // nil: other methods are not called

	conn  *wire.Conn
	blobs string // directory of the cache's content
}

// Writer sends the blob to be written, and reports that it exists already.
func (o *output) Writer(_ context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var w content.WriterOpts
	for _, opt := range opts {
		if err := opt(&w); err != nil {
			return nil, err
		}
	}
	d := w.Desc.Digest
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q: %w", d, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(filepath.Join(o.blobs, "blobs", d.Algorithm().String(), d.Encoded()))
	if err != nil {
		return nil, fmt.Errorf("putting blob %s out: %w", d, err)
	}
	defer f.Close()
	if err := o.conn.Send(wire.Report{Output: d.String()}, f); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("blob %s: %w", d, errdefs.ErrAlreadyExists)
}

// Status reports that nothing is half written.
func (o *output) Status(_ context.Context, ref string) (content.Status, error) {
	return content.Status{}, fmt.Errorf("%s: %w", ref, errdefs.ErrNotFound)
}
