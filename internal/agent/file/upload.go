package file

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
)

// written describes a written file as E2B does.
type written struct {
	Name     string            `json:"name"`
	Path     string            `json:"path"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// post answers POST /files as E2B's server does. It writes files in place, so that
// watchers see a write and links stay links.
func (f *Files) post(w http.ResponseWriter, r *http.Request) {
	done, err := f.upload(r)
	if err != nil {
		const maxRest = 128 << 20 // bytes; see put
		_, _ = io.CopyN(io.Discard, r.Body, maxRest)
		answer.Error(w, err)
		return
	}
	answer.JSON(w, http.StatusOK, done)
}

func (f *Files) upload(r *http.Request) ([]written, error) {
	u, err := f.named(r.URL.Query().Get("username"))
	if err != nil {
		return nil, err
	}
	meta, err := metadataOf(r.Header)
	if err != nil {
		return nil, err
	}
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return nil, answer.Bad("content type: %s", err)
	}
	var body io.Reader = r.Body
	switch enc := strings.ToLower(strings.TrimSpace(r.Header.Get("Content-Encoding"))); enc {
	case "", "identity":
	case "gzip":
		unzipped, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, answer.Bad("gzip: %s", err)
		}
		body = unzipped
	default:
		return nil, answer.Bad("content encoding %q is not supported", enc)
	}
	q := r.URL.Query().Get("path")
	switch kind {
	case "multipart/form-data":
		return f.uploadParts(multipart.NewReader(body, params["boundary"]), q, u, meta)
	case "application/octet-stream":
		one, err := f.writeInPlace(q, u, meta, body)
		if err != nil {
			return nil, err
		}
		return []written{one}, nil
	}
	return nil, answer.Bad("content type %q is neither multipart/form-data nor application/octet-stream", kind)
}

func (f *Files) uploadParts(parts *multipart.Reader, query string, u *account.User,
	meta map[string]string) ([]written, error) {
	done := []written{}
	seen := map[string]bool{}
	for {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			return done, nil
		}
		if err != nil {
			return nil, answer.Bad("multipart: %s", err)
		}
		name, filename := partNames(part.Header.Get("Content-Disposition"))
		if name != "file" {
			continue
		}
		p := query
		if p == "" {
			p = filename
		}
		if abs, err := account.ResolvePath(p, u.Home); err == nil {
			if seen[abs] {
				return nil, answer.Bad("path %q is uploaded twice in one request", p)
			}
			seen[abs] = true
		}
		one, err := f.writeInPlace(p, u, meta, part)
		if err != nil {
			return nil, err
		}
		done = append(done, one)
	}
}

// partNames returns a part's name and file name. The file name is a path; the
// standard library's accessor would cut its directories off.
func partNames(disposition string) (name, filename string) {
	kind, params, err := mime.ParseMediaType(disposition)
	if err != nil || kind != "form-data" {
		return "", ""
	}
	return params["name"], params["filename"]
}

// writeInPlace writes a file. An existing one stays the same file.
func (f *Files) writeInPlace(query string, u *account.User, meta map[string]string, body io.Reader) (written, error) {
	p, err := account.ResolvePath(query, u.Home)
	if err != nil {
		return written{}, err
	}
	if err := makeParents(p, u); err != nil {
		return written{}, answer.OfFile(err, p)
	}
	file, _, err := openRegular(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err != nil {
		return written{}, err
	}
	defer file.Close()
	if err := file.Chown(int(u.UID), int(u.GID)); err != nil {
		return written{}, answer.OfFile(err, p)
	}
	if err := copyInto(file, body); err != nil {
		return written{}, bodyProblem(err, p)
	}
	if err := setMetadata(p, meta); err != nil {
		return written{}, err
	}
	if err := file.Close(); err != nil {
		return written{}, answer.OfFile(err, p)
	}
	return written{Name: path.Base(p), Path: p, Type: "file", Metadata: meta}, nil
}

// bodyProblem returns the problem for an error of the file or of the body.
func bodyProblem(err error, p string) error {
	var onPath *os.PathError
	if errors.As(err, &onPath) {
		return answer.OfFile(err, p)
	}
	return answer.Bad("reading the body: %s", err)
}

// Metadata of files is stored in extended attributes with the prefix metadataPrefix.
const (
	metadataPrefix = "user.e2b."
	metadataHeader = "X-Metadata-"
	maxMetadataKey = 246  // bytes; Linux takes 255 with the prefix
	maxMetadata    = 4096 // bytes of all keys and values; more is refused
)

// metadataOf returns the metadata in the X-Metadata-… headers, nil if there is none.
func metadataOf(h http.Header) (map[string]string, error) {
	var meta map[string]string
	total := 0
	for name, values := range h {
		if len(name) <= len(metadataHeader) || !strings.EqualFold(name[:len(metadataHeader)], metadataHeader) {
			continue
		}
		key, value := strings.ToLower(name[len(metadataHeader):]), values[0]
		if len(key) > maxMetadataKey {
			return nil, answer.Bad("metadata key of %d bytes: at most %d are possible", len(key), maxMetadataKey)
		}
		for _, c := range []byte(key + value) {
			if c < 0x20 || c > 0x7e {
				return nil, answer.Bad("metadata %q is not printable ASCII", key)
			}
		}
		if total += len(key) + len(value); total > maxMetadata {
			return nil, answer.Bad("metadata is longer than %d bytes", maxMetadata)
		}
		if meta == nil {
			meta = map[string]string{}
		}
		meta[key] = value
	}
	return meta, nil
}

// setMetadata replaces the file's metadata with meta.
func setMetadata(p string, meta map[string]string) error {
	for key := range getMetadata(p) {
		if _, stays := meta[key]; stays {
			continue
		}
		if err := unix.Removexattr(p, metadataPrefix+key); err != nil {
			return answer.OfFile(err, p)
		}
	}
	for key, value := range meta {
		if err := unix.Setxattr(p, metadataPrefix+key, []byte(value), 0); err != nil {
			return fmt.Errorf("setting metadata: %w", err)
		}
	}
	return nil
}

// getMetadata returns a file's metadata, nil if it has none or its file system has
// no extended attributes.
func getMetadata(p string) map[string]string {
	n, err := unix.Listxattr(p, nil)
	if err != nil || n == 0 {
		return nil
	}
	names := make([]byte, n)
	if n, err = unix.Listxattr(p, names); err != nil {
		return nil
	}
	var meta map[string]string
	for name := range strings.SplitSeq(string(names[:n]), "\x00") {
		key, ours := strings.CutPrefix(name, metadataPrefix)
		if !ours || key == "" {
			continue
		}
		value := make([]byte, maxMetadata)
		n, err := unix.Getxattr(p, name, value)
		if err != nil {
			continue
		}
		if meta == nil {
			meta = map[string]string{}
		}
		meta[key] = strings.ToValidUTF8(string(value[:n]), "\uFFFD")
	}
	return meta
}

// compose answers POST /files/compose: it writes the sources one after the other to
// the destination and removes them.
func (f *Files) compose(w http.ResponseWriter, r *http.Request) {
	var req struct {
		SourcePaths []string `json:"source_paths"`
		Destination string   `json:"destination"`
		Username    string   `json:"username"`
	}
	const maxRequest = 1 << 20 // bytes
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&req); err != nil {
		answer.Error(w, answer.Bad("compose: %s", err))
		return
	}
	one, err := f.concat(req.SourcePaths, req.Destination, req.Username)
	if err != nil {
		answer.Error(w, err)
		return
	}
	answer.JSON(w, http.StatusOK, one)
}

func (f *Files) concat(sources []string, destination, username string) (written, error) {
	u, err := f.named(username)
	if err != nil {
		return written{}, err
	}
	if len(sources) == 0 || destination == "" {
		return written{}, answer.Bad("source_paths and destination are required")
	}
	p, err := account.ResolvePath(destination, u.Home)
	if err != nil {
		return written{}, err
	}
	to, err := writeTarget(p)
	if err != nil {
		return written{}, err
	}
	all := &chain{}
	defer all.close()
	for _, s := range sources {
		abs, err := account.ResolvePath(s, u.Home)
		if err != nil {
			return written{}, err
		}
		// Only check here that the source can be opened; chain opens the sources one by one.
		file, _, err := openRegular(abs, os.O_RDONLY, 0)
		if err != nil {
			return written{}, err
		}
		_ = file.Close()
		all.paths = append(all.paths, abs)
	}
	if err := makeParents(to, u); err != nil {
		return written{}, answer.OfFile(err, to)
	}
	paths := all.paths
	if err := writeWhole(to, u, nil, all); err != nil {
		return written{}, answer.OfFile(err, to)
	}
	for _, s := range paths {
		if s == p || s == to {
			continue
		}
		if err := os.Remove(s); err != nil && !errors.Is(err, os.ErrNotExist) {
			return written{}, answer.OfFile(err, s)
		}
	}
	return written{Name: path.Base(p), Path: p, Type: "file"}, nil
}

// chain reads files one after the other, one open at a time.
type chain struct {
	paths []string
	file  *os.File
}

func (c *chain) Read(b []byte) (int, error) {
	for {
		if c.file == nil {
			if len(c.paths) == 0 {
				return 0, io.EOF
			}
			file, _, err := openRegular(c.paths[0], os.O_RDONLY, 0)
			if err != nil {
				return 0, err
			}
			c.file, c.paths = file, c.paths[1:]
		}
		n, err := c.file.Read(b)
		if n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		c.close()
	}
}

func (c *chain) close() {
	_ = c.file.Close()
	c.file = nil
}
