package e2b

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// agentPaths are the paths that the agent serves to clients, with their methods. The host's own
// calls are not among them.
var agentPaths = map[string][]string{
	"/health":        {http.MethodGet},
	"/metrics":       {http.MethodGet},
	"/envs":          {http.MethodGet},
	"/files":         {http.MethodGet, http.MethodHead, http.MethodPost},
	"/files/compose": {http.MethodPost},
}

// procedures are the calls of the Connect protocol that clients may make; true marks a stream,
// which ends when the server stops.
var procedures = map[string]bool{
	"/process.Process/List": false, "/process.Process/Start": true, "/process.Process/Connect": true,
	"/process.Process/Update": false, "/process.Process/SendInput": false, "/process.Process/SendSignal": false,
	"/process.Process/CloseStdin": false, "/process.Process/StreamInput": true,

	"/filesystem.Filesystem/Stat": false, "/filesystem.Filesystem/MakeDir": false, "/filesystem.Filesystem/Move": false,
	"/filesystem.Filesystem/ListDir": false, "/filesystem.Filesystem/Remove": false, "/filesystem.Filesystem/WatchDir": true,
	"/filesystem.Filesystem/CreateWatcher": false, "/filesystem.Filesystem/GetWatcherEvents": false,
	"/filesystem.Filesystem/RemoveWatcher": false,
}

// served reports whether the agent serves a request of a client.
func served(r *http.Request) bool {
	if _, ok := procedures[r.URL.Path]; ok {
		return r.Method == http.MethodPost || r.Method == http.MethodGet // unary calls may use GET
	}
	for _, method := range agentPaths[r.URL.Path] {
		if r.Method == method {
			return true
		}
	}
	return false
}

// traffic passes a request to a port of a sandbox.
func (s *Handler) traffic(w http.ResponseWriter, r *http.Request, to place) error {
	callOf(r).names(to.sandbox())
	sb, err := s.Rows.GetAny(r.Context(), to.sandbox())
	if fault.Is(err, fault.NotFound) {
		return gone{to, notFoundText, false}
	}
	if err != nil {
		return err
	}
	if to.port != envdPort {
		return s.servePort(w, r, sb, to)
	}
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	if !served(r) {
		return fault.New(fault.NotFound, fault.CodeNoSuchRoute, "there is no %s %s", r.Method, r.URL.Path)
	}
	callOf(r).Route = r.URL.Path
	r.Header.Del("Upgrade") // the agent has no upgrades, and a program that poses as it must get none
	opts := optionsOf(sb)
	if !takesTraffic(sb, opts) || r.URL.Path == "/health" && sb.State != sandbox.Running {
		return gone{to, notFoundText, false}
	}
	if err := s.admitEnvd(r, sb, opts); err != nil {
		return err
	}
	if err := callOf(r).OpenAccount(s.Budget, r, sb.OrgID, trafficCost); err != nil {
		return err // before waking the sandbox
	}
	if s.Relay.Away(r, sb.Holder.Node) {
		r.Header.Del(agentapi.TokenHeader)
		return s.sendTraffic(w, r, sb, to)
	}
	lease, err := s.lease(r.Context(), sb, opts, useOf(r.URL.Path))
	if err != nil {
		return goneError(err, to)
	}
	defer lease.Release()
	s.Samples.Follow(sb.ID, sb.OrgID)
	return s.forward(w, r, lease.Sandbox, to)
}

// takesTraffic reports whether the sandbox runs, or wakes when traffic comes.
func takesTraffic(sb sandbox.Sandbox, o options) bool {
	return sb.State == sandbox.Running || stateOf(sb) == statePaused && o.wakes(sb)
}

// admitEnvd checks the token, or the signature that replaces it.
func (s *Handler) admitEnvd(r *http.Request, sb sandbox.Sandbox, o options) error {
	_, forwarded := httpserver.PassageOf(r.Context()) // which the replica admitted
	if forwarded || r.URL.Path == "/health" || o.open(sb) {
		return nil
	}
	given := r.Header.Values(agentapi.TokenHeader)
	switch {
	case len(given) == 1 && s.isToken(given[0], envdToken, sb.ID):
		return nil
	case len(given) == 0 && r.URL.Path == "/files":
		return signatureError(s.checkSignature(r, sb.ID))
	}
	return errNoToken
}

// useOf returns what a path of the agent is for.
func useOf(path string) sandbox.Cause {
	if strings.HasPrefix(path, "/file") { // also the procedures of filesystem.Filesystem
		return sandbox.ForFiles
	}
	return sandbox.ForProcess
}

