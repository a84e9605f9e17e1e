package e2b

import (
	"net/http"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// forkBody is one entry of the answer to a fork.
type forkBody struct {
	Sandbox *sandboxBody   `json:"sandbox,omitempty"`
	Error   *forkErrorBody `json:"error,omitempty"`
}

type forkErrorBody struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// fork answers POST /sandboxes/{id}/fork with an entry for each child, made or not.
func (s *Handler) fork(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Timeout int64 `json:"timeout"` // seconds
		Count   int   `json:"count"`
	}{connectTimeout, 1}
	if err := read(w, r, &in); err != nil {
		return err
	}
	timeout := seconds(in.Timeout)
	if err := tooLong(timeout); err != nil {
		return err
	}
	if in.Count < 1 || in.Count > sandbox.MaxFork {
		return fault.InvalidField("count", "must be from 1 to %d", sandbox.MaxFork)
	}
	id := sandboxID(r)
	sb, err := s.present(r, id)
	if err != nil {
		return err
	}
	request := sandbox.ForkRequest{Count: in.Count, Request: sandbox.Request{FrontData: sb.FrontData}}
	if sb.Mode == sandbox.Ephemeral {
		request.Timeout = &timeout
	}
	children, err := s.Sandboxes.Fork(r.Context(), caller(r), id, request)
	if err != nil {
		return hidden(err, id)
	}
	out := make([]forkBody, len(children))
	for i, child := range children {
		if child.Err != nil {
			p := verdictOf(child.Err)
			out[i].Error = &forkErrorBody{p.status, p.message}
			continue
		}
		s.Samples.Follow(child.Sandbox.ID, child.Sandbox.OrgID)
		out[i].Sandbox = new(s.sandboxOf(child.Sandbox))
	}
	reply(w, r, http.StatusCreated, out)
	return nil
}

// snapshotBody is E2B's SnapshotInfo, with a time that E2B does not have.
type snapshotBody struct {
	SnapshotID string    `json:"snapshotID"`
	Names      []string  `json:"names"`
	CreatedAt  time.Time `json:"createdAt"`
}

func snapshotOf(snap sandbox.Snapshot) snapshotBody {
	out := snapshotBody{SnapshotID: string(snap.ID), Names: []string{}, CreatedAt: snap.CreatedAt.UTC()}
	if snap.Name != "" {
		out.Names = append(out.Names, snap.Name)
	}
	return out
}

// snapshot answers POST /sandboxes/{id}/snapshots.
func (s *Handler) snapshot(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Name string `json:"name"`
	}
	if err := read(w, r, &in); err != nil {
		return err
	}
	id := sandboxID(r)
	if _, err := s.present(r, id); err != nil {
		return err
	}
	snap, err := s.Sandboxes.SaveSnapshot(r.Context(), orgOf(r), id, in.Name)
	if err != nil {
		return ended(err, id)
	}
	reply(w, r, http.StatusCreated, snapshotOf(snap))
	return nil
}

// listSnapshots answers GET /snapshots.
func (s *Handler) listSnapshots(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	limit, cursor, err := limits(q)
	if err != nil {
		return err
	}
	f := sandbox.SnapshotFilter{OrgID: orgOf(r), Name: q.Get("name"), Limit: limit, Cursor: cursor}
	if id := q.Get("sandboxID"); id != "" {
		f.SandboxID = sandbox.ID(idPrefix + id)
	}
	all, next, err := s.Rows.ListSnapshots(r.Context(), f)
	if err != nil {
		return pageError(err)
	}
	out := make([]snapshotBody, len(all))
	for i, snap := range all {
		out[i] = snapshotOf(snap)
	}
	page(w, r, out, next)
	return nil
}
