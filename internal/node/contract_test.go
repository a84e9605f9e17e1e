package node

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/checkpoint"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
)

// machineInside implements nodetest.Inside with commands.
type machineInside struct{ *machine }

func (m machineInside) Write(t *testing.T, spec sandbox.Spec, text string) {
	t.Helper()
	m.run(t, spec, "echo "+text+" | tee /root/text >/dev/shm/text")
}

func (m machineInside) Read(t *testing.T, spec sandbox.Spec) string {
	t.Helper()
	return m.run(t, spec, "cmp /root/text /dev/shm/text && cat /root/text")
}

func (m machineInside) ReadFile(t *testing.T, spec sandbox.Spec) string {
	t.Helper()
	return m.run(t, spec, "test ! -e /dev/shm/text && cat /root/text")
}

func (m machineInside) Command(t *testing.T, spec sandbox.Spec, variable string) (value, workdir string) {
	t.Helper()
	value, workdir, _ = strings.Cut(m.run(t, spec, `echo "$`+variable+`:$PWD"`), ":")
	return value, workdir
}

func (m machineInside) Work(t *testing.T, spec sandbox.Spec) {
	t.Helper()
	m.run(t, spec, "sleep 1000 >/dev/null 2>&1 &")
}

func (m machineInside) Send(t *testing.T, spec sandbox.Spec, to netip.AddrPort) {
	t.Helper()
	m.run(t, spec, fmt.Sprintf("nc -w 5 %s %d </dev/null >/dev/null 2>&1 &", to.Addr(), to.Port()))
}

// TestContract runs the contract of sandbox.Node with real sandboxes.
func TestContract(t *testing.T) {
	m := newMachine(t)
	setMinDisk := func(free int64) {
		var err error
		if m.node.checkpoints, _, err = checkpoint.Open(filepath.Join(m.dir, "checkpoints"), free); err != nil {
			t.Fatal(err)
		}
	}
	most := m.node.cfg.MaxSandboxes
	nodetest.Contract(t, func(t *testing.T) nodetest.Fixture {
		t.Cleanup(m.wantNothing)
		return nodetest.Fixture{Node: m.node, Inside: machineInside{m},
			Spec: func() sandbox.Spec {
				spec := m.spec()
				spec.Egress = openPolicy
				return spec
			},
			SetMost: func(n int) {
				if m.node.cfg.MaxSandboxes = n; n == 0 {
					m.node.cfg.MaxSandboxes = most
				}
			},
			SetDiskFull: func(full bool) {
				if full {
					setMinDisk(1 << 60)
				} else {
					setMinDisk(m.minDisk)
				}
			},
			Kill: func(t *testing.T, id sandbox.ID) {
				t.Helper()
				if err := m.node.groups.Group(m.node.groupPath(id)).Kill(m.ctx()); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}
