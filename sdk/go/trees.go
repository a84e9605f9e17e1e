package cay

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
)

// StatFile describes the file at a path. It describes a symbolic link itself and not its target.
func (c *Client) StatFile(ctx context.Context, id, path string) (*FileEntry, error) {
	return decode[FileEntry](c.wire.StatFile(ctx, id, &statFileParams{Path: path}))
}

// MakeDirectoryOptions holds the options of [Client.MakeDirectory].
type MakeDirectoryOptions struct {
	Mode  *fs.FileMode // permission bits; nil is 0755
	Owner string       // as in [WriteFileOptions]
}

// MakeDirectory makes a directory and its missing parents. A directory that exists is not changed.
func (c *Client) MakeDirectory(ctx context.Context, id, path string, o MakeDirectoryOptions) (*FileEntry, error) {
	r := makeDirectoryRequest{Path: path}
	if o.Mode != nil {
		r.Mode = new("0" + strconv.FormatUint(uint64(o.Mode.Perm()), 8))
	}
	if o.Owner != "" {
		r.Owner = &o.Owner
	}
	return decode[FileEntry](c.wire.MakeDirectory(ctx, id, r))
}

// RenameFile moves a file or directory to another path. It replaces a file at that path only if
// overwrite is true.
func (c *Client) RenameFile(ctx context.Context, id, from, to string, overwrite bool) (*FileEntry, error) {
	r := renameFileRequest{From: from, To: to}
	if overwrite {
		r.Overwrite = &overwrite
	}
	return decode[FileEntry](c.wire.RenameFile(ctx, id, r))
}

// DownloadTree opens a tar archive of everything below a directory, with names relative to the
// directory. Reading an incomplete archive ends with an error. The caller closes the archive.
func (c *Client) DownloadTree(ctx context.Context, id, path string) (io.ReadCloser, error) {
	resp, err := open(c.wire.DownloadTree(ctx, id, &downloadTreeParams{Path: path}))
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// UploadTree unpacks a tar archive into a directory, which it makes if it does not exist. owner is
// as in [WriteFileOptions]. After an error, the files before it have been written. UploadTree does
// not close archive.
func (c *Client) UploadTree(ctx context.Context, id, path string, archive io.Reader, owner string) error {
	p := uploadTreeParams{Path: path}
	if owner != "" {
		p.Owner = &owner
	}
	body := struct{ io.Reader }{archive} // net/http would close the caller's archive
	return done(c.wire.UploadTreeWithBody(ctx, id, &p, "application/x-tar", body,
		func(_ context.Context, r *http.Request) error {
			r.Header.Set("Expect", "100-continue") // so that an archive that is refused is not sent
			return nil
		}))
}

// maxChange limits an event of a watch, bytes: a path of 4 KiB, escaped. A lower limit would refuse
// long paths.
const maxChange = 64 << 10

// WatchFiles calls ready once it watches a directory, and with recursive everything below it, then
// calls emit with each change. It returns when ctx ends, with an error of emit, with an [*Error]
// when the sandbox ends or the server stops, or with [io.ErrUnexpectedEOF].
func (c *Client) WatchFiles(ctx context.Context, id, path string, recursive bool, ready func(),
	emit func(FileChange) error) error {
	p := watchFilesParams{Path: path}
	if recursive {
		p.Recursive = &recursive
	}
	resp, err := open(c.wire.WatchFiles(ctx, id, &p))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = readEvents(resp.Body, maxChange, func(_, event string, data []byte) error {
		switch event {
		case "ready":
			ready()
		case "change":
			var change FileChange
			if err := json.Unmarshal(data, &change); err != nil {
				return fmt.Errorf("decoding a change: %w", err)
			}
			return emit(change)
		case "error":
			return errorOfEvent(data)
		}
		return nil
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
