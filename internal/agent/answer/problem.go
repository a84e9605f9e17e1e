// Package answer answers the calls of the agent: it turns errors into the statuses and codes that
// clients know, for plain HTTP and for Connect.
package answer

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

// Problem is an error with the codes by which clients decide: an HTTP status for
// plain HTTP, a Connect code for Connect, and a code of agentapi for the host.
type Problem struct {
	Code    string // "" for none
	Status  int
	Connect connect.Code
	Text    string
	Field   string // of the host's call, if it differs from the code's usual field
}

// Error returns the text for the client.
func (p *Problem) Error() string { return p.Text }

// ErrUnknownUser reports that the account files have no such user or group.
var ErrUnknownUser = errors.New("unknown user")

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

// New returns the problem of a code of agentapi.
func New(code, text string, args ...any) *Problem {
	p := problems[code]
	return &Problem{Code: code, Status: p.status, Connect: p.connect, Text: fmt.Sprintf(text, args...)}
}

// Bad returns a problem for a mistake that the host's client does not make.
func Bad(text string, args ...any) *Problem {
	return &Problem{Status: http.StatusBadRequest, Connect: connect.CodeInvalidArgument, Text: fmt.Sprintf(text, args...)}
}

// OfFile returns the problem that an error of a file operation on path means,
// or the error itself if it has no particular meaning.
func OfFile(err error, path string) error {
	var known *Problem
	var errno syscall.Errno
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(err, ErrUnknownUser):
		return New(fault.CodeUnknownUser, "%s", err)
	case !errors.As(err, &errno):
		return err
	}
	switch errno {
	case syscall.ENOENT:
		return New(fault.CodeFileNotFound, "path %q does not exist", path)
	case syscall.ENOTDIR:
		return New(fault.CodePathNotDirectory, "path %q, or a part of it, is not a directory", path)
	case syscall.EISDIR:
		return New(fault.CodePathIsDirectory, "path %q is a directory", path)
	case syscall.ENOTEMPTY:
		return New(fault.CodeDirectoryNotEmpty, "directory %q is not empty", path)
	case syscall.ENOSPC, syscall.EDQUOT:
		return New(fault.CodeDiskFull, "not enough disk space for %q", path)
	case syscall.EACCES, syscall.EPERM, syscall.EROFS, syscall.EBUSY, syscall.ETXTBSY:
		return New(fault.CodeFileDenied, "path %q: %s", path, errno)
	case syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EINVAL:
		return New(fault.CodeInvalidPath, "path %q: %s", path, errno)
	case syscall.EEXIST:
		text := fmt.Sprintf("path %q exists already", path)
		return &Problem{Status: http.StatusConflict, Connect: connect.CodeAlreadyExists, Text: text}
	}
	return err
}

// Connect returns err in the form that a Connect method returns.
func Connect(err error) error {
	var p *Problem
	if !errors.As(err, &p) {
		var c *connect.Error
		if errors.As(err, &c) {
			return err
		}
		return connect.NewError(connect.CodeInternal, err)
	}
	e := connect.NewError(p.Connect, p)
	if p.Code != "" {
		e.Meta().Set(agentapi.CodeHeader, p.Code)
	}
	return e
}

// Error answers a plain HTTP request with err.
func Error(w http.ResponseWriter, err error) {
	p := &Problem{Status: http.StatusInternalServerError, Text: err.Error()}
	errors.As(err, &p)
	if p.Code != "" {
		w.Header().Set(agentapi.CodeHeader, p.Code)
	}
	if p.Field != "" {
		w.Header().Set(agentapi.FieldHeader, p.Field)
	}
	JSON(w, p.Status, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{p.Status, p.Text})
}

// JSON answers with v. It ignores write errors: the client has gone.
func JSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
