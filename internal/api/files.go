package api

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// maxFile is the size in bytes of the largest file that can be written. It is part of the
	// contract.
	maxFile = 100_000_000
	// Depths of a listing. They are part of the contract.
	defaultDepth = 1
	maxDepth     = 10
)

// WriteFile answers PUT /v1/sandboxes/{id}/files.
func (s *server) WriteFile(w http.ResponseWriter, r *http.Request, id SandboxID, params WriteFileParams) {
	upload, err := uploadOf(w, r, params)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		err := s.Agent.Upload(r.Context(), t, upload)
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return ownerError(err)
	})
}

func uploadOf(w http.ResponseWriter, r *http.Request, params WriteFileParams) (agentapi.UploadRequest, error) {
	out := agentapi.UploadRequest{Path: params.Path, Size: r.ContentLength, Body: http.NoBody}
	if err := agentapi.CheckFilePath(params.Path); err != nil {
		return out, err
	}
	if params.Mode != nil {
		mode, err := fileMode(*params.Mode)
		if err != nil {
			return out, err
		}
		out.Mode = &mode
	}
	if params.Owner != nil {
		if *params.Owner == "" {
			return out, fault.InvalidField("owner", "must be the name or number of a user, not empty")
		}
		// The file is written as its owner, so that the owner also owns new parent directories.
		out.User = *params.Owner
	}
	if r.ContentLength > maxFile {
		return out, errFileTooLarge
	}
	if r.Body != nil {
		out.Body = newUpload(r, maxFile, errFileTooLarge)
	}
	return out, nil
}

// ownerError renames the field of an error from the agent's name for it, user, to this call's,
// owner.
func ownerError(err error) error {
	f := fault.As(err)
	if f == nil || f.Field != "user" {
		return err
	}
	named := f.Because(err)
	named.Field = "owner"
	return named
}

// errFileTooLarge refuses a file over maxFile. It is Invalid, not TooLarge, because the contract
// has 400 here.
var errFileTooLarge = fault.New(fault.Invalid, fault.CodeFileTooLarge, "a file may have %d bytes", maxFile)

// upload reads the body of a call. It refuses more than left bytes and a caller that stalls.
type upload struct {
	body io.Reader
	left int64
	over error // the error for a body of more than left bytes
}

// newUpload returns the body of a call, which may have most bytes.
func newUpload(r *http.Request, most int64, over error) *upload {
	callOf(r).Body.Piecewise(callOf(r).Patience.Stall)
	return &upload{body: r.Body, left: most, over: over}
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.body.Read(p)
	if u.left -= int64(n); u.left < 0 {
		return 0, u.over
	}
	return n, err
}

// contentRange matches a well-formed Content-Range. The header must be checked because it comes
// from inside the sandbox.
var contentRange = regexp.MustCompile(`^bytes (\d+-\d+|\*)/(\d+|\*)$`)

// copyPiece is the number of bytes of a file that are held at once.
const copyPiece = 64 << 10

// ReadFile answers GET /v1/sandboxes/{id}/files.
func (s *server) ReadFile(w http.ResponseWriter, r *http.Request, id SandboxID, params ReadFileParams) {
	if err := checkNotRoot(params.Path); err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		if err := callOf(r).Account.Take(passCost); err != nil {
			return err
		}
		file, err := s.Agent.Download(r.Context(), t, params.Path, "", rangeOf(r.Header))
		if err != nil {
			return err
		}
		defer file.Body.Close()
		s.sendFile(w, r, file)
		return nil
	})
}

// checkNotRoot refuses paths that no file can have, without waking the sandbox.
func checkNotRoot(p string) error {
	if err := agentapi.CheckPath(p); err != nil {
		return err
	}
	if path.Clean(p) == "/" {
		return fault.InvalidField("path", "is the root directory")
	}
	return nil
}

// rangeOf returns the range to ask the agent for, or "" for the whole file. Requests for several
// ranges and conditional ones (If-Range) get the whole file, as RFC 9110 allows; ranges in another
// unit than bytes get it too, as RFC 9110 demands.
func rangeOf(h http.Header) string {
	text := h.Get("Range")
	if unit, _, _ := strings.Cut(text, "="); unit != "bytes" || strings.Contains(text, ",") || h.Get("If-Range") != "" {
		return ""
	}
	return text
}

func (s *server) sendFile(w http.ResponseWriter, r *http.Request, file *agentapi.Download) {
	h := w.Header()
	part := file.Header.Get("Content-Range")
	if !contentRange.MatchString(part) {
		part = ""
	}
	if file.Status == http.StatusRequestedRangeNotSatisfiable {
		if part != "" {
			h.Set("Content-Range", part)
		}
		s.problem(w, r, file.Status, fault.InvalidField("Range", "lies outside the file"))
		return
	}
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", "attachment") // no browser displays it, whatever type it guesses
	h.Set("Cache-Control", "no-store")
	h.Set("Accept-Ranges", "bytes")
	if file.Size >= 0 {
		h.Set("Content-Length", strconv.FormatInt(file.Size, 10))
	}
	status := http.StatusOK
	if file.Status == http.StatusPartialContent && part != "" && rangeOf(r.Header) != "" {
		status = http.StatusPartialContent
		h.Set("Content-Range", part)
	}
	w.WriteHeader(status)
	if r.Method == http.MethodHead {
		return
	}
	if _, err := io.CopyBuffer(w, file.Body, make([]byte, copyPiece)); err != nil {
		if r.Context().Err() != nil {
			callOf(r).Gone = true
		}
		callOf(r).Err = fmt.Errorf("sending a file: %w", err)
		// The status is sent already; only a broken connection tells the client that the file is
		// incomplete.
		panic(http.ErrAbortHandler)
	}
}

// RemoveFile answers DELETE /v1/sandboxes/{id}/files.
func (s *server) RemoveFile(w http.ResponseWriter, r *http.Request, id SandboxID, params RemoveFileParams) {
	if err := checkNotRoot(params.Path); err != nil {
		s.fail(w, r, err)
		return
	}
	recursive := params.Recursive != nil && *params.Recursive
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		err := s.Agent.Remove(r.Context(), t, params.Path, "", recursive)
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return err
	})
}

// ListFiles answers GET /v1/sandboxes/{id}/files/list.
func (s *server) ListFiles(w http.ResponseWriter, r *http.Request, id SandboxID, params ListFilesParams) {
	depth := defaultDepth
	if params.Depth != nil {
		depth = *params.Depth
	}
	err := agentapi.CheckPath(params.Path)
	if err == nil && (depth < 1 || depth > maxDepth) {
		err = fault.InvalidField("depth", "must be between 1 and %d", maxDepth)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		if err := callOf(r).Account.Take(passCost); err != nil {
			return err
		}
		reply := newListReply(w, "entries")
		err := s.Agent.List(r.Context(), t, params.Path, "", depth, func(e agentapi.Entry) error {
			item, err := encode(entryOf(e))
			if err != nil {
				return err
			}
			return reply.add(item)
		})
		if err == nil {
			err = reply.end("")
		}
		if err != nil {
			s.broken(reply, w, r, tooManyEntries(err))
		}
		return nil
	})
}

// tooManyEntries turns the error of a listing that is too large into an Invalid for the field
// depth, because 413 would blame the caller's body.
func tooManyEntries(err error) error {
	var f *fault.Error
	if errors.As(err, &f) && f.Code == fault.CodeListingTooLarge {
		return fault.InField(f.Code, "depth", "%s", f.Detail).Because(err)
	}
	return err
}
