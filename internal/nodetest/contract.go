package nodetest

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Fixture holds a node to test, and what the tests do that sandbox.Node has no method for.
type Fixture struct {
	Node sandbox.Node
	// Spec returns the spec of another sandbox that the node can make, with a policy and no start
	// command.
	Spec func() sandbox.Spec
	// SetMost sets how many sandboxes the machine may have at once; 0 restores the number of before.
	SetMost func(n int)
	// SetDiskFull sets whether the disk has no room for a checkpoint.
	SetDiskFull func(full bool)
	// Kill ends the processes of a sandbox, as a crash of its kernel does. It need not wait.
	Kill func(t *testing.T, id sandbox.ID)
	Inside
}

// Inside does in a running sandbox what a program there would do.
type Inside interface {
	// Write keeps a text, in a file and in memory.
	Write(t *testing.T, spec sandbox.Spec, text string)
	// Read returns the text of the last Write.
	Read(t *testing.T, spec sandbox.Spec) string
	// ReadFile returns the text of the last Write in a sandbox that has it in the file and not in memory.
	ReadFile(t *testing.T, spec sandbox.Spec) string
	// Command returns the value of an environment variable and the working directory of a command.
	Command(t *testing.T, spec sandbox.Spec, variable string) (value, workdir string)
	// Work starts a process that does not end.
	Work(t *testing.T, spec sandbox.Spec)
	// Send sends a packet to a TCP port, which the policy forbids. It need not wait.
	Send(t *testing.T, spec sandbox.Spec, to netip.AddrPort)
}

// Contract tests what the comments of sandbox.Node promise. It calls open for each of its parts. open
// may return the same machine each time: every part leaves it empty.
//
// It leaves out the promises that only a machine with processes can break (that memory, listeners
// and random values of a snapshot's sandboxes are as they should be), and the failures in the middle
// of an operation, which a test can cause only in the implementation.
func Contract(t *testing.T, open func(t *testing.T) Fixture) {
	for _, part := range []struct {
		name string
		test func(*suite)
	}{
		{"nothing", testNothing},
		{"create and destroy", testCreate},
		{"a create that fails", testCreateFails},
		{"capacity", testCapacity},
		{"reservations", testReserve},
		{"reservations at once", testReserveAtOnce},
		{"policy", testPolicy},
		{"suspend and wake", testSuspend},
		{"files alone", testFilesAlone},
		{"recovery point", testRecovery},
		{"snapshots", testSnapshots},
		{"snapshot of a recovery point", testSnapshotCheckpoint},
		{"no disk space", testNoSpace},
		{"pool", testPool},
		{"pool with a start command", testPoolServes},
		{"pool from a snapshot", testPoolRestores},
	} {
		t.Run(part.name, func(t *testing.T) {
			s := &suite{T: t, Fixture: open(t)}
			t.Cleanup(s.clear)
			part.test(s)
			s.wantEmpty()
		})
	}
}

// suite runs one part of the contract.
type suite struct {
	*testing.T
	Fixture
}

// patience limits one call of a node and one wait. A start takes less than a second on a quiet
// machine. With less, a busy machine fails the tests; with more, a call that hangs delays them.
const patience = time.Minute

func (s *suite) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	s.Cleanup(cancel)
	return ctx
}

// must fails the test if a call failed.
func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// clear removes what a part that failed has left, so that the next part begins with nothing.
func (s *suite) clear() {
	all, err := s.Node.List(context.Background())
	if err != nil {
		s.Error(err)
	}
	for _, o := range all {
		if err := s.Node.Destroy(context.Background(), o.ID); err != nil {
			s.Error(err)
		}
	}
	snapshots, err := s.Node.Snapshots(context.Background())
	if err != nil {
		s.Error(err)
	}
	for _, id := range snapshots {
		if err := s.Node.DropSnapshot(context.Background(), id); err != nil {
			s.Error(err)
		}
	}
}

// create makes a sandbox, which must succeed.
func (s *suite) create() sandbox.Spec {
	s.Helper()
	spec := s.Spec()
	s.must(s.Node.Create(s.ctx(), spec))
	return spec
}

// destroy destroys sandboxes, which must succeed and leave nothing of them.
func (s *suite) destroy(ids ...sandbox.ID) {
	s.Helper()
	for _, id := range ids {
		s.must(s.Node.Destroy(s.ctx(), id))
		s.wantGone(id)
	}
}

// wake wakes a sandbox as its next instance and returns the spec of that.
func (s *suite) wake(spec sandbox.Spec) sandbox.Spec {
	s.Helper()
	spec.Run += "2"
	spec.Token += "2"
	s.must(s.Node.Wake(s.ctx(), spec))
	return spec
}

// kill ends the processes of a sandbox and waits for the report.
func (s *suite) kill(spec sandbox.Spec) {
	s.Helper()
	s.Kill(s.T, spec.ID)
	select {
	case lost := <-s.Node.Lost():
		if lost.ID != spec.ID || lost.Run != spec.Run || lost.Alive {
			s.Errorf("the node reports %+v as lost, want run %s of %s", lost, spec.Run, spec.ID)
		}
	case <-time.After(patience):
		s.Fatal("the end of a sandbox was not reported")
	}
}

