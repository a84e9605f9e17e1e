package api

import (
	"context"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// Limits of the lifetime of signed URLs. They are part of the contract.
const (
	defaultURLExpiry = time.Hour
	minURLExpiry     = time.Second
	maxURLExpiry     = 24 * time.Hour
)

// Routes of requests to ports, as the log and the metrics name them.
const (
	portPathRoute = "/v1/sandboxes/{id}/ports/{port}/*"
	portHostRoute = "{port}-{id}.{domain}"
)

// Ports has the methods of the room portproxy that this package calls; [*portproxy.Proxy]
// implements it.
type Ports interface {
	Serve(w http.ResponseWriter, r *http.Request, to portproxy.Destination) error
	Tunnel(w http.ResponseWriter, r *http.Request, t agentapi.Target, port int) error
}

// portRequest describes a request to a port.
type portRequest struct {
	id     sandbox.ID
	port   int
	byHost bool
	path   string // if not byHost: the escaped path that the port receives
}

var portPath = regexp.MustCompile(`^/v1/sandboxes/([^/]+)/ports/([0-9]{1,9})(/.*)$`)

// portOf reports whether a request is for a port, by its host name or by its path. Of the paths
// below a port, only the one that creates signed URLs belongs to the API.
func (s *server) portOf(r *http.Request) (portRequest, bool) {
	if p, ok := httpserver.PassageOf(r.Context()); ok {
		return forwardedPort(r, p)
	}
	if port, id, ok := s.Names.Parse(r.Host); ok {
		return portRequest{id: sandbox.ID(id), port: port, byHost: true}, true
	}
	m := portPath.FindStringSubmatch(r.URL.EscapedPath())
	if m == nil || m[3] == "/url" && r.Method == http.MethodPost {
		return portRequest{}, false
	}
	port, _ := strconv.Atoi(m[2]) // cannot fail: nine digits at most
	return portRequest{id: sandbox.ID(m[1]), port: port, path: m[3]}, true
}

// forwardedPort returns the port of a forwarded request, as the replica has found it: host names are the replica's.
func forwardedPort(r *http.Request, p httpserver.Passage) (portRequest, bool) {
	out := portRequest{id: sandbox.ID(p.Sandbox), port: p.Port, byHost: !p.Shared}
	if m := portPath.FindStringSubmatch(r.URL.EscapedPath()); p.Shared && m != nil {
		out.path = m[3]
	}
	return out, p.Front == frontPort
}

// servePort forwards a request to a port, if the caller may reach it.
func (s *server) servePort(w http.ResponseWriter, r *http.Request, p portRequest) {
	c := callOf(r)
	c.Route, c.page = portPathRoute, true
	if p.byHost {
		c.Route = portHostRoute
	}
	if p.id.Valid() {
		c.Sandbox = string(p.id)
		r = s.expecting(r, p.id)
	}
	caller, moved, err := s.mayReach(w, r, p)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if moved {
		return
	}
	if err := c.OpenAccount(s.Budget, r, caller.OrgID, httpserver.PortCost); err != nil {
		s.fail(w, r, err)
		return
	}
	if s.Relay.Forwards(r) {
		node, away, err := s.holderOf(r, caller.OrgID, p.id, false)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if away {
			ctx, stop := s.untilStop(r.Context())
			defer stop()
			s.send(w, r.WithContext(ctx), node, httpserver.Passage{Front: frontPort, Port: p.port, Shared: !p.byHost,
				Quota: auth.Quota(caller.Quota)})
			return
		}
	}
	lease, err := s.Sandboxes.Connect(r.Context(), caller, p.id, sandbox.ForPort)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer lease.Release()
	to := portproxy.Destination{Target: targetOf(lease), Port: p.port, Shared: !p.byHost}
	if !p.byHost {
		to.Path, to.Prefix = p.path, portproxy.Path(string(p.id), p.port)
		to.Host = "localhost:" + strconv.Itoa(p.port)
	}
	clear(w.Header()) // the application sets the header, which may include its own request id
	if err := s.Ports.Serve(w, r, to); err != nil {
		httpserver.OwnHead(w.Header(), c.ID)
		s.fail(w, r, err)
	}
}

func targetOf(l *sandbox.Lease) agentapi.Target {
	return agentapi.Target{SandboxID: string(l.Sandbox.ID), Run: l.Sandbox.Run}
}

// mayReach authorizes a request to a port. It returns the organization to charge: that of the key,
// or that of the sandbox if the request is signed or the port is public. moved reports that the
// caller was redirected to the same URL with its signature in a cookie.
func (s *server) mayReach(w http.ResponseWriter, r *http.Request, p portRequest) (caller sandbox.Caller, moved bool,
	err error) {
	if err := checkPort(p.port); err != nil {
		return sandbox.Caller{}, false, err
	}
	if caller, forwarded, err := s.forwardedCaller(r); forwarded {
		return caller, false, err
	}
	if key := keyOfPort(r); key != "" {
		if err := s.admitKey(r, key, auth.Exec); err != nil {
			return sandbox.Caller{}, false, err
		}
		return callerOf(r), false, nil
	}
	signed, ends, err := s.signature(r, p)
	if err != nil {
		return sandbox.Caller{}, false, err
	}
	orgID, public, err := s.Rows.GetPort(r.Context(), p.id, p.port)
	if !signed && (fault.Is(err, fault.NotFound) || err == nil && !public) {
		// A caller without a right must not learn which sandboxes exist either.
		return sandbox.Caller{}, false, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated,
			"this port is private: it needs a signed URL, or an API key in Authorization: Bearer cay_… or in %s",
			portproxy.KeyHeader)
	}
	if err != nil {
		return sandbox.Caller{}, false, err
	}
	if fromQuery := r.URL.Query().Has(portproxy.TokenParam); p.byHost && fromQuery &&
		(r.Method == http.MethodGet || r.Method == http.MethodHead) && r.Header.Get("Upgrade") == "" {
		exchange(w, r, ends)
		return sandbox.Caller{}, true, nil
	}
	org, err := s.Auth.Org(r.Context(), orgID)
	return sandbox.Caller{OrgID: org.ID, Quota: sandbox.Quota(org.Quota)}, false, err
}

