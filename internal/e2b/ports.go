package e2b

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// trafficHeader is the header with the token for ports that are not public.
const trafficHeader = "E2b-Traffic-Access-Token"

// mcpPort is the port of E2B's MCP gateway, to which getMcpUrl leads.
const mcpPort = 50005

// errPrivate is returned for a port that is not public.
var errPrivate = fault.New(fault.Denied, fault.CodePrivate,
	"the ports of this sandbox are not public: a valid %s is needed",
	trafficHeader)

// leaves reports whether a request for a port belongs to the next handler: it uses a host name of
// the operator's domain, and the rules of this API do not open the port. The v1 API's keys,
// signatures and public ports are valid there, for sandboxes of both APIs.
func (s *Handler) leaves(r *http.Request, to place) bool {
	if _, _, ok := s.Names.Parse(r.Host); !ok || to.port == envdPort || len(r.Header.Values(idHeader)) > 0 {
		return false
	}
	sb, err := s.Rows.GetAny(r.Context(), to.sandbox())
	return err != nil || !s.mayReach(r, sb, optionsOf(sb))
}

// mayReach reports whether a request may pass to the ports of a sandbox.
func (s *Handler) mayReach(r *http.Request, sb sandbox.Sandbox, o options) bool {
	given := r.Header.Values(trafficHeader)
	return o.public() || len(given) == 1 && s.isToken(given[0], trafficToken, sb.ID)
}

// servePort passes a request to a port of a program inside.
func (s *Handler) servePort(w http.ResponseWriter, r *http.Request, sb sandbox.Sandbox, to place) error {
	callOf(r).Route = "port"
	opts := optionsOf(sb)
	if !takesTraffic(sb, opts) {
		return gone{to, notFoundText, false}
	}
	if _, forwarded := httpserver.PassageOf(r.Context()); !forwarded && !s.mayReach(r, sb, opts) {
		return errPrivate
	}
	if err := callOf(r).OpenAccount(s.Budget, r, sb.OrgID, httpserver.PortCost); err != nil {
		return err
	}
	for _, own := range []string{idHeader, portHeader, trafficHeader} {
		r.Header.Del(own)
	}
	if s.isToken(r.Header.Get(agentapi.TokenHeader), envdToken, sb.ID) { // clients send it to every port
		r.Header.Del(agentapi.TokenHeader)
	}
	if s.Relay.Away(r, sb.Holder.Node) {
		return s.sendTraffic(w, r, sb, to)
	}
	lease, err := s.lease(r.Context(), sb, opts, sandbox.ForPort)
	if err != nil {
		return goneError(err, to)
	}
	defer lease.Release()
	s.Samples.Follow(sb.ID, sb.OrgID)
	clear(w.Header()) // the application sets its own
	host := strings.ReplaceAll(opts.hostMask(), "${PORT}", strconv.Itoa(to.port))
	err = s.Ports.Serve(w, r, portproxy.Destination{Target: target(lease.Sandbox), Port: to.port, Host: host,
		Shared: to.shared})
	if err == nil {
		return nil
	}
	httpserver.OwnHead(w.Header(), callOf(r).ID)
	if err := callOf(r).Body.Broken(); err != nil {
		return err
	}
	f := fault.As(err)
	switch {
	case f == nil:
		return err
	case f.Code == fault.CodePortClosed && to.port == mcpPort:
		return unsupported("no template of this server has E2B's MCP gateway; a server of your own may listen on this port")
	case f.Code == fault.CodePortClosed:
		return gone{to, "The sandbox is running but port is not open", true}
	case f.Kind == fault.Upstream:
		return gone{to, "The sandbox is running but " + f.Detail, true}
	case f.Code == fault.CodeSandboxUnreachable:
		return s.unanswered(r, lease.Sandbox, to)
	}
	return goneError(err, to)
}
