package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// CreateSandbox answers POST /v1/sandboxes.
func (s *server) CreateSandbox(w http.ResponseWriter, r *http.Request, params CreateSandboxParams) {
	var in CreateSandboxRequest
	b, err := read(w, r, maxBody, true, &in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	once, err := onceOf(r, b)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	request, err := creationOf(in)
	if err == nil {
		err = s.mayTake(r.Context(), request)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	wait := params.Wait == nil || *params.Wait
	sbx, err := s.Sandboxes.Create(r.Context(), callerOf(r), request.Request, once, wait)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	callOf(r).Sandbox = string(sbx.ID)
	w.Header().Set("Location", "/v1/sandboxes/"+string(sbx.ID))
	s.answer(w, r, http.StatusCreated, s.sandboxOf(sbx))
}

// creation is a create: what the core is asked for, and the labels that the machine must have.
type creation struct {
	sandbox.Request
	Labels map[string]string
}

func creationOf(in CreateSandboxRequest) (c creation, err error) {
	if in.Placement != nil {
		c.Labels = in.Placement.Require
	}
	c.Request, err = requestOf(in)
	return c, err
}

// mayTake returns an error if this machine must not take a sandbox for the labels that it needs.
func (s *server) mayTake(ctx context.Context, c creation) error {
	if len(c.Labels) == 0 {
		return nil
	}
	if c.Snapshot != "" {
		return fault.InvalidField("placement.require",
			"cannot be given with snapshot: the sandbox is made where the snapshot is")
	}
	return s.Nodes.Takes(ctx, c.Labels)
}

// callerOf returns the caller of a request as the core represents it.
func callerOf(r *http.Request) sandbox.Caller {
	org := callOf(r).Who.Org
	return sandbox.Caller{OrgID: org.ID, Quota: sandbox.Quota(org.Quota)}
}

// onceOf returns the Idempotency-Key with a hash of the body. The hash ignores white space and the
// order of fields.
func onceOf(r *http.Request, body []byte) (sandbox.Once, error) {
	const name, maxKey = "Idempotency-Key", 255
	values := r.Header.Values(name)
	if len(values) == 0 {
		return sandbox.Once{}, nil
	}
	key := values[0]
	if len(values) > 1 || key == "" || len(key) > maxKey ||
		strings.ContainsFunc(key, func(c rune) bool { return c < ' ' || c > '~' }) {
		return sandbox.Once{}, fault.InvalidField(name,
			"must be one text of 1 to %d printable ASCII characters", maxKey)
	}
	canonical := jsontext.Value(body).Clone()
	if err := canonical.Canonicalize(); err != nil {
		return sandbox.Once{}, fmt.Errorf("bringing a body that was decoded into canonical form: %w", err)
	}
	sum := sha256.Sum256(canonical)
	return sandbox.Once{Key: key, Hash: hex.EncodeToString(sum[:])}, nil
}

func requestOf(in CreateSandboxRequest) (sandbox.Request, error) {
	out := sandbox.Request{Template: in.Template, Snapshot: in.Snapshot, DiskSizeMB: in.DiskSizeMB, Env: in.Env,
		Metadata: in.Metadata}
	if in.Mode != nil {
		if *in.Mode == "" {
			return out, fault.InvalidField("mode", "must be %s or %s, not empty", sandbox.Ephemeral, sandbox.Persistent)
		}
		out.Mode = *in.Mode
	}
	if in.Size != nil {
		if *in.Size == "" {
			return out, fault.InvalidField("size", "must be one of the sizes in GET /v1/sizes, not empty")
		}
		out.Size = *in.Size
	}
	var err error
	if out.Timeout, err = duration("timeout", in.Timeout); err != nil {
		return out, err
	}
	if out.IdleTimeout, err = duration("idle_timeout", (*string)(in.IdleTimeout)); err != nil {
		return out, err
	}
	if out.RecoveryInterval, err = duration("recovery_interval", (*string)(in.RecoveryInterval)); err != nil {
		return out, err
	}
	if in.Egress != nil {
		e, err := policyOf(*in.Egress)
		if err != nil {
			return out, err
		}
		out.Egress = &e
	}
	return out, nil
}

func policyOf(in Egress) (sandbox.Egress, error) {
	return sandbox.EgressRequest{Mode: string(in.Mode), AllowCIDRs: in.AllowCIDRs, DenyCIDRs: in.DenyCIDRs,
		AllowPorts: in.AllowPorts, AllowDomains: in.AllowDomains}.Parse()
}

// metadataPrefix is the prefix of the query parameters that filter by metadata.
const metadataPrefix = "metadata."

// ListSandboxes answers GET /v1/sandboxes.
func (s *server) ListSandboxes(w http.ResponseWriter, r *http.Request, params ListSandboxesParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	f := sandbox.Filter{OrgID: callOf(r).Who.Org.ID, Limit: limit, Cursor: cursor, Metadata: map[string]string{}}
	if f.States, err = statesOf(params.Status); err != nil {
		s.fail(w, r, err)
		return
	}
	for name, values := range r.URL.Query() {
		key, ok := strings.CutPrefix(name, metadataPrefix)
		if !ok {
			continue
		}
		if key == "" {
			s.fail(w, r, fault.InField(fault.CodeInvalidMetadata, name, "must be metadata.KEY=VALUE"))
			return
		}
		f.Metadata[key] = values[0]
	}
	answerList(s, w, r, "sandboxes", limit, cursor, func(limit int, cursor string) ([]sandbox.Sandbox, string, error) {
		f.Limit, f.Cursor = limit, cursor
		return s.Rows.List(r.Context(), f)
	}, s.sandboxOf)
}

// statesOf returns the states of the given statuses, or without any the states of all statuses but
// destroyed.
func statesOf(statuses []SandboxStatus) ([]sandbox.State, error) {
	var states []sandbox.State
	if len(statuses) == 0 {
		for _, state := range sandbox.States() {
			if state.Status() != sandbox.StatusDestroyed {
				states = append(states, state)
			}
		}
	}
	for _, status := range statuses {
		of := sandbox.Status(status).Of()
		if len(of) == 0 {
			return nil, fault.InvalidField("status", "must be creating, running, suspended or destroyed, not %.40q", status)
		}
		states = append(states, of...)
	}
	return states, nil
}

// GetSandbox answers GET /v1/sandboxes/{id}.
func (s *server) GetSandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	sbx, err := s.Rows.Get(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	var traffic *sandbox.Traffic
	if !s.Relay.Away(r, sbx.Holder.Node) { // otherwise its node cannot be reached
		if traffic, err = s.Sandboxes.Traffic(r.Context(), sbx); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	out := s.sandboxOf(sbx)
	out.Network = networkOf(traffic)
	s.answer(w, r, http.StatusOK, out)
}

func (s *server) answerSandbox(w http.ResponseWriter, r *http.Request, sbx sandbox.Sandbox, err error) {
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, s.sandboxOf(sbx))
}

// DestroySandbox answers DELETE /v1/sandboxes/{id}.
func (s *server) DestroySandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	if err := s.Sandboxes.Destroy(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id)); err != nil {
		s.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// KeepaliveSandbox answers POST /v1/sandboxes/{id}/keepalive.
func (s *server) KeepaliveSandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in KeepaliveRequest
	if _, err := read(w, r, maxBody, false, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	timeout, err := duration("timeout", in.Timeout)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	sbx, err := s.Sandboxes.Keepalive(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id), timeout)
	s.answerSandbox(w, r, sbx, err)
}

// WakeSandbox answers POST /v1/sandboxes/{id}/wake.
func (s *server) WakeSandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	if _, err := read(w, r, maxBody, false, &nothing{}); err != nil {
		s.fail(w, r, err)
		return
	}
	sbx, err := s.Sandboxes.Wake(r.Context(), callerOf(r), sandbox.ID(id))
	s.answerSandbox(w, r, sbx, err)
}

