package webhook

import (
	"context"
	"log/slog"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
)

// Limits of what a webhook may be. Part of the contract.
const (
	maxName  = 128  // characters
	maxURL   = 2048 // bytes
	maxTypes = 100
)

// Outcomes of attempts, for metrics.
const (
	Delivered   = "delivered"
	Refused     = "refused"     // the answer was no 2xx
	Unreachable = "unreachable" // there was no answer
	Forbidden   = "forbidden"   // the address may not be called
)

// Config holds the operator's settings for webhooks.
type Config struct {
	MaxPerOrg   int // webhooks of an organization; 0 is no limit
	Concurrency int // attempts at once, 4 or more
	// Bounds limit what a webhook has pending; the zero value means [DefaultBounds].
	Bounds Bounds
	Log    *slog.Logger
	// Now tells the time by which deliveries are due. A nil Now is the clock of this machine.
	Now func() time.Time
	// Shared says that other processes write to the store too, so that the service looks for what they have changed.
	Shared bool
	// Observe learns of each attempt. It must not block; nil is none.
	Observe func(outcome string, took time.Duration)
}

// DefaultBounds bound the disk that one webhook takes: 64 MiB of bodies, which is some hours of a busy organization.
// With more, an organization with webhooks that do not answer takes more of the disk; with less, a receiver may be away
// for less time.
var DefaultBounds = Bounds{Deliveries: 100_000, Bytes: 64 << 20}

// Feed has the methods of [*event.Feed] that this package calls.
type Feed interface {
	Read(ctx context.Context, q event.Query) (event.Page, error)
	Consume(ctx context.Context, consumer string, handle func([]event.Event) error) error
}

// Service administers webhooks and makes their deliveries while [Service.Run] runs.
type Service struct {
	cfg     Config
	store   Store
	feed    Feed
	sender  Sender
	wires   map[Format]Wire
	queues  *queues
	changed chan struct{} // has room for one: a webhook was made, changed or deleted
	dropped chan struct{} // has room for one: a webhook was deleted
	runs    atomic.Bool   // deliveries are made by this process

	mu sync.Mutex
	// +checklocks:mu
	calls map[string]int // long calls under way, by what limits them
}

// New returns a Service. wires has the wire of each format.
func New(cfg Config, store Store, feed Feed, sender Sender, wires map[Format]Wire) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, time.Duration) {}
	}
	if cfg.Bounds == (Bounds{}) {
		cfg.Bounds = DefaultBounds
	}
	return &Service{cfg: cfg, store: store, feed: feed, sender: sender, wires: wires, calls: map[string]int{},
		queues: newQueues(cfg.Concurrency), changed: make(chan struct{}, 1), dropped: make(chan struct{}, 1)}
}

// now returns the present time as the store keeps it.
func (s *Service) now() time.Time { return s.cfg.Now().UTC().Truncate(time.Microsecond) }

// NewWebhook says what a webhook is to be.
type NewWebhook struct {
	Name, URL string
	Format    Format
	Types     []string
	Secret    Secret // "" makes one
	Disabled  bool   // it is not enabled yet
}

// Create makes a webhook. The returned one has its secret. Errors are Invalid, with the field "name", "url", "types" or
// "secret", or Exhausted, code "quota_exceeded".
func (s *Service) Create(ctx context.Context, orgID string, r NewWebhook) (Webhook, error) {
	now := s.now()
	w := Webhook{ID: newID(), OrgID: orgID, Format: r.Format, CreatedAt: now, Enabled: true, EnabledAt: now}
	if r.Secret == "" {
		r.Secret = s.wires[r.Format].NewSecret()
	}
	enabled := !r.Disabled
	if err := s.change(&w, Change{&r.Name, &r.URL, &r.Types, &r.Secret, &enabled}, now); err != nil {
		return Webhook{}, err
	}
	if err := s.store.AddWebhook(ctx, w, s.cfg.MaxPerOrg); err != nil {
		return Webhook{}, err
	}
	s.wake(w)
	return w, nil
}