// forwardedCaller returns who makes a forwarded request to a port. The replica has checked the signature, or that the
// port is public, if the caller has no key.
func (s *server) forwardedCaller(r *http.Request) (caller sandbox.Caller, forwarded bool, err error) {
	p, forwarded := httpserver.PassageOf(r.Context())
	if !forwarded {
		return sandbox.Caller{}, false, nil
	}
	if p.Who.Key.ID != "" {
		callOf(r).Who, _, err = httpserver.CallerOf(r, auth.Exec)
	}
	return sandbox.Caller{OrgID: p.Org, Quota: sandbox.Quota(p.Quota)}, true, err
}

// keyOfPort returns the key of a request to a port, or "" if there is none. An Authorization header
// without a key of ours belongs to the application.
func keyOfPort(r *http.Request) string {
	if values := r.Header.Values(portproxy.KeyHeader); len(values) > 0 {
		return strings.Join(values, ",")
	}
	if key := bearer(r); portproxy.IsKey(key) {
		return key
	}
	return ""
}

// signature checks the signature in the query or, without one, those in cookies. An invalid
// signature in the query is an error; an invalid cookie is ignored, because the port may have
// become public.
func (s *server) signature(r *http.Request, p portRequest) (signed bool, ends time.Time, err error) {
	now := time.Now()
	if values := r.URL.Query()[portproxy.TokenParam]; len(values) > 0 {
		ends, err = s.Signer.Check(values[0], string(p.id), p.port, now)
		return err == nil, ends, err
	}
	if !p.byHost {
		return false, ends, nil // on the API's host the cookie of one sandbox would be sent by the pages of all
	}
	for _, cookie := range r.CookiesNamed(portproxy.TokenCookie) {
		if ends, err = s.Signer.Check(cookie.Value, string(p.id), p.port, now); err == nil {
			return true, ends, nil
		}
	}
	return false, ends, nil
}

// exchange redirects the caller to the same URL without the signature, and sets the signature as a
// cookie of this host alone. A signature in a URL would get into histories and logs.
func exchange(w http.ResponseWriter, r *http.Request, ends time.Time) {
	http.SetCookie(w, &http.Cookie{Name: portproxy.TokenCookie, Value: r.URL.Query().Get(portproxy.TokenParam), Path: "/",
		Expires: ends, HttpOnly: true, Secure: portproxy.Scheme(r) == "https", SameSite: http.SameSiteLaxMode})
	// Two slashes at the beginning would name another host.
	to := url.URL{
		Path:     "/" + strings.TrimLeft(r.URL.Path, "/"),
		RawPath:  "/" + strings.TrimLeft(r.URL.EscapedPath(), "/"),
		RawQuery: portproxy.WithoutToken(r.URL.RawQuery),
	}
	h := w.Header()
	h.Set("Location", to.String())
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusSeeOther)
}

func checkPort(port int) error {
	switch {
	case port < 1 || port > 65535:
		return fault.InvalidField("port", "must be from 1 to 65535")
	case port == agentapi.Port:
		return fault.InvalidField("port", "%d is the sandbox's own agent's", port)
	}
	return nil
}

