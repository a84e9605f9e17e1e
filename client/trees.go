package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
)

// StatFile describes what a path names, a symbolic link itself.
func (c *Client) StatFile(ctx context.Context, id, path string) (*FileEntry, error) {
	return decode[FileEntry](c.wire.StatFile(ctx, id, &StatFileParams{Path: path}))
}

// MakeDirectoryOptions says how to make a directory.
type MakeDirectoryOptions struct {
	Mode  *fs.FileMode // permission bits; nil is 0755
	Owner string       // as in [WriteFileOptions]
}

// MakeDirectory makes a directory with its parents. One that is there stays as it is.
func (c *Client) MakeDirectory(ctx context.Context, id, path string, o MakeDirectoryOptions) (*FileEntry, error) {
	r := MakeDirectoryRequest{Path: path}
	if o.Mode != nil {
		r.Mode = new("0" + strconv.FormatUint(uint64(o.Mode.Perm()), 8))
	}
	if o.Owner != "" {
		r.Owner = &o.Owner
	}
	return decode[FileEntry](c.wire.MakeDirectory(ctx, id, r))
}

// RenameFile gives a file or directory another path. What is there already is replaced only
// if overwrite says so.
func (c *Client) RenameFile(ctx context.Context, id, from, to string, overwrite bool) (*FileEntry, error) {
	r := RenameFileRequest{From: from, To: to}
	if overwrite {
		r.Overwrite = &overwrite
	}
	return decode[FileEntry](c.wire.RenameFile(ctx, id, r))
}

// DownloadTree opens a tar archive of everything below a directory, names relative to it. An
// archive that is not whole ends with an error of reading. The caller closes it.
func (c *Client) DownloadTree(ctx context.Context, id, path string) (io.ReadCloser, error) {
	resp, err := open(c.wire.DownloadTree(ctx, id, &DownloadTreeParams{Path: path}))
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// UploadTree unpacks a tar archive into a directory, making it if it is not there. owner is as in
// [WriteFileOptions]. After an error, what came before it is there. archive is not closed.
func (c *Client) UploadTree(ctx context.Context, id, path string, archive io.Reader, owner string) error {
	p := UploadTreeParams{Path: path}
	if owner != "" {
		p.Owner = &owner
	}
	return done(c.wire.UploadTreeWithBody(ctx, id, &p, "application/x-tar", struct{ io.Reader }{archive}, func(_ context.Context, r *http.Request) error {
		r.Header.Set("Expect", "100-continue") // what is refused need not be sent
		return nil
	}))
}

// maxChange bounds one event of a watch, bytes: a path of 4 KiB, escaped.
const maxChange = 64 << 10

// WatchFiles calls ready once changes in a directory are seen, with recursive those in all
// below it too, then emit with each. It ends with ctx, with an error of emit, with an [*Error]
// when the sandbox goes or the server stops, or with an [io.ErrUnexpectedEOF].
func (c *Client) WatchFiles(ctx context.Context, id, path string, recursive bool, ready func(), emit func(FileChange) error) error {
	p := WatchFilesParams{Path: path}
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
