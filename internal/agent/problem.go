package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"syscall"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// problem is an error with the codes by which clients decide: an HTTP status for
// plain HTTP, a Connect code for Connect, and a code of agentapi for the host.
type problem struct {
	code    string // "" for none
	status  int
	connect connect.Code
	text    string
	field   string // of the host's call, if it differs from the code's usual field
}

func (p *problem) Error() string { return p.text }

// problems maps each code of agentapi to its HTTP status and its Connect code.
var problems = map[string]struct {
	status  int
	connect connect.Code
}{
	fault.CodeFileNotFound:       {http.StatusNotFound, connect.CodeNotFound},
	fault.CodePathIsDirectory:    {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodePathNotDirectory:   {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeDirectoryNotEmpty:  {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeInvalidPath:        {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeInvalidMode:        {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeInvalidEnv:         {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeInvalidCommand:     {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeFileDenied:         {http.StatusForbidden, connect.CodePermissionDenied},
	fault.CodeWorkdirNotFound:    {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeUnknownUser:        {http.StatusUnauthorized, connect.CodeUnauthenticated},
	fault.CodeUnknownOwner:       {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodeDiskFull:           {http.StatusInsufficientStorage, connect.CodeResourceExhausted},
	fault.CodeListingTooLarge:    {http.StatusRequestEntityTooLarge, connect.CodeOutOfRange},
	fault.CodeTooManyProcesses:   {http.StatusTooManyRequests, connect.CodeResourceExhausted},
	fault.CodeStartFailed:        {http.StatusConflict, connect.CodeFailedPrecondition},
	fault.CodeInvalidTar:         {http.StatusBadRequest, connect.CodeInvalidArgument},
	fault.CodePathExists:         {http.StatusConflict, connect.CodeAlreadyExists},
	fault.CodePortClosed:         {http.StatusBadGateway, connect.CodeFailedPrecondition},
	fault.CodeTooManyConnections: {http.StatusTooManyRequests, connect.CodeResourceExhausted},
	fault.CodeProcessNotFound:    {http.StatusNotFound, connect.CodeNotFound},
	fault.CodeProcessEnded:       {http.StatusConflict, connect.CodeFailedPrecondition},
	fault.CodeTagInUse:           {http.StatusConflict, connect.CodeAlreadyExists},
	fault.CodeStdinClosed:        {http.StatusConflict, connect.CodeFailedPrecondition},
	fault.CodeStdinBlocked:       {http.StatusConflict, connect.CodeFailedPrecondition},
	fault.CodeNoTerminal:         {http.StatusConflict, connect.CodeFailedPrecondition},
	fault.CodeOutputNotKept:      {http.StatusConflict, connect.CodeFailedPrecondition},
	fault.CodeInvalidOffset:      {http.StatusBadRequest, connect.CodeInvalidArgument},
}

func newProblem(code, text string, args ...any) *problem {
	p := problems[code]
	return &problem{code: code, status: p.status, connect: p.connect, text: fmt.Sprintf(text, args...)}
}

// badRequest returns a problem for a mistake that the host's client does not make.
func badRequest(text string, args ...any) *problem {
	return &problem{status: http.StatusBadRequest, connect: connect.CodeInvalidArgument, text: fmt.Sprintf(text, args...)}
}

// fileProblem returns the problem that an error of a file operation on path means,
// or the error itself if it has no particular meaning.
func fileProblem(err error, path string) error {
	var known *problem
	var errno syscall.Errno
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(err, errUnknownUser):
		return newProblem(fault.CodeUnknownUser, "%s", err)
	case !errors.As(err, &errno):
		return err
	}
	switch errno {
	case syscall.ENOENT:
		return newProblem(fault.CodeFileNotFound, "path %q does not exist", path)
	case syscall.ENOTDIR:
		return newProblem(fault.CodePathNotDirectory, "path %q, or a part of it, is not a directory", path)
	case syscall.EISDIR:
		return newProblem(fault.CodePathIsDirectory, "path %q is a directory", path)
	case syscall.ENOTEMPTY:
		return newProblem(fault.CodeDirectoryNotEmpty, "directory %q is not empty", path)
	case syscall.ENOSPC, syscall.EDQUOT:
		return newProblem(fault.CodeDiskFull, "not enough disk space for %q", path)
	case syscall.EACCES, syscall.EPERM, syscall.EROFS, syscall.EBUSY, syscall.ETXTBSY:
		return newProblem(fault.CodeFileDenied, "path %q: %s", path, errno)
	case syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EINVAL:
		return newProblem(fault.CodeInvalidPath, "path %q: %s", path, errno)
	case syscall.EEXIST:
		text := fmt.Sprintf("path %q exists already", path)
		return &problem{status: http.StatusConflict, connect: connect.CodeAlreadyExists, text: text}
	}
	return err
}

// connectErr returns err in the form that a Connect method returns.
func connectErr(err error) error {
	var p *problem
	if !errors.As(err, &p) {
		var c *connect.Error
		if errors.As(err, &c) {
			return err
		}
		return connect.NewError(connect.CodeInternal, err)
	}
	e := connect.NewError(p.connect, p)
	if p.code != "" {
		e.Meta().Set(agentapi.CodeHeader, p.code)
	}
	return e
}

// httpError answers a plain HTTP request with err.
func httpError(w http.ResponseWriter, err error) {
	p := &problem{status: http.StatusInternalServerError, text: err.Error()}
	errors.As(err, &p)
	if p.code != "" {
		w.Header().Set(agentapi.CodeHeader, p.code)
	}
	if p.field != "" {
		w.Header().Set(agentapi.FieldHeader, p.field)
	}
	writeJSON(w, p.status, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{p.status, p.text})
}

// writeJSON answers with v. It ignores write errors: the client has gone.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
