package agentapi

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// UploadRequest is one file to write.
type UploadRequest struct {
	Path  string
	User  string       // writes it, and owns it and parents that had to be made; "" is the sandbox's default
	Owner string       // owns the file instead: a name or a number, "user" or "user:group"; "" is User
	Mode  *fs.FileMode // permission bits; nil is what a replaced file had, else 0644
	Body  io.Reader
	Size  int64 // bytes of Body; -1 when not known
}

// Upload streams a file into the sandbox. It appears whole under its path or
// not at all: after any error, one of Body included, what was there before is
// there still. An error of Body comes back wrapped. Errors: Invalid
// ("invalid_path", "path_is_directory", "path_not_directory", "unknown_user",
// "unknown_owner"), Denied "file_denied", NoSpace "disk_full".
func (c *Client) Upload(ctx context.Context, t Target, r UploadRequest) error {
	if err := CheckFilePath(r.Path); err != nil {
		return err
	}
	q := fileQuery(r.Path, r.User)
	if r.Owner != "" {
		q.Set("owner", r.Owner)
	}
	if r.Mode != nil {
		q.Set("mode", strconv.FormatUint(uint64(r.Mode.Perm()), 8))
	}
	body := &watchedReader{r: r.Body}
	// The transport may go on reading after it has returned; the caller's reader
	// must be left alone then.
	defer body.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, t.url("/files", q), body)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	req.ContentLength = r.Size
	if r.Size == 0 {
		req.Body = http.NoBody
	}
	// Asking first saves sending much to a path that is refused; for little, the
	// round trip costs more than it saves.
	const worthAsking = 1 << 20 // bytes
	if r.Size < 0 || r.Size > worthAsking {
		req.Header.Set("Expect", "100-continue")
	}
	resp, err := c.do(req)
	if err != nil {
		if broken := body.broken(); broken != nil {
			return fmt.Errorf("reading the body: %w", broken)
		}
		return err
	}
	defer resp.Body.Close()
	return drain(resp.Body)
}

// watchedReader remembers why reading ended, which the transport hides among
// the errors of the connection, and reads no more once it is closed.
type watchedReader struct {
	mu     sync.Mutex
	r      io.Reader
	err    error
	closed bool
}

func (w *watchedReader) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, io.ErrClosedPipe
	}
	n, err := w.r.Read(p)
	if err != nil && err != io.EOF {
		w.err = err
	}
	return n, err
}

// Close never fails. It waits for a Read under way.
func (w *watchedReader) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	return nil
}

func (w *watchedReader) broken() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Download is a file being read. The caller closes Body.
type Download struct {
	Body   io.ReadCloser
	Size   int64 // bytes of Body; -1 when not known
	Status int   // 200, 206 (a range) or 416 (a range outside the file)
	Header http.Header
}

// Download opens a file of the sandbox. rng is the text of a Range header, "" for
// the whole file. Errors: NotFound "file_not_found", Invalid ("invalid_path",
// "path_is_directory", "unknown_user"), Denied "file_denied".
func (c *Client) Download(ctx context.Context, t Target, path, user, rng string) (*Download, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url("/files", fileQuery(path, user)), nil)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := c.do(req)
	if err != nil {
		return nil, err
	}
	return &Download{Body: resp.Body, Size: resp.ContentLength, Status: resp.StatusCode, Header: resp.Header}, nil
}

// Remove removes a file, or a directory: an empty one, or with recursive any.
// Errors: NotFound "file_not_found", Invalid ("invalid_path",
// "directory_not_empty", "unknown_user"), Denied "file_denied". A recursive
// removal that fails may have removed a part.
func (c *Client) Remove(ctx context.Context, t Target, path, user string, recursive bool) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	q := fileQuery(path, user)
	if recursive {
		q.Set("recursive", "true")
	}
	return c.call(ctx, t, http.MethodDelete, "/files", q, nil, nil)
}

// Types of an [Entry].
const (
	TypeFile      = "file"
	TypeDirectory = "directory"
	TypeSymlink   = "symlink"
	TypeOther     = "other" // a device, socket or pipe
)

// Entry is one name in a directory. A symbolic link is described itself, not
// what it points to.
type Entry struct {
	Name          string    `json:"name"`
	Path          string    `json:"path"`
	RawPath       []byte    `json:"raw_path,omitempty"` // where it is not UTF-8; then Name and Path show it with U+FFFD
	Type          string    `json:"type"`
	Size          int64     `json:"size"` // bytes
	Mode          uint32    `json:"mode"` // permission, setuid, setgid and sticky bits as in stat(2)
	Owner         string    `json:"owner"`
	Group         string    `json:"group"`
	ModifiedAt    time.Time `json:"modified_at"`
	SymlinkTarget string    `json:"symlink_target,omitempty"` // as it is written in the link
}

// maxEntries is how many entries of a listing the host holds; at about 200
// bytes each that is 20 MB.
const maxEntries = 100_000

// List lists what is below a directory, depth levels deep (1: its own entries),
// a parent before its children, in lexical order. It does not follow links
// below path. Errors: NotFound "file_not_found", Invalid ("invalid_path",
// "path_not_directory", "unknown_user"), Denied "file_denied", TooLarge
// "listing_too_large" for more than 100000 entries.
func (c *Client) List(ctx context.Context, t Target, path, user string, depth int) ([]Entry, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	q := fileQuery(path, user)
	q.Set("depth", strconv.Itoa(depth))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url("/files/list", q), nil)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	const maxLine = 64 << 10 // bytes; a path and a link target of 4 KiB each, escaped
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 4<<10), maxLine)
	entries := []Entry{}
	for lines.Scan() {
		if len(entries) == maxEntries {
			return nil, fault.New(fault.TooLarge, CodeListingTooLarge, "more than %d entries: list fewer levels", maxEntries)
		}
		var e Entry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, unreachable(fmt.Errorf("decoding an entry: %w", err))
		}
		entries = append(entries, e)
	}
	if err := lines.Err(); err != nil {
		return nil, callError(ctx, err)
	}
	return entries, nil
}

func fileQuery(path, user string) url.Values {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	return q
}
