// Package sandbox is what a sandbox is: its states, the operations that move
// it between them, its lifetime, and what is made of it after a crash.
//
// It owns every transition. The -ing states are claims, written to the Store
// before the Node touches the host, so that after a crash the rows say what was
// being done. It does no I/O of its own: rows are kept by a [Store], machines are
// driven through a [Node], both given by the caller. It does not know HTTP, SQL,
// gVisor or the file system.
//
// A [Service] is safe for concurrent use; operations on one sandbox run one at a
// time, a second caller of the same operation shares the first one's result, and
// only destroy interrupts. After an error the row is never in a claim that nobody
// works on: [Service.Reconcile] comes back for what a crash left.
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

// NewID makes an ID from the system's random source.
func NewID() ID {
	var b [13]byte
	rand.Read(b[:])
	return ID("sbx_" + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20])
}

// Valid reports whether the ID has the form of one.
func (id ID) Valid() bool { return idPattern.MatchString(string(id)) }

// Mode says what happens to a sandbox nobody uses.
type Mode string

// The modes.
const (
	Ephemeral  Mode = "ephemeral"  // ends when its timeout is over, see [AtEnd]
	Persistent Mode = "persistent" // suspended when idle, woken by the next call
)

// AtEnd says what becomes of an ephemeral sandbox when its timeout is over.
type AtEnd string

// The ends.
const (
	EndDestroys AtEnd = "destroy"
	EndSuspends AtEnd = "suspend" // with everything it has, until it is woken for another timeout
)

// Source says how a sandbox was made.
type Source string

// The sources.
const (
	Cold Source = "cold" // booted for the request
	Warm Source = "warm" // taken from the pool

	Restored Source = "snapshot" // made from one, see Origin
	Forked   Source = "fork"     // of another sandbox, see Origin
)

// Size is a preset of what a sandbox may use.
type Size struct {
	Name     string `json:"name" toml:"name"`
	VCPUs    int    `json:"vcpus" toml:"vcpus"`
	MemoryMB int    `json:"memory_mb" toml:"memory_mb"` // MiB
	// Dedicated sizes get a CPU quota of VCPUs; the others share by weight.
	Dedicated bool `json:"dedicated" toml:"dedicated"`
}

// Sandbox is one sandbox as its row has it. Times are UTC; the zero time means
// "not yet" or "does not apply".
type Sandbox struct {
	ID    ID
	OrgID string
	Mode  Mode
	State State
	// Run names the present life of the sandbox's processes: it changes with
	// every create and wake, so that a decision made on an old reading cannot
	// hit a new life.
	Run string

	Template        string // name, for people
	TemplateID      string
	TemplateVersion int
	Image           string // content hash of the root file system, see Template

	Size     Size
	DiskMB   int // size limit of the writable layer, MiB
	Env      map[string]string
	Metadata map[string]string
	Egress   Egress
	User     string // default user of commands and files; "" is root
	Workdir  string // default working directory; "" is the user's home

	Timeout          time.Duration // ephemeral: the lifetime it was given last
	AtEnd            AtEnd         // "" of a persistent one
	IdleTimeout      time.Duration // persistent: 0 is never
	RecoveryInterval time.Duration // persistent: 0 is off

	CreatedAt      time.Time
	StartedAt      time.Time
	ExpiresAt      time.Time // ephemeral only, and not while it is suspended
	LastActivityAt time.Time // persistent only
	SuspendedAt    time.Time // the time of the recovery point it would wake from
	DestroyedAt    time.Time
	DestroyReason  Reason
	Error          string // why it failed, or why it could not be woken, for the user
	Source         Source
	Origin         string // ID of the snapshot or the sandbox that it is from, which may be gone; "" is none

	// Surface is what the surface that it was made through keeps with it. The core
	// carries it and does not look into it; "" is nothing.
	Surface string

	// Token authorises the host to the agent inside. Secret: never in an
	// answer, an event or a log.
	Token string
}

// Reason says why a sandbox was destroyed. Part of the contract.
type Reason string

// The reasons.
const (
	Requested  Reason = "requested"
	Expired    Reason = "expired"
	BootFailed Reason = "boot_failed"
	Lost       Reason = "lost" // its processes ended without being asked to
)

// Event is one transition in the life of a sandbox.
type Event struct {
	ID        string // sortable, unique in the sandbox
	SandboxID ID
	At        time.Time
	From      State // "" for the first
	To        State
	Reason    string
	Detail    string // what there is to say beyond the reason, for people; "" is nothing
}