// SuspendSandbox answers POST /v1/sandboxes/{id}/suspend.
func (s *server) SuspendSandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in SuspendRequest
	if _, err := read(w, r, maxBody, false, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	keep := sandbox.KeepAll
	if in.Memory != nil && !*in.Memory {
		keep = sandbox.KeepFiles
	}
	sbx, err := s.Sandboxes.Suspend(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id), keep)
	s.answerSandbox(w, r, sbx, err)
}

// CheckpointSandbox answers POST /v1/sandboxes/{id}/checkpoint.
func (s *server) CheckpointSandbox(w http.ResponseWriter, r *http.Request, id SandboxID) {
	if _, err := read(w, r, maxBody, false, &nothing{}); err != nil {
		s.fail(w, r, err)
		return
	}
	checkpoint, err := s.Sandboxes.Checkpoint(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, RecoveryPoint{CreatedAt: checkpoint.At.UTC(), SizeBytes: checkpoint.Size})
}

// SetEgress answers PUT /v1/sandboxes/{id}/egress.
func (s *server) SetEgress(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in Egress
	_, err := read(w, r, maxBody, true, &in)
	if err != nil {
		s.fail(w, r, egressError(err))
		return
	}
	policy, err := policyOf(in)
	if err != nil {
		s.fail(w, r, egressError(err))
		return
	}
	sbx, err := s.Sandboxes.SetEgress(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id), policy)
	if err != nil {
		s.fail(w, r, egressError(err))
		return
	}
	s.answer(w, r, http.StatusOK, s.sandboxOf(sbx))
}

// egressError adapts an error to a call whose whole body is the policy: it removes the prefix
// "egress." from the field, and sets the code that the error has in a create.
func egressError(err error) error {
	f := fault.As(err)
	if f == nil || f.Field == "" {
		return err
	}
	named := f.Because(err)
	named.Field = strings.TrimPrefix(f.Field, "egress.")
	if f.Kind == fault.Invalid && strings.HasPrefix(f.Code, "invalid_") {
		named.Code = fault.CodeInvalidEgress
	}
	return named
}

// ListEvents answers GET /v1/sandboxes/{id}/events.
func (s *server) ListEvents(w http.ResponseWriter, r *http.Request, id SandboxID, params ListEventsParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	events, next, err := s.Rows.Events(r.Context(), callOf(r).Who.Org.ID, sandbox.ID(id), limit, cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, EventList{Events: each(events, eventOf), NextCursor: optional(next)})
}
