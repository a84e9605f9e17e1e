package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

// The names of this package's handlers in a passage.
const (
	frontAPI  = "api"
	frontPort = "api.port" // of requests to ports
)

// relay sends an admitted call to the server that its route names, or answers why it cannot. It returns the request
// if this server is the one.
func (s *server) relay(w http.ResponseWriter, r *http.Request, route access, id sandbox.ID) (here *http.Request) {
	if !s.Relay.Forwards(r) {
		return r
	}
	passage := httpserver.Passage{Front: frontAPI}
	if route.at == placed {
		here, err := s.Relay.Place(w, r, maxBody, passage, s.needsOf)
		if err != nil {
			s.fail(w, r, err)
		}
		return here
	}
	node, away, err := s.serverOf(r, route, id)
	switch {
	case err != nil:
		s.fail(w, r, err)
		return nil
	case !away:
		return r
	case route.endless:
		ctx, stop := s.untilStop(r.Context())
		defer stop()
		s.send(w, r.WithContext(ctx), node, passage)
		return nil
	case route.at != holderOrRows:
		s.send(w, r, node, passage)
		return nil
	}
	err = s.Relay.Send(w, r, node, passage)
	if f := fault.As(err); f != nil && f.Code == fault.CodeNodeUnreachable {
		return r
	}
	if err != nil {
		s.fail(w, r, err)
	}
	return nil
}

// needsOf returns what a create asks for that placement goes by. A node judges the rest of the body.
func (s *server) needsOf(body []byte) (needs httpserver.Needs) {
	var r struct {
		Size      string    `json:"size"`
		Placement Placement `json:"placement"`
	}
	if json.Unmarshal(body, &r) != nil {
		return needs
	}
	needs.Labels = r.Placement.Require
	for _, size := range s.Rows.Sizes() {
		if size.Name == r.Size {
			needs.MemoryMB = size.MemoryMB
		}
	}
	return needs
}

// serverOf returns the node that does a call, and whether that is another server.
func (s *server) serverOf(r *http.Request, route access, id sandbox.ID) (node string, away bool, err error) {
	at := route.at
	if at == rowsOrBuilder {
		if at = anywhere; httpserver.WantsEvents(r) {
			at = builder
		}
	}
	switch at {
	case builder:
		return s.Relay.BuilderAway(r)
	case holder, holderUnlessLost, holderOrRows:
		return s.holderOf(r, callOf(r).Who.Org.ID, id, at == holderUnlessLost)
	case snapshotHolder:
		var snap sandbox.Snapshot
		ref := strings.TrimPrefix(r.URL.Path, "/v1/snapshots/")
		snap, err = s.Rows.GetSnapshot(r.Context(), callOf(r).Who.Org.ID, ref)
		node = snap.Holder.Node
	default:
		return "", false, nil
	}
	return node, err == nil && s.Relay.Away(r, node), err
}

// holderOf returns the node that has a sandbox of the organization, and whether that is another server. Once the node
// is lost, any server says that the sandbox is over, and does the call if unlessLost is true.
func (s *server) holderOf(r *http.Request, orgID string, id sandbox.ID,
	unlessLost bool) (node string, away bool, err error) {
	sbx, err := s.Rows.Get(r.Context(), orgID, id)
	if err != nil {
		return "", false, err
	}
	node = sbx.Holder.Node
	if unlessLost || sbx.State.Over() {
		return node, s.Relay.AwayUnlessLost(r, node), nil
	}
	return node, s.Relay.Away(r, node), nil
}

// maxPool limits the pool of a node as it comes in its answer, in bytes. An entry takes some 150.
const maxPool = 64 << 10

// withPoolsOfOthers adds the pools of the other nodes that take sandboxes to this server's own. It leaves out a node
// that does not answer.
func (s *server) withPoolsOfOthers(r *http.Request, pool []PoolEntry) ([]PoolEntry, error) {
	if !s.Relay.Forwards(r) {
		return pool, nil
	}
	nodes, err := s.Relay.Nodes(r.Context(), httpserver.Needs{})
	if err != nil {
		return nil, err
	}
	queries := map[string]string{}
	for _, node := range nodes {
		if s.Relay.Away(r, node) {
			queries[node] = ""
		}
	}
	err = s.Relay.Gather(r, queries, maxPool, httpserver.Passage{Front: frontAPI}, func(_ string, body []byte) error {
		var got Pool
		if err := json.Unmarshal(body, &got); err != nil {
			return fmt.Errorf("decoding a pool: %w", err)
		}
		pool = addPool(pool, got.Pool)
		return nil
	})
	return pool, err
}

// addPool adds the numbers of a pool to those of the same version and size of another.
func addPool(to, pool []PoolEntry) []PoolEntry {
	for _, e := range pool {
		i := slices.IndexFunc(to, func(t PoolEntry) bool {
			return t.Template == e.Template && t.TemplateVersion == e.TemplateVersion && t.Size == e.Size
		})
		if i < 0 {
			to = append(to, e)
			continue
		}
		to[i].Ready, to[i].Claimed, to[i].Target = to[i].Ready+e.Ready, to[i].Claimed+e.Claimed, to[i].Target+e.Target
	}
	return to
}

// send sends a call to a node, or answers why it cannot.
func (s *server) send(w http.ResponseWriter, r *http.Request, node string, p httpserver.Passage) {
	s.Hijacked.Add(1) // the caller may upgrade the connection
	defer s.Hijacked.Done()
	if err := s.Relay.Send(w, r, node, p); err != nil {
		s.fail(w, r, err)
	}
}
