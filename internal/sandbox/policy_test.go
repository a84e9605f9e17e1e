package sandbox_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

var (
	open   = sandbox.Egress{Mode: sandbox.AllowAll}
	closed = sandbox.Egress{Mode: sandbox.DenyAll}
	named  = sandbox.Egress{Mode: sandbox.DenyAll, AllowDomains: []string{"example.com"}}
)

// wantPolicy checks the policy of the row and, if the sandbox runs, that of the node.
func (h *fixture) wantPolicy(id sandbox.ID, want sandbox.Egress) {
	h.t.Helper()
	sbx := h.get(id)
	if !sbx.Egress.Equal(want) {
		h.t.Errorf("the row has policy %+v, want %+v", sbx.Egress, want)
	}
	if observed, _ := h.node.Inspect(context.Background(), id); sbx.State == sandbox.Running &&
		!observed.Egress.Equal(want) {
		h.t.Errorf("the node has policy %+v, want %+v", observed.Egress, want)
	}
}

// notes returns the events that are not transitions, newest first.
func (h *fixture) notes(id sandbox.ID) []string {
	h.t.Helper()
	events, _, err := h.Events(context.Background(), org, id, 200, "")
	if err != nil {
		h.t.Fatal(err)
	}
	var out []string
	for _, e := range events {
		if e.From == e.To {
			out = append(out, fmt.Sprintf("%s %s: %s", e.To, e.Reason, e.Detail))
		}
	}
	return out
}

func TestPolicyOfARunningSandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		id := h.mustCreate(sandbox.Request{Egress: &closed}).ID
		h.wantPolicy(id, closed)
		lease, err := h.Connect(ctx, h.caller(), id, sandbox.ForCommand)
		if err != nil {
			t.Fatal(err)
		}
		defer lease.Release()
		for _, e := range []sandbox.Egress{named, open, open} {
			if sbx, err := h.SetEgress(ctx, org, id, e); err != nil || !sbx.Egress.Equal(e) {
				t.Errorf("setting %+v: %+v, %v", e, sbx.Egress, err)
			}
			h.wantPolicy(id, e)
		}
		want := []string{"running egress_changed: allow_all", "running egress_changed: allow_all",
			"running egress_changed: deny_all, 1 allow_domains"}
		if diff := cmp.Diff(want, h.notes(id)); diff != "" {
			t.Error(diff)
		}
	})
}

func TestPolicyOfTheTemplate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		for _, tt := range []struct {
			template string
			asked    *sandbox.Egress
			want     sandbox.Egress
		}{{"python", nil, open}, {"closed", nil, closed}, {"closed", &named, named}, {"closed", &open, open}} {
			h.wantPolicy(h.mustCreate(sandbox.Request{Template: tt.template, Egress: tt.asked}).ID, tt.want)
		}
	})
}

func TestPolicyOfASuspendedSandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.suspended()
		if _, err := h.SetEgress(context.Background(), org, id, closed); err != nil {
			t.Fatal(err)
		}
		h.wantState(id, sandbox.Suspended, "")
		h.wantPolicy(id, closed)
		h.mustWake(id)
		h.wantPolicy(id, closed)
	})
}

// TestPolicyWaits checks that a change of policy waits for a create, and precedes a suspend that is
// requested after it.
func TestPolicyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
		h.node.OnSetEgress = func(context.Context, sandbox.ID) error { time.Sleep(time.Second); return nil }
		sbx, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python", Mode: "persistent"}, sandbox.Once{}, false)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() {
			_, err := h.SetEgress(ctx, org, sbx.ID, closed)
			done <- err
		}()
		time.Sleep(1500 * time.Millisecond)
		if _, err := h.Suspend(ctx, org, sbx.ID, sandbox.KeepAll); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		h.wantPolicy(sbx.ID, closed)
		calls := h.node.Calls()
		for i, what := range []string{"create", "egress", "suspend"} {
			if i >= len(calls) || !strings.HasPrefix(calls[i], what+" ") {
				t.Fatalf("calls were %v", calls)
			}
		}
	})
}

func TestPolicyThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{}).ID
		h.node.OnSetEgress = func(context.Context, sandbox.ID) error { return errInjected }
		_, err := h.SetEgress(context.Background(), org, id, closed)
		wantCode(t, err, fault.Internal, "egress_failed")
		h.wantPolicy(id, open)
		// If the row cannot be restored, the policy that it says is applied in the end.
		h.node.OnSetEgress = func(context.Context, sandbox.ID) error { h.gate.breakPolicies(true); return errInjected }
		_, err = h.SetEgress(context.Background(), org, id, closed)
		wantCode(t, err, fault.Internal, "egress_failed")
		h.node.OnSetEgress = nil
		h.gate.breakPolicies(false)
		time.Sleep(time.Minute)
		h.wantPolicy(id, closed)
	})
}

