package agentapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/fault"
)

// MaxTar limits the size of an archive that is unpacked, and that of all files in it, bytes. A smaller
// limit refuses large trees, a larger one lets one call write for longer.
const MaxTar = 10_000_000_000

// Stat describes the file at a path. It describes a symbolic link itself and not its target.
// Errors: NotFound "file_not_found", Invalid ("invalid_path", "unknown_user"), Denied "file_denied".
func (c *Client) Stat(ctx context.Context, t Target, path, user string) (Entry, error) {
	if err := CheckPath(path); err != nil {
		return Entry{}, err
	}
	var e Entry
	err := c.call(ctx, t, c.Patience, http.MethodGet, "/files/stat", fileQuery(path, user), nil, &e)
	return e, olderAgent(errors.Join(err, e.check()))
}

// MakeDirectory makes a directory and its missing parents as the user, and describes the directory.
// mode holds its permission bits; nil means 0755. A directory that exists is not changed. Errors:
// Invalid ("invalid_path", "path_not_directory", "unknown_user"), Denied "file_denied", NoSpace
// "disk_full".
func (c *Client) MakeDirectory(ctx context.Context, t Target, path, user string, mode *fs.FileMode) (Entry, error) {
	if err := CheckPath(path); err != nil {
		return Entry{}, err
	}
	q := fileQuery(path, user)
	if mode != nil {
		q.Set("mode", strconv.FormatUint(uint64(mode.Perm()), 8))
	}
	var e Entry
	err := c.call(ctx, t, c.Patience, http.MethodPost, "/files/mkdir", q, nil, &e)
	return e, olderAgent(errors.Join(err, e.check()))
}

// Rename moves a file or directory to another path, makes missing parents of that, and describes
// the file at its new path. It replaces a file or an empty directory at the new path only if
// overwrite is true. Errors: NotFound "file_not_found", Conflict "path_exists", Invalid
// ("invalid_path", "path_not_directory", "path_is_directory", "directory_not_empty", "unknown_user";
// in field "path" or "to"), Denied "file_denied".
func (c *Client) Rename(ctx context.Context, t Target, from, to, user string, overwrite bool) (Entry, error) {
	if err := CheckPath(from); err != nil {
		return Entry{}, err
	}
	if err := CheckPath(to); err != nil {
		return Entry{}, inField(err, "to")
	}
	q := fileQuery(from, user)
	q.Set("to", to)
	if overwrite {
		q.Set("overwrite", "true")
	}
	var e Entry
	err := c.call(ctx, t, c.Patience, http.MethodPost, "/files/rename", q, nil, &e)
	return e, olderAgent(errors.Join(err, e.check()))
}

// inField returns a copy of a fault with another field, and other errors unchanged.
func inField(err error, field string) error {
	f := fault.As(err)
	if f == nil {
		return err
	}
	named := *f
	named.Field = field
	return &named
}

// DownloadTree opens a tar archive of everything below a directory, with names relative to the
// directory. Reading an incomplete archive ends with an error. The caller closes the archive. Errors:
// NotFound "file_not_found", Invalid ("invalid_path", "path_not_directory", "unknown_user"), Denied
// "file_denied".
func (c *Client) DownloadTree(ctx context.Context, t Target, path, user string) (io.ReadCloser, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url("/files/tar", fileQuery(path, user)), nil)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.do(req)
	if err != nil {
		return nil, olderAgent(err)
	}
	return resp.Body, nil
}

// UploadTree unpacks a tar archive into a directory, which it makes if it does not exist. The user
// owns all unpacked files; their permission bits are those of the archive. Files and links that exist
// are replaced. Each file appears whole or not at all; after an error, also one of body, the files
// before it have been written. Nothing is written outside the directory. Errors: Invalid
// ("invalid_path", "invalid_tar", "path_is_directory", "path_not_directory", "unknown_user"), Denied
// "file_denied", NoSpace "disk_full".
func (c *Client) UploadTree(ctx context.Context, t Target, path, user string, body io.Reader) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	watched := &watchedReader{r: body}
	defer watched.Close() // see Upload
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, t.url("/files/tar", fileQuery(path, user)), watched)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	req.Header.Set("Content-Type", "application/x-tar")
	req.Header.Set("Expect", "100-continue")
	req.ContentLength = -1
	resp, err := c.doFor(req, c.Patience, longPatience*c.Patience, c.Patience, patientPace)
	if err != nil {
		if broken := watched.broken(); broken != nil {
			return fmt.Errorf("reading the body: %w", broken)
		}
		return olderAgent(err)
	}
	defer resp.Body.Close()
	return drain(req.Context(), resp.Body)
}

