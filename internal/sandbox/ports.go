package sandbox

import (
	"context"
	"net"
	"time"
)

// Quota is what an organization may have running at once. Zero means no limit.
type Quota struct {
	Sandboxes int
	VCPUs     int
	MemoryMB  int
}

// Filter selects and pages a listing, newest first.
type Filter struct {
	OrgID    string
	States   []State           // any of; empty is all
	Metadata map[string]string // every pair must match
	Limit    int               // 1-200, checked by the caller
	Cursor   string            // from the previous page; "" is the first
}

// Once makes a create idempotent: the same Key and Hash give the first answer.
type Once struct {
	Key  string // from the caller, scoped to the organization; "" is off
	Hash string // of the request's body
}

// Change is one transition of one sandbox, conditional on where it comes from.
type Change struct {
	ID     ID
	From   []State // the row must be in one of these
	Run    string  // if not "", the row must be in this life
	To     State
	At     time.Time
	Reason string // for the event

	// What else is written with the transition; nil leaves it as it is.
	NewRun        *string
	StartedAt     *time.Time
	ExpiresAt     *time.Time
	DestroyedAt   *time.Time
	DestroyReason *Reason
	Error         *string
	Source        *Source
	Token         *string
}

// Store keeps the rows. Every method is atomic and durable when it returns.
// The contract suite in the store room holds for every implementation.
type Store interface {
	// Insert adds a sandbox in state creating together with its first event,
	// unless the organization's sandboxes that are not over (see State.Over,
	// and suspended ones count for Sandboxes alone) would exceed quota:
	// Exhausted, code "quota_exceeded", and nothing is written. With a once key that is known (and younger than 24 h)
	// nothing is written and the sandbox of the first create is returned with
	// found true; with another hash it is a Conflict, code "idempotency_key_reused".
	Insert(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
	// Forget drops the idempotency record of a create that failed, so that
	// the caller may try again. No record is no error.
	Forget(ctx context.Context, id ID) error
	// Get returns the row, or NotFound with code "sandbox_not_found".
	Get(ctx context.Context, id ID) (Sandbox, error)
	// List returns a page and the cursor of the next, "" after the last.
	// A cursor that is not one of ours is Invalid in field "cursor".
	List(ctx context.Context, f Filter) ([]Sandbox, string, error)
	// Transition applies c and records its event in one transaction. A row that
	// is not in c.From or not in c.Run is a Conflict, code "sandbox_state", and
	// untouched; the returned sandbox is then the row as it is.
	Transition(ctx context.Context, c Change) (Sandbox, error)
	// SetExpiry moves the end of a running sandbox's life; Conflict, code
	// "sandbox_not_running", when it is not in state running.
	SetExpiry(ctx context.Context, id ID, expiresAt time.Time, timeout time.Duration) (Sandbox, error)
	// Unfinished returns every sandbox that is not over, oldest first.
	Unfinished(ctx context.Context) ([]Sandbox, error)
	// Events pages a sandbox's events, newest first.
	Events(ctx context.Context, id ID, limit int, cursor string) ([]Event, string, error)
	// Purge drops sandboxes that were over before the time, with their events,
	// and idempotency records older than 24 h at now. It says how many sandboxes went.
	Purge(ctx context.Context, over, now time.Time) (int, error)
	// Images lists the images that sandboxes which are not over need.
	Images(ctx context.Context) ([]string, error)
}

// Spec is everything a Node needs to make a sandbox.
type Spec struct {
	ID      ID
	Run     string
	Image   string
	Size    Size
	DiskMB  int
	Env     map[string]string
	User    string
	Workdir string
	Egress  Egress
	Token   string
}

// Fact is what a node has of one sandbox.
type Fact struct {
	ID    ID
	Run   string // "" if the node cannot tell
	Alive bool   // its processes run and its agent can be expected to answer
}

// Node makes sandboxes on a machine and takes them apart. The fake in caytest and
// the real one keep the same contract.
type Node interface {
	// Room says whether a sandbox of the size could be made now: Unavailable, code
	// "no_capacity", with RetryAfter when not. An answer is no reservation.
	Room(ctx context.Context, size Size) error
	// Create makes the sandbox and returns when its agent answers. After an
	// error nothing of it is left, except what the error says could not be undone.
	// No room on the machine is Unavailable, code "no_capacity", with RetryAfter.
	Create(ctx context.Context, spec Spec) error
	// Destroy removes everything of the sandbox, going on after errors and joining
	// them. No such sandbox is success.
	Destroy(ctx context.Context, id ID) error
	// Dial connects to the sandbox's agent. A sandbox that is not there is Conflict,
	// code "sandbox_not_running".
	Dial(ctx context.Context, id ID) (net.Conn, error)
	// List says what the machine has, dead or alive, whole or in part.
	List(ctx context.Context) ([]Fact, error)
	// Lost yields the sandboxes whose processes ended without being asked to.
	// One channel for the node's whole life; never closed before the node is.
	Lost() <-chan Fact
}