// Change says what to change of a webhook. A nil field stays as it is.
type Change struct {
	Name    *string
	URL     *string
	Types   *[]string
	Secret  *Secret // a pointer to "" makes a new one
	Enabled *bool
}

// change checks c and changes w.
func (s *Service) change(w *Webhook, c Change, now time.Time) error {
	wire := s.wires[w.Format]
	if c.Name != nil {
		w.Name = *c.Name
		if !utf8.ValidString(w.Name) || utf8.RuneCountInString(w.Name) > maxName ||
			strings.ContainsFunc(w.Name, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fault.InvalidField("name", "must have at most %d printable characters", maxName)
		}
	}
	if c.URL != nil {
		w.URL = *c.URL
		if err := s.checkURL(w.URL); err != nil {
			return err
		}
	}
	if c.Types != nil {
		if len(*c.Types) > maxTypes {
			return fault.InvalidField("types", "must be at most %d", maxTypes)
		}
		w.Types = nil
		for _, t := range *c.Types {
			if !wire.Known(t) {
				return fault.InvalidField("types", "there is no type of events %.60q", t)
			}
			if !slices.Contains(w.Types, t) {
				w.Types = append(w.Types, t)
			}
		}
	}
	if c.Secret != nil {
		if w.Secret = *c.Secret; w.Secret == "" {
			w.Secret = wire.NewSecret()
		}
		if err := wire.CheckSecret(string(w.Secret)); err != nil {
			return err
		}
	}
	if c.Enabled != nil && !*c.Enabled {
		w.Disable(Requested, now)
	}
	if c.Enabled != nil && *c.Enabled && !w.Enabled {
		w.Enabled, w.EnabledAt, w.Reason, w.DisabledAt = true, now, "", time.Time{}
	}
	return nil
}

// checkURL refuses a URL that webhooks cannot have.
func (s *Service) checkURL(text string) error {
	bad := func(rule string, args ...any) error { return fault.InvalidField("url", rule, args...) }
	if len(text) > maxURL {
		return bad("must have at most %d bytes", maxURL)
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.Opaque != "" {
		return bad("must be https://HOST/PATH or http://HOST/PATH")
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return bad("must be ASCII without spaces: percent-encode other characters")
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return bad("must have a port from 1 to 65535")
		}
	}
	switch {
	case u.User != nil:
		return bad("must have no user name and no password")
	case u.Fragment != "" || strings.Contains(text, "#"):
		return bad("must have no fragment")
	}
	if err := s.sender.CheckURL(text); err != nil {
		return fault.InvalidField("url", "names an address that webhooks may not call").Because(err)
	}
	return nil
}

// Get returns a webhook of an organization. NotFound, code "webhook_not_found", if there is none.
func (s *Service) Get(ctx context.Context, orgID, id string) (Webhook, error) {
	return s.store.GetWebhook(ctx, orgID, id)
}

// List returns a page of webhooks, newest first, and the cursor of the next page, "" if there is none.
func (s *Service) List(ctx context.Context, f Filter) ([]Webhook, string, error) {
	return s.store.ListWebhooks(ctx, f)
}

// Change changes a webhook and returns it. What is pending of a webhook that it enables is due at once. Errors are
// as for Get and Create.
func (s *Service) Change(ctx context.Context, orgID, id string, c Change) (Webhook, error) {
	now := s.now()
	w, err := s.store.ChangeWebhook(ctx, orgID, id, now, func(w *Webhook) error { return s.change(w, c, now) })
	if err == nil {
		s.wake(w)
	}
	return w, err
}

// Delete deletes a webhook with its deliveries. Errors are as for Get.
func (s *Service) Delete(ctx context.Context, orgID, id string) error {
	if err := s.store.DeleteWebhook(ctx, orgID, id, s.now()); err != nil {
		return err
	}
	s.wake(Webhook{ID: id, OrgID: orgID})
	s.deleted()
	return nil
}

// deleted makes trim look for a webhook that was deleted.
func (s *Service) deleted() {
	select {
	case s.dropped <- struct{}{}:
	default: // trim has not looked since the last one
	}
}

