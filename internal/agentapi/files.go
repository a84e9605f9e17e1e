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

// UploadRequest describes a file to write.
type UploadRequest struct {
	Path  string
	User  string       // writes the file, and owns it and the parents that are made; "" is the sandbox's default
	Owner string       // owns the file instead: a name or a number, "user" or "user:group"; "" is User
	Mode  *fs.FileMode // permission bits; nil is those of a replaced file, else 0644
	Body  io.Reader
	Size  int64 // bytes of Body; -1 when not known
}

// Upload streams a file into the sandbox. The file appears whole under its path or
// not at all: after any error, also one of Body, a file that was there before is
// unchanged. Upload returns an error of Body wrapped. Other errors: Invalid
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
	// The transport may go on reading after it has returned, when the caller's
	// reader must no longer be used.
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
	// Asking first saves sending a large body to a path that is refused. For a
	// small body the round trip costs more than it saves.
	if r.Size < 0 || r.Size > largeBody {
		req.Header.Set("Expect", "100-continue")
	}
	resp, err := c.doFor(req, c.Patience, headPatience(c.Patience, r.Size), c.Patience, patientPace)
	if err != nil {
		if broken := body.broken(); broken != nil {
			return fmt.Errorf("reading the body: %w", broken)
		}
		return err
	}
	defer resp.Body.Close()
	return drain(req.Context(), resp.Body)
}

// largeBody is the length, in bytes, above which the host asks the agent before it sends a body, and the
// agent may take long to write it. A smaller value costs round trips, a larger one sends more bytes that
// are refused.
const largeBody = 1 << 20

// headPatience returns the patience for the head of the answer to a body of size bytes, or of unknown size
// if size is -1.
func headPatience(patience time.Duration, size int64) time.Duration {
	if size < 0 || size > largeBody {
		return longPatience * patience
	}
	return 2 * patience
}

// watchedReader remembers the error that ended reading, which the transport hides
// among the errors of the connection, and does not read once it is closed.
type watchedReader struct {
	mu sync.Mutex
	// +checklocks:mu
	r io.Reader
	// +checklocks:mu
	err error
	// +checklocks:mu
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

// broken returns the error that ended reading, nil if there is none.
func (w *watchedReader) broken() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Download holds a file that is being read. The caller closes Body.
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

// Remove removes a file or an empty directory, with recursive any directory. A
// recursive removal that fails may have removed a part. Errors: NotFound
// "file_not_found", Invalid ("invalid_path", "directory_not_empty",
// "unknown_user"), Denied "file_denied".
func (c *Client) Remove(ctx context.Context, t Target, path, user string, recursive bool) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	q := fileQuery(path, user)
	within := c.Patience
	if recursive {
		q.Set("recursive", "true")
		within *= longPatience
	}
	return c.call(ctx, t, within, http.MethodDelete, "/files", q, nil, nil)
}

// Types of an [Entry].
const (
	TypeFile      = "file"
	TypeDirectory = "directory"
	TypeSymlink   = "symlink"
	TypeOther     = "other" // a device, socket or pipe
)

// Entry describes a file by one of its names. It describes a symbolic link itself
// and not its target.
type Entry struct {
	Name          string    `json:"name"`
	Path          string    `json:"path"`
	RawPath       []byte    `json:"raw_path,omitempty"` // a path that is not UTF-8; Name and Path then have U+FFFD
	Type          string    `json:"type"`
	Size          int64     `json:"size"` // bytes
	Mode          uint32    `json:"mode"` // permission, setuid, setgid and sticky bits as in stat(2)
	Owner         string    `json:"owner"`
	Group         string    `json:"group"`
	ModifiedAt    time.Time `json:"modified_at"`
	SymlinkTarget string    `json:"symlink_target,omitempty"` // as it is written in the link
}

// MaxEntries limits the entries that [Client.List] emits. A lower limit refuses large directories,
// a higher one lets one listing take more of the host's time.
const MaxEntries = 100_000

// Limits of the texts in an entry, bytes. Lower ones refuse honest entries, higher ones let an agent
// take more of the host's memory.
const (
	maxName = 255 // Linux's
	maxUser = 256 // plenty for the name of a user
	// maxLine limits an entry as JSON, which escapes one byte as up to six.
	maxLine = 64 << 10
)

// List calls emit with each entry below a directory, depth levels deep (1: its own entries), a
// parent before its children, in lexical order. It does not follow links below path. An error of
// emit ends it. Errors: NotFound "file_not_found", Invalid ("invalid_path", "path_not_directory",
// "unknown_user"), Denied "file_denied", TooLarge "listing_too_large" for more than [MaxEntries]:
// before the first entry if the directory at path itself has as many, else after the last one that
// is emitted.
func (c *Client) List(ctx context.Context, t Target, path, user string, depth int, emit func(Entry) error) error {
	if err := CheckPath(path); err != nil {
		return err
	}
	q := fileQuery(path, user)
	q.Set("depth", strconv.Itoa(depth))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url("/files/list", q), nil)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 4<<10), maxLine)
	for n := 0; lines.Scan(); n++ {
		if n == MaxEntries {
			return fault.New(fault.TooLarge, fault.CodeListingTooLarge,
				"more than %d entries: list fewer levels", MaxEntries)
		}
		var e Entry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return unusable(fmt.Errorf("decoding an entry: %w", err))
		}
		if err := e.check(); err != nil {
			return err
		}
		if err := emit(e); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return callError(ctx, err)
	}
	return nil
}

// check refuses an entry that no file can have, and clears an impossible time.
func (e *Entry) check() error {
	switch {
	case len(e.Name) > 3*maxName, len(e.Path) > 3*maxPath, len(e.SymlinkTarget) > 3*maxPath:
		// Each byte that is not UTF-8 became three.
		return unusable(fmt.Errorf("an entry has names of %d, %d and %d bytes",
			len(e.Name), len(e.Path), len(e.SymlinkTarget)))
	case len(e.RawPath) > maxPath:
		return unusable(fmt.Errorf("an entry has a raw path of %d bytes", len(e.RawPath)))
	case len(e.Owner) > maxUser, len(e.Group) > maxUser, len(e.Type) > maxUser:
		return unusable(fmt.Errorf("an entry has an owner of %d and a group of %d bytes", len(e.Owner), len(e.Group)))
	}
	// A year of five digits cannot be encoded as JSON.
	if year := e.ModifiedAt.UTC().Year(); year < 0 || year > 9999 {
		e.ModifiedAt = time.Time{}
	}
	return nil
}

func fileQuery(path, user string) url.Values {
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	return q
}
