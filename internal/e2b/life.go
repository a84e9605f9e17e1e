package e2b

import (
	"net/http"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// get answers GET /sandboxes/{id}.
func (s *Surface) get(w http.ResponseWriter, r *http.Request) error {
	box, err := s.present(r, sandboxID(r))
	if err != nil {
		return err
	}
	who := callOf(r).who
	reply(w, http.StatusOK, s.detail(box, who.May(use[0]) && who.May(use[1])))
	return nil
}

// kill answers DELETE /sandboxes/{id}.
func (s *Surface) kill(w http.ResponseWriter, r *http.Request) error {
	id := sandboxID(r)
	if _, err := s.present(r, id); err != nil {
		return err
	}
	if err := s.Sandboxes.Destroy(r.Context(), orgOf(r), id); err != nil {
		return err
	}
	s.samples.forget(id)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// setTimeout answers POST /sandboxes/{id}/timeout.
func (s *Surface) setTimeout(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Timeout *int64 `json:"timeout"`
	}
	if err := read(w, r, &in); err != nil {
		return err
	}
	if in.Timeout == nil {
		return fault.InField("invalid_timeout", "timeout", "is required")
	}
	return s.giveTime(w, r, seconds(*in.Timeout), false)
}

// refresh answers POST /sandboxes/{id}/refreshes.
func (s *Surface) refresh(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Duration int64 `json:"duration"` // seconds
	}{15}
	if err := read(w, r, &in); err != nil {
		return err
	}
	return s.giveTime(w, r, seconds(in.Duration), true)
}

func (s *Surface) giveTime(w http.ResponseWriter, r *http.Request, timeout time.Duration, later bool) error {
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
func (s *Surface) pause(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Memory bool `json:"memory"`
	}{true}
	if err := read(w, r, &in); err != nil {
		return err
	}
	if !in.Memory {
		return unsupported(noMemorylessPause)
	}
	id := sandboxID(r)
	box, err := s.present(r, id)
	if err != nil {
		return err
	}
	if box.State == sandbox.Running || box.State == sandbox.Suspending {
		_, err = s.Sandboxes.Pause(r.Context(), orgOf(r), id)
		if f := fault.As(err); f == nil || f.Code != "sandbox_not_running" {
			if err != nil {
				return hidden(err, id)
			}
			w.WriteHeader(http.StatusNoContent)
			return nil
		}
		if box, err = s.present(r, id); err != nil { // it changed meanwhile
			return err
		}
	}
	return fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s is %s already", shown(id), stateOf(box))
}

// connectTimeout is what a sandbox has from a connect that says nothing.
const connectTimeout = 300

// connect answers POST /sandboxes/{id}/connect: 200 when it ran, 201 when it was paused.
func (s *Surface) connect(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Timeout int64 `json:"timeout"`
		Memory  bool  `json:"memory"`
	}{connectTimeout, true}
	if err := read(w, r, &in); err != nil {
		return err
	}
	if !in.Memory {
		return unsupported("a sandbox is woken with its memory: it is not started anew from its files")
	}
	box, paused, err := s.wake(r, seconds(in.Timeout))
	if err != nil {
		return err
	}
	status := http.StatusOK
	if paused {
		status = http.StatusCreated
	}
	reply(w, status, s.sandboxOf(box))
	return nil
}

// resume answers POST /sandboxes/{id}/resume, which connect came after.
func (s *Surface) resume(w http.ResponseWriter, r *http.Request) error {
	in := struct {
		Timeout   int64 `json:"timeout"`
		AutoPause *bool `json:"autoPause"`
	}{Timeout: 15}
	if err := read(w, r, &in); err != nil {
		return err
	}
	if in.AutoPause != nil {
		return unsupported("autoPause: what happens at the end is said when a sandbox is created")
	}
	id := sandboxID(r)
	box, err := s.present(r, id)
	if err != nil {
		return err
	}
	if box.State == sandbox.Running {
		return fault.New(fault.Conflict, "sandbox_running", "sandbox %s is running already", shown(id))
	}
	if box, _, err = s.wake(r, seconds(in.Timeout)); err != nil {
		return err
	}
	reply(w, http.StatusCreated, s.sandboxOf(box))
	return nil
}

// wake brings a sandbox to running, for so long at the least.
func (s *Surface) wake(r *http.Request, timeout time.Duration) (box sandbox.Sandbox, paused bool, err error) {
	id := sandboxID(r)
	if err := tooLong(timeout); err != nil {
		return box, false, err
	}
	if timeout < sandbox.MinTimeout {
		return box, false, fault.InField("invalid_timeout", "timeout", "must be at least %d second", sandbox.MinTimeout/time.Second)
	}
	before, err := s.present(r, id)
	if err != nil {
		return box, false, err
	}
	if box, err = s.Sandboxes.WakeFor(r.Context(), caller(r), id, timeout); err != nil {
		return box, false, ended(err, id)
	}
	if box.Mode == sandbox.Ephemeral {
		// To one that ran it gives time; to one that was woken just now, none.
		if box, err = s.Sandboxes.SetTimeout(r.Context(), orgOf(r), id, timeout, true); err != nil {
			return box, false, ended(err, id)
		}
	}
	s.samples.follow(id)
	return box, stateOf(before) == statePaused, nil
}
