package api

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// filled returns a value with something in every field. It is valid if set makes it so.
func filled[T any](set func(*T)) func() T {
	return func() T {
		var v T
		caytest.Fill(&v, 7)
		if set != nil {
			set(&v)
		}
		return v
	}
}

// ignored returns the fields of a value that make no difference to the result of f.
func ignored[In, Out any](t *testing.T, full func() In, f func(In) (Out, error)) (names []string) {
	t.Helper()
	want, err := f(full())
	if err != nil {
		t.Fatalf("this test needs a valid value for each field: %v", err)
	}
	caytest.EachWithout(full, func(name string, without In) {
		got, err := f(without)
		if err == nil && cmp.Equal(want, got, cmpopts.EquateComparable(netip.Prefix{}), cmpopts.EquateEmpty()) {
			names = append(names, name)
		}
	})
	return names
}

func validEgress() *Egress {
	return &Egress{Mode: EgressModeDenyAll, AllowCIDRs: []string{"10.1.0.0/16"}, DenyCIDRs: []string{"10.2.0.0/16"},
		AllowPorts: []int{443}, AllowDomains: []string{"example.com"}}
}

// TestRequestsAreRead fails for a field of a request, also for one that is added later, that does not
// reach the core. Such a field would be accepted and ignored.
func TestRequestsAreRead(t *testing.T) {
	for name, lost := range map[string][]string{
		"create": ignored(t, filled(func(in *CreateSandboxRequest) {
			in.Timeout = new("1m")
			in.IdleTimeout, in.RecoveryInterval = new(DurationOrZero("2m")), new(DurationOrZero("3m"))
			in.Egress = validEgress()
		}), creationOf),
		"fork": ignored(t, filled(func(in *ForkRequest) {
			in.Timeout = new("1m")
			in.IdleTimeout, in.RecoveryInterval = new(DurationOrZero("2m")), new(DurationOrZero("3m"))
			in.Egress = validEgress()
		}), forkRequestOf),
		"template": ignored(t, filled(func(in *CreateTemplateRequest) {
			in.Ready.Timeout, in.Egress = new("1m"), validEgress()
		}), templateRequestOf),
		"drain": ignored(t, filled(func(in *DrainNodeRequest) { in.Timeout = new("2h") }), drainOf),
		"token of a machine": ignored(t, filled(func(in *CreateNodeTokenRequest) { in.ExpiresIn = new("2m") }),
			func(in CreateNodeTokenRequest) (string, error) {
				t, err := nodeTokenRequestOf(in)
				return fmt.Sprintf("%+v", t), err
			}),
		"webhook": ignored(t, filled[CreateWebhookRequest](nil), newWebhookOf),
		"change of a webhook": ignored(t, filled(func(in *UpdateWebhookRequest) { in.RotateSecret = new(false) }),
			func(in UpdateWebhookRequest) (webhook.Change, error) {
				if in.RotateSecret == nil { // it makes a difference only without a secret
					in.Secret, in.RotateSecret = nil, new(true)
				}
				return webhookChangeOf(in)
			}),
		"quota": ignored(t, filled[QuotaRequest](nil), func(in QuotaRequest) (auth.QuotaRequest, error) {
			return quotaRequestOf(&in), nil
		}),
	} {
		if lost != nil {
			t.Errorf("a %s ignores %q", name, lost)
		}
	}
}

