package e2e

import (
	"strings"
	"syscall"
	"testing"

	cay "github.com/cayhq/cay/sdk/go"
)

// lost stops the process of one server for so long that the other one counts its machine as lost, and lets it go on.
func (f *fleetOfTwo) lost(t *testing.T) {
	kept := object{"mode": "persistent", "timeout": nil, "recovery_interval": "0"}
	ephemeral, persistent := f.on("host-b", f.a, nil), f.on("host-b", f.a, kept)
	unwanted, paused := f.on("host-b", f.a, kept), f.on("host-b", f.a, kept)
	if _, err := f.a.api().Suspend(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	const look = "cat /proc/sys/kernel/random/boot_id"
	before := f.a.want(persistent, look)
	f.b.signal(syscall.SIGSTOP)
	defer f.b.signal(syscall.SIGCONT) // if the test fails

	f.a.becomes("the machine is lost", func() bool {
		n, err := f.a.api().GetNode(t.Context(), "host-b")
		return err == nil && n.Status == cay.NodeStatusLost && n.LostAt != nil
	})
	f.a.becomes("its ephemeral sandboxes are", func() bool {
		state, reason := f.a.state(ephemeral)
		return state == "destroyed" && reason == "lost"
	})
	for id, want := range map[string]cay.SandboxStatus{persistent: cay.SandboxStatusRunning,
		paused: cay.SandboxStatusSuspended} {
		f.a.becomes("its persistent sandboxes say that they are out of reach", func() bool {
			s := f.a.get(id)
			return s.Status == want && s.Unavailable != nil && strings.HasPrefix(*s.Unavailable, "its machine is lost since ")
		})
		_, err := f.a.api().Execute(t.Context(), id, cay.ExecuteRequest{Command: new("true")})
		if !isRefused(err, 503, "node_unreachable") || !strings.Contains(err.Error(), "is lost since ") {
			t.Errorf("a call about a sandbox of a lost machine: %v", err)
		}
	}
	if err := f.a.api().DestroySandbox(t.Context(), unwanted); err != nil {
		t.Errorf("destroying a sandbox of a lost machine: %v", err)
	}
	if state, reason := f.a.state(unwanted); state != "destroyed" || reason != "requested" {
		t.Errorf("it is %s, %s", state, reason)
	}

	if _, err := f.a.api().Execute(t.Context(), ephemeral, cay.ExecuteRequest{Command: new("true")}); !isRefused(err,
		409, "sandbox_not_running") {
		t.Errorf("a call about a sandbox that was lost: %v", err)
	}

	f.b.stop(syscall.SIGCONT) // it ends when it finds out
	f.b.start()
	f.a.becomes("the machine is back", func() bool {
		n, err := f.a.api().GetNode(t.Context(), "host-b")
		return err == nil && n.Status == cay.NodeStatusReady && n.LostAt == nil
	})
	f.linked(map[*server]string{f.a: persistent})
	if after := f.a.want(persistent, look); after != before {
		t.Errorf("the sandbox was %s before its machine was lost, and is %s", before, after)
	}
	f.a.alive(paused)
	for _, id := range []string{ephemeral, unwanted} {
		f.b.becomes("what has ended is removed from the machine", func() bool { return len(f.b.onHost(id)) == 0 })
		f.b.gone(id)
	}
	if s := f.a.get(persistent); s.Unavailable != nil {
		t.Errorf("the sandbox of a machine that is back says %q", *s.Unavailable)
	}
	f.a.destroy(persistent)
	f.a.destroy(paused)
}

// signal sends a signal to the server's process.
func (s *server) signal(signal syscall.Signal) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Signal(signal); err != nil {
		s.t.Errorf("sending %s: %v", signal, err)
	}
}
