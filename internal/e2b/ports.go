package e2b

import (
	"net/http"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// trafficHeader opens ports that are not public.
const trafficHeader = "E2b-Traffic-Access-Token"

// errPrivate is the answer at a port that is not public.
var errPrivate = fault.New(fault.Denied, "private", "the ports of this sandbox are not public: a valid %s is needed", trafficHeader)

// leaves reports whether a request is the next handler's after all: one by a host name of
// the operator's domain, for a port that is not open by the rules here. There are keys,
// signatures and public ports of the v1 API, for the sandboxes of both.
func (s *Surface) leaves(r *http.Request, to place) bool {
	if _, _, ok := s.Names.Parse(r.Host); !ok || to.port == envdPort || len(r.Header.Values(idHeader)) > 0 {
		return false
	}
	box, err := s.Sandboxes.Lookup(r.Context(), to.sandbox())
	return err != nil || !s.mayReach(r, box, keptWith(box))
}

// mayReach reports whether a request may pass to the ports of a sandbox.
func (s *Surface) mayReach(r *http.Request, box sandbox.Sandbox, k kept) bool {
	given := r.Header.Values(trafficHeader)
	return k.public() || len(given) == 1 && s.isToken(given[0], trafficToken, box.ID)
}

// servePort carries a request to a port that a program inside listens on.
func (s *Surface) servePort(w http.ResponseWriter, r *http.Request, box sandbox.Sandbox, to place) error {
	callOf(r).route = "port"
	kept := keptWith(box)
	if !takesTraffic(box, kept) {
		return gone{to, notFoundText, false}
	}
	if !s.mayReach(r, box, kept) {
		return errPrivate
	}
	if err := s.account(r, box.OrgID, portCost); err != nil {
		return err
	}
	lease, err := s.lease(r.Context(), box, kept)
	if err != nil {
		return away(err, to)
	}
	defer lease.Release()
	s.samples.follow(box.ID)
	for _, own := range []string{idHeader, portHeader, trafficHeader} {
		r.Header.Del(own)
	}
	if s.isToken(r.Header.Get(agentapi.TokenHeader), envdToken, box.ID) { // clients send it to every port
		r.Header.Del(agentapi.TokenHeader)
	}
	clear(w.Header()) // it is the application's
	host := strings.ReplaceAll(kept.HostMask, "${PORT}", strconv.Itoa(to.port))
	err = s.Ports.Serve(w, r, portproxy.Destination{Target: target(lease.Sandbox), Port: to.port, Host: host, Shared: to.shared})
	if err == nil {
		return nil
	}
	ownHead(w.Header(), callOf(r).id)
	if err := callOf(r).body.incomplete(); err != nil {
		return err
	}
	f := fault.As(err)
	switch {
	case f == nil:
		return err
	case f.Code == agentapi.CodePortClosed:
		return gone{to, "The sandbox is running but port is not open", true}
	case f.Kind == fault.Upstream:
		return gone{to, "The sandbox is running but " + f.Detail, true}
	case f.Code == agentapi.CodeUnreachable:
		return s.unanswered(r, lease.Sandbox, to)
	}
	return away(err, to)
}