// lease leases a running sandbox, and first wakes one that wakes when traffic comes.
func (s *Handler) lease(ctx context.Context, sb sandbox.Sandbox, o options, use sandbox.Cause) (*sandbox.Lease,
	error) {
	lease, err := s.Sandboxes.Attach(ctx, sb.ID)
	if err == nil || !o.wakes(sb) || !fault.Is(err, fault.Conflict) {
		return lease, err
	}
	quota, err := s.quotaOf(ctx, sb)
	if err != nil {
		return nil, err
	}
	return s.Sandboxes.Connect(ctx, sandbox.Caller{OrgID: sb.OrgID, Quota: sandbox.Quota(quota)}, sb.ID, use)
}

// quotaOf returns the quota under which traffic wakes a sandbox: that of its organization.
func (s *Handler) quotaOf(ctx context.Context, sb sandbox.Sandbox) (auth.Quota, error) {
	if p, ok := httpserver.PassageOf(ctx); ok {
		return p.Quota, nil
	}
	org, err := s.Auth.Org(ctx, sb.OrgID)
	return org.Quota, err
}

// goneError returns the answer for a sandbox that existed a moment ago.
func goneError(err error, to place) error {
	if fault.Is(err, fault.Conflict) || fault.Is(err, fault.NotFound) {
		return gone{to, notFoundText, false}
	}
	return err
}

func target(sb sandbox.Sandbox) agentapi.Target {
	return agentapi.Target{SandboxID: string(sb.ID), Run: sb.Run}
}

// forward passes the request to the agent. It returns an error only before the answer has begun;
// a later failure breaks the connection.
func (s *Handler) forward(w http.ResponseWriter, r *http.Request, sb sandbox.Sandbox, to place) error {
	var failed error
	r, stop := s.untilHangup(r, false)
	defer stop()
	p := httputil.ReverseProxy{
		Transport:     s.Agent.Transport(target(sb), procedures[r.URL.Path]),
		FlushInterval: -1, // pass on each message at once; clients wait for the first
		Rewrite: func(pr *httputil.ProxyRequest) {
			q := pr.In.URL.Query()
			if q.Has("signature") { // it was checked here against the client's token
				q.Del("signature")
				q.Del("signature_expiration")
				pr.Out.URL.RawQuery = q.Encode()
			} else {
				pr.Out.URL.RawQuery = pr.In.URL.RawQuery
			}
			pr.Out.URL.RawQuery = portproxy.WithoutToken(pr.Out.URL.RawQuery)
			for _, own := range []string{idHeader, portHeader, "X-Api-Key", "Cookie"} {
				pr.Out.Header.Del(own)
			}
			portproxy.WithoutSecrets(pr.Out.Header)
			if _, _, basic := pr.In.BasicAuth(); !basic { // basic authentication names a user; anything else may be a stray key
				pr.Out.Header.Del("Authorization")
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			portproxy.CleanAnswer(resp.Header, true) // root inside may answer instead of the agent
			httpserver.OwnHead(resp.Header, callOf(r).ID)
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) { failed = err },
		ErrorLog:     slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	// The agent answers before a body has ended, and a stream with its first message. Without
	// this net/http would then discard the rest of the body. The writers of tests have no
	// connection, and fail.
	_ = http.NewResponseController(w).EnableFullDuplex()
	clear(w.Header()) // the answer has its own headers
	p.ServeHTTP(w, r)
	if failed == nil {
		portproxy.CleanTrailers(w.Header(), true)
		return nil
	}
	httpserver.OwnHead(w.Header(), callOf(r).ID)
	callOf(r).Err = failed
	if err := callOf(r).Body.Broken(); err != nil {
		return err
	}
	if r.Context().Err() != nil && s.stopped.Err() == nil {
		return failed // the caller has left
	}
	if f := fault.As(failed); f != nil && f.Kind == fault.Unavailable || errors.Is(failed, context.Canceled) {
		return s.unanswered(r, sb, to)
	}
	return goneError(failed, to)
}

// untilHangup returns a request that ends with [Handler.Hangup] if it may have no end of its own: one to the agent for
// a stream, and, with port, one to a program. Call stop when it is answered.
func (s *Handler) untilHangup(r *http.Request, port bool) (_ *http.Request, stop func()) {
	if !port && !procedures[r.URL.Path] {
		return r, func() {}
	}
	ctx, cancel := context.WithCancel(r.Context())
	release := context.AfterFunc(s.stopped, cancel)
	return r.WithContext(ctx), func() { release(); cancel() }
}

// unanswered returns the error for a request that the agent did not answer: the sandbox has gone,
// or does not work as it should.
func (s *Handler) unanswered(r *http.Request, sb sandbox.Sandbox, to place) error {
	now, err := s.Rows.GetAny(context.WithoutCancel(r.Context()), sb.ID)
	if err == nil && now.State == sandbox.Running && now.Run == sb.Run {
		return gone{to, "The sandbox is running but does not answer", true}
	}
	return gone{to, notFoundText, false}
}