// wantObserved checks what the node has of a sandbox.
func (s *suite) wantObserved(want sandbox.Observed) {
	s.Helper()
	got, err := s.Node.Inspect(s.ctx(), want.ID)
	if diff := cmp.Diff(&want, got, cmpopts.EquateComparable(netip.Prefix{})); err != nil || diff != "" {
		s.Errorf("the node has of %s, %v (-want +got):\n%s", want.ID, err, diff)
	}
	all, err := s.Node.List(s.ctx())
	i := slices.IndexFunc(all, func(o sandbox.Observed) bool { return o.ID == want.ID })
	if err != nil || i < 0 {
		s.Errorf("%s is not listed in %+v, %v", want.ID, all, err)
	} else if diff := cmp.Diff(want, all[i], cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		s.Errorf("listed of %s (-want +got):\n%s", want.ID, diff)
	}
}

// wantGone checks that the node has nothing of a sandbox.
func (s *suite) wantGone(id sandbox.ID) {
	s.Helper()
	if got, err := s.Node.Inspect(s.ctx(), id); err != nil || got != nil {
		s.Errorf("the node has %+v of %s, %v, want nothing", got, id, err)
	}
}

// wantEmpty checks that the node has no sandboxes and no snapshots, and has reported none as lost.
func (s *suite) wantEmpty() {
	s.Helper()
	if all, err := s.Node.List(s.ctx()); err != nil || len(all) > 0 {
		s.Errorf("in the end the node has %+v, %v", all, err)
	}
	s.wantSnapshots()
	select {
	case lost := <-s.Node.Lost():
		s.Errorf("the node reports %+v as lost", lost)
	default:
	}
}

// wantSnapshots checks which snapshots the node has.
func (s *suite) wantSnapshots(want ...sandbox.SnapshotID) {
	s.Helper()
	got, err := s.Node.Snapshots(s.ctx())
	slices.Sort(got)
	slices.Sort(want)
	if err != nil || !slices.Equal(got, want) {
		s.Errorf("the node has the snapshots %v, %v, want %v", got, err, want)
	}
}

// wantText checks the text inside a sandbox.
func (s *suite) wantText(spec sandbox.Spec, want string) {
	s.Helper()
	if got := s.Read(s.T, spec); got != want {
		s.Errorf("inside %s is the text %q, want %q", spec.ID, got, want)
	}
}

// wantCommand checks the environment and the working directory of a command.
func (s *suite) wantCommand(spec sandbox.Spec) {
	s.Helper()
	value, workdir := s.Command(s.T, spec, variable)
	if value != spec.Env[variable] || spec.Workdir != "" && workdir != spec.Workdir {
		s.Errorf("a command in %s has %s=%q and works in %q, want %q and %q", spec.ID, variable, value, workdir,
			spec.Env[variable], spec.Workdir)
	}
}

// variable names an environment variable that tells sandboxes apart.
const variable = "CONTRACT"

// with returns the spec with another value of variable.
func with(spec sandbox.Spec, value string) sandbox.Spec {
	env := map[string]string{variable: value}
	for name, v := range spec.Env {
		if name != variable {
			env[name] = v
		}
	}
	spec.Env = env
	return spec
}

// wantFault checks the kind and the code of an error, and that a caller with no room is told when to
// try again.
func (s *suite) wantFault(err error, kind fault.Kind, code string) {
	s.Helper()
	f := fault.As(err)
	if f == nil || f.Kind != kind || f.Code != code || f.Detail == "" ||
		(kind == fault.Unavailable) != (f.RetryAfter > 0) {
		s.Errorf("got %#v, want %v with code %q", err, kind, code)
	}
}

func (s *suite) wantNoCapacity(err error) {
	s.Helper()
	s.wantFault(err, fault.Unavailable, "no_capacity")
}

// wantNotRunning checks the calls that need a sandbox that runs, for one that does not.
func (s *suite) wantNotRunning(id sandbox.ID) {
	s.Helper()
	for name, call := range map[string]func() error{
		"Check":      func() error { return s.Node.Check(s.ctx(), id) },
		"Busy":       func() error { _, err := s.Node.Busy(s.ctx(), id); return err },
		"Dial":       func() error { _, err := s.Node.Dial(s.ctx(), id); return err },
		"Suspend":    func() error { _, err := s.Node.Suspend(s.ctx(), id, sandbox.KeepAll); return err },
		"Checkpoint": func() error { _, err := s.Node.Checkpoint(s.ctx(), id); return err },
		"Snapshot":   func() error { _, err := s.Node.Snapshot(s.ctx(), id, sandbox.NewSnapshotID()); return err },
		"SetEgress":  func() error { return s.Node.SetEgress(s.ctx(), id, sandbox.Egress{Mode: sandbox.AllowAll}) },
		"Traffic":    func() error { _, err := s.Node.Traffic(s.ctx(), id); return err },
	} {
		if err := call(); fault.As(err) == nil || fault.As(err).Kind != fault.Conflict ||
			fault.As(err).Code != "sandbox_not_running" {
			s.Errorf("%s of a sandbox that does not run: %v", name, err)
		}
	}
}
