package template

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// uploadKept is the time for which an upload is kept after its last use. With a shorter one a slow
	// client would have to send files again between its upload and its build; a longer one keeps files
	// that no build needs any more on the disk.
	uploadKept = time.Hour
	// maxUploads bounds the uploads of one organization, of which small ones cost memory only. Beyond,
	// the one that was used the longest time ago is forgotten.
	maxUploads = 5000
)

// uploads remembers archives of files that organizations sent for builds to come, by the names that
// their clients give them. A name is the client's word; what counts for builds is the content. They
// are lost with the process: clients then send them again.
type uploads struct {
	mu sync.Mutex
	// +checklocks:mu
	byOrg map[string]map[string]*upload
}

type upload struct {
	blob string
	size int64
	used time.Time
}

// get returns the blob of an upload, and marks the upload as used; "" if there is none.
func (u *uploads) get(org, name string) string {
	u.mu.Lock()
	defer u.mu.Unlock()
	found := u.byOrg[org][name]
	if found == nil {
		return ""
	}
	found.used = time.Now()
	return found.blob
}

func (u *uploads) put(org, name, blob string, size int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byOrg[org] == nil {
		u.byOrg[org] = map[string]*upload{}
	}
	all := u.byOrg[org]
	all[name] = &upload{blob, size, time.Now()}
	if len(all) <= maxUploads {
		return
	}
	oldest := ""
	for name, up := range all {
		if oldest == "" || up.used.Before(all[oldest].used) {
			oldest = name
		}
	}
	delete(all, oldest)
}

// sizes returns the sizes of an organization's uploads by blob.
func (u *uploads) sizes(org string) contextSizes {
	u.mu.Lock()
	defer u.mu.Unlock()
	all := contextSizes{}
	for _, up := range u.byOrg[org] {
		all[up.blob] = max(up.size, leastSize)
	}
	return all
}

// expire forgets the uploads that were not used since a time, and returns the blobs of the others.
func (u *uploads) expire(since time.Time) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var kept []string
	for org, all := range u.byOrg {
		for name, up := range all {
			if up.used.Before(since) {
				delete(all, name)
			} else {
				kept = append(kept, up.blob)
			}
		}
		if len(all) == 0 {
			delete(u.byOrg, org)
		}
	}
	return kept
}

// HasUpload reports whether an organization's upload is there, and keeps it for an hour.
func (s *Service) HasUpload(org, name string) bool { return s.uploads.get(org, name) != "" }

// PutUpload stores an upload, a tar, plain or compressed with gzip, of length bytes; negative is
// unknown. It has the limits and the errors of a build context. It asks still whether the caller may
// still upload when all bytes have come; an error of it refuses the upload.
func (s *Service) PutUpload(ctx context.Context, org, name string, r io.Reader, length int64,
	still func(context.Context) error) error {
	if err := s.mayBuild(); err != nil {
		return err
	}
	blob, err := s.putContext(ctx, org, r, length)
	if err != nil {
		return err
	}
	if err := still(ctx); err != nil {
		return err
	}
	size, err := s.contexts.Size(blob)
	if err != nil {
		return fmt.Errorf("looking at an upload: %w", err)
	}
	s.uploads.put(org, name, blob, size)
	return nil
}

// UploadKind returns the type of what an upload has at a path: a directory, a file (0) or a symbolic
// link. A path that is none of its entries is a directory above them.
func (s *Service) UploadKind(ctx context.Context, org, name, from string) (fs.FileMode, error) {
	entries, closeAll, err := s.openUpload(org, name, &unpacking{ctx: ctx, left: maxFirstHeader})
	if err != nil {
		return 0, err
	}
	defer closeAll()
	// Clients write what they were asked for first.
	h, err := entries.Next()
	if err != nil {
		return 0, brokenUpload(err)
	}
	if path.Clean(h.Name) != from {
		return fs.ModeDir, nil
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		return fs.ModeSymlink, nil
	case tar.TypeReg:
		return 0, nil
	}
	return fs.ModeDir, nil
}

// maxFirstHeader bounds what is unpacked of an upload to find its first entry, in bytes: a header and
// the long names before it.
const maxFirstHeader = 64 << 10

// unpacking bounds what is read of uploads after they are unpacked. A few bytes can unpack to a
// thousand times as many, which take CPU even if nothing is made of them.
type unpacking struct {
	ctx  context.Context
	left int64
}

// of returns a reader that fails when the context ends or too much was read.
func (u *unpacking) of(r io.Reader) io.Reader { return unpacked{u, r} }

type unpacked struct {
	*unpacking
	from io.Reader
}

func (u unpacked) Read(b []byte) (int, error) {
	if err := context.Cause(u.ctx); err != nil {
		return 0, err
	}
	if u.left <= 0 {
		return 0, fault.InvalidField("files", "its files unpack to more than is allowed")
	}
	n, err := u.from.Read(b[:min(int64(len(b)), u.left)])
	u.left -= int64(n)
	return n, err
}

