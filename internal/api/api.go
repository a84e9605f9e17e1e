// Package api is HTTP in, HTTP out: it decodes a request, says who asks and
// whether the key's scopes cover it, calls one method of the core, and encodes
// the answer. It owns the wire format of openapi.yaml, the HTTP statuses, the access log,
// and the limits on bodies and slow callers. It holds no state of its own and
// decides nothing about sandboxes: what a core room refuses is a fault, which only
// this package turns into a status.
//
// The handler is safe for concurrent use. Files stream both ways and are never
// whole in memory. After an error nothing is left behind: every lease is
// released with the call it was taken for, and a command whose caller has gone is
// killed.
//
// api.gen.go is generated from openapi.yaml; run generate.sh after changing it.
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
	List(ctx context.Context, f sandbox.Filter) ([]sandbox.Sandbox, string, error)
	Destroy(ctx context.Context, orgID string, id sandbox.ID) error
	Keepalive(ctx context.Context, orgID string, id sandbox.ID, timeout *time.Duration) (sandbox.Sandbox, error)
	Wake(ctx context.Context, c sandbox.Caller, id sandbox.ID) (sandbox.Sandbox, error)
	Connect(ctx context.Context, c sandbox.Caller, id sandbox.ID) (*sandbox.Lease, error)
	Suspend(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Sandbox, error)
	Checkpoint(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Point, error)
	SetEgress(ctx context.Context, orgID string, id sandbox.ID, e sandbox.Egress) (sandbox.Sandbox, error)
	SaveSnapshot(ctx context.Context, orgID string, id sandbox.ID, name string) (sandbox.Snapshot, error)
	GetSnapshot(ctx context.Context, orgID, nameOrID string) (sandbox.Snapshot, error)
	ListSnapshots(ctx context.Context, f sandbox.SnapshotFilter) ([]sandbox.Snapshot, string, error)
	DeleteSnapshot(ctx context.Context, orgID, nameOrID string) error
	Fork(ctx context.Context, c sandbox.Caller, id sandbox.ID, r sandbox.ForkRequest) ([]sandbox.Child, error)
	Traffic(ctx context.Context, box sandbox.Sandbox) (*sandbox.Traffic, error)
	Events(ctx context.Context, orgID string, id sandbox.ID, limit int, cursor string) ([]sandbox.Event, string, error)
	SetPublicPort(ctx context.Context, orgID string, id sandbox.ID, port int, public bool) error
	PublicPorts(ctx context.Context, orgID string, id sandbox.ID) ([]int, error)
	Visit(ctx context.Context, id sandbox.ID, port int) (orgID string, public bool, err error)
	Sizes() []sandbox.Size
	Pool() []sandbox.PoolStatus
}

// Templates is what is called of the template room; [*template.Service] has it.
type Templates interface {
	Get(ctx context.Context, orgID, nameOrID string) (template.Template, error)
	List(ctx context.Context, orgID string, limit int, cursor string) ([]template.Template, string, error)
	Create(ctx context.Context, c template.Caller, r template.Request, source io.Reader) (template.Template, error)
	Rebuild(ctx context.Context, c template.Caller, nameOrID string, r *template.Request, source io.Reader) (template.Template, error)
	Cancel(ctx context.Context, c template.Caller, nameOrID string) (template.Template, error)
	Delete(ctx context.Context, c template.Caller, nameOrID string, force bool) error
	Log(ctx context.Context, orgID, nameOrID string) ([]template.LogLine, error)
	Follow(ctx context.Context, orgID, nameOrID, after string, seq int64, emit func(build string, lines []template.LogLine) error) (template.Template, error)
}

// Auth is what is called of the auth room; [*auth.Service] has it.
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

// Agent is what is called inside sandboxes; [*agentapi.Client] has it.
type Agent interface {
	Collect(ctx context.Context, t agentapi.Target, r agentapi.ExecuteRequest, stdout, stderr *budget.Bytes) (agentapi.ExecuteResult, error)
	Upload(ctx context.Context, t agentapi.Target, r agentapi.UploadRequest) error
	Download(ctx context.Context, t agentapi.Target, path, user, rng string) (*agentapi.Download, error)
	Remove(ctx context.Context, t agentapi.Target, path, user string, recursive bool) error
	List(ctx context.Context, t agentapi.Target, path, user string, depth int, emit func(agentapi.Entry) error) error
	Stat(ctx context.Context, t agentapi.Target, path, user string) (agentapi.Entry, error)
	MakeDirectory(ctx context.Context, t agentapi.Target, path, user string, mode *fs.FileMode) (agentapi.Entry, error)
	Rename(ctx context.Context, t agentapi.Target, from, to, user string, overwrite bool) (agentapi.Entry, error)
	DownloadTree(ctx context.Context, t agentapi.Target, path, user string) (io.ReadCloser, error)
	UploadTree(ctx context.Context, t agentapi.Target, path, user string, body io.Reader) error
	Watch(ctx context.Context, t agentapi.Target, path string, recursive bool, ready func(), emit func(agentapi.Change) error) error
	Processes
}

