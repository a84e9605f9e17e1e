package node

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// snapshot makes a snapshot, which must succeed.
func (m *machine) snapshot(spec sandbox.Spec) sandbox.SnapshotID {
	m.t.Helper()
	id := sandbox.NewSnapshotID()
	if _, err := m.node.Snapshot(m.ctx(), spec.ID, id); err != nil {
		m.t.Fatalf("making a snapshot: %v", err)
	}
	return id
}

// child returns the spec of a sandbox that is to be made from a snapshot of another.
func child(of sandbox.Spec, from sandbox.SnapshotID) sandbox.Spec {
	c := of
	c.ID, c.Run, c.Token, c.From = sandbox.NewID(), "child", "token of a child", from
	c.Env = maps.Clone(of.Env)
	c.Env["CHILD"] = string(c.ID)
	return c
}

func (m *machine) restored(of sandbox.Spec, from sandbox.SnapshotID) sandbox.Spec {
	m.t.Helper()
	c := child(of, from)
	if err := m.node.Create(m.ctx(), c); err != nil {
		m.t.Fatalf("restoring: %v", err)
	}
	return c
}

// wantSnapshots checks that the machine has exactly these snapshots, and no other checkpoint.
func (m *machine) wantSnapshots(want ...sandbox.SnapshotID) {
	m.t.Helper()
	got, err := m.node.Snapshots(m.ctx())
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		m.t.Errorf("the machine has the snapshots %v, %v; want %v", got, err, want)
	}
	entries, _ := filepath.Glob(filepath.Join(m.dir, "checkpoints", "*"))
	if len(entries) != len(want) {
		m.t.Errorf("the machine has %v", entries)
	}
}

// TestChildrenOfASnapshot makes two sandboxes from one snapshot while the first continues, and one
// more after the first has gone and the snapshot was deleted: each continues from the state of the
// snapshot.
func TestChildrenOfASnapshot(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	snap := m.snapshot(spec)
	m.wantSnapshots(snap)
	specs := []sandbox.Spec{spec, m.restored(spec, snap), m.restored(spec, snap)}
	for _, s := range specs {
		if got := m.counts(s, n); got < n {
			t.Errorf("%s is at %d, and the snapshot was made at %d", s.ID, got, n)
		}
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	last := m.restored(spec, snap)
	if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
		t.Fatal(err)
	}
	m.wantSnapshots()
	m.counts(last, n)
	// A child is independent: it can be suspended, woken and destroyed, and a snapshot of it has
	// children too.
	m.counts(specs[1], n)
	saved, err := m.node.Suspend(m.ctx(), specs[1].ID, sandbox.KeepAll)
	if err != nil {
		t.Fatal(err)
	}
	of := sandbox.NewSnapshotID()
	if copied, err := m.node.SnapshotCheckpoint(m.ctx(), specs[1].ID, of); err != nil || copied != saved {
		t.Errorf("the snapshot is %+v, the recovery point %+v, %v", copied, saved, err)
	}
	specs[1].From = ""
	awake := m.wake(specs[1])
	m.counts(awake, n)
	if err := m.node.Destroy(m.ctx(), awake.ID); err != nil {
		t.Fatal(err)
	}
	m.wantSnapshots(of)
	grandchild := m.restored(awake, of)
	m.counts(grandchild, n)
	for _, s := range []sandbox.Spec{specs[2], last, grandchild} {
		if err := m.node.Destroy(m.ctx(), s.ID); err != nil {
			t.Error(err)
		}
	}
	if err := m.node.DropSnapshot(m.ctx(), of); err != nil {
		t.Fatal(err)
	}
	m.wantSnapshots()
	m.wantNothing()
}

