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

// MaxTar is how large an archive may be that is unpacked, and the files in it, bytes.
const MaxTar = 10_000_000_000

// Stat describes what a path names; a symbolic link itself. Errors: NotFound
// "file_not_found", Invalid ("invalid_path", "unknown_user"), Denied "file_denied".
func (c *Client) Stat(ctx context.Context, t Target, path, user string) (Entry, error) {
	if err := CheckPath(path); err != nil {
		return Entry{}, err
	}
	var e Entry
	err := c.call(ctx, t, c.Patience, http.MethodGet, "/files/stat", fileQuery(path, user), nil, &e)
	return e, olderAgent(errors.Join(err, e.check()))
}

// MakeDirectory makes a directory with its parents, for the user, and describes it. mode is
// its permission bits, nil is 0755; one that is there already stays as it is. Errors: Invalid ("invalid_path",
// "path_not_directory", "unknown_user"), Denied "file_denied", NoSpace "disk_full".
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

// Rename gives a file or directory another path, making parents, and describes it there.
// What is there already is replaced only if overwrite says so, and a directory only if it is
// empty. Errors: NotFound "file_not_found", Conflict "path_exists", Invalid ("invalid_path",
// "path_not_directory", "path_is_directory", "directory_not_empty", "unknown_user"; in field "path" or "to"), Denied "file_denied".
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

func inField(err error, field string) error {
	f := fault.As(err)
	if f == nil {
		return err
	}
	named := *f
	named.Field = field
	return &named
}

// DownloadTree opens an archive of all that is below a directory, names relative to it. An
// archive that is not whole ends with an error of reading. The caller closes it. Errors: NotFound "file_not_found", Invalid
// ("invalid_path", "path_not_directory", "unknown_user"), Denied "file_denied".
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

// UploadTree unpacks an archive into a directory, making it if it is not there. Everything in it becomes the
// user's, with the permission bits of the archive; files are replaced, links too. Each file
// appears whole or not at all; after an error, one of body included, those before it are there.
// Nothing is written outside the directory. Errors: Invalid ("invalid_path", "invalid_tar", "path_is_directory", "path_not_directory",
// "unknown_user"), Denied "file_denied", NoSpace "disk_full".
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
	ChangeRename = "rename" // moved away; where it went is a create, if that is watched
	ChangeMode   = "chmod"
)

var changes = map[filesystem.EventType]string{
	filesystem.EventType_EVENT_TYPE_CREATE: ChangeCreate,
	filesystem.EventType_EVENT_TYPE_WRITE:  ChangeWrite,
	filesystem.EventType_EVENT_TYPE_REMOVE: ChangeRemove,
	filesystem.EventType_EVENT_TYPE_RENAME: ChangeRename,
	filesystem.EventType_EVENT_TYPE_CHMOD:  ChangeMode,
}

// Change is something that happened in a directory that is watched.
type Change struct {
	Type string // one of the kinds
	Name string // relative to the directory
}

// watchKeepalive is how often the agent is asked to say that it lives while nothing changes.
const watchKeepalive = 20 * time.Second

// Watch calls ready once it watches a directory, with recursive all below it too, then emit with each change, until ctx ends
// or emit fails. Watching 10000 directories is the most; changes in others are not seen. The removal and the renaming of the
// directory itself, whose Name is ".", is the last change. Errors: NotFound "file_not_found", also after that, Invalid ("invalid_path", "path_not_directory").
func (c *Client) Watch(ctx context.Context, t Target, path string, recursive bool, ready func(), emit func(Change) error) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	client := filesystem.NewFilesystemClient(metered{c.http}, (&url.URL{Scheme: "http", Host: t.host()}).String(), connectOptions...)
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
	w.begun(c.Patience, math.MaxInt) // until the watch has begun, whatever else comes
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
				continue // of an agent that is newer than we are
			}
			if len(ev.Filesystem.GetName()) > maxPath {
				return unusable(fmt.Errorf("a change has a name of %d bytes", len(ev.Filesystem.GetName())))
			}
			change := Change{Type: kind, Name: ev.Filesystem.GetName()}
			if change.Name != "" && !filepath.IsLocal(change.Name) {
				return unreachable(fmt.Errorf("a change of %q is none in the directory", change.Name))
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
		return fault.New(fault.NotFound, CodeFileNotFound, "the directory %q, which was watched, is gone", path)
	}
	return unreachable(errors.New("the watch ended"))
}
