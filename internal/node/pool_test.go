package node

import (
	"errors"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/sandbox"
)

// pooled prepares a pooled sandbox and returns its spec. The environment and policy of the spec may
// be changed for the claim.
func (m *machine) pooled() sandbox.Spec {
	m.t.Helper()
	spec := m.spec()
	spec.Run, spec.Token = "run-"+string(spec.ID), "secret-"+string(spec.ID)
	if err := m.node.Prepare(m.ctx(), spec); err != nil {
		m.t.Fatal(err)
	}
	return spec
}

func (m *machine) wantWarm(id sandbox.ID, want bool) {
	m.t.Helper()
	observed, err := m.node.Inspect(m.ctx(), id)
	if err != nil || observed == nil || !observed.Alive || observed.Warm != want {
		m.t.Errorf("the node has %+v, %v, want it alive and warm: %v", observed, err, want)
	}
}

// closed checks that the slot has no policy, so that everything from it is dropped.
func (m *machine) closed(id sandbox.ID) {
	m.t.Helper()
	b := m.node.instance(id)
	if _, ok := m.node.Guest(b.slot.Addr); ok || b.policed {
		m.t.Errorf("pooled sandbox %s has a policy", id)
	}
}

// TestClaim claims pooled sandboxes and checks that each has its own settings and random numbers.
func TestClaim(t *testing.T) {
	m := newMachine(t)
	const look = "hostname; cat /etc/hostname; cat /etc/hosts; echo $MINE; env | grep -c SECRET; cat /etc/resolv.conf; " +
		"head -c 16 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid 2>/dev/null"
	specs := []sandbox.Spec{m.pooled(), m.pooled()}
	seen := map[string]bool{}
	for i, spec := range specs {
		m.wantWarm(spec.ID, true)
		m.closed(spec.ID)
		spec.Env = map[string]string{"PATH": "/bin", "MINE": string(spec.ID)}
		spec.Egress, spec.Workdir = rangePolicy, "/tmp"
		if err := m.node.Claim(m.ctx(), spec); err != nil {
			t.Fatal(err)
		}
		m.wantWarm(spec.ID, false)
		m.wantPolicy(spec.ID, rangePolicy)
		host := hostname(spec.ID)
		got := m.sh(spec, look)
		want := host + "\n" + host + "\n127.0.0.1\tlocalhost\n127.0.1.1\t" + host + "\n" + string(spec.ID) +
			"\n0\nnameserver 192.0.2.53\n"
		random, ok := strings.CutPrefix(got, want)
		if !ok || random == "" || seen[random] {
			t.Errorf("pooled sandbox %d is\n%s\nwant it to begin with\n%s", i, got, want)
		}
		seen[random] = true
		if dir := m.sh(spec, "pwd"); dir != "/tmp" {
			t.Errorf("works in %s", dir)
		}
	}
	for _, spec := range specs {
		if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
	}
	m.wantNothing()
}

// TestWarmIsLikeCold compares what a command sees in a sandbox that was created and in one that was
// claimed.
func TestWarmIsLikeCold(t *testing.T) {
	m := newMachine(t)
	const look = `env | sort; id; pwd; ps -o args; ls -la / /tmp /root; mount; ulimit -a; cat /proc/1/environ; ` +
		`df -k /; cat /proc/meminfo | head -1; ls /proc/self/fd; cat /etc/resolv.conf`
	cold := m.spec()
	cold.Env = map[string]string{"PATH": "/bin", "A": "1"}
	if err := m.node.Create(m.ctx(), cold); err != nil {
		t.Fatal(err)
	}
	warm := m.pooled()
	warm.Env = cold.Env
	if err := m.node.Claim(m.ctx(), warm); err != nil {
		t.Fatal(err)
	}
	see := func(spec sandbox.Spec) string {
		lines := strings.Split(strings.ReplaceAll(m.sh(spec, "{ "+look+"; } 2>&1"), hostname(spec.ID), "HOST"), "\n")
		for i, line := range lines { // without the times of files that the start made
			if fields := strings.Fields(line); len(fields) == 9 && strings.Contains(fields[7], ":") {
				lines[i] = strings.Join(append(fields[:5], fields[8]), " ")
			}
		}
		return strings.Join(lines, "\n")
	}
	if w, c := see(warm), see(cold); w != c {
		t.Errorf("warm:\n%s\ncold:\n%s", w, c)
	}
	for _, spec := range []sandbox.Spec{cold, warm} {
		if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
	}
	m.wantNothing()
}

