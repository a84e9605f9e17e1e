package api

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

// StatFile answers GET /v1/sandboxes/{id}/files/stat.
func (s *server) StatFile(w http.ResponseWriter, r *http.Request, id SandboxID, params StatFileParams) {
	if err := agentapi.CheckPath(params.Path); err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		e, err := s.Agent.Stat(r.Context(), t, params.Path, "")
		if err == nil {
			s.answer(w, r, http.StatusOK, entryOf(e))
		}
		return err
	})
}

// MakeDirectory answers POST /v1/sandboxes/{id}/files/mkdir.
func (s *server) MakeDirectory(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in MakeDirectoryRequest
	_, err := read(w, r, maxBody, true, &in)
	if err == nil {
		err = agentapi.CheckPath(in.Path)
	}
	var mode *fs.FileMode
	if err == nil && in.Mode != nil {
		var bits fs.FileMode
		bits, err = fileMode(*in.Mode)
		mode = &bits
	}
	owner := ""
	if err == nil {
		owner, err = ownerOf(in.Owner)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		e, err := s.Agent.MakeDirectory(r.Context(), t, in.Path, owner, mode)
		if err == nil {
			s.answer(w, r, http.StatusOK, entryOf(e))
		}
		return ownerError(err)
	})
}

// ownerOf returns the owner that a call names, or "" for the sandbox's default.
func ownerOf(named *string) (string, error) {
	switch {
	case named == nil:
		return "", nil
	case *named == "":
		return "", fault.InvalidField("owner", "must be the name or number of a user, not empty")
	}
	return *named, nil
}

// RenameFile answers POST /v1/sandboxes/{id}/files/rename.
func (s *server) RenameFile(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in RenameFileRequest
	_, err := read(w, r, maxBody, true, &in)
	if err == nil {
		err = renamed(checkNotRoot(in.From), "from")
	}
	if err == nil {
		err = renamed(checkNotRoot(in.To), "to")
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	overwrite := in.Overwrite != nil && *in.Overwrite
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		e, err := s.Agent.Rename(r.Context(), t, in.From, in.To, "", overwrite)
		if err == nil {
			s.answer(w, r, http.StatusOK, entryOf(e))
		}
		return renamed(err, "from")
	})
}

// renamed changes the field of an error from "path" to the name of the field in the call.
func renamed(err error, field string) error {
	f := fault.As(err)
	if f == nil || f.Field != "path" {
		return err
	}
	named := f.Because(err)
	named.Field = field
	return named
}

// WatchFiles answers GET /v1/sandboxes/{id}/files/watch. It streams changes until the caller
// leaves.
func (s *server) WatchFiles(w http.ResponseWriter, r *http.Request, id SandboxID, params WatchFilesParams) {
	if err := agentapi.CheckPath(params.Path); err != nil {
		s.fail(w, r, err)
		return
	}
	recursive := params.Recursive != nil && *params.Recursive
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		ctx, cancel := s.untilStop(r.Context())
		defer cancel()
		reply := s.newEventReply(w, r)
		defer reply.Close()
		ready := func() { _ = reply.send("event: ready\ndata: {}\n\n") } // the next event meets the same error
		err := s.Agent.Watch(ctx, t, params.Path, recursive, ready, func(c agentapi.Change) error {
			var b strings.Builder
			change := FileChange{Type: FileChangeType(c.Type), Path: path.Join(params.Path, c.Name)}
			if err := httpserver.WriteEvent(&b, "", "change", change); err != nil {
				return err
			}
			return reply.send(b.String())
		})
		if context.Cause(ctx) == errStopping {
			err = fault.New(fault.Unavailable, fault.CodeStopping, "the server stops; watch again when it is back")
		}
		reply.fail(err)
		return nil
	})
}

// DownloadTree answers GET /v1/sandboxes/{id}/files/tar.
func (s *server) DownloadTree(w http.ResponseWriter, r *http.Request, id SandboxID, params DownloadTreeParams) {
	if err := agentapi.CheckPath(params.Path); err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		if err := callOf(r).Account.Take(passCost); err != nil {
			return err
		}
		tree, err := s.Agent.DownloadTree(r.Context(), t, params.Path, "")
		if err != nil {
			return err
		}
		defer tree.Close()
		w.Header().Set("Content-Type", "application/x-tar")
		w.Header().Set("Content-Disposition", "attachment")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusOK)
		if r.Method == http.MethodHead {
			return nil
		}
		if _, err := io.CopyBuffer(struct{ io.Writer }{w}, tree, make([]byte, copyPiece)); err != nil {
			callOf(r).Gone = r.Context().Err() != nil
			callOf(r).Err = fmt.Errorf("sending an archive: %w", err)
			panic(http.ErrAbortHandler) // see sendFile
		}
		return nil
	})
}

// errTarTooLarge refuses an archive over agentapi.MaxTar. It is Invalid, as errFileTooLarge is.
var errTarTooLarge = fault.New(fault.Invalid, fault.CodeTarTooLarge,
	"an archive may have %d bytes", int64(agentapi.MaxTar))

// UploadTree answers PUT /v1/sandboxes/{id}/files/tar.
func (s *server) UploadTree(w http.ResponseWriter, r *http.Request, id SandboxID, params UploadTreeParams) {
	owner, err := ownerOf(params.Owner)
	if err == nil {
		err = agentapi.CheckPath(params.Path)
	}
	if err == nil && r.ContentLength > agentapi.MaxTar {
		err = errTarTooLarge
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	var body io.Reader = http.NoBody
	if r.Body != nil {
		body = newUpload(r, agentapi.MaxTar, errTarTooLarge)
	}
	s.inside(w, r, id, sandbox.ForFiles, func(t agentapi.Target) error {
		err := s.Agent.UploadTree(r.Context(), t, params.Path, owner, body)
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return ownerError(err)
	})
}