// OpenTunnel answers POST /v1/sandboxes/{id}/tunnel.
func (s *server) OpenTunnel(w http.ResponseWriter, r *http.Request, id SandboxID, params OpenTunnelParams) {
	if err := checkPort(params.Port); err != nil {
		s.fail(w, r, err)
		return
	}
	if !portproxy.WantsTunnel(r) {
		w.Header().Set("Upgrade", agentapi.TunnelProtocol)
		s.problem(w, r, http.StatusUpgradeRequired, fault.InField(fault.CodeUpgradeRequired, "Upgrade",
			"a tunnel needs HTTP/1.1 with Connection: Upgrade and Upgrade: %s", agentapi.TunnelProtocol))
		return
	}
	s.inside(w, r, id, sandbox.ForPort, func(t agentapi.Target) error { return s.Ports.Tunnel(w, r, t, params.Port) })
}

// GetPort answers GET /v1/sandboxes/{id}/ports/{port}.
func (s *server) GetPort(w http.ResponseWriter, r *http.Request, id SandboxID, port PortNumber) {
	s.answerPort(w, r, id, port, checkPort(port))
}

// SetPort answers PUT /v1/sandboxes/{id}/ports/{port}.
func (s *server) SetPort(w http.ResponseWriter, r *http.Request, id SandboxID, port PortNumber) {
	var in PortSettings
	_, err := read(w, r, maxBody, true, &in)
	if err == nil {
		err = checkPort(port)
	}
	if err == nil && in.Public == nil {
		err = fault.InvalidField("public", "is required")
	}
	if err == nil {
		err = s.Rows.SetPublicPort(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id), port, *in.Public)
	}
	s.answerPort(w, r, id, port, err)
}

func (s *server) answerPort(w http.ResponseWriter, r *http.Request, id SandboxID, port int, err error) {
	var public []int
	if err == nil {
		public, err = s.Rows.PublicPorts(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id))
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	out := s.portShown(r, id, port)
	for _, p := range public {
		out.Public = out.Public || p == port
	}
	s.answer(w, r, http.StatusOK, out)
}

// portShown returns a private port as the API shows it.
func (s *server) portShown(r *http.Request, id string, port int) Port {
	return Port{Port: port, URL: s.portURL(r, id, port)}
}

// portURL returns the URL of a port: by host name if every client resolves these names, otherwise by path on the host
// that was called.
func (s *server) portURL(r *http.Request, id string, port int) string {
	if base := s.Names.Of(id, port); base != "" && !s.Names.Local {
		return base + "/"
	}
	return portproxy.Scheme(r) + "://" + r.Host + portproxy.Path(id, port) + "/"
}

// ListPorts answers GET /v1/sandboxes/{id}/ports.
func (s *server) ListPorts(w http.ResponseWriter, r *http.Request, id SandboxID) {
	public, err := s.Rows.PublicPorts(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, PortList{Ports: each(public, func(port int) Port {
		out := s.portShown(r, id, port)
		out.Public = true
		return out
	})})
}

// CreatePortURL answers POST /v1/sandboxes/{id}/ports/{port}/url.
func (s *server) CreatePortURL(w http.ResponseWriter, r *http.Request, id SandboxID, port PortNumber) {
	var in CreatePortURLRequest
	_, err := read(w, r, maxBody, false, &in)
	if err == nil {
		err = checkPort(port)
	}
	expiry := defaultURLExpiry
	if err == nil {
		var asked *time.Duration
		if asked, err = duration("expires_in", in.ExpiresIn); asked != nil {
			expiry = *asked
		}
	}
	if err == nil && (expiry < minURLExpiry || expiry > maxURLExpiry) {
		err = fault.InvalidField("expires_in", "must be between %s and %s", minURLExpiry, maxURLExpiry)
	}
	if err == nil {
		err = s.notOver(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id))
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	// Signatures end at a whole second. Round up, so that the URL lives at least as long as asked.
	ends := time.Now().Add(expiry + time.Second - 1).Truncate(time.Second).UTC()
	signed := s.portURL(r, id, port) + "?" + portproxy.TokenParam + "=" + s.Signer.Sign(id, port, ends)
	s.answer(w, r, http.StatusCreated, PortURL{URL: signed, ExpiresAt: ends})
}

// notOver refuses a sandbox of the organization that is destroyed, so that nothing in it can be
// reached.
func (s *server) notOver(ctx context.Context, orgID string, id sandbox.ID) error {
	sbx, err := s.Rows.Get(ctx, orgID, id)
	if err == nil && sbx.State.Status() == sandbox.StatusDestroyed {
		err = fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is destroyed", id)
	}
	return err
}
