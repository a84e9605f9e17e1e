// Package webhook sends the events of an organization to receivers that it names by URL.
//
// A [Service] reads all events as a consumer of the feed, and puts a delivery into the [Store] for each
// enabled webhook whose types have the event. From there on it makes attempts until the receiver has
// taken the delivery. Each is made at least once; the id of a delivery stays the same, so that a receiver can
// tell a repetition. The deliveries of one webhook about one sandbox are made in the order of the events,
// one at a time: a delivery that fails holds back the later ones of its lane and no others. A webhook whose
// delivery fails for three days is disabled, and keeps what is pending.
//
// The package makes no request itself: a [Sender] does, and decides which addresses may be called. What a
// delivery looks like is up to a [Wire] for each [Format]. All methods of a Service are safe for concurrent use. After
// a crash, deliveries that were under way are made again.
//
// Secrets of webhooks are in the store as they are, since each signature needs one. They are in no event,
// log or error.
package webhook

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/event"
)

// Consumer is the name of this package's consumer of the feed.
const Consumer = "webhooks"

// Format says what the deliveries of a webhook look like. Part of the contract.
type Format string

// The formats.
const (
	Standard Format = "standard" // Standard Webhooks, with an event of the feed
	E2B      Format = "e2b"      // for webhooks that E2B's clients made
)

// Reason says why a webhook is disabled. Part of the contract.
type Reason string

// The reasons.
const (
	Requested Reason = "requested" // by a call
	Failing   Reason = "failing"   // a delivery failed for too long
	Gone      Reason = "gone"      // the receiver answered 410
	Backlog   Reason = "backlog"   // too much is pending
)

// Secret is the key of a webhook's signatures. It is not printed.
type Secret string

// String returns no part of the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "(hidden)"
}

// GoString returns no part of the secret.
func (s Secret) GoString() string { return s.String() }

// Webhook is a receiver of events of one organization.
type Webhook struct {
	ID, OrgID string
	Name      string // for people; "" is none
	URL       string
	Format    Format
	Types     []string // in the words of the format; none is all
	Secret    Secret
	CreatedAt time.Time

	Enabled    bool
	EnabledAt  time.Time // the last time that it was
	Reason     Reason    // "" if it is enabled
	DisabledAt time.Time // zero if it is enabled

	After   event.Seq // only events after it are delivered
	Pending int       // deliveries that are not made yet
	Bytes   int64     // of the bodies of these
}

// wants reports whether the webhook receives events of a type of its format.
func (w *Webhook) wants(kind string) bool {
	for _, t := range w.Types {
		if t == kind {
			return true
		}
	}
	return len(w.Types) == 0
}

// Disable disables w, unless it is disabled already.
func (w *Webhook) Disable(why Reason, now time.Time) {
	if w.Enabled {
		w.Enabled, w.Reason, w.DisabledAt = false, why, now
	}
}

// Delivery is an event that a webhook receives.
type Delivery struct {
	WebhookID string
	Seq       event.Seq // of the event
	// Lane names what the event is about: deliveries of a webhook with the same lane are made in order.
	Lane     string
	Type     string // in the words of the format
	Body     string // "" once it is made
	QueuedAt time.Time
	MadeAt   time.Time // zero while it is pending
	Attempts int       // that failed or succeeded
	FailedAt time.Time // the first attempt that failed since it was queued or its webhook enabled; zero if none did
	// NextAt is the time of the next attempt, zero if the delivery is made or waits for another of its lane.
	NextAt time.Time
	Last   Attempt // the zero value if there was none
}

// Attempt records one request to a receiver.
type Attempt struct {
	At     time.Time
	Took   time.Duration
	Status int    // of the answer, 0 if there was none
	Error  string // why it failed, for people; "" if it succeeded
	Answer string // the beginning of the answer's body, printable
}

// laneOf returns the lane of an event: its sandbox, or what else it is about.
func laneOf(e event.Event) string {
	for _, id := range []string{e.SandboxID, e.TemplateID, e.KeyID, e.WebhookID} {
		if id != "" {
			return id
		}
	}
	return ""
}

// Wire makes the requests of one format.
type Wire interface {
	// Known reports whether the format has a type of events.
	Known(kind string) bool
	// NewSecret makes a secret.
	NewSecret() Secret
	// CheckSecret returns an error, Invalid in the field "secret", for a text that the format cannot sign with.
	CheckSecret(secret string) error
	// Message returns the type of an event in the words of the format and the body of its deliveries. The type is "" if
	// the format does not have the event.
	Message(ctx context.Context, e event.Event) (kind string, body []byte, err error)
	// Test returns the body of a request that tests a webhook.
	Test(w Webhook, now time.Time) ([]byte, error)
	// Header returns the header of an attempt at a delivery, which carries the signature.
	Header(w Webhook, deliveryID string, now time.Time, body []byte) map[string]string
}

// Sender posts requests to receivers.
type Sender interface {
	// Send posts body to url and returns the answer. It returns an error, whose text is for people and names no address,
	// if there is no answer; [ErrDenied] is in its chain if the address may not be called.
	Send(ctx context.Context, url string, header map[string]string, body []byte) (Answer, error)
	// CheckURL returns an error for a URL that names an address that may not be called. It resolves no names.
	CheckURL(url string) error
}

// Answer is the answer of a receiver.
type Answer struct {
	Status     int
	Text       string        // the beginning of the body, printable
	RetryAfter time.Duration // 0 if the receiver named none
}

// ErrDenied is in the chain of errors about addresses that may not be called.
var ErrDenied = errors.New("webhooks may not call this address")

var idEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// newID returns the id of a new webhook, with 100 random bits.
func newID() string {
	var b [13]byte
	rand.Read(b[:]) // never fails: it would end the program instead
	return "whk_" + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20]
}

// DeliveryID returns the id of the delivery of an event to a webhook, which all its attempts have.
func DeliveryID(webhookID string, s event.Seq) string {
	sum := sha256.Sum256([]byte(webhookID + " " + s.ID()))
	return "msg_" + strings.ToLower(idEncoding.EncodeToString(sum[:]))[:26]
}
