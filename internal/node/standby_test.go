package node

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// standbys returns the ids of the waiting processes of the machine's runsc.
func (m *machine) standbys() []int {
	m.t.Helper()
	return processes(m.t, func(args []string) bool { return slices.Equal(args, []string{m.programs.Runsc, "await"}) })
}

// standby waits for a waiting process that is none of those in not, and returns its id.
func (m *machine) standby(not ...int) int {
	m.t.Helper()
	for range 1000 {
		if pids := m.standbys(); len(pids) == 1 && !slices.Contains(not, pids[0]) {
			return pids[0]
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.t.Fatalf("the waiting processes are %v, want another one than %v", m.standbys(), not)
	return 0
}

func TestStandby(t *testing.T) {
	m := newMachine(t)
	first := m.standby()
	spec := m.spec()
	create := func() {
		t.Helper()
		if err := m.node.Create(m.ctx(), spec); err != nil {
			t.Fatal(err)
		}
		m.works(spec)
		if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
	}
	create()
	second := m.standby(first)
	if err := unix.Kill(second, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	create()
	m.standby(first, second)
	// More sandboxes are made at once than processes wait.
	t.Run("many", func(t *testing.T) {
		for range 3 {
			t.Run("one", func(t *testing.T) {
				t.Parallel()
				spec := m.spec()
				if err := m.node.Create(m.ctx(), spec); err != nil {
					t.Fatal(err)
				}
				m.works(spec)
				if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
					t.Error(err)
				}
			})
		}
	})
	m.close()
	if left := m.standbys(); len(left) > 0 {
		t.Errorf("still waiting after the end: %v", left)
	}
}
