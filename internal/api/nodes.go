package api

import (
	"context"
	"net/http"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
)

// defaultDrain is the timeout of a drain that names none. It is part of the contract.
const defaultDrain = time.Hour

// operates refuses callers that do not belong to the operator's organization, and reports whether the caller does.
// Nodes have the sandboxes of all organizations.
func (s *server) operates(w http.ResponseWriter, r *http.Request) bool {
	if callOf(r).Who.Org.Name == auth.OperatorOrg {
		return true
	}
	s.fail(w, r, fault.New(fault.Denied, fault.CodeNotTheOperator,
		"only keys of the organization %q may see and change nodes", auth.OperatorOrg))
	return false
}

// ListNodes answers GET /v1/nodes.
func (s *server) ListNodes(w http.ResponseWriter, r *http.Request) {
	if !s.operates(w, r) {
		return
	}
	all, err := s.Nodes.List(r.Context())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, NodeList{Nodes: each(all, nodeOf)})
}

// GetNode answers GET /v1/nodes/{node}.
func (s *server) GetNode(w http.ResponseWriter, r *http.Request, ref NodeRef) {
	s.answerNode(w, r, ref, nil, s.Nodes.Get)
}

// CordonNode answers POST /v1/nodes/{node}/cordon.
func (s *server) CordonNode(w http.ResponseWriter, r *http.Request, ref NodeRef) {
	s.answerNode(w, r, ref, &nothing{}, s.Nodes.Cordon)
}

// UncordonNode answers POST /v1/nodes/{node}/uncordon.
func (s *server) UncordonNode(w http.ResponseWriter, r *http.Request, ref NodeRef) {
	s.answerNode(w, r, ref, &nothing{}, s.Nodes.Uncordon)
}

// DrainNode answers POST /v1/nodes/{node}/drain.
func (s *server) DrainNode(w http.ResponseWriter, r *http.Request, ref NodeRef) {
	var in DrainNodeRequest
	s.answerNode(w, r, ref, &in, func(ctx context.Context, idOrName string) (fleet.Node, error) {
		wait, err := drainOf(in)
		if err != nil {
			return fleet.Node{}, err
		}
		return s.Nodes.Drain(ctx, idOrName, wait)
	})
}

// answerNode reads the body into in, if that is not nil, and answers with the node that call returns.
func (s *server) answerNode(w http.ResponseWriter, r *http.Request, ref NodeRef, in any,
	call func(ctx context.Context, idOrName string) (fleet.Node, error)) {
	if !s.operates(w, r) {
		return
	}
	if in != nil {
		if _, err := read(w, r, maxBody, false, in); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	n, err := call(r.Context(), ref)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, nodeOf(n))
}

// RemoveNode answers DELETE /v1/nodes/{node}.
func (s *server) RemoveNode(w http.ResponseWriter, r *http.Request, ref NodeRef) {
	if !s.operates(w, r) {
		return
	}
	if err := s.Nodes.Remove(r.Context(), ref); err != nil {
		s.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// CreateNodeToken answers POST /v1/nodes/tokens.
func (s *server) CreateNodeToken(w http.ResponseWriter, r *http.Request) {
	if !s.operates(w, r) {
		return
	}
	var in CreateNodeTokenRequest
	if _, err := read(w, r, maxBody, false, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	t, err := nodeTokenRequestOf(in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	text, expires, err := s.Nodes.NewToken(r.Context(), callOf(r).Who.Key.ID, t.rejoin, t.settings, t.valid)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusCreated, NodeToken{Token: text, ExpiresAt: expires})
}

// nodeTokenRequest is a request for a token in the core's terms.
type nodeTokenRequest struct {
	rejoin   string
	settings fleet.TokenSettings
	valid    time.Duration
}

func nodeTokenRequestOf(in CreateNodeTokenRequest) (nodeTokenRequest, error) {
	out := nodeTokenRequest{valid: fleet.MaxTokenTime, settings: fleet.TokenSettings{Labels: orEmpty(in.Labels)}}
	if in.Name != nil {
		out.settings.Name = *in.Name
	}
	if in.Rejoin != nil {
		out.rejoin = *in.Rejoin
	}
	valid, err := duration("expires_in", in.ExpiresIn)
	if valid != nil {
		out.valid = *valid
	}
	return out, err
}

// drainOf returns the timeout of a drain.
func drainOf(in DrainNodeRequest) (time.Duration, error) {
	wait, err := duration("timeout", in.Timeout)
	if err != nil || wait == nil {
		return defaultDrain, err
	}
	return *wait, nil
}

func nodeOf(n fleet.Node) Node {
	out := Node{
		ID: n.ID, Name: n.Name, Status: NodeStatus(n.Status), Labels: orEmpty(n.Labels), Version: n.Version, VCPUs: n.VCPUs,
		MemoryMB: n.MemoryMB, MaxSandboxes: n.MaxSandboxes, Sandboxes: n.Sandboxes, Active: n.Active,
		StartedAt: n.StartedAt, CordonedAt: at(n.CordonedAt), DrainBy: at(n.DrainBy),
		JoinedAt: at(n.JoinedAt), SeenAt: at(n.SeenAt), LostAt: at(n.LostAt),
	}
	if out.SeenAt != nil {
		out.MemoryFreeMB, out.Starting = new(n.Load.MemoryFreeMB), new(n.Load.Starting)
	}
	return out
}