// TestAnswersHaveEveryField encodes what has a value in every field, and fails for a field of the
// answer, also for one that is added later, that is left empty.
func TestAnswersHaveEveryField(t *testing.T) {
	lost := func(string) (time.Time, bool) { return time.Now(), true }
	s := &server{Config: Config{Relay: &httpserver.Relay{Lost: lost}}}
	ephemeral := filled(func(b *sandbox.Sandbox) { b.Mode, b.State = sandbox.Ephemeral, sandbox.Suspended })()
	persistent := filled(func(b *sandbox.Sandbox) { b.Mode, b.State = sandbox.Persistent, sandbox.Suspended })()
	for _, c := range []struct {
		what    string
		answers []any // of one type; a field may be set in any of them
		empty   []string
	}{
		{"sandbox", []any{s.sandboxOf(ephemeral), s.sandboxOf(persistent)}, []string{"Network"}}, // see GetSandbox
		{"traffic", []any{*networkOf(new(filled[sandbox.Traffic](nil)()))}, nil},
		{"snapshot", []any{s.snapshotOf(filled(func(s *sandbox.Snapshot) { s.Kept = sandbox.KeepAll })())}, nil},
		{"template", []any{templateOf(filled[template.Template](nil)()),
			templateOf(filled(func(t *template.Template) { t.OrgID = "" })())}, nil},
		{"line of a log", []any{logLineOf(filled[template.LogLine](nil)())}, nil},
		{"event of a sandbox", []any{eventOf(filled[sandbox.Event](nil)())}, nil},
		{"event", []any{feedEventOf(filled[event.Event](nil)())}, nil},
		{"entry", []any{entryOf(filled[agentapi.Entry](nil)())}, nil},
		// A call that runs a command has the exit too, with more.
		{"process", []any{processOf(filled[agentapi.Process](nil)())},
			[]string{"Exit.DurationMs", "Exit.StderrTruncated", "Exit.StdoutTruncated"}},
		{"size", []any{sizeOf(filled[sandbox.Size](nil)())}, nil},
		{"organization", []any{orgOf(filled[auth.Org](nil)())}, nil},
		{"node", []any{nodeOf(filled[fleet.Node](nil)())}, nil},
		{"webhook", []any{withSecret(filled[webhook.Webhook](nil)())}, nil},
		{"attempt", []any{attemptOf(webhook.Attempt{At: time.Unix(1, 0), Took: time.Second}),
			attemptOf(filled(func(a *webhook.Attempt) { a.Took = time.Second })())}, nil},
		{"delivery", []any{deliveryOf(filled(func(d *webhook.Delivery) { d.Last.Took = time.Second })())},
			[]string{"LastAttempt.Delivered"}},
		{"key", []any{keyOf(filled[auth.Key](nil)())}, nil},
	} {
		var empty []string
		for i, a := range c.answers {
			zero := caytest.ZeroFields(a)
			if i == 0 {
				empty = zero
			}
			empty = slices.DeleteFunc(empty, func(name string) bool { return !slices.Contains(zero, name) })
		}
		if !slices.Equal(empty, c.empty) {
			t.Errorf("the answer with a %s leaves %q empty, want %q", c.what, empty, c.empty)
		}
	}
}

// TestShapeIsShown fails for a field of the shape, also for one that is added later, that no answer
// has and no list excuses.
func TestShapeIsShown(t *testing.T) {
	s := &server{}
	start := []string{"Start.Command", "Start.Args", "Start.Ready.Port", "Start.Ready.Command", "Start.Ready.HTTP.Port",
		"Start.Ready.HTTP.Path", "Start.Ready.Timeout", "Start.User"}
	shape := filled(func(s *sandbox.Shape) { s.Start.Args = []string{"other", "than", "the", "command"} })
	for what, c := range map[string]struct {
		hidden []string
		show   func(sandbox.Shape) (any, error)
	}{
		// A sandbox and a snapshot have the settings of their template that no call can change.
		"sandbox": {slices.Concat([]string{"Image", "Size.Dedicated", "User", "Workdir"}, start),
			func(shape sandbox.Shape) (any, error) { return s.sandboxOf(sandbox.Sandbox{Shape: shape}), nil }},
		"snapshot": {slices.Concat([]string{"Image", "Size.Dedicated", "User", "Workdir"}, start),
			func(shape sandbox.Shape) (any, error) { return s.snapshotOf(sandbox.Snapshot{Shape: shape}), nil }},
		// Of a template's size there is only the name, and a create sets the user of its start command.
		"template": {[]string{"Image", "Size.VCPUs", "Size.MemoryMB", "Size.Dedicated", "Start.Command", "Start.User"},
			func(shape sandbox.Shape) (any, error) { return templateOf(template.Template{Shape: shape}), nil }},
	} {
		if hidden := ignored(t, shape, c.show); !slices.Equal(hidden, c.hidden) {
			t.Errorf("the answer with a %s does not show %q, want %q", what, hidden, c.hidden)
		}
	}
}
