package e2e

import (
	"context"
	"crypto/ecdsa"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/noderpc"
	"github.com/cayhq/cay/internal/pki"
	cay "github.com/cayhq/cay/sdk/go"
)

// TestNodes empties a machine as an operator does before a reboot, with kill -9 of the server at each step: what was
// ordered holds, and what was suspended goes on afterwards.
func TestNodes(t *testing.T) {
	t.Parallel() // it has its own server
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(strings.Repeat("0123456789abcdef", 4)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fleetAt := freeAddress(t)
	s := newServer(t, "CAY_NODE_NAME=host-1", "CAY_NODE_LABELS=zone=a,disk=ssd", "CAY_FLEET_LISTEN="+fleetAt,
		"CAY_FLEET_SECRET_FILE="+secret)
	s.start()
	other, leave := s.joins("https://" + fleetAt)
	s.needTemplate("python")
	persistent := s.create(object{"mode": "persistent", "timeout": nil, "recovery_interval": "0"})
	ephemeral := s.create(object{"timeout": "1h"})
	s.want(persistent, "nohup sh -c 'while true; do date +%s%N > /tmp/next; mv /tmp/next /tmp/beat; sleep 0.05; done' "+
		">/dev/null 2>&1 & until test -e /tmp/beat; do sleep 0.1; done")
	const look = "cat /proc/sys/kernel/random/boot_id; pgrep -f 'while true' | head -1"
	before := s.want(persistent, look)

	if out, _, code := s.cli("", "nodes", "show", "host-1"); code != 0 || !strings.Contains(out, "disk=ssd") ||
		!strings.Contains(out, "2, 2 of them not suspended") || !strings.Contains(out, s.instance()) {
		t.Errorf("cay nodes show: %d\n%s", code, out)
	}
	restart := func() {
		t.Helper()
		s.stop(syscall.SIGKILL)
		s.start()
	}
	refused := func(what string, err error) {
		t.Helper()
		if !isRefused(err, 503, "no_capacity") || !strings.Contains(err.Error(), "this machine is cordoned") {
			t.Errorf("%s on a cordoned machine: %v", what, err)
		}
	}
	if out, _, code := s.cli("", "nodes", "cordon", "host-1"); code != 0 || !strings.Contains(out, "cordoned") {
		t.Errorf("cay nodes cordon: %d\n%s", code, out)
	}
	restart()
	_, err := s.api().CreateSandbox(t.Context(), cay.CreateSandboxRequest{Template: "python"}, cay.CreateOptions{})
	refused("a create", err)
	s.want(ephemeral, "true")
	s.want(persistent, "true")

	if _, err := s.api().DrainNode(t.Context(), "host-1", time.Hour); err != nil {
		t.Fatal(err)
	}
	restart() // while the sandbox is being suspended, or after that
	s.waitState(persistent, "suspended")
	_, err = s.api().Wake(t.Context(), persistent)
	refused("a wake", err)
	s.want(ephemeral, "true")
	_, errors, code := s.cli("", "nodes", "drain", s.instance(), "--timeout", "1s")
	if code != 1 || !strings.Contains(errors, "1 sandboxes are left on host-1, which stays cordoned") {
		t.Errorf("cay nodes drain with a sandbox that stays: %d\n%s", code, errors)
	}
	s.destroy(ephemeral)
	if out, errors, code := s.cli("", "nodes", "drain", "host-1"); code != 0 || !strings.Contains(out, "drained") {
		t.Errorf("cay nodes drain: %d\n%s%s", code, out, errors)
	}
	if n, err := s.api().UncordonNode(t.Context(), "host-1"); err != nil || n.Status != cay.NodeStatusReady {
		t.Errorf("uncordoned: %s, %v", jsonOf(n), err)
	}
	restart()
	if after := s.want(persistent, look); after != before {
		t.Errorf("the sandbox was %q before the drain and is %q", before, after)
	}
	s.want(s.create(nil), "true")
	other()
	leave()
}

// joins has another machine join by a token of the command line. It returns a function that checks that the machine may
// speak, and one that removes it and checks that it may not any more.
func (s *server) joins(url string) (speaks, leaves func()) {
	s.t.Helper()
	out, errors, code := s.cli("", "nodes", "token", "--name", "host-2")
	if code != 0 {
		s.t.Fatalf("cay nodes token: %d\n%s", code, errors)
	}
	token := strings.TrimSpace(out)
	key, err := pki.NewKey()
	if err != nil {
		s.t.Fatal(err)
	}
	join := func(key *ecdsa.PrivateKey) (fleet.Joined, error) {
		return noderpc.Join(context.Background(), []string{url}, token, key, fleet.JoinRequest{Name: "unused"})
	}
	j, err := join(key)
	if err != nil {
		s.t.Fatalf("joining: %v\n%s", err, s.lastLog())
	}
	if another, err := pki.NewKey(); err != nil {
		s.t.Error(err)
	} else if _, err := join(another); err == nil {
		s.t.Error("a second machine has joined with the token")
	}
	k, err := pki.NewKeeper(key, j.Certificate, j.Authorities)
	if err != nil {
		s.t.Fatal(err)
	}
	client := noderpc.NewClient(k, func() []string { return []string{url} })
	s.t.Cleanup(client.Close)
	const session = "sessionofthetest"
	if _, err := client.Begin(context.Background(), session); err != nil {
		s.t.Error(err)
	}
	speaks = func() {
		s.t.Helper()
		request, err := k.Request()
		if err != nil {
			s.t.Fatal(err)
		}
		chain, authorities, err := client.Renewal(session)(context.Background(), request)
		if err == nil {
			err = k.Replace(chain, authorities)
		}
		if err != nil {
			s.t.Errorf("renewing: %v", err)
		}
		if _, err := client.Beat(context.Background(), session, fleet.Load{}); err != nil {
			s.t.Errorf("a beat: %v", err)
		}
	}
	leaves = func() {
		s.t.Helper()
		if out, errors, code := s.cli("", "nodes", "remove", "host-2"); code != 0 {
			s.t.Errorf("cay nodes remove: %d\n%s%s", code, out, errors)
		}
		if _, err := client.Beat(context.Background(), session, fleet.Load{}); err == nil {
			s.t.Error("a machine that was removed may speak")
		}
	}
	speaks()
	return speaks, leaves
}
