package e2b

import (
	"net/http"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// get answers GET /sandboxes/{id}.
func (s *Handler) get(w http.ResponseWriter, r *http.Request) error {
	sb, err := s.present(r, sandboxID(r))
	if err != nil {
		return err
	}
	principal := callOf(r).Who
	reply(w, r, http.StatusOK, s.detail(sb, principal.May(tokenScopes[0]) && principal.May(tokenScopes[1])))
	return nil
}

// kill answers DELETE /sandboxes/{id}.
func (s *Handler) kill(w http.ResponseWriter, r *http.Request) error {
	id := sandboxID(r)
	if _, err := s.present(r, id); err != nil {
		return err
	}
	if err := s.Sandboxes.Destroy(r.Context(), orgOf(r), id); err != nil {
		return err
	}
	s.Samples.Forget(id)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// setTimeout answers POST /sandboxes/{id}/timeout.
func (s *Handler) setTimeout(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Timeout *int64 `json:"timeout"`
	}
	if err := read(w, r, &in); err != nil {
		return err
	}
	if in.Timeout == nil {
		return fault.InvalidField("timeout", "is required")
	}
	return s.changeTimeout(w, r, seconds(*in.Timeout), false)
}

// refresh answers POST /sandboxes/{id}/refreshes.
func (s *Handler) refresh(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Duration int64 `json:"duration"` // seconds
	}{15}
	if err := read(w, r, &in); err != nil {
		return err
	}
	return s.changeTimeout(w, r, seconds(in.Duration), true)
}

func (s *Handler) changeTimeout(w http.ResponseWriter, r *http.Request, timeout time.Duration, later bool) error {
	id := sandboxID(r)
	if err := tooLong(timeout); err != nil {
		return err
	}
	if _, err := s.present(r, id); err != nil {
		return err
	}
	if _, err := s.Sandboxes.SetTimeout(r.Context(), orgOf(r), id, timeout, later); err != nil {
		return ended(err, id)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// pause answers POST /sandboxes/{id}/pause.
func (s *Handler) pause(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Memory bool `json:"memory"`
	}{true}
	if err := read(w, r, &in); err != nil {
		return err
	}
	keep := sandbox.KeepAll
	if !in.Memory {
		keep = sandbox.KeepFiles
	}
	id := sandboxID(r)
	sb, err := s.present(r, id)
	if err != nil {
		return err
	}
	if sb.State == sandbox.Running || sb.State == sandbox.Suspending {
		_, err = s.Sandboxes.Pause(r.Context(), orgOf(r), id, keep)
		if f := fault.As(err); f == nil || f.Code != fault.CodeSandboxNotRunning {
			if err != nil {
				return hidden(err, id)
			}
			w.WriteHeader(http.StatusNoContent)
			return nil
		}
		if sb, err = s.present(r, id); err != nil { // its state changed meanwhile
			return err
		}
	}
	return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is already %s", shown(id), stateOf(sb))
}

// connectTimeout is the timeout, in seconds, of a connect that names none.
const connectTimeout = 300

// connect answers POST /sandboxes/{id}/connect: 200 if the sandbox ran, 201 if it was paused.
func (s *Handler) connect(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Timeout int64 `json:"timeout"`
		Memory  bool  `json:"memory"`
	}{connectTimeout, true}
	if err := read(w, r, &in); err != nil {
		return err
	}
	sb, paused, err := s.wake(r, seconds(in.Timeout), in.Memory)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if paused {
		status = http.StatusCreated
	}
	reply(w, r, status, s.sandboxOf(sb))
	return nil
}

// resume answers POST /sandboxes/{id}/resume, which connect has replaced.
func (s *Handler) resume(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Timeout   int64 `json:"timeout"`
		Memory    bool  `json:"memory"`
		AutoPause *bool `json:"autoPause"`
	}{Timeout: 15, Memory: true}
	if err := read(w, r, &in); err != nil {
		return err
	}
	if in.AutoPause != nil {
		return unsupported("autoPause: it can be set only when a sandbox is created")
	}
	id := sandboxID(r)
	sb, err := s.present(r, id)
	if err != nil {
		return err
	}
	if sb.State == sandbox.Running {
		return fault.New(fault.Conflict, fault.CodeSandboxRunning, "sandbox %s is already running", shown(id))
	}
	if sb, _, err = s.wake(r, seconds(in.Timeout), in.Memory); err != nil {
		return err
	}
	reply(w, r, http.StatusCreated, s.sandboxOf(sb))
	return nil
}

// wake makes a sandbox run, for at least timeout. Without memory a paused sandbox is booted with its files.
func (s *Handler) wake(r *http.Request, timeout time.Duration, memory bool) (sb sandbox.Sandbox, paused bool,
	err error) {
	id := sandboxID(r)
	if err := tooLong(timeout); err != nil {
		return sb, false, err
	}
	if timeout < sandbox.MinTimeout {
		return sb, false, fault.InvalidField("timeout", "must be at least %d second",
			sandbox.MinTimeout/time.Second)
	}
	before, err := s.present(r, id)
	if err != nil {
		return sb, false, err
	}
	paused = stateOf(before) == statePaused
	if paused && !memory && before.Kept == sandbox.KeepAll {
		if _, err := s.Sandboxes.DropMemory(r.Context(), caller(r), id); err != nil {
			return sb, false, ended(err, id)
		}
	}
	if sb, err = s.Sandboxes.WakeFor(r.Context(), caller(r), id, timeout); err != nil {
		return sb, false, ended(err, id)
	}
	if sb.Mode == sandbox.Ephemeral {
		// This extends the time of a sandbox that was running. It changes nothing for one that
		// was just woken.
		if sb, err = s.Sandboxes.SetTimeout(r.Context(), orgOf(r), id, timeout, true); err != nil {
			return sb, false, ended(err, id)
		}
	}
	s.Samples.Follow(id, orgOf(r))
	return sb, paused, nil
}