// Kinds of a [Change].
const (
	ChangeCreate = "create"
	ChangeWrite  = "write"
	ChangeRemove = "remove"
	ChangeRename = "rename" // moved away; a create reports the new path, if that is watched
	ChangeMode   = "chmod"
)

// changes maps the agent's types of events to the kinds of a [Change].
var changes = map[filesystem.EventType]string{
	filesystem.EventType_EVENT_TYPE_CREATE: ChangeCreate,
	filesystem.EventType_EVENT_TYPE_WRITE:  ChangeWrite,
	filesystem.EventType_EVENT_TYPE_REMOVE: ChangeRemove,
	filesystem.EventType_EVENT_TYPE_RENAME: ChangeRename,
	filesystem.EventType_EVENT_TYPE_CHMOD:  ChangeMode,
}

// Change describes one change in a watched directory.
type Change struct {
	Type string // one of the kinds
	Name string // relative to the directory
}

// watchKeepalive is the interval at which the agent shows that it is alive while nothing changes.
// With more than twice the patience, a watch without changes would end as unreachable.
const watchKeepalive = 20 * time.Second

// Watch calls ready once it watches a directory, and with recursive everything below it, then calls
// emit with each change until ctx ends or emit fails. It watches at most 10000 directories and does
// not see changes in others. The last change is the removal or the renaming of the directory itself,
// whose Name is ".". Errors: NotFound "file_not_found", also after that last change, Invalid
// ("invalid_path", "path_not_directory").
func (c *Client) Watch(ctx context.Context, t Target, path string, recursive bool, ready func(),
	emit func(Change) error) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	base := &url.URL{Scheme: "http", Host: t.host()}
	client := filesystem.NewFilesystemClient(metered{c.http}, base.String(), connectOptions...)
	req := connect.NewRequest(&filesystem.WatchDirRequest{Path: path, Recursive: recursive, AllowNetworkMounts: true})
	req.Header().Set("Keepalive-Ping-Interval", strconv.Itoa(int(watchKeepalive.Seconds())))
	ctx, w := watching(ctx, c.Patience)
	defer w.end()
	stream, err := client.WatchDir(ctx, req)
	if err != nil {
		return connectError(ctx, err)
	}
	defer stream.Close()
	gone := false
	w.begun(c.Patience, math.MaxInt) // only the start of the watch sets the clock anew
	receive := func() bool {
		w.wait()
		defer w.heard(2)
		return stream.Receive()
	}
	for receive() {
		switch ev := stream.Msg().GetEvent().(type) {
		case *filesystem.WatchDirResponse_Start:
			w.begun(2*c.Patience, 1)
			ready()
		case *filesystem.WatchDirResponse_Filesystem:
			kind := changes[ev.Filesystem.GetType()]
			if kind == "" {
				continue // an agent of a newer version sent it
			}
			if len(ev.Filesystem.GetName()) > maxPath {
				return unusable(fmt.Errorf("a change has a name of %d bytes", len(ev.Filesystem.GetName())))
			}
			change := Change{Type: kind, Name: ev.Filesystem.GetName()}
			if change.Name != "" && !filepath.IsLocal(change.Name) {
				return unreachable(fmt.Errorf("the change of %q is not in the directory", change.Name))
			}
			gone = change.Name == "." && (kind == ChangeRemove || kind == ChangeRename)
			if err := emit(change); err != nil {
				return err
			}
		}
	}
	if err := stream.Err(); err != nil {
		return connectError(ctx, err)
	}
	if gone {
		return fault.New(fault.NotFound, fault.CodeFileNotFound, "the watched directory %q is gone", path)
	}
	return unreachable(errors.New("the watch ended"))
}
