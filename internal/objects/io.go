package objects

import (
	"context"
	"io"
)

// onlyReader is a reader that fails when its context ends, and has no other method, so that copies from it use the
// given buffer.
type onlyReader struct {
	ctx  context.Context
	from io.Reader
}

func (r onlyReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.from.Read(p)
}

// exactReader reads n bytes, and fails if there are fewer.
type exactReader struct {
	from io.Reader
	io.Closer
	left int64
}

// exactly returns a reader of the first n bytes of r, which closes c.
func exactly(r io.Reader, c io.Closer, n int64) io.ReadCloser { return &exactReader{r, c, n} }

func (r *exactReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n, err := r.from.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if err == io.EOF && r.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
