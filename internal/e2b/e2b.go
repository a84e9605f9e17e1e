// Package e2b serves E2B's clients: the control API that they call, and their traffic to what
// runs inside a sandbox. One port serves all of it; headers, host names and signatures tell
// requests apart. The package owns E2B's wire, its errors and its words, and translates both
// ways; the core rooms decide.
//
// It has no state. What it must know of a sandbox beyond the core's fields is in the row, as the
// row's FrontData. Tokens are derived, not stored: see tokens.go.
//
// The handler is safe for concurrent use. A call that carries traffic leases its sandbox until it
// ends. If the sandbox goes away, the call's stream breaks and never ends in order, and the row
// says before that the sandbox does not run: this is how E2B's clients tell a killed sandbox from
// a finished command.
//
// A call for something that this server does not have is answered with 501 and the reason.
package e2b

import (
	"context"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// Rows has what any process can answer about sandboxes; [*sandbox.Rows] and [*sandbox.Service] implement it.
type Rows interface {
	Get(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Sandbox, error)
	GetAny(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)
	Living(ctx context.Context) ([]sandbox.ID, error)
	List(ctx context.Context, f sandbox.Filter) ([]sandbox.Sandbox, string, error)
	GetSnapshot(ctx context.Context, orgID, nameOrID string) (sandbox.Snapshot, error)
	ListSnapshots(ctx context.Context, f sandbox.SnapshotFilter) ([]sandbox.Snapshot, string, error)
	Sizes() []sandbox.Size
	SizeOf(name string, diskMB int) (sandbox.Size, int)
	Events(ctx context.Context, orgID string, id sandbox.ID, limit int, cursor string) ([]sandbox.Event, string, error)
}

// Sandboxes has the methods of [*sandbox.Service] that this package calls and that need the machine.
type Sandboxes interface {
	Create(ctx context.Context, c sandbox.Caller, r sandbox.Request, once sandbox.Once, wait bool) (sandbox.Sandbox, error)
	Destroy(ctx context.Context, orgID string, id sandbox.ID) error
	SetTimeout(ctx context.Context, orgID string, id sandbox.ID, timeout time.Duration,
		later bool) (sandbox.Sandbox, error)
	SetEgress(ctx context.Context, orgID string, id sandbox.ID, e sandbox.Egress) (sandbox.Sandbox, error)
	SetFrontData(ctx context.Context, orgID string, id sandbox.ID, data string) (sandbox.Sandbox, error)
	Pause(ctx context.Context, orgID string, id sandbox.ID, keep sandbox.Kept) (sandbox.Sandbox, error)
	DropMemory(ctx context.Context, c sandbox.Caller, id sandbox.ID) (sandbox.Sandbox, error)
	WakeFor(ctx context.Context, c sandbox.Caller, id sandbox.ID, timeout time.Duration) (sandbox.Sandbox, error)
	Attach(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error)
	Connect(ctx context.Context, c sandbox.Caller, id sandbox.ID, use sandbox.Cause) (*sandbox.Lease, error)
	Fork(ctx context.Context, c sandbox.Caller, id sandbox.ID, r sandbox.ForkRequest) ([]sandbox.Child, error)
	SaveSnapshot(ctx context.Context, orgID string, id sandbox.ID, name string) (sandbox.Snapshot, error)
	DeleteSnapshot(ctx context.Context, orgID, nameOrID string) error
}

// TemplateRows has what any process can answer about templates; [*template.Reader] and [*template.Service] implement
// it.
type TemplateRows interface {
	Get(ctx context.Context, orgID, nameOrID string) (template.Template, error)
	List(ctx context.Context, orgID string, limit int, cursor string) ([]template.Template, string, error)
	Tags(ctx context.Context, orgID, nameOrID string) (template.Template, []template.Tag, error)
	LogRest(ctx context.Context, templateID string, skip, limit int) ([]template.LogLine, error)
}

// Templates has the methods of [*template.Service] that this package calls and that only the server that builds has.
type Templates interface {
	Delete(ctx context.Context, c template.Caller, nameOrID string, force bool) error
	Announce(ctx context.Context, c template.Caller, a template.Announcement) (template.Draft, error)
	HasUpload(orgID, name string) bool
	PutUpload(ctx context.Context, orgID, name string, r io.Reader, length int64,
		still func(context.Context) error) error
	HasDraft(orgID, templateID, buildID string) error
	UploadKind(ctx context.Context, orgID, name, from string) (fs.FileMode, error)
	BuildDraft(ctx context.Context, c template.Caller, templateID, buildID string, r template.Request, dockerfile string,
		parts []template.Part) (template.Template, error)
	FailDraft(orgID, templateID, buildID string, cause *template.BuildError) error
	BuildState(ctx context.Context, orgID, templateID, buildID string) (template.BuildState, error)
	Tag(ctx context.Context, c template.Caller, nameOrID, from string, names []string) (buildID string, err error)
	Untag(ctx context.Context, c template.Caller, nameOrID string, names []string) error
}

// Auth has the methods of [*auth.Service] that this package calls.
type Auth interface {
	Authenticate(ctx context.Context, secret string) (auth.Principal, error)
	Allow(p auth.Principal) error
	Failed(remote string) error
	Holder(ctx context.Context, keyID string) (auth.Principal, error)
	Org(ctx context.Context, id string) (auth.Org, error)
}

// Agent has the methods of [*agentapi.Client] that this package calls.
type Agent interface {
	Transport(t agentapi.Target, stream bool) http.RoundTripper
}

// Ports has the methods of [*portproxy.Proxy] that this package calls.
type Ports interface {
	Serve(w http.ResponseWriter, r *http.Request, to portproxy.Destination) error
}

// Config configures a Handler. Every field but Budget and Relay is required.
type Config struct {
	Rows         Rows
	TemplateRows TemplateRows
	Auth         Auth
	Events       Events
	Webhooks     Webhooks
	Names        portproxy.Names // host names of ports, if the operator has a domain for them

	// These need a machine. Without one they are nil, and Relay must not be.
	Sandboxes Sandboxes
	Templates Templates
	Agent     Agent
	Ports     Ports
	Samples   Samples

	// Relay sends calls to the nodes that can do them; nil does all calls here.
	Relay *httpserver.Relay

	// Secret is the key that tokens are derived from, at least 16 random bytes. It must stay the
	// same when the server restarts, or clients lose their sandboxes.
	Secret []byte
	// Budget bounds the memory that calls hold; nil is no limit.
	Budget *budget.Budget
	Log    *slog.Logger
	// Registry receives the metrics of this package.
	Registry prometheus.Registerer
}

// Handler answers the requests of E2B's clients. Make it with [New].
type Handler struct {
	Config
	next    http.Handler
	control *http.ServeMux
	counts  *counts
	front   *httpserver.Front
	// search and searchOfOne limit the searches for the sandbox of a signature, in all and of one
	// address.
	search, searchOfOne *auth.Buckets
	stopped             context.Context // done when streams must end
	stop                context.CancelFunc
}

// New returns a Handler in front of next, which gets every request that is not for the Handler.
func New(cfg Config, next http.Handler) *Handler {
	s := &Handler{Config: cfg, next: next, counts: newCounts(cfg.Registry),
		search: auth.NewBuckets(searchesPerSecond, searchesBurst), searchOfOne: auth.NewBuckets(searchesOfOne, searchesOfOneAtOnce)}
	s.stopped, s.stop = context.WithCancel(context.Background())
	s.control = s.routes()
	s.front = s.newFront()
	return s
}

// Hangup breaks the streams of commands, terminals and watches, which would otherwise delay the
// server's shutdown. The processes in the sandboxes continue.
func (s *Handler) Hangup() { s.stop() }

// The agent's port, and the prefix of sandbox ids.
const (
	envdPort = agentapi.Port // E2B's agent has the same
	idPrefix = "sbx_"
)

// roots are the first parts of the control API's paths. The v1 API has none of them.
var roots = []string{"/sandboxes", "/v2", "/v3", "/snapshots", "/templates", "/volumes", "/secrets", "/teams",
	"/api-keys", "/nodes", "/events", "/health"}

// ServeHTTP answers a request, or passes it to the next handler.
func (s *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if p, ok := httpserver.PassageOf(r.Context()); ok {
		s.serveForwarded(w, r, p)
		return
	}
	to, err := destination(r)
	switch {
	case err != nil:
		s.handle(w, r, true, func(w http.ResponseWriter, r *http.Request) error { return err })
	case to.id != "" && !s.leaves(r, to):
		s.handle(w, r, true, func(w http.ResponseWriter, r *http.Request) error { return s.traffic(w, r, to) })
	case to.id != "":
		s.next.ServeHTTP(w, r) // pages of a port may have paths of the control API
	case r.URL.Path == "/files":
		s.handle(w, r, true, s.signed)
	case isControl(r.URL.Path):
		s.handle(w, r, false, s.answerControl)
	case preflight(r) && strings.Contains(strings.ToLower(r.Header.Get("Access-Control-Request-Headers")),
		strings.ToLower(idHeader)):
		// A browser asks whether it may send the headers that name a sandbox.
		s.handle(w, r, true, func(w http.ResponseWriter, r *http.Request) error {
			allowOrigins(w, r)
			return nil
		})
	default:
		s.next.ServeHTTP(w, r)
	}
}

func isControl(path string) bool {
	for _, root := range roots {
		if rest, ok := strings.CutPrefix(path, root); ok && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}