// TestPolicyThatACrashInterrupted checks that the next server applies the policy of the row,
// whether or not the dead server had given it to the kernel.
func TestPolicyThatACrashInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)}).ID
		h.node.OnSetEgress = func(ctx context.Context, _ sandbox.ID) error { <-ctx.Done(); return ctx.Err() }
		go func() { _, _ = h.SetEgress(context.Background(), org, id, closed) }()
		synctest.Wait()
		h.crash()
		h.node.OnSetEgress = nil
		h.start()
		h.wantPolicy(id, closed)
		h.wantState(id, sandbox.Running, "")
	})
}

func TestDestroyInterruptsAPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{}).ID
		h.node.OnSetEgress = func(ctx context.Context, _ sandbox.ID) error { <-ctx.Done(); return ctx.Err() }
		done := make(chan error)
		go func() {
			_, err := h.SetEgress(context.Background(), org, id, closed)
			done <- err
		}()
		synctest.Wait()
		if err := h.Destroy(context.Background(), org, id); err != nil {
			t.Error(err)
		}
		wantCode(t, <-done, fault.Conflict, "sandbox_not_running")
		h.wantState(id, sandbox.Destroyed, sandbox.Requested)
	})
}

func TestTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{}).ID
		got, err := h.Traffic(context.Background(), h.get(id))
		if err != nil || got == nil || got.PacketsDenied != 1 || got.BytesAllowed != 4096 {
			t.Errorf("got %+v, %v", got, err)
		}
		if got, err := h.Traffic(context.Background(), h.get(h.suspended())); got != nil || err != nil {
			t.Errorf("a suspended sandbox has traffic: %+v, %v", got, err)
		}
	})
}

func TestDenialsBecomeEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{Egress: &closed, Timeout: ptr(24 * time.Hour)}).ID
		to := func(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }
		h.node.Deny(sandbox.Denial{ID: id, Protocol: "tcp", Destination: to("203.0.113.5:443"),
			Name: "example.org", Count: 2})
		h.node.Deny(sandbox.Denial{ID: id, Protocol: "tcp", Destination: to("203.0.113.5:443"),
			Name: "example.org", Count: 1})
		h.node.Deny(sandbox.Denial{ID: id, Protocol: "icmp", Destination: to("203.0.113.6:0"), Count: 1})
		h.node.Deny(sandbox.Denial{ID: id, Protocol: "dns", Name: "example.net", Count: 1})
		h.node.Deny(sandbox.Denial{ID: id, Protocol: "dns", Name: "\xff\n" + strings.Repeat("x", 1000), Count: 4})
		h.node.Deny(sandbox.Denial{ID: sandbox.NewID(), Protocol: "dns", Name: "of.nobody", Count: 1})
		time.Sleep(5 * time.Second)
		first := []string{"running egress_denied: icmp 203.0.113.6 once", "running egress_denied: dns example.net once",
			"running egress_denied: tcp 203.0.113.5:443 (example.org) 3 times",
			"running egress_denied: dns \"\\xff\\n" + strings.Repeat("x", 251) + "\" 4 times"}
		if diff := cmp.Diff(first, h.notes(id)); diff != "" {
			t.Error(diff)
		}
		// A sandbox that scans makes a few events a minute, which give only the number of the rest.
		scan := func(ports int) {
			for i := range ports {
				h.node.Deny(sandbox.Denial{ID: id, Protocol: "udp",
					Destination: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.9"), uint16(i+1)), Count: 1})
			}
		}
		scan(5000)
		time.Sleep(5 * time.Second)
		got := h.notes(id)
		if len(got) != len(first)+2 || got[0] != "running egress_denied: other destinations 4999 times" {
			t.Errorf("got %d events: %q", len(got), got)
		}
		scan(10)
		time.Sleep(30 * time.Second)
		if got := h.notes(id); len(got) != len(first)+2 {
			t.Errorf("the seventh event of a minute: %q", got)
		}
		time.Sleep(30 * time.Second)
		if got := h.notes(id); len(got) != len(first)+2+6 || got[0] != "running egress_denied: other destinations 5 times" {
			t.Errorf("after a minute there are %d events: %q", len(got), got[0])
		}
		for range 60 {
			scan(100)
			time.Sleep(time.Minute)
		}
		if got := h.notes(id); len(got) != 100 {
			t.Errorf("after an hour there are %d events", len(got))
		}
	})
}
