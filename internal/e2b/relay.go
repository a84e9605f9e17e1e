package e2b

import (
	"net/http"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

// The names of this package's handlers in a passage.
const (
	frontControl = "e2b"
	frontTraffic = "e2b.traffic" // of requests to the agent and to ports
)

// serveForwarded answers a request that a replica has forwarded, which has decided where it goes.
func (s *Handler) serveForwarded(w http.ResponseWriter, r *http.Request, p httpserver.Passage) {
	switch p.Front {
	case frontControl:
		s.handle(w, r, false, s.answerControl)
	case frontTraffic:
		to := place{shown(sandbox.ID(p.Sandbox)), p.Port, p.Shared}
		s.handle(w, r, true, func(w http.ResponseWriter, r *http.Request) error { return s.traffic(w, r, to) })
	default:
		s.next.ServeHTTP(w, r)
	}
}

// relay sends an admitted call of the control API to the server that its location names. It returns the request if
// this server is the one.
func (s *Handler) relay(w http.ResponseWriter, r *http.Request, at location) (here *http.Request, err error) {
	if !s.Relay.Forwards(r) {
		return r, nil
	}
	passage := httpserver.Passage{Front: frontControl}
	node, away := "", false
	switch at {
	case placed:
		return s.Relay.Place(w, r, maxBody, passage, nil) // these requests name no size
	case builder:
		node, away, err = s.Relay.BuilderAway(r)
	case holder, holderUnlessLost:
		var sb sandbox.Sandbox
		sb, err = s.present(r, sandboxID(r))
		node = sb.Holder.Node
		if away = s.Relay.Away(r, node); at == holderUnlessLost {
			away = s.Relay.AwayUnlessLost(r, node)
		}
	case snapshotOrTemplate:
		node, away, err = s.snapshotOrBuilder(r)
	}
	if err != nil {
		return nil, err
	}
	if !away {
		return r, nil
	}
	return nil, s.Relay.Send(w, r, node, passage)
}

// snapshotOrBuilder returns the node that deletes what a path names, and whether that is another server.
func (s *Handler) snapshotOrBuilder(r *http.Request) (node string, away bool, err error) {
	name, err := templateName(r.PathValue("ref"))
	if err != nil {
		return "", false, err
	}
	snap, err := s.Rows.GetSnapshot(r.Context(), orgOf(r), name)
	switch {
	case fault.Is(err, fault.NotFound):
		return s.Relay.BuilderAway(r)
	case err != nil:
		return "", false, err
	}
	return snap.Holder.Node, s.Relay.Away(r, snap.Holder.Node), nil
}

// sendTraffic sends a request that may pass to a sandbox to the node that has it.
func (s *Handler) sendTraffic(w http.ResponseWriter, r *http.Request, sb sandbox.Sandbox, to place) error {
	r, stop := s.untilHangup(r, to.port != envdPort)
	defer stop()
	// The node decides by its row whether the sandbox wakes, which may be newer.
	quota, err := s.quotaOf(r.Context(), sb)
	if err != nil {
		return err
	}
	return s.Relay.Send(w, r, sb.Holder.Node,
		httpserver.Passage{Front: frontTraffic, Port: to.port, Shared: to.shared, Quota: quota})
}
