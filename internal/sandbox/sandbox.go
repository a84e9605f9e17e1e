// Package sandbox implements the core of cay: the states of sandboxes, the operations that move
// them between states, their lifetimes, and recovery after a crash.
//
// The package owns every transition. The -ing states are claims: they are written to the Store
// before the Node touches the host, so that after a crash the rows tell which operations were under
// way. The package does no I/O of its own: the caller gives it a [Store], which keeps rows, and a
// [Node], which drives a machine. The package does not know HTTP, SQL, gVisor or the file system.
//
// A [Service] is safe for concurrent use. Operations on one sandbox run one at a time, a second
// caller of the same operation shares the result of the first, and only destroy interrupts an
// operation. After an error no row stays in a claim without an operation: [Service.Reconcile]
// settles the rows that a crash left.
package sandbox

import (
	"crypto/rand"
	"encoding/base32"
	"regexp"
	"strings"
	"time"
)

// ID names a sandbox: "sbx_" and 20 lower-case base32 characters (100 random bits).
type ID string

var (
	idEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)
	idPattern  = regexp.MustCompile(`^sbx_[a-z2-7]{20}$`)
)

// NewID returns a new ID from the system's random source.
func NewID() ID {
	var b [13]byte
	rand.Read(b[:])
	return ID("sbx_" + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20])
}

// Valid reports whether the ID has the form of a sandbox's ID.
func (id ID) Valid() bool { return idPattern.MatchString(string(id)) }

// Mode selects what happens to an unused sandbox.
type Mode string

// The modes.
const (
	Ephemeral  Mode = "ephemeral"  // ends when its timeout is over, see [AtEnd]
	Persistent Mode = "persistent" // suspended when idle, woken by the next call
)

// AtEnd selects what happens to an ephemeral sandbox when its timeout is over.
type AtEnd string

// The values of AtEnd.
const (
	EndDestroys AtEnd = "destroy"
	EndSuspends AtEnd = "suspend" // keeps all of its state until it is woken for another timeout
	// EndSuspendsFiles is like EndSuspends, but keeps the files alone, see [KeepFiles]. If that fails, it
	// keeps everything.
	EndSuspendsFiles AtEnd = "suspend_files"
)

// Suspends reports whether the sandbox is suspended, and not destroyed.
func (e AtEnd) Suspends() bool { return e == EndSuspends || e == EndSuspendsFiles }

// keeps returns what the suspend at the end keeps.
func (e AtEnd) keeps() Kept {
	if e == EndSuspendsFiles {
		return KeepFiles
	}
	return KeepAll
}

// Kept selects what a suspend keeps of a sandbox.
type Kept string

// The values of Kept.
const (
	KeepAll   Kept = ""      // processes, memory and files, with which a wake continues
	KeepFiles Kept = "files" // files: processes end, and a wake boots the sandbox
)

// Source tells how a sandbox was made.
type Source string

// The sources.
const (
	Cold Source = "cold" // booted for the request
	Warm Source = "warm" // claimed from the warm pool

	Restored Source = "snapshot" // created from a snapshot, see Origin
	Forked   Source = "fork"     // forked from another sandbox, see Origin
)

// Size gives the CPUs and the memory of a sandbox under a name.
type Size struct {
	Name     string `json:"name" toml:"name"`
	VCPUs    int    `json:"vcpus" toml:"vcpus"`
	MemoryMB int    `json:"memory_mb" toml:"memory_mb"` // MiB
	// Dedicated gives the size a CPU quota of VCPUs. Other sizes share CPUs by weight.
	Dedicated bool `json:"dedicated" toml:"dedicated"`
}

// Sandbox holds the row of a sandbox. Times are UTC; the zero time means "not yet" or "does not
// apply".
type Sandbox struct {
	ID    ID
	OrgID string
	Mode  Mode
	State State
	// Run names the present instance of the sandbox. It changes with every create and wake, so that a
	// decision from an old reading cannot reach a new instance.
	Run string

	Template        string // name, for display
	TemplateID      string
	TemplateVersion int

	Shape
	Metadata map[string]string

	Timeout          time.Duration // ephemeral: the lifetime that it was last given
	AtEnd            AtEnd         // "" for a persistent sandbox
	IdleTimeout      time.Duration // persistent: 0 means never
	RecoveryInterval time.Duration // persistent: 0 means off

	CreatedAt      time.Time
	StartedAt      time.Time
	ExpiresAt      time.Time // ephemeral only; zero while it is suspended
	LastActivityAt time.Time // persistent only
	SuspendedAt    time.Time // time of the recovery point that a wake would restore
	Kept           Kept      // what that recovery point holds; of no meaning while SuspendedAt is zero
	DestroyedAt    time.Time
	DestroyReason  Reason
	Error          string // why it failed or could not be woken, for the user
	Source         Source
	Origin         string // ID of its snapshot or parent sandbox, which may be gone; "" if none

	// FrontData holds data of the front that created the sandbox. The core stores it and does not read
	// it; "" means none.
	FrontData string

	// Token authorises the host to the agent inside. It is secret: it must never appear in an answer,
	// an event or a log.
	Token string

	Holder Holder // set by the store
}

// Holder names the node that has a sandbox, a pooled sandbox or a snapshot, and the server there that may change its
// row. Each server of a node has a higher fence than those before it, and takes over the node's rows when it starts.
// The store sets the holder of new rows, and refuses the writes of servers that do not hold a row.
type Holder struct {
	Node  string
	Fence int64
}

// Reason tells why a sandbox was destroyed. Its values are part of the contract.
type Reason string

// The reasons.
const (
	Requested  Reason = "requested"
	Expired    Reason = "expired"
	BootFailed Reason = "boot_failed"
	Lost       Reason = "lost" // its processes ended unexpectedly
)

// Event records one transition of a sandbox.
type Event struct {
	ID        string // sortable, unique within the sandbox
	SandboxID ID
	At        time.Time
	From      State // "" for the first
	To        State
	Reason    string
	Detail    string // text for people beyond the reason; "" means none
}
