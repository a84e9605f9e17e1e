package cay

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"strconv"
)

// MaxFile is the size of the largest file that the server takes, bytes.
const MaxFile = 100_000_000

// WriteFileOptions holds the options of [Client.WriteFile].
type WriteFileOptions struct {
	// Mode holds the permission bits; nil is those of the file that is replaced, else 0644.
	Mode *fs.FileMode
	// Owner is the name or number of the user that owns the file and the parents
	// that are made; "" is the template's user, else root.
	Owner string
	// Size is the number of bytes of body. If it is 0, WriteFile finds out the size of
	// a body that has one (*os.File, *bytes.Reader, *bytes.Buffer, *strings.Reader) and
	// sends others without a size.
	Size int64
}

// WriteFile streams body, up to [MaxFile] bytes, into a file of the sandbox, and
// makes parents that do not exist. The file appears whole or not at all: after any
// error, also one of body, a file that was there before is unchanged. WriteFile does
// not close body.
func (c *Client) WriteFile(ctx context.Context, id, path string, body io.Reader, o WriteFileOptions) error {
	p := writeFileParams{Path: path}
	if o.Mode != nil {
		p.Mode = new("0" + strconv.FormatUint(uint64(o.Mode.Perm()), 8))
	}
	if o.Owner != "" {
		p.Owner = &o.Owner
	}
	if o.Size == 0 {
		o.Size = sizeOf(body)
	}
	if _, closes := body.(io.Closer); closes {
		body = struct{ io.Reader }{body} // net/http would close the caller's body
	}
	setLength := func(_ context.Context, r *http.Request) error {
		if o.Size > 0 {
			r.ContentLength = o.Size
		}
		// Asking first saves sending a large body to a path that is refused. For a
		// small body the round trip costs more than it saves.
		const worthAsking = 1 << 20 // bytes
		unknown := r.ContentLength < 0 || r.ContentLength == 0 && r.Body != http.NoBody
		if r.Body != nil && (unknown || r.ContentLength > worthAsking) {
			r.Header.Set("Expect", "100-continue")
		}
		return nil
	}
	return done(c.wire.WriteFileWithBody(ctx, id, &p, "application/octet-stream", body, setLength))
}

// sizeOf returns the number of bytes that are left to read of a regular file, and 0
// for other readers, whose size is not known or net/http finds out itself.
func sizeOf(body io.Reader) int64 {
	f, ok := body.(*os.File)
	if !ok {
		return 0
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0
	}
	return max(info.Size()-at, 0)
}

// ReadFileOptions selects a part of a file; the zero value selects all of it.
type ReadFileOptions struct {
	Offset int64 // first byte
	Length int64 // bytes; 0 is to the end
}

// File is an open file of a sandbox. The caller closes it.
type File struct {
	io.ReadCloser
	Size         int64  // bytes to read; -1 when not known
	ContentRange string // the header Content-Range of a part: first and last byte, and size of the file
}

// ReadFile opens a file of the sandbox for reading.
func (c *Client) ReadFile(ctx context.Context, id, path string, o ReadFileOptions) (*File, error) {
	p := readFileParams{Path: path}
	switch {
	case o.Offset < 0 || o.Length < 0:
		return nil, fmt.Errorf("reading %d bytes at %d: a part of a file begins at 0 or later and has no negative length",
			o.Length, o.Offset)
	case o.Length > 0:
		p.Range = new(fmt.Sprintf("bytes=%d-%d", o.Offset, o.Offset+o.Length-1))
	case o.Offset > 0:
		p.Range = new(fmt.Sprintf("bytes=%d-", o.Offset))
	}
	resp, err := open(c.wire.ReadFile(ctx, id, &p))
	if err != nil {
		return nil, err
	}
	return &File{ReadCloser: resp.Body, Size: resp.ContentLength, ContentRange: resp.Header.Get("Content-Range")}, nil
}

// RemoveFile removes a file or an empty directory; with recursive any directory.
func (c *Client) RemoveFile(ctx context.Context, id, path string, recursive bool) error {
	p := removeFileParams{Path: path}
	if recursive {
		p.Recursive = &recursive
	}
	return done(c.wire.RemoveFile(ctx, id, &p))
}

// ListFiles returns the entries of a directory, depth levels deep: 1 to 10; 0 means 1.
func (c *Client) ListFiles(ctx context.Context, id, path string, depth int) ([]FileEntry, error) {
	p := listFilesParams{Path: path}
	if depth != 0 {
		p.Depth = &depth
	}
	l, err := decode[fileList](c.wire.ListFiles(ctx, id, &p))
	if err != nil {
		return nil, err
	}
	return l.Entries, nil
}
