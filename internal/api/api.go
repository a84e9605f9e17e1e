// Package api implements the HTTP API of cay. It decodes a request, authenticates the caller,
// checks the scopes of the key, calls one method of the core, and encodes the answer. It owns the
// wire format of openapi.yaml and the body of errors; what all fronts do alike is in httpserver, also
// the status of a fault. It holds no state of its own and decides nothing about sandboxes: a core room
// refuses a request with a fault.
//
// The handler is safe for concurrent use. Files stream in both directions and are never held in
// memory whole. A failed call leaves nothing behind: the call releases every lease that it took,
// and a command is killed when its caller leaves.
//
// api.gen.go is generated from openapi.yaml; run generate.sh after changing openapi.yaml.
package api

//go:generate ./generate.sh

import (
	"context"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// Rows has what any process can answer about sandboxes; [*sandbox.Rows] and [*sandbox.Service] implement it.
type Rows interface {
	Get(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Sandbox, error)
	List(ctx context.Context, f sandbox.Filter) ([]sandbox.Sandbox, string, error)
	GetSnapshot(ctx context.Context, orgID, nameOrID string) (sandbox.Snapshot, error)
	ListSnapshots(ctx context.Context, f sandbox.SnapshotFilter) ([]sandbox.Snapshot, string, error)
	Events(ctx context.Context, orgID string, id sandbox.ID, limit int, cursor string) ([]sandbox.Event, string, error)
	SetPublicPort(ctx context.Context, orgID string, id sandbox.ID, port int, public bool) error
	PublicPorts(ctx context.Context, orgID string, id sandbox.ID) ([]int, error)
	GetPort(ctx context.Context, id sandbox.ID, port int) (orgID string, public bool, err error)
	Sizes() []sandbox.Size
}

// Sandboxes has the methods of the sandbox room that need the machine; [*sandbox.Service] implements it.
type Sandboxes interface {
	Create(ctx context.Context, c sandbox.Caller, r sandbox.Request, once sandbox.Once, wait bool) (sandbox.Sandbox, error)
	Destroy(ctx context.Context, orgID string, id sandbox.ID) error
	Keepalive(ctx context.Context, orgID string, id sandbox.ID, timeout *time.Duration) (sandbox.Sandbox, error)
	Wake(ctx context.Context, c sandbox.Caller, id sandbox.ID) (sandbox.Sandbox, error)
	Connect(ctx context.Context, c sandbox.Caller, id sandbox.ID, use sandbox.Cause) (*sandbox.Lease, error)
	Suspend(ctx context.Context, orgID string, id sandbox.ID, keep sandbox.Kept) (sandbox.Sandbox, error)
	Checkpoint(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Checkpoint, error)
	SetEgress(ctx context.Context, orgID string, id sandbox.ID, e sandbox.Egress) (sandbox.Sandbox, error)
	SaveSnapshot(ctx context.Context, orgID string, id sandbox.ID, name string) (sandbox.Snapshot, error)
	DeleteSnapshot(ctx context.Context, orgID, nameOrID string) error
	Fork(ctx context.Context, c sandbox.Caller, id sandbox.ID, r sandbox.ForkRequest) ([]sandbox.Child, error)
	Traffic(ctx context.Context, sbx sandbox.Sandbox) (*sandbox.Traffic, error)
	Pool() []sandbox.PoolStatus
}

// TemplateRows has what any process can answer about templates; [*template.Reader] and [*template.Service] implement
// it.
type TemplateRows interface {
	Get(ctx context.Context, orgID, nameOrID string) (template.Template, error)
	List(ctx context.Context, orgID string, limit int, cursor string) ([]template.Template, string, error)
	Log(ctx context.Context, orgID, nameOrID string) ([]template.LogLine, error)
}

// Templates has the methods of the template room that only the server that builds has; [*template.Service] implements
// it.
type Templates interface {
	Create(ctx context.Context, c template.Caller, r template.Request, source io.Reader) (template.Template, error)
	Rebuild(ctx context.Context, c template.Caller, nameOrID string, r *template.Request,
		source io.Reader) (template.Template, error)
	Cancel(ctx context.Context, c template.Caller, nameOrID string) (template.Template, error)
	Delete(ctx context.Context, c template.Caller, nameOrID string, force bool) error
	Follow(ctx context.Context, orgID, nameOrID, after string, seq int64,
		emit func(build string, lines []template.LogLine) error) (template.Template, error)
}

// Webhooks has the methods of the webhook room that this package calls; [*webhook.Service] implements it.
type Webhooks interface {
	Create(ctx context.Context, orgID string, r webhook.NewWebhook) (webhook.Webhook, error)
	Get(ctx context.Context, orgID, id string) (webhook.Webhook, error)
	List(ctx context.Context, f webhook.Filter) ([]webhook.Webhook, string, error)
	Change(ctx context.Context, orgID, id string, c webhook.Change) (webhook.Webhook, error)
	Delete(ctx context.Context, orgID, id string) error
	Deliveries(ctx context.Context, orgID string, f webhook.DeliveryFilter) ([]webhook.Delivery, string, error)
	Test(ctx context.Context, orgID, id string) (webhook.Attempt, error)
	Replay(ctx context.Context, orgID, id string, after event.Seq) (webhook.Replayed, error)
}

// Nodes has the methods of the fleet room that this package calls; [*fleet.Service] implements it.
type Nodes interface {
	Get(ctx context.Context, idOrName string) (fleet.Node, error)
	List(ctx context.Context) ([]fleet.Node, error)
	Cordon(ctx context.Context, idOrName string) (fleet.Node, error)
	Uncordon(ctx context.Context, idOrName string) (fleet.Node, error)
	Drain(ctx context.Context, idOrName string, wait time.Duration) (fleet.Node, error)
	Remove(ctx context.Context, idOrName string) error
	Takes(ctx context.Context, labels map[string]string) error
	NewToken(ctx context.Context, by, rejoin string, settings fleet.TokenSettings,
		valid time.Duration) (text string, expires time.Time, err error)
}

// Auth has the methods of the auth room that this package calls; [*auth.Service] implements it.
type Auth interface {
	Authenticate(ctx context.Context, secret string) (auth.Principal, error)
	Allow(p auth.Principal) error
	Failed(remote string) error
	Org(ctx context.Context, id string) (auth.Org, error)
	CreateKey(ctx context.Context, p auth.Principal, r auth.KeyRequest) (auth.Key, string, error)
	ListKeys(ctx context.Context, p auth.Principal, limit int, cursor string) ([]auth.Key, string, error)
	RevokeKey(ctx context.Context, p auth.Principal, id string) error
	CreateOrg(ctx context.Context, p auth.Principal, name string, r auth.QuotaRequest) (auth.Org, auth.Key, string, error)
	ListOrgs(ctx context.Context, p auth.Principal, limit int, cursor string) ([]auth.Org, string, error)
}

// Agent has the calls into sandboxes that this package makes; [*agentapi.Client] implements it.
type Agent interface {
	Collect(ctx context.Context, t agentapi.Target, r agentapi.ExecuteRequest,
		stdout, stderr *budget.Bytes) (agentapi.ExecuteResult, error)
	Upload(ctx context.Context, t agentapi.Target, r agentapi.UploadRequest) error
	Download(ctx context.Context, t agentapi.Target, path, user, rng string) (*agentapi.Download, error)
	Remove(ctx context.Context, t agentapi.Target, path, user string, recursive bool) error
	List(ctx context.Context, t agentapi.Target, path, user string, depth int, emit func(agentapi.Entry) error) error
	Stat(ctx context.Context, t agentapi.Target, path, user string) (agentapi.Entry, error)
	MakeDirectory(ctx context.Context, t agentapi.Target, path, user string, mode *fs.FileMode) (agentapi.Entry, error)
	Rename(ctx context.Context, t agentapi.Target, from, to, user string, overwrite bool) (agentapi.Entry, error)
	DownloadTree(ctx context.Context, t agentapi.Target, path, user string) (io.ReadCloser, error)
	UploadTree(ctx context.Context, t agentapi.Target, path, user string, body io.Reader) error
	Watch(ctx context.Context, t agentapi.Target, path string, recursive bool, ready func(),
		emit func(agentapi.Change) error) error
	Processes
}

// Config configures the API. All fields but Expect, Ready, Stored, Names, Stopping, Hijacked, Relay and
// Budget are required.
type Config struct {
	Rows         Rows
	TemplateRows TemplateRows
	Auth         Auth
	Events       Events
	Webhooks     Webhooks
	Nodes        Nodes
	Names        portproxy.Names // host names of ports; the zero value has none
	Signer       portproxy.Signer

	// These need a machine. Without one they are nil, and Relay must not be.
	Sandboxes Sandboxes
	Templates Templates
	Agent     Agent
	Ports     Ports

	// Relay sends calls to the nodes that can do them; nil does all calls here.
	Relay *httpserver.Relay

	// Expect returns a context for a call that will read the sandbox after its key, so that the store can read both at
	// once. A nil Expect returns the context as it is.
	Expect func(ctx context.Context, id sandbox.ID) context.Context
	// Ready reports why no sandbox can be created; a nil Ready, or a nil error, means that sandboxes
	// can be created. Callers are shown the text of a fault; any other error is only logged.
	Ready func() error
	// Stored reports whether the bucket has the checkpoint of a sandbox or snapshot that was made at that time. A nil
	// Stored means that there is no bucket.
	Stored func(id string, made time.Time) bool
	// Metrics answers /metrics; Registry takes the metrics of this package.
	Metrics  http.Handler
	Registry prometheus.Registerer

	// Stopping is canceled when the server stops. That ends calls that have no end of their own, such
	// as watching a directory or following a process. A nil Stopping never ends them.
	Stopping context.Context
	// Hijacked counts the calls on connections that net/http does not wait for, so that the server can
	// wait for them. If it is nil, nothing waits for them.
	Hijacked *sync.WaitGroup

	// Budget limits the memory that calls hold; nil sets no limit.
	Budget *budget.Budget

	Log     *slog.Logger
	Version string // the server's version, for /healthz
}

// server answers the operations of openapi.yaml.
type server struct {
	Config
	mux     *http.ServeMux
	metrics *metrics
	front   *httpserver.Front
}

var _ ServerInterface = (*server)(nil)

// New returns the handler of the whole API. It registers metrics, so it can be called only once for
// each registry.
func New(cfg Config) http.Handler {
	if cfg.Stopping == nil {
		cfg.Stopping = context.Background()
	}
	if cfg.Hijacked == nil {
		cfg.Hijacked = &sync.WaitGroup{}
	}
	s := &server{
		Config: cfg, mux: http.NewServeMux(), metrics: newMetrics(cfg.Registry),
	}
	s.front = s.newFront()
	HandlerWithOptions(s, StdHTTPServerOptions{
		BaseRouter:       s.mux,
		ErrorHandlerFunc: func(w http.ResponseWriter, r *http.Request, err error) { s.fail(w, r, parameterError(err)) },
	})
	return s
}