// TestIdentityOfAChild checks everything that distinguishes a sandbox from others.
func TestIdentityOfAChild(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.sh(spec, "echo '192.0.2.7 mine' >>/etc/hosts")
	// This process draws random numbers on command and is never started again.
	m.sh(spec, `mkfifo /tmp/ask; (exec 3<>/tmp/ask; while read -r n <&3; do head -c 16 /dev/urandom | md5sum >/tmp/drawn; cat /proc/sys/kernel/random/uuid >>/tmp/drawn; done) >/dev/null 2>&1 &
while ! [ -p /tmp/ask ]; do sleep 0.01; done`)
	look := func(s sandbox.Spec) string {
		return m.sh(s, `rm -f /tmp/drawn; echo 1 >/tmp/ask; until [ "$(wc -l </tmp/drawn 2>/dev/null)" = 2 ]; do sleep 0.01; done; cat /tmp/drawn
head -c 16 /dev/urandom | md5sum; head -c 16 /dev/random | md5sum; cat /proc/sys/kernel/random/uuid`)
	}
	snap := m.snapshot(spec)
	specs := []sandbox.Spec{spec, m.restored(spec, snap), m.restored(spec, snap)}
	drawn := map[string]sandbox.ID{}
	addresses := map[string]bool{}
	for _, s := range specs {
		for _, line := range strings.Fields(strings.ReplaceAll(look(s), " -", "")) {
			if of, twice := drawn[line]; twice {
				t.Errorf("%s and %s both drew %s", of, s.ID, line)
			}
			drawn[line] = s.ID
		}
		name := hostname(s.ID)
		want := name + "\n" + name + "\n127.0.0.1\tlocalhost\n127.0.1.1\t" + name + "\n192.0.2.7 mine"
		if got := m.sh(s, "hostname; cat /etc/hostname; cat /etc/hosts"); got != want {
			t.Errorf("%s is called %q, want %q", s.ID, got, want)
		}
		if got := m.sh(s, `echo "$CHILD"`); s.From != "" && got != string(s.ID) || s.From == "" && got != "" {
			t.Errorf("%s has the environment of %q", s.ID, got)
		}
		address := m.sh(s, "ip -4 -o addr show dev eth0 | awk '{print $4}'")
		if address == "" || addresses[address] {
			t.Errorf("%s has address %q, others %v", s.ID, address, addresses)
		}
		addresses[address] = true
		if inside := m.sh(s, "date +%s"); inside < fmt.Sprint(time.Now().Unix()-2) ||
			inside > fmt.Sprint(time.Now().Unix()+2) {
			t.Errorf("the clock of %s is at %s", s.ID, inside)
		}
		// The token of another sandbox is not valid for it.
		for _, o := range specs {
			wrong := s
			wrong.Token = o.Token + "x"
			if o.Run != s.Run {
				wrong.Token = o.Token
			}
			if err := m.node.Agents().Health(m.ctx(), m.node.instance(s.ID).target()); err != nil {
				t.Error(err)
			}
			m.refused(wrong)
		}
	}
}

// TestRestoreFailsAtEveryStep makes the restore of a child fail after each of its steps: nothing of
// the child is left, the snapshot is whole, and the sandbox that it was taken from continues.
func TestRestoreFailsAtEveryStep(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	snap := m.snapshot(spec)
	broken := errors.New("broken on purpose")
	for _, name := range []string{"image", "directory", "network", "record", "policy", "start",
		"watch", "agent", "favour", "init", "verify"} {
		reached := false
		m.node.after = func(step string) error {
			if step == name {
				reached = true
				return broken
			}
			return nil
		}
		c := child(spec, snap)
		if err := m.node.Create(m.ctx(), c); !errors.Is(err, broken) || !reached {
			t.Fatalf("%s: got %v, reached: %v", name, err, reached)
		}
		m.node.after = nil
		if observed, err := m.node.Inspect(m.ctx(), c.ID); err != nil || observed != nil {
			t.Errorf("%s: the machine has %+v, %v", name, observed, err)
		}
	}
	m.counts(m.restored(spec, snap), n)
	m.counts(spec, n)
}

// TestSnapshotFails makes a snapshot fail after it is saved and after it is committed: the sandbox
// continues with its former recovery point, and what was made of the snapshot can be removed.
func TestSnapshotFails(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	saved, err := m.node.Checkpoint(m.ctx(), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken on purpose")
	for _, name := range []string{"save", "commit"} {
		m.node.after = func(step string) error {
			if step == name {
				return broken
			}
			return nil
		}
		snap := sandbox.NewSnapshotID()
		if _, err := m.node.Snapshot(m.ctx(), spec.ID, snap); !errors.Is(err, broken) {
			t.Fatalf("%s: got %v", name, err)
		}
		m.node.after = nil
		n = m.counts(spec, n)
		if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
			t.Error(err)
		}
		if got, err := m.node.Snapshots(m.ctx()); err != nil || len(got) > 0 {
			t.Errorf("%s: the machine has %v, %v", name, got, err)
		}
		if observed, err := m.node.Inspect(m.ctx(), spec.ID); err != nil ||
			observed.Checkpoint == nil || *observed.Checkpoint != saved {
			t.Errorf("%s: its recovery point is %+v, %v", name, observed.Checkpoint, err)
		}
	}
}