// Deliveries returns a page of the deliveries of a webhook, those of the newest events first. Errors are as for Get.
func (s *Service) Deliveries(ctx context.Context, orgID string, f DeliveryFilter) ([]Delivery, string, error) {
	if _, err := s.store.GetWebhook(ctx, orgID, f.WebhookID); err != nil {
		return nil, "", err
	}
	return s.store.ListDeliveries(ctx, f)
}

// Test sends a request of the type [TestType] to a webhook, also to a disabled one, and returns what came of it. It is
// not repeated and appears in no list. Conflict, code "webhook_busy", while another test of the webhook runs, or
// maxTests of the organization.
func (s *Service) Test(ctx context.Context, orgID, id string) (Attempt, error) {
	w, err := s.store.GetWebhook(ctx, orgID, id)
	if err != nil {
		return Attempt{}, err
	}
	if !s.begin("test "+id, 1) {
		return Attempt{}, fault.New(fault.Conflict, fault.CodeWebhookBusy, "another test of webhook %s runs", id)
	}
	defer s.end("test " + id)
	if !s.begin("tests "+orgID, maxTests) {
		return Attempt{}, fault.New(fault.Conflict, fault.CodeWebhookBusy, "%d tests of the organization's webhooks run",
			maxTests)
	}
	defer s.end("tests " + orgID)
	now := s.now()
	body, err := s.wires[w.Format].Test(w, now)
	if err != nil {
		return Attempt{}, err
	}
	a, _, _ := s.attempt(ctx, w, "msg_test"+strconv.FormatInt(now.UnixMicro(), 36), body)
	return a, ctx.Err()
}

// begin counts a call until end, unless most run.
func (s *Service) begin(what string, most int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls[what] >= most {
		return false
	}
	s.calls[what]++
	return true
}

func (s *Service) end(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.calls[what]--; s.calls[what] == 0 {
		delete(s.calls, what)
	}
}

// maxTests limits the tests of an organization at once. Each may hold a connection to a receiver for [Patience].
const maxTests = 4

// Limits of one replay. With more, one call would hold the webhook's row for longer.
const (
	replayPage = 100   // events that are read at once
	maxReplay  = 1000  // deliveries from which on a replay ends
	maxScan    = 10000 // events from which on it ends
)

// Replayed tells what a replay did.
type Replayed struct {
	Queued  int
	Through event.Seq // the events up to it were considered
	More    bool      // there are events after it now
}

// Replay makes deliveries pending of the events after a place that the webhook's types have, also of those that were
// made already. One call considers a bounded number of events. Gone, code "events_gone", as for [event.Store]'s
// ReadEvents; Conflict, code "webhook_disabled"; Exhausted, code "quota_exceeded", if too much is pending; and as for
// Get.
func (s *Service) Replay(ctx context.Context, orgID, id string, after event.Seq) (Replayed, error) {
	w, err := s.store.GetWebhook(ctx, orgID, id)
	if err != nil {
		return Replayed{}, err
	}
	if !s.begin("replay "+id, 1) {
		return Replayed{}, fault.New(fault.Conflict, fault.CodeWebhookBusy, "another replay of webhook %s runs", id)
	}
	defer s.end("replay " + id)
	out := Replayed{Through: after, More: true}
	defer s.wake(w)
	for scanned := 0; out.More && out.Queued < maxReplay && scanned < maxScan; scanned += replayPage {
		page, err := s.feed.Read(ctx, event.Query{OrgID: orgID, After: out.Through, Limit: replayPage})
		if err != nil {
			return out, err
		}
		var all []Delivery
		for _, e := range page.Events {
			d, ok, err := s.deliveryOf(ctx, &w, e, nil)
			if err != nil {
				return out, err
			}
			if ok {
				all = append(all, d)
			}
		}
		n, err := s.store.Requeue(ctx, id, all, s.cfg.Bounds, s.now())
		if out.Through > after && fault.Is(err, fault.Exhausted) {
			break // the caller continues from Through once these are made
		}
		if err != nil {
			return out, err
		}
		out.Queued, out.Through, out.More = out.Queued+n, page.Through, page.More
	}
	return out, nil
}
