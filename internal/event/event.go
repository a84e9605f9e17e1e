// Package event defines events, the facts about sandboxes and organizations, and the feed that
// they are read from: one sequence for all organizations, from which each reads its own.
//
// A store writes an event in the transaction that makes its fact true, so there is no fact
// without its event and no event without its fact. The sequence grows only at its end: a reader
// that has read up to an event misses none before it. Readers keep their own place, the [Seq] of
// the last event that they read.
//
// A [Feed] reads pages, follows the sequence, and drops old events. It keeps no event in memory
// and is safe for concurrent use. An event holds names and ids, and never an environment,
// metadata, a key, a token or output of a sandbox.
package event

import (
	"encoding/base32"
	"encoding/binary"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Seq is the place of an event in the sequence. Values rise but are not consecutive: each is the
// microsecond in which the event was written, or one more than the last if that is not more. So
// they tell an organization nothing about how many events others have, and a database that was
// restored from a backup does not use a value twice.
type Seq int64

const (
	// Oldest is the place before all events that there are.
	Oldest Seq = -1
	// Newest is the place after them.
	Newest Seq = math.MaxInt64
)

const idPrefix = "evt_"

// idEncoding keeps the order of the bytes that it encodes.
var idEncoding = base32.NewEncoding("0123456789abcdefghijklmnopqrstuv").WithPadding(base32.NoPadding)

// ID returns the id that users know an event by: "evt_" and 13 characters. Ids are ordered as the
// values are. The id of 0 names the place before the first event.
func (s Seq) ID() string {
	return idPrefix + idEncoding.EncodeToString(binary.BigEndian.AppendUint64(nil, uint64(s)))
}

// ParseID returns the place of an id. Invalid, naming the field, for a text that is no id.
func ParseID(field, code, text string) (Seq, error) {
	bad := fault.InField(code, field, "is not the id of an event of GET /v1/events")
	encoded, ok := strings.CutPrefix(text, idPrefix)
	if !ok || len(encoded) != idEncoding.EncodedLen(8) {
		return 0, bad
	}
	b, err := idEncoding.DecodeString(encoded)
	if err != nil || len(b) != 8 {
		return 0, bad
	}
	// Decoding skips line breaks and unused bits, so that two texts could be one place.
	if s := Seq(binary.BigEndian.Uint64(b)); s >= 0 && s.ID() == text {
		return s, nil
	}
	return 0, bad
}

// Type says which kind of fact an event is about. Part of the contract.
type Type string

// The types. One of a sandbox's transitions is [Transition] of the state that it comes to.
const (
	SandboxCreating   Type = "sandbox.creating"
	SandboxRunning    Type = "sandbox.running"
	SandboxSuspending Type = "sandbox.suspending"
	SandboxSuspended  Type = "sandbox.suspended"
	SandboxWaking     Type = "sandbox.waking"
	SandboxDestroying Type = "sandbox.destroying"
	SandboxDestroyed  Type = "sandbox.destroyed"
	SandboxFailed     Type = "sandbox.failed"

	SandboxEgressChanged Type = "sandbox.egress_changed" // its policy was replaced
	SandboxEgressDenied  Type = "sandbox.egress_denied"  // its policy kept something in; these are gathered
	SandboxForked        Type = "sandbox.forked"         // it was saved to make children from it
	SandboxPortPublic    Type = "sandbox.port_public"    // a port was opened to callers without a key
	SandboxPortPrivate   Type = "sandbox.port_private"   // a port was closed to them again

	SnapshotCreated Type = "snapshot.created"
	SnapshotDeleted Type = "snapshot.deleted"

	TemplateCreated      Type = "template.created"
	TemplateBuildQueued  Type = "template.build_queued"
	TemplateBuildStarted Type = "template.build_started"
	TemplateBuildReady   Type = "template.build_ready"
	TemplateBuildFailed  Type = "template.build_failed" // or was cancelled
	TemplateDeleted      Type = "template.deleted"

	KeyCreated Type = "api_key.created"
	KeyRevoked Type = "api_key.revoked"
	OrgCreated Type = "org.created"

	WebhookCreated  Type = "webhook.created"
	WebhookDeleted  Type = "webhook.deleted"
	WebhookDisabled Type = "webhook.disabled" // by a call, or by the server, as the reason says
)

var types = []Type{
	SandboxCreating, SandboxRunning, SandboxSuspending, SandboxSuspended, SandboxWaking, SandboxDestroying,
	SandboxDestroyed, SandboxFailed,
	SandboxEgressChanged, SandboxEgressDenied, SandboxForked, SandboxPortPublic, SandboxPortPrivate,
	SnapshotCreated, SnapshotDeleted,
	TemplateCreated, TemplateBuildQueued, TemplateBuildStarted, TemplateBuildReady, TemplateBuildFailed, TemplateDeleted,
	KeyCreated, KeyRevoked, OrgCreated,
	WebhookCreated, WebhookDeleted, WebhookDisabled,
}

// Types returns all types.
func Types() []Type { return slices.Clone(types) }

// Known reports whether there is such a type.
func (t Type) Known() bool { return slices.Contains(types, t) }

// Subject returns the kind of thing that an event of the type is about: "sandbox", "snapshot",
// "template", "api_key", "org" or "webhook".
func (t Type) Subject() string {
	subject, _, _ := strings.Cut(string(t), ".")
	return subject
}

// Transition returns the type of a sandbox's transition to a state.
func Transition(state string) Type { return Type("sandbox." + state) }

// Event records one fact. Of the fields after Type only those are set that its type has.
type Event struct {
	Seq   Seq
	OrgID string // whose it is; "" for a built-in template's, which is in no organization's feed
	At    time.Time
	Type  Type

	SandboxID string // that it is about, or that a snapshot is of; "" is none
	From, To  string // states of the sandbox; equal if it is no transition, From is "" for the first
	Reason    string
	Detail    string // for people

	About
}

// About names the things besides a sandbox that an event is about. A store keeps it as JSON.
type About struct {
	SnapshotID string `json:"snapshot_id,omitempty"`
	TemplateID string `json:"template_id,omitempty"`
	KeyID      string `json:"api_key_id,omitempty"`
	WebhookID  string `json:"webhook_id,omitempty"`
	Name       string `json:"name,omitempty"` // of the snapshot, template, key, organization or webhook
	Version    int    `json:"version,omitempty"`
	Port       int    `json:"port,omitempty"`
}