// TestDamagedSnapshot damages the pages of a snapshot whose children run: each child is ended, and
// no other can be made from it. The pages of a snapshot that was deleted before are verified too.
func TestDamagedSnapshot(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.sh(spec, "head -c 20000000 /dev/urandom >/root/data")
	for _, deleted := range []bool{false, true} {
		snap := m.snapshot(spec)
		pages := filepath.Join(m.dir, "checkpoints", string(snap), "1", "pages.img")
		file, err := os.OpenFile(pages, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		one := make([]byte, 1)
		if _, err := file.ReadAt(one, info.Size()-5000); err != nil {
			t.Fatal(err)
		}
		one[0] ^= 1
		if _, err := file.WriteAt(one, info.Size()-5000); err != nil {
			t.Fatal(err)
		}
		children := map[sandbox.ID]bool{m.restored(spec, snap).ID: true, m.restored(spec, snap).ID: true}
		if deleted {
			if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
				t.Fatal(err)
			}
		}
		for len(children) > 0 {
			select {
			case lost := <-m.node.Lost():
				if !children[lost.ID] {
					t.Errorf("lost %s", lost.ID)
				}
				delete(children, lost.ID)
				if err := m.node.Destroy(m.ctx(), lost.ID); err != nil {
					t.Error(err)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("a sandbox with damaged memory goes on")
			}
		}
		if err := m.node.Create(m.ctx(), child(spec, snap)); fault.As(err) == nil || fault.As(err).Code != "restore_failed" {
			t.Errorf("deleted %v: another child: %v", deleted, err)
		}
	}
	m.works(spec)
}

// TestSnapshotKeepsItsPrograms gives the server another version of the programs: the snapshot is
// still restored by the version that made it, which is removed with the last sandbox or checkpoint
// that needs it.
func TestSnapshotKeepsItsPrograms(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	snap := m.snapshot(spec)
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	old := m.programs
	m.close()
	m.programs = otherPrograms(t, m)
	m.open()
	c := m.restored(spec, snap)
	m.counts(c, n)
	if _, err := os.Stat(old.Runsc); err != nil {
		t.Error(err)
	}
	if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
		t.Fatal(err)
	}
	m.counts(c, n)
	if err := m.node.Destroy(m.ctx(), c.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(old.Runsc); !os.IsNotExist(err) {
		t.Errorf("a runtime that nothing needs is still there: %v", err)
	}
}

// otherPrograms installs another version of the programs, with the same contents.
func otherPrograms(t *testing.T, m *machine) embedded.Programs {
	t.Helper()
	other := embedded.At(filepath.Join(m.dir, "programs"),
		embedded.Version{Agent: "another-agent", Runsc: "another-runsc"})
	for from, to := range map[string]string{m.programs.Agent: other.Agent, m.programs.Runsc: other.Runsc} {
		if err := errors.Join(os.Mkdir(filepath.Dir(to), 0o755), os.Link(from, to)); err != nil {
			t.Fatal(err)
		}
	}
	return other
}

// TestPooledFromASnapshot prepares pooled sandboxes from a snapshot of one that had been started,
// and claims one: it is independent and runs the processes of the first.
func TestPooledFromASnapshot(t *testing.T) {
	m := newMachine(t)
	first, n := m.working()
	snap := m.snapshot(first)
	if err := m.node.Destroy(m.ctx(), first.ID); err != nil {
		t.Fatal(err)
	}
	spec := child(first, snap)
	spec.Env = first.Env
	if err := m.node.Prepare(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	m.wantWarm(spec.ID, true)
	m.closed(spec.ID)
	m.close()
	m.open()
	m.wantWarm(spec.ID, true) // also for the next server
	m.closed(spec.ID)
	spec.Env = map[string]string{"PATH": "/bin", "MINE": string(spec.ID)}
	spec.Egress = rangePolicy
	if err := m.node.Claim(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	m.wantWarm(spec.ID, false)
	m.wantPolicy(spec.ID, rangePolicy)
	if got, want := m.sh(spec, `hostname; echo "$MINE"`), hostname(spec.ID)+"\n"+string(spec.ID); got != want {
		t.Errorf("it says %q, want %q", got, want)
	}
	m.counts(spec, n)
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
		t.Fatal(err)
	}
	m.wantNothing()
}
