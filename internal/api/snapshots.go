package api

import (
	"net/http"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// CreateSnapshot answers POST /v1/sandboxes/{id}/snapshots.
func (s *server) CreateSnapshot(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in CreateSnapshotRequest
	if _, err := read(w, r, maxBody, false, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	name := ""
	if in.Name != nil {
		if name = *in.Name; name == "" {
			s.fail(w, r, fault.InvalidField("name", "must not be empty: leave it out for none"))
			return
		}
	}
	snap, err := s.Sandboxes.SaveSnapshot(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id), name)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	w.Header().Set("Location", "/v1/snapshots/"+string(snap.ID))
	s.answer(w, r, http.StatusCreated, s.snapshotOf(snap))
}

// ListSnapshots answers GET /v1/snapshots.
func (s *server) ListSnapshots(w http.ResponseWriter, r *http.Request, params ListSnapshotsParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	f := sandbox.SnapshotFilter{OrgID: callOf(r).Who.Org.ID, Limit: limit, Cursor: cursor}
	for name, value := range map[string]*string{"sandbox": params.Sandbox, "name": params.Name} {
		// An empty filter would select everything, which its sender cannot mean.
		if value != nil && *value == "" {
			s.fail(w, r, fault.InvalidField(name, "must not be empty: leave it out for any"))
			return
		}
	}
	if params.Sandbox != nil {
		f.SandboxID = sandbox.ID(*params.Sandbox)
	}
	if params.Name != nil {
		f.Name = *params.Name
	}
	answerList(s, w, r, "snapshots", limit, cursor, func(limit int, cursor string) ([]sandbox.Snapshot, string, error) {
		f.Limit, f.Cursor = limit, cursor
		return s.Rows.ListSnapshots(r.Context(), f)
	}, s.snapshotOf)
}

// GetSnapshot answers GET /v1/snapshots/{snapshot}.
func (s *server) GetSnapshot(w http.ResponseWriter, r *http.Request, ref SnapshotRef) {
	snap, err := s.Rows.GetSnapshot(r.Context(), callOf(r).Who.Org.ID, ref)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, s.snapshotOf(snap))
}

// DeleteSnapshot answers DELETE /v1/snapshots/{snapshot}.
func (s *server) DeleteSnapshot(w http.ResponseWriter, r *http.Request, ref SnapshotRef) {
	if err := s.Sandboxes.DeleteSnapshot(r.Context(), callOf(r).Who.Org.ID, ref); err != nil {
		s.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// ForkSandbox answers POST /v1/sandboxes/{id}/fork.
func (s *server) ForkSandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in ForkRequest
	if _, err := read(w, r, maxBody, false, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	request, err := forkRequestOf(in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	children, err := s.Sandboxes.Fork(r.Context(), callerOf(r), sandbox.ID(id), request)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	made := 0
	for _, c := range children {
		if c.Err == nil {
			made++
		}
	}
	if made == 0 {
		s.fail(w, r, children[0].Err)
		return
	}
	s.answer(w, r, http.StatusCreated, ForkResult{Children: each(children, s.childOf)})
}

func forkRequestOf(in ForkRequest) (sandbox.ForkRequest, error) {
	request, err := requestOf(CreateSandboxRequest{Mode: in.Mode, Timeout: in.Timeout, IdleTimeout: in.IdleTimeout,
		RecoveryInterval: in.RecoveryInterval, Env: in.Env, Metadata: in.Metadata, Egress: in.Egress})
	out := sandbox.ForkRequest{Count: 1, Request: request}
	if in.Count != nil {
		if out.Count = *in.Count; out.Count == 0 {
			out.Count = -1 // the core refuses -1, but takes 0 as the default
		}
	}
	return out, err
}