func (s *Service) openUpload(org, name string, bound *unpacking) (*tar.Reader, func(), error) {
	blob := s.uploads.get(org, name)
	if blob == "" {
		return nil, nil, fault.InvalidField("files",
			"its files were not uploaded, or so long ago that they were removed: build the template again")
	}
	f, err := s.contexts.Open(bound.ctx, blob)
	if err != nil {
		return nil, nil, fmt.Errorf("opening an upload: %w", err)
	}
	closeFile := func() { _ = f.Close() } // it was only read
	buffered := bufio.NewReaderSize(f, 64<<10)
	if magic, _ := buffered.Peek(2); !isGzip(magic) {
		return tar.NewReader(bound.of(buffered)), closeFile, nil
	}
	plain, err := gzip.NewReader(buffered)
	if err != nil {
		closeFile()
		return nil, nil, brokenUpload(err)
	}
	return tar.NewReader(bound.of(plain)), closeFile, nil
}

func brokenUpload(err error) error {
	if fault.As(err) != nil {
		return err
	}
	return fault.InvalidField("files", "its files are no tar archive that can be read: %v", err)
}

// Part places an upload in the context of a build.
type Part struct {
	Upload string // its name
	From   string // what is taken of it: a path, or a directory whose content is taken
	Dir    string // the directory in the context
	As     string // the new name of what is taken, if that is no directory
	Step   string // for errors
}

// assemble writes a context of a Dockerfile and parts, a tar that is the same for the same inputs.
// Close ends it; it must be called.
func (s *Service) assemble(ctx context.Context, org, dockerfile string, parts []Part) io.ReadCloser {
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	a := &assembled{PipeReader: r, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(a.done)
		// Headers and entries that are left out come on top of what the context may have.
		bound := &unpacking{ctx: ctx, left: 2 * s.cfg.ContextLimit}
		w.CloseWithError(s.writeContext(w, org, dockerfile, parts, bound))
	}()
	return a
}

// assembled is a context while it is written.
type assembled struct {
	*io.PipeReader
	cancel context.CancelFunc
	done   chan struct{}
}

// Close ends the writing of the context and waits for its end.
func (a *assembled) Close() error {
	a.cancel()
	err := a.PipeReader.Close()
	<-a.done
	return err
}

func (s *Service) writeContext(to io.Writer, org, dockerfile string, parts []Part, bound *unpacking) error {
	w := tar.NewWriter(to)
	h := tar.Header{Typeflag: tar.TypeReg, Name: "Dockerfile", Mode: 0o644, Size: int64(len(dockerfile))}
	if err := w.WriteHeader(&h); err != nil {
		return err
	}
	if _, err := io.WriteString(w, dockerfile); err != nil {
		return err
	}
	for i, p := range parts {
		if err := s.writePart(w, org, p, bound); err != nil {
			return &PartError{Part: i, Step: p.Step, Cause: err}
		}
	}
	return w.Close()
}

// PartError is the error of a part of a context.
type PartError struct {
	Part  int // from 0
	Step  string
	Cause error // without the step
}

func (e *PartError) Error() string { return e.Step + ": " + e.Cause.Error() }

// Unwrap returns the cause. If the caller is at fault, it names the step.
func (e *PartError) Unwrap() error {
	f := fault.As(e.Cause)
	if f == nil {
		return e.Cause
	}
	named := f.Because(e.Cause)
	named.Detail = e.Step + ": " + f.Detail
	return named
}

func (s *Service) writePart(w *tar.Writer, org string, p Part, bound *unpacking) error {
	entries, closeAll, err := s.openUpload(org, p.Upload, bound)
	if err != nil {
		return err
	}
	defer closeAll()
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: p.Dir + "/", Mode: 0o755}); err != nil {
		return err
	}
	for {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return brokenUpload(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := p.place(h.Name)
		if err != nil {
			return err
		}
		if name == p.Dir {
			continue // the directory itself
		}
		out := &tar.Header{Typeflag: h.Typeflag, Name: name, Mode: h.Mode & 0o7777, ModTime: h.ModTime, Size: h.Size,
			Linkname: h.Linkname}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeSymlink:
		case tar.TypeDir:
			out.Name += "/"
		case tar.TypeLink:
			if out.Linkname, err = p.place(h.Linkname); err != nil {
				return err
			}
		default:
			return fault.InvalidField("files", "entry %.200q is no file, directory or link", h.Name)
		}
		if err := w.WriteHeader(out); err != nil {
			return brokenUpload(err)
		}
		if _, err := io.Copy(w, entries); err != nil {
			return brokenUpload(err)
		}
	}
}

// place returns the path in the context of an entry of the upload.
func (p Part) place(name string) (string, error) {
	clean := path.Clean(name)
	if strings.ContainsRune(name, 0) || !filepath.IsLocal(clean) {
		return "", fault.InvalidField("files",
			"the path of entry %.200q leads out of the directory of files", name)
	}
	rest, below := strings.CutPrefix(clean, p.From+"/")
	if p.From == "." {
		rest, below = clean, clean != "."
	}
	switch {
	case p.As != "" && clean == p.From:
		return path.Join(p.Dir, p.As), nil
	case p.As == "" && clean == p.From:
		return p.Dir, nil
	case p.As == "" && below:
		return path.Join(p.Dir, rest), nil
	}
	return "", fault.InvalidField("files", "entry %.200q does not belong to %.200q", name, p.From)
}
