package e2b

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httputil"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// inside is what the agent serves to those outside, by path. The calls that the host makes
// are not here.
var inside = map[string][]string{
	"/health":        {http.MethodGet},
	"/metrics":       {http.MethodGet},
	"/envs":          {http.MethodGet},
	"/files":         {http.MethodGet, http.MethodHead, http.MethodPost},
	"/files/compose": {http.MethodPost},
}

// procedures are the calls of the Connect protocol that are served; true is a stream, which
// ends with the server.
var procedures = map[string]bool{
	"/process.Process/List": false, "/process.Process/Start": true, "/process.Process/Connect": true,
	"/process.Process/Update": false, "/process.Process/SendInput": false, "/process.Process/SendSignal": false,
	"/process.Process/CloseStdin": false, "/process.Process/StreamInput": true,

	"/filesystem.Filesystem/Stat": false, "/filesystem.Filesystem/MakeDir": false, "/filesystem.Filesystem/Move": false,
	"/filesystem.Filesystem/ListDir": false, "/filesystem.Filesystem/Remove": false, "/filesystem.Filesystem/WatchDir": true,
	"/filesystem.Filesystem/CreateWatcher": false, "/filesystem.Filesystem/GetWatcherEvents": false,
	"/filesystem.Filesystem/RemoveWatcher": false,
}

// served reports whether the agent serves that to those outside.
func served(r *http.Request) bool {
	if _, ok := procedures[r.URL.Path]; ok {
		return r.Method == http.MethodPost || r.Method == http.MethodGet // a GET may be a unary call's
	}
	for _, method := range inside[r.URL.Path] {
		if r.Method == method {
			return true
		}
	}
	return false
}

// traffic carries a request to a port of a sandbox.
func (s *Surface) traffic(w http.ResponseWriter, r *http.Request, to place) error {
	callOf(r).sandbox = string(to.sandbox())
	box, err := s.Sandboxes.Lookup(r.Context(), to.sandbox())
	if fault.Is(err, fault.NotFound) {
		return gone{to, notFoundText, false}
	}
	if err != nil {
		return err
	}
	if to.port != envdPort {
		return s.servePort(w, r, box, to)
	}
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	if !served(r) {
		return fault.New(fault.NotFound, "no_such_route", "there is no %s %s", r.Method, r.URL.Path)
	}
	callOf(r).route = r.URL.Path
	r.Header.Del("Upgrade") // the agent has no other protocol, and one in its place must have none
	kept := keptWith(box)
	if !takesTraffic(box, kept) || r.URL.Path == "/health" && box.State != sandbox.Running {
		return gone{to, notFoundText, false}
	}
	if err := s.admitEnvd(r, box, kept); err != nil {
		return err
	}
	if err := s.account(r, box.OrgID, trafficCost); err != nil {
		return err // before the sandbox is woken
	}
	lease, err := s.lease(r.Context(), box, kept)
	if err != nil {
		return away(err, to)
	}
	defer lease.Release()
	s.samples.follow(box.ID)
	return s.forward(w, r, lease.Sandbox, to)
}

// takesTraffic reports whether the sandbox runs, or is one that traffic wakes.
func takesTraffic(box sandbox.Sandbox, k kept) bool {
	return box.State == sandbox.Running || stateOf(box) == statePaused && k.wakes(box)
}

// admitEnvd checks the token, or the signature that stands in for it.
func (s *Surface) admitEnvd(r *http.Request, box sandbox.Sandbox, k kept) error {
	if r.URL.Path == "/health" || k.open(box) {
		return nil
	}
	given := r.Header.Values(agentapi.TokenHeader)
	switch {
	case len(given) == 1 && s.isToken(given[0], envdToken, box.ID):
		return nil
	case len(given) == 0 && r.URL.Path == "/files":
		return signatureError(s.checkSignature(r, box.ID))
	}
	return errNoToken
}

// lease leases a sandbox that runs; one that traffic wakes is woken.
func (s *Surface) lease(ctx context.Context, box sandbox.Sandbox, k kept) (*sandbox.Lease, error) {
	lease, err := s.Sandboxes.Attach(ctx, box.ID)
	if err == nil || !k.wakes(box) || !fault.Is(err, fault.Conflict) {
		return lease, err
	}
	org, err := s.Auth.Org(ctx, box.OrgID)
	if err != nil {
		return nil, err
	}
	return s.Sandboxes.Connect(ctx, sandbox.Caller{OrgID: org.ID, Quota: sandbox.Quota(org.Quota)}, box.ID)
}

// away is what clients are told of a sandbox that was there a moment ago.
func away(err error, to place) error {
	if fault.Is(err, fault.Conflict) || fault.Is(err, fault.NotFound) {
		return gone{to, notFoundText, false}
	}
	return err
}

func target(box sandbox.Sandbox) agentapi.Target {
	return agentapi.Target{SandboxID: string(box.ID), Run: box.Run}
}

// forward makes the request to the agent. It returns an error only before the answer has
// begun; what breaks later breaks the connection.
func (s *Surface) forward(w http.ResponseWriter, r *http.Request, box sandbox.Sandbox, to place) error {
	var failed error
	if procedures[r.URL.Path] {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(s.stopped, cancel)()
		r = r.WithContext(ctx)
	}
	p := httputil.ReverseProxy{
		Transport:     s.Agent.Transport(target(box), procedures[r.URL.Path]),
		FlushInterval: -1, // each message as it comes: clients wait for the first
		Rewrite: func(pr *httputil.ProxyRequest) {
			q := pr.In.URL.Query()
			if q.Has("signature") { // checked here, with the client's token
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
			if _, _, basic := pr.In.BasicAuth(); !basic { // that names a user; anything else is a key gone astray
				pr.Out.Header.Del("Authorization")
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			portproxy.CleanAnswer(resp.Header, true) // root inside answers as it likes
			ownHead(resp.Header, callOf(r).id)
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) { failed = err },
		ErrorLog:     slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	// The agent answers before a body has ended, a stream's with its first message. Without
	// this net/http would take the rest of the body away from who still sends it. A writer
	// that has no connection is one of a test.
	_ = http.NewResponseController(w).EnableFullDuplex()
	clear(w.Header()) // the answer brings its own
	p.ServeHTTP(w, r)
	if failed == nil {
		portproxy.CleanTrailers(w.Header(), true)
		return nil
	}
	ownHead(w.Header(), callOf(r).id)
	callOf(r).err = failed
	if err := callOf(r).body.incomplete(); err != nil {
		return err
	}
	if r.Context().Err() != nil && s.stopped.Err() == nil {
		return failed // nobody hears it
	}
	if f := fault.As(failed); f != nil && f.Kind == fault.Unavailable || errors.Is(failed, context.Canceled) {
		return s.unanswered(r, box, to)
	}
	return away(failed, to)
}

// unanswered is the answer to a request that the agent did not answer: the sandbox has gone
// meanwhile, or does not do what it should.
func (s *Surface) unanswered(r *http.Request, box sandbox.Sandbox, to place) error {
	now, err := s.Sandboxes.Lookup(context.WithoutCancel(r.Context()), box.ID)
	if err == nil && now.State == sandbox.Running && now.Run == box.Run {
		return gone{to, "The sandbox is running but does not answer", true}
	}
	return gone{to, notFoundText, false}
}