// TestPrepareAndClaimFailAtEveryStep makes a prepare and a claim fail after each of their steps:
// nothing is left.
func TestPrepareAndClaimFailAtEveryStep(t *testing.T) {
	m := newMachine(t)
	broken := errors.New("broken on purpose")
	fail := func(step string, do func() error) {
		t.Helper()
		reached := false
		m.node.after = func(name string) error {
			if name == step {
				reached = true
				return broken
			}
			return nil
		}
		if err := do(); !errors.Is(err, broken) || !reached {
			t.Errorf("step %s: got %v, reached: %v", step, err, reached)
		}
		m.node.after = nil
		m.wantNothing()
	}
	for _, step := range []string{"directory", "network", "record", "start", "watch", "agent", "favour", "init"} {
		fail(step, func() error { return m.node.Prepare(m.ctx(), m.spec()) })
	}
	for _, step := range []string{"claimed", "policy", "init"} {
		spec := m.pooled()
		fail(step, func() error { return m.node.Claim(m.ctx(), spec) })
	}
}

// TestAdoptPooled opens another Node: a pooled sandbox is still pooled and closed, and can be
// claimed; one whose claim had begun is not pooled; and none is pooled for a Node that makes
// sandboxes in another way.
func TestAdoptPooled(t *testing.T) {
	m := newMachine(t)
	idle, begun := m.pooled(), m.pooled()
	b := m.node.instance(begun.ID)
	if !b.unwarm(begun) {
		t.Fatal("not pooled")
	}
	if err := b.writeRecord(); err != nil {
		t.Fatal(err)
	}
	m.close()
	m.open()
	m.wantWarm(idle.ID, true)
	m.closed(idle.ID)
	m.wantWarm(begun.ID, false)
	m.node.cfg.MaxPIDs++
	m.wantWarm(idle.ID, false)
	m.node.cfg.MaxPIDs--
	idle.Egress = openPolicy
	if err := m.node.Claim(m.ctx(), idle); err != nil {
		t.Fatal(err)
	}
	m.works(idle)
	m.wantPolicy(idle.ID, openPolicy)
	for _, spec := range []sandbox.Spec{idle, begun} {
		if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
	}
	m.wantNothing()
}

// TestPooledServe checks that a start command is ready in the pool, under its policy, and that the
// claim does not start it again. A claimed sandbox is suspended and woken like any other.
func TestPooledServe(t *testing.T) {
	m := newMachine(t)
	spec := m.serving(sandbox.Ready{Port: 8080})
	spec.Egress = rangePolicy
	if err := m.node.Prepare(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	m.wantWarm(spec.ID, true)
	m.wantPolicy(spec.ID, rangePolicy)
	m.close()
	m.open()
	m.wantPolicy(spec.ID, rangePolicy)
	if err := m.node.Claim(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	m.wantServing(spec)
	m.suspend(spec)
	spec = m.wake(spec)
	m.wantServing(spec)
	m.wantWarm(spec.ID, false)
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
	m.wantNothing()
}

func TestSpare(t *testing.T) {
	m := newMachine(t)
	if n, err := m.node.Spare(m.ctx()); err != nil || n < 1 || n > 10 {
		t.Errorf("%d spare of 10, %v", n, err)
	}
	m.node.cfg.MinHostMemory = 1 << 60
	if n, err := m.node.Spare(m.ctx()); err != nil || n != 0 {
		t.Errorf("%d spare without memory, %v", n, err)
	}
}
