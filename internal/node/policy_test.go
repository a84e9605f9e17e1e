package node

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
)

var (
	openPolicy  = sandbox.Egress{Mode: sandbox.AllowAll}
	rangePolicy = sandbox.Egress{Mode: sandbox.DenyAll,
		AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}, AllowPorts: []uint16{443}}
	namesPolicy = sandbox.Egress{Mode: sandbox.DenyAll, AllowDomains: []string{"example.com"}}
)

// wantPolicy checks the policy that the node reports for the sandbox, that of the record, and that
// of the sandbox at the address.
func (m *machine) wantPolicy(id sandbox.ID, want sandbox.Egress) {
	m.t.Helper()
	observed, err := m.node.Inspect(m.ctx(), id)
	if err != nil || observed == nil || !observed.Egress.Equal(want) {
		m.t.Errorf("the node has %+v, %v, want policy %+v", observed, err, want)
	}
	if l, err := readRecord(m.node.dir(id)); err != nil || !l.Shape.Egress.Equal(want) {
		m.t.Errorf("recorded is %+v, %v, want %+v", l.Shape.Egress, err, want)
	}
	slot := m.node.instance(id).slot
	if g, ok := m.node.Guest(slot.Addr); !ok || g.ID != id || g.Slot != slot || !g.Egress.Equal(want) {
		m.t.Errorf("the guest at %s is %+v (%v), want policy %+v", slot.Addr, g, ok, want)
	}
	if _, ok := m.node.Guest(slot.Gateway); ok {
		m.t.Error("the gateway is a guest")
	}
}

func TestPolicyFromCreateToDestroy(t *testing.T) {
	m := newMachine(t)
	var told []netip.Addr
	m.node.cfg.PolicyChanged = func(a netip.Addr) { told = append(told, a) }
	spec := m.spec()
	spec.Egress = rangePolicy
	if err := m.node.Create(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	m.wantPolicy(spec.ID, rangePolicy)
	if err := m.node.SetEgress(m.ctx(), spec.ID, namesPolicy); err != nil {
		t.Fatal(err)
	}
	m.wantPolicy(spec.ID, namesPolicy)
	if addr := m.node.instance(spec.ID).slot.Addr; len(told) != 1 || told[0] != addr {
		t.Errorf("told of %v, want %s", told, addr)
	}
	// The next server applies the recorded policy.
	m.close()
	m.open()
	m.wantPolicy(spec.ID, namesPolicy)
	m.works(spec)
	m.suspend(spec)
	spec.Egress = rangePolicy // changed while it slept
	spec = m.wake(spec)
	m.wantPolicy(spec.ID, rangePolicy)
	addr := m.node.instance(spec.ID).slot.Addr
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
	if g, ok := m.node.Guest(addr); ok {
		t.Errorf("a destroyed sandbox is a guest: %+v", g)
	}
	m.wantNothing()
}

// TestPolicyThatCannotBeRecorded checks that the former policy stays in force and in the record.
func TestPolicyThatCannotBeRecorded(t *testing.T) {
	m := newMachine(t)
	spec := m.spec()
	spec.Egress = rangePolicy
	if err := m.node.Create(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	blocked := filepath.Join(m.node.dir(spec.ID), recordFile+".new")
	if err := os.Mkdir(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.node.SetEgress(m.ctx(), spec.ID, openPolicy); err == nil {
		t.Error("it was set without a record")
	}
	if err := unix.Rmdir(blocked); err != nil {
		t.Fatal(err)
	}
	m.wantPolicy(spec.ID, rangePolicy)
}

// TestPolicyOf fails for a field of a policy, also for one that is added later, that makes no
// difference to the rules of a slot.
func TestPolicyOf(t *testing.T) {
	full := func() (e sandbox.Egress) {
		caytest.Fill(&e, 7)
		e.Mode = sandbox.DenyAll
		return e
	}
	caytest.EachWithout(full, func(name string, without sandbox.Egress) {
		if name == "Mode" {
			without.Mode = sandbox.AllowAll
		}
		if reflect.DeepEqual(policyOf(without), policyOf(full())) {
			t.Errorf("the rules are the same without %s", name)
		}
	})
}
