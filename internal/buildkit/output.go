package buildkit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

var sha256Digest = regexp.MustCompile(`^sha256:([0-9a-f]{64})$`)

// blobPath returns the path of a blob in a layout.
func blobPath(digest string) (string, error) {
	m := sha256Digest.FindStringSubmatch(digest)
	if m == nil {
		return "", fmt.Errorf("%q is not a digest", wire.Short(digest))
	}
	return filepath.Join("blobs", "sha256", m[1]), nil
}

// output receives a build's result from the program: blobs as open files, which become a layout
// in a directory that the program does not see. The reader of the layout checks the bytes.
type output struct {
	dir  string
	left int64 // bytes
	all  int64
}

// outputFile is the number of bytes counted for each blob besides its content, so that the number
// of empty ones is bounded too.
const outputFile = 4 << 10

func (b *Builder) newOutput() (*output, error) {
	dir, err := os.MkdirTemp(b.results(), "")
	if err == nil {
		err = os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("making a result's directory: %w", err)
	}
	return &output{dir: dir, left: b.cfg.BuildBytes, all: b.cfg.BuildBytes}, nil
}

// take copies a blob.
func (o *output) take(ctx context.Context, digest string, from *os.File) (err error) {
	path, err := blobPath(digest)
	if err != nil {
		return fmt.Errorf("taking a result: %w", err)
	}
	if from == nil {
		return fmt.Errorf("taking a result: %s came without a file", digest)
	}
	info, err := from.Stat()
	if err != nil {
		return fmt.Errorf("taking a result: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("taking a result: %s is not a regular file", digest)
	}
	if o.left -= info.Size() + outputFile; o.left < 0 {
		return &StepError{ExitCode: -1,
			Err: fmt.Errorf("%w: the result has more than the %d MiB that it may have (build.disk_mb)", ErrDisk, o.all>>20)}
	}
	to, err := os.OpenFile(filepath.Join(o.dir, path), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil // two parts of the result are the same blob
	}
	if err != nil {
		return fmt.Errorf("taking a result: %w", err)
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	// Copy in pieces, so that a cancelled build ends soon.
	const piece = 16 << 20
	for left := info.Size(); left > 0; left -= piece {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := io.CopyN(to, from, min(left, piece)); err != nil {
			return fmt.Errorf("taking a result: %w", err)
		}
	}
	return nil
}

// finish makes a layout with one image of the blobs.
func (o *output) finish(done *wire.Done) error {
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []any{done.Descriptor}})
	if err != nil {
		return fmt.Errorf("encoding the image's index: %w", err)
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(o.dir, "index.json"), index, 0o600),
		os.WriteFile(filepath.Join(o.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600))
	if err != nil {
		return fmt.Errorf("writing the image's index: %w", err)
	}
	return nil
}