// Config is what the API needs. Every field but Ready, Names, Stopping, Hijacked and Budget is required.
type Config struct {
	Sandboxes Sandboxes
	Templates Templates
	Auth      Auth
	Events    Events
	Agent     Agent
	Ports     Ports
	Names     portproxy.Names // host names of ports; the zero value is none
	Signer    portproxy.Signer

	// Ready says whether sandboxes can be created; nil, or a nil error, is yes.
	// The text of a fault is shown, that of any other error only logged.
	Ready func() error
	// Metrics answers /metrics; Registry takes the metrics of this package.
	Metrics  http.Handler
	Registry prometheus.Registerer

	// Stopping ends when the server stops: calls that have no end of their own, such as
	// watching a directory or following a process, end then. nil never does.
	Stopping context.Context
	// Hijacked has the calls whose connection net/http does not wait for; nil is nobody who
	// waits for them.
	Hijacked *sync.WaitGroup

	// Budget is what calls take the memory from that they hold; nil is no limit.
	Budget *budget.Budget

	Log     *slog.Logger
	Version string // of the server, for /healthz
}

// server answers the operations of openapi.yaml.
type server struct {
	Config
	mux      *http.ServeMux
	metrics  *metrics
	access   *accesslog.Log
	patience patience
}

var _ ServerInterface = (*server)(nil)

// New makes the handler of the whole API. It registers metrics, so it can be
// called once per registry.
func New(cfg Config) http.Handler {
	if cfg.Stopping == nil {
		cfg.Stopping = context.Background()
	}
	if cfg.Hijacked == nil {
		cfg.Hijacked = &sync.WaitGroup{}
	}
	s := &server{Config: cfg, mux: http.NewServeMux(), metrics: newMetrics(cfg.Registry), access: accesslog.New(cfg.Log), patience: usual}
	HandlerWithOptions(s, StdHTTPServerOptions{
		BaseRouter:       s.mux,
		ErrorHandlerFunc: func(w http.ResponseWriter, r *http.Request, err error) { s.fail(w, r, parameterError(err)) },
	})
	return s
}

// Limits on callers who are slow or gone. A caller on a phone line must be able to
// work; one who only holds connections must not.
const (
	headerTimeout  = 10 * time.Second // to send a request's headers
	idleTimeout    = 2 * time.Minute  // between two requests on a connection
	maxHeaderBytes = 32 << 10         // a key, a path of 4 KiB escaped, filters. They are read before the caller is known
	// http2Window is how much of bodies that are not read yet a connection of HTTP/2 may make the server hold,
	// bytes: the least that there can be, beside which nothing is counted. An upload over a line with 50 ms
	// there and back has 1.3 MB a second of it.
	http2Window = 64<<10 - 1
	// http2Streams is how many calls go on over one.
	http2Streams = 100
)

// patience is how long a caller may take.
type patience struct {
	body  time.Duration // to send a JSON body, 8 MiB at most
	stall time.Duration // between two pieces of a file, and to take a piece of an answer
	drain time.Duration // to send the rest of what is refused already
	quiet time.Duration // without a sign of life in a stream of events: proxies give up after a minute or so
}

var usual = patience{body: time.Minute, stall: time.Minute, drain: 30 * time.Second, quiet: 15 * time.Second}

// Server makes an HTTP server that protects itself against slow callers. It has no
// timeout for whole requests: commands and transfers take as long as they take,
// and the handler watches that they move.
//
// It speaks HTTP/2 too, without TLS and only with those who know beforehand: a proxy with TLS in
// front, clients of gRPC.
func Server(addr string, h http.Handler, log *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{
		Protocols:         protocols,
		Addr:              addr,
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: http2Window, MaxReceiveBufferPerStream: http2Window,
			MaxConcurrentStreams: http2Streams},
	}
	newConnections(files()).bound(srv)
	return srv
}
