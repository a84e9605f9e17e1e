package image

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/hostfile"
)

const (
	// chunk is the number of bytes read, hashed or written at once.
	chunk = 1 << 20
	// hole is the shortest run of zeros that is left out of a file, in bytes. A smaller one saves
	// more space and takes more system calls.
	hole = 64 << 10
	// maxWindow bounds the memory that a zstd stream may ask for, in bytes: what the strongest of
	// its usual levels use.
	maxWindow = 128 << 20
	// headerRoom is the number of bytes that the headers of all layers may take besides their
	// files.
	headerRoom = 8 << 30
	// maxRatio is the factor by which a layer may grow when it is decompressed, beyond ratioFree
	// bytes and without zeros, which take no space. Real files stay far below; gzip can reach a
	// thousand and zstd ten times that.
	maxRatio  = 250
	ratioFree = 1 << 30
)

var zeros [hole]byte

// sparseFile writes a file from start to end and leaves out long runs of zeros, which take no
// space on the disk.
type sparseFile struct {
	f    *os.File
	size int64
}

// Write appends p.
func (s *sparseFile) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		// Write all up to the next hole with one system call.
		end := n
		for end < len(p) {
			piece := p[end:min(end+hole, len(p))]
			if len(piece) == hole && hostfile.IsZero(piece) {
				break
			}
			end += len(piece)
		}
		if end == n {
			n += hole
			s.size += hole
			continue
		}
		k, err := s.f.WriteAt(p[n:end], s.size)
		n += k
		s.size += int64(k)
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// finish sets the length of the file, which zeros at its end do not.
func (s *sparseFile) finish() error { return s.f.Truncate(s.size) }

// copyRange copies a part of a file. It does not read holes, since that costs as much as reading
// data.
func copyRange(w io.Writer, f *os.File, off, size int64, buf []byte) error {
	for end := off + size; off < end; {
		data, stop := off, end
		if size > 2*hole { // it is not worth asking for holes in small ones
			data, stop = dataIn(f, off, end)
		}
		for off < data {
			n, err := w.Write(zeros[:min(hole, data-off)])
			if off += int64(n); err != nil {
				return err
			}
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{w}, io.NewSectionReader(f, off, stop-off), buf)
		if off += n; err == nil && off != stop {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dataIn returns the begin and end of the next piece of data between off and end, or end and end
// if there is none. On a file system without holes all is data.
func dataIn(f *os.File, off, end int64) (data, stop int64) {
	data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO), err == nil && data >= end:
		return end, end
	case err != nil:
		return off, end
	}
	if stop, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE); err != nil || stop > end {
		stop = end
	}
	return data, stop
}

// tee writes to a file and hashes at the same time, since each is about as slow as the other.
type tee struct {
	hash hash.Hash
	to   io.Writer
}

func (t tee) Write(p []byte) (int, error) {
	done := make(chan struct{})
	go func() {
		t.hash.Write(p)
		close(done)
	}()
	n, err := t.to.Write(p)
	<-done
	return n, err
}

// counted is a reader that counts bytes.
type counted struct {
	io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

// decompress detects a stream's compression by its first bytes. Call the returned function when
// nothing reads any more.
func decompress(r io.Reader) (io.Reader, func(), error) {
	in := bufio.NewReaderSize(r, chunk)
	magic, err := in.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, nil, fmt.Errorf("reading gzip: %w", err)
		}
		return z, func() { z.Close() }, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, fmt.Errorf("reading zstd: %w", err)
		}
		return z, z.Close, nil
	}
	return in, func() {}, nil
}

// metered returns a reader that fails when a stream becomes larger than an image may be, or grows
// by more than maxRatio.
func (t *tree) metered(plain io.Reader, packed *counted) io.Reader {
	solid := int64(0)
	return readerFunc(func(p []byte) (int, error) {
		n, err := plain.Read(p)
		t.streamed += int64(n)
		if t.streamed-headerRoom > t.maxSize {
			return 0, fmt.Errorf("the layers of the image are larger than %d bytes", t.maxSize)
		}
		for rest := p[:n]; len(rest) > 0; {
			piece := rest[:min(hole, len(rest))]
			if rest = rest[len(piece):]; !hostfile.IsZero(piece) {
				solid += int64(len(piece))
			}
		}
		if solid > ratioFree && solid/maxRatio > packed.n {
			return 0, fmt.Errorf("decompression bomb: %d bytes became more than %d times that", packed.n, maxRatio)
		}
		return n, err
	})
}

// ahead reads and hashes a stream in a goroutine, so that unpacking, hashing and writing run in
// parallel.
type ahead struct {
	full, free chan []byte
	quit, done chan struct{}
	hash       hash.Hash
	err        error // valid once full is closed
	all, rest  []byte
}

func readAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan []byte, 3), free: make(chan []byte, 3), quit: make(chan struct{}),
		done: make(chan struct{}), hash: sha256.New()}
	for range cap(a.free) {
		a.free <- make([]byte, chunk)
	}
	go func() {
		defer close(a.done)
		defer close(a.full)
		for {
			var b []byte
			select {
			case b = <-a.free:
			case <-a.quit:
				return
			}
			n, err := fill(r, b[:chunk])
			a.hash.Write(b[:n])
			a.full <- b[:n] // full has room for all buffers
			if err != nil {
				a.err = err
				return
			}
		}
	}()
	return a
}

// fill reads until b is full or the stream ends, and returns the stream's own error.
// [io.ReadFull] does not tell a truncated stream from a short one.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var k int
		k, err = r.Read(b[n:])
		n += k
	}
	return n, err
}

// Read returns bytes that were read ahead.
func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.all != nil {
			a.free <- a.all[:chunk]
			a.all = nil
		}
		b, ok := <-a.full
		if !ok {
			return 0, a.err
		}
		a.all, a.rest = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// stop stops reading, and returns the hash of all bytes read.
func (a *ahead) stop() string {
	close(a.quit)
	for range a.full { // the goroutine may be about to send one
	}
	<-a.done
	return hex.EncodeToString(a.hash.Sum(nil))
}

// copyFile copies a file. Holes of the file are holes of the copy.
func copyFile(to, from *os.File) error {
	if info, err := from.Stat(); err != nil {
		return err
	} else if isSparse(info) {
		out := &sparseFile{f: to}
		if _, err := io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{from}, make([]byte, chunk)); err != nil {
			return err
		}
		return out.finish()
	}
	_, err := io.Copy(to, from) // the kernel shares the blocks if it can
	return err
}
