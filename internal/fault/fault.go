// Package fault holds the kinds of error that callers in cay decide by.
//
// A room sets a kind where a caller acts on it (a failed lookup is [NotFound], a lost race for a
// sandbox is [Conflict]). Every other error is a plain wrapped error and counts as internal: its
// text reaches the log and never a user. The texts of an [Error] are written for the user. Each kind
// has one HTTP status.
//
// The package imports nothing of cay. Errors are immutable and safe to share.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Kind tells what a caller can do about an error.
type Kind int

// The kinds. The zero value is Internal: a defect or a broken machine, whose
// text stays in the log.
const (
	Internal        Kind = iota
	NotFound             // the thing does not exist
	Conflict             // the thing is in a state that forbids the call
	Invalid              // the request itself is wrong; Field names the part
	Unauthenticated      // the caller is unknown
	Denied               // the caller is known and not allowed
	Exhausted            // the caller has used up a quota or rate
	Unavailable          // this machine cannot do it now; trying again later may work
	NoSpace              // a disk is full
	TooLarge             // a body or a result is over its limit
	Upstream             // a program in a sandbox failed, not cay
	Gone                 // the thing was there and has been dropped for good
)

// kinds has the name of each kind, and its status of HTTP. No two kinds share a status, so that the receiver of an
// answer finds the kind.
var kinds = [...]struct {
	name   string
	status int
}{
	Internal:        {"internal", 500},
	NotFound:        {"not found", 404},
	Conflict:        {"conflict", 409},
	Invalid:         {"invalid", 400},
	Unauthenticated: {"unauthenticated", 401},
	Denied:          {"denied", 403},
	Exhausted:       {"exhausted", 429},
	Unavailable:     {"unavailable", 503},
	NoSpace:         {"no space", 507},
	TooLarge:        {"too large", 413},
	Upstream:        {"upstream", 502},
	Gone:            {"gone", 410},
}

// String names the kind for logs.
func (k Kind) String() string {
	if k < 0 || int(k) >= len(kinds) {
		return fmt.Sprintf("kind(%d)", int(k))
	}
	return kinds[k].name
}

// Status returns the status of an answer over HTTP with an error of the kind. Fronts answer other statuses than these
// only where HTTP has one that no kind stands for.
func (k Kind) Status() int {
	if k < 0 || int(k) >= len(kinds) {
		return kinds[Internal].status
	}
	return kinds[k].status
}

// OfStatus returns the kind whose [Kind.Status] is status, or Internal if there is none.
func OfStatus(status int) Kind {
	for k := range kinds {
		if kinds[k].status == status {
			return Kind(k)
		}
	}
	return Internal
}

// Error is an error with a kind, a stable code for machines and a text for
// people. Code is part of the API contract (snake_case, never renamed).
type Error struct {
	Kind   Kind
	Code   string // stable, e.g. "sandbox_not_found"
	Detail string // for the user; names the rule that was broken
	Field  string // the offending field of the request, "" if none

	// RetryAfter is the time to wait before trying again, 0 if unknown. Only Exhausted and
	// Unavailable carry it.
	RetryAfter time.Duration

	// Node names the node that has what the call is for, if this one has not; "" otherwise. Servers decide by it, and
	// users do not see it.
	Node string

	cause error // for the log; never shown to a user
}

// New makes an error of a kind; detail is formatted with args.
func New(kind Kind, code, detail string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Detail: fmt.Sprintf(detail, args...)}
}

// InField makes an Invalid error that names the field of the request at fault.
func InField(code, field, detail string, args ...any) *Error {
	return &Error{Kind: Invalid, Code: code, Field: field, Detail: fmt.Sprintf(detail, args...)}
}

// Because returns a copy that wraps cause. The cause is for errors.Is and the log.
func (e *Error) Because(cause error) *Error {
	c := *e
	c.cause = cause
	return &c
}

// After returns a copy that tells the caller when to try again.
func (e *Error) After(d time.Duration) *Error {
	c := *e
	c.RetryAfter = d
	return &c
}

// On returns a copy that names the node that has what the call is for.
func (e *Error) On(node string) *Error {
	c := *e
	c.Node = node
	return &c
}

// Error returns the text for logs: code, detail and cause.
func (e *Error) Error() string {
	s := e.Detail
	if e.Code != "" {
		s = e.Code + ": " + s
	}
	if e.cause != nil {
		s += ": " + e.cause.Error()
	}
	return s
}

// Unwrap returns the cause, or nil if there is none.
func (e *Error) Unwrap() error { return e.cause }

// As returns the outermost Error in err's chain, or nil if there is none.
func As(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return nil
}

// KindOf returns the kind of the outermost Error in err's chain, or Internal if there is none.
func KindOf(err error) Kind {
	if e := As(err); e != nil {
		return e.Kind
	}
	return Internal
}

// Is reports whether err is of the kind.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }
