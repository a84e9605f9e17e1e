// Package e2b is a second face of cay, for whom it is E2B: the control API that E2B's
// clients call, and the traffic of those clients to what runs inside a sandbox, told apart
// on one port by headers, host names and signatures. It owns that wire, its errors and its
// words, and translates both ways; what is decided, is decided in the core rooms.
//
// It has no state but the samples of what sandboxes use, which are bounded and forgotten
// with the process. What it has to know of a sandbox beyond the core's words is in the row,
// as the row's Surface. Tokens are derived, not stored: see tokens.go.
//
// The handler is safe for concurrent use. A call that carries traffic leases its sandbox
// until it ends. One that a sandbox goes away under is broken in mid-stream and never ended
// in good order, after the row says that the sandbox does not run: E2B's clients tell a
// killed sandbox from a finished command by that.
//
// What is not there answers 501 and says so.
package e2b

import (
	"context"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/accesslog"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// Sandboxes is what is called of the sandbox room; [*sandbox.Service] has it.
type Sandboxes interface {
	Create(ctx context.Context, c sandbox.Caller, r sandbox.Request, once sandbox.Once, wait bool) (sandbox.Sandbox, error)
	Get(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Sandbox, error)
	Lookup(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)
	Living(ctx context.Context) ([]sandbox.ID, error)
	List(ctx context.Context, f sandbox.Filter) ([]sandbox.Sandbox, string, error)
	Destroy(ctx context.Context, orgID string, id sandbox.ID) error
	SetTimeout(ctx context.Context, orgID string, id sandbox.ID, timeout time.Duration, later bool) (sandbox.Sandbox, error)
	SetEgress(ctx context.Context, orgID string, id sandbox.ID, e sandbox.Egress) (sandbox.Sandbox, error)
	SetSurface(ctx context.Context, orgID string, id sandbox.ID, surface string) (sandbox.Sandbox, error)
	Pause(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Sandbox, error)
	WakeFor(ctx context.Context, c sandbox.Caller, id sandbox.ID, timeout time.Duration) (sandbox.Sandbox, error)
	Attach(ctx context.Context, id sandbox.ID) (*sandbox.Lease, error)
	Connect(ctx context.Context, c sandbox.Caller, id sandbox.ID) (*sandbox.Lease, error)
	Fork(ctx context.Context, c sandbox.Caller, id sandbox.ID, r sandbox.ForkRequest) ([]sandbox.Child, error)
	SaveSnapshot(ctx context.Context, orgID string, id sandbox.ID, name string) (sandbox.Snapshot, error)
	GetSnapshot(ctx context.Context, orgID, nameOrID string) (sandbox.Snapshot, error)
	ListSnapshots(ctx context.Context, f sandbox.SnapshotFilter) ([]sandbox.Snapshot, string, error)
	DeleteSnapshot(ctx context.Context, orgID, nameOrID string) error
	Events(ctx context.Context, orgID string, id sandbox.ID, limit int, cursor string) ([]sandbox.Event, string, error)
}

// Templates is what is called of the template room; [*template.Service] has it.
type Templates interface {
	Get(ctx context.Context, orgID, nameOrID string) (template.Template, error)
	List(ctx context.Context, orgID string, limit int, cursor string) ([]template.Template, string, error)
}

// Auth is what is called of the auth room; [*auth.Service] has it.
type Auth interface {
	Authenticate(ctx context.Context, secret string) (auth.Principal, error)
	Allow(p auth.Principal) error
	Failed(remote string) error
	Org(ctx context.Context, id string) (auth.Org, error)
}

// Agent is what is called inside sandboxes; [*agentapi.Client] has it.
type Agent interface {
	Transport(t agentapi.Target, stream bool) http.RoundTripper
	Metrics(ctx context.Context, t agentapi.Target) (agentapi.Metrics, error)
}

// Ports is what is called of the room portproxy; [*portproxy.Proxy] has it.
type Ports interface {
	Serve(w http.ResponseWriter, r *http.Request, to portproxy.Destination) error
}

// Config is what the surface needs. Every field but Budget is required.
type Config struct {
	Sandboxes Sandboxes
	Templates Templates
	Auth      Auth
	Agent     Agent
	Ports     Ports
	Names     portproxy.Names // of ports, where the operator has a domain for them
	// Secret is what tokens are derived from: at least 16 random bytes, the same in
	// every life of the server, or clients lose the sandboxes that they have.
	Secret []byte
	// Budget is what calls take the memory from that they hold; nil is no limit.
	Budget *budget.Budget
	Log    *slog.Logger
	// Registry takes the metrics of this package.
	Registry prometheus.Registerer
}

// Surface is the handler. Make it with [New].
type Surface struct {
	Config
	next    http.Handler
	control *http.ServeMux
	samples *samples
	counts  *counts
	access  *accesslog.Log
	// search and searchOfOne have the searches for the sandbox that a signature is of.
	search, searchOfOne *auth.Buckets
	stopped             context.Context // of the server's streams
	stop                context.CancelFunc
}

// New makes a surface in front of next, which is given every request that is not the
// surface's own. [Surface.Run] takes the samples.
func New(cfg Config, next http.Handler) *Surface {
	s := &Surface{Config: cfg, next: next, samples: newSamples(), counts: newCounts(cfg.Registry), access: accesslog.New(cfg.Log),
		search: auth.NewBuckets(searchesPerSecond, searchesBurst), searchOfOne: auth.NewBuckets(searchesOfOne, searchesOfOneAtOnce)}
	s.stopped, s.stop = context.WithCancel(context.Background())
	s.control = s.routes()
	return s
}

// Hangup breaks the streams of commands, terminals and watches, which would otherwise hold
// up a server that shuts down. What runs in the sandboxes goes on.
func (s *Surface) Hangup() { s.stop() }

// The port that is not a program's inside, and what our ids begin with.
const (
	envdPort = agentapi.Port // it listens where E2B's does
	idPrefix = "sbx_"
)

// roots begin the paths of the control API. None is the v1 API's.
var roots = []string{"/sandboxes", "/v2", "/v3", "/snapshots", "/templates", "/volumes", "/secrets", "/teams", "/api-keys", "/nodes", "/events", "/health"}

// ServeHTTP answers one request, or leaves it to the next handler.
func (s *Surface) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to, err := destination(r)
	switch {
	case err != nil:
		s.handle(w, r, true, func(w http.ResponseWriter, r *http.Request) error { return err })
	case to.id != "" && !s.leaves(r, to):
		s.handle(w, r, true, func(w http.ResponseWriter, r *http.Request) error { return s.traffic(w, r, to) })
	case to.id != "":
		s.next.ServeHTTP(w, r) // a page of a port may be called as the control API's are
	case r.URL.Path == "/files":
		s.handle(w, r, true, s.signed)
	case isControl(r.URL.Path):
		s.handle(w, r, false, s.answerControl)
	case preflight(r) && strings.Contains(strings.ToLower(r.Header.Get("Access-Control-Request-Headers")), strings.ToLower(idHeader)):
		allowOrigins(w, r) // a browser asks whether it may route by headers
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
