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
)

const (
	// chunk is what is read, hashed or written at once, in bytes.
	chunk = 1 << 20
	// hole is the least run of zeros that is left out of a file, in bytes. Smaller
	// finds more and makes more system calls.
	hole = 64 << 10
	// maxWindow bounds the memory that a zstd stream may ask for, in bytes: what
	// the strongest of its usual levels use.
	maxWindow = 128 << 20
	// headerRoom is what the headers of all layers may take beside their files, in bytes.
	headerRoom = 8 << 30
	// maxRatio is how many times its size a layer may become, beyond ratioFree bytes
	// and not counting zeros, which take no room. Real files stay far below; gzip can
	// reach a thousand and zstd ten times that.
	maxRatio  = 250
	ratioFree = 1 << 30
)

var zeros [hole]byte

func allZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

// sparseFile writes a file from its start to its end and leaves long runs of
// zeros out: they take no room on the disk.
type sparseFile struct {
	f    *os.File
	size int64
}

// Write writes at the end.
func (s *sparseFile) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		// One system call for all that is not left out.
		end := n
		for end < len(p) {
			piece := p[end:min(end+hole, len(p))]
			if len(piece) == hole && allZero(piece) {
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

// finish gives the file its length, which zeros at its end have not.
func (s *sparseFile) finish() error { return s.f.Truncate(s.size) }

// copyRange copies a part of a file. What the file does not hold is not read:
// reading a hole costs as much as reading data.
func copyRange(w io.Writer, f *os.File, off, size int64, buf []byte) error {
	for end := off + size; off < end; {
		data, stop := off, end
		if size > 2*hole { // in small ones none is worth asking for
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

// dataIn finds the next piece of data between off and end: where it begins and
// ends, end and end if there is none. A file system that does not know has all of it.
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

// tee writes to a file and takes the hash of it, at once: each is about as slow
// as the other.
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

// counted counts what is read.
type counted struct {
	io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n += int64(n)
	return n, err
}

// decompress finds out how a stream is packed by its first bytes. Call the
// function when nothing reads any more.
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

// metered ends a stream that becomes more than an image may be, or more than
// what it is packed in can honestly be.
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
			if rest = rest[len(piece):]; !allZero(piece) {
				solid += int64(len(piece))
			}
		}
		if solid > ratioFree && solid/maxRatio > packed.n {
			return 0, fmt.Errorf("decompression bomb: %d bytes became more than %d times that", packed.n, maxRatio)
		}
		return n, err
	})
}

// ahead reads a stream and takes its hash in a goroutine of its own, so that
// unpacking, hashing and writing go on side by side.
type ahead struct {
	full, free chan []byte
	quit, done chan struct{}
	hash       hash.Hash
	err        error // once full is closed
	all, rest  []byte
}

func readAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan []byte, 3), free: make(chan []byte, 3), quit: make(chan struct{}), done: make(chan struct{}), hash: sha256.New()}
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
			a.full <- b[:n] // has room for all buffers
			if err != nil {
				a.err = err
				return
			}
		}
	}()
	return a
}

// fill reads until b is full or the stream ends, and says how it did:
// [io.ReadFull] makes one that was cut off of one that is short.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var k int
		k, err = r.Read(b[n:])
		n += k
	}
	return n, err
}

// Read gives what was read ahead.
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

// stop ends the reading, and returns the hash of what was read.
func (a *ahead) stop() string {
	close(a.quit)
	for range a.full { // it may be about to hand one over
	}
	<-a.done
	return hex.EncodeToString(a.hash.Sum(nil))
}

// copyFile copies a file, whose zeros take no room in the copy where they take
// none in it.
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
	_, err := io.Copy(to, from) // the kernel shares the blocks where it can
	return err
}
