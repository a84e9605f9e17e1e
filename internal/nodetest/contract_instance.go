package nodetest

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// testNothing makes every call for a sandbox or a snapshot that the node does not have.
func testNothing(s *suite) {
	spec := s.Spec()
	s.wantNotRunning(spec.ID)
	s.wantGone(spec.ID)
	s.wantFault(s.Node.Wake(s.ctx(), spec), fault.Internal, "wake_failed")
	s.wantFault(s.Node.Claim(s.ctx(), spec), fault.Conflict, "no_member")
	_, err := s.Node.SnapshotCheckpoint(s.ctx(), spec.ID, sandbox.NewSnapshotID())
	s.wantFault(err, fault.Conflict, "sandbox_not_running")
	s.must(errors.Join(s.Node.Rest(s.ctx(), spec.ID), s.Node.Destroy(s.ctx(), spec.ID),
		s.Node.DropSnapshot(s.ctx(), sandbox.NewSnapshotID())))
	lost, denied := s.Node.Lost(), s.Node.Denied()
	if s.Node.Lost() != lost || s.Node.Denied() != denied {
		s.Error("the node has more than one channel of a kind")
	}
}

func testCreate(s *suite) {
	spec := with(s.Spec(), "first")
	spec.Workdir = "/tmp"
	s.must(s.Node.Create(s.ctx(), spec))
	runs := sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress}
	s.wantObserved(runs)
	s.wantCommand(spec)
	s.must(s.Node.Check(s.ctx(), spec.ID))
	conn, err := s.Node.Dial(s.ctx(), spec.ID)
	s.must(err)
	s.must(conn.Close())
	if busy, err := s.Node.Busy(s.ctx(), spec.ID); err != nil || busy {
		s.Errorf("a new sandbox is busy: %v, %v", busy, err)
	}
	s.Work(s.T, spec)
	if busy, err := s.Node.Busy(s.ctx(), spec.ID); err != nil || !busy {
		s.Errorf("a sandbox with a process is busy: %v, %v", busy, err)
	}

	// Neither a create nor a wake takes the place of an instance.
	again := spec
	again.Run = "other"
	if s.Node.Create(s.ctx(), again) == nil {
		s.Error("made twice")
	}
	if s.Node.Wake(s.ctx(), again) == nil {
		s.Error("woke a sandbox that runs")
	}
	s.wantObserved(runs)

	// Without a recovery point Rest leaves nothing.
	s.must(s.Node.Rest(s.ctx(), spec.ID))
	s.wantGone(spec.ID)
	s.wantNotRunning(spec.ID)
	s.must(s.Node.Create(s.ctx(), spec))
	for range 2 {
		s.destroy(spec.ID)
	}
	s.wantNotRunning(spec.ID)
}

// failingStart ends before it is ready.
var failingStart = sandbox.Start{Command: "exit 3", Ready: &sandbox.Ready{Port: 8080}}

func testCreateFails(s *suite) {
	for name, make := range s.makers() {
		spec := s.Spec()
		spec.Start = failingStart
		s.Log(name)
		s.wantFault(make(spec), fault.Conflict, "start_failed")
		s.wantGone(spec.ID)
		spec = s.Spec()
		spec.From = sandbox.NewSnapshotID()
		s.wantFault(make(spec), fault.Internal, "restore_failed")
		s.wantGone(spec.ID)
	}
}

// makers returns the calls that make a sandbox.
func (s *suite) makers() map[string]func(sandbox.Spec) error {
	return map[string]func(sandbox.Spec) error{
		"Create":  func(spec sandbox.Spec) error { return s.Node.Create(s.ctx(), spec) },
		"Prepare": func(spec sandbox.Spec) error { return s.Node.Prepare(s.ctx(), spec) },
	}
}

func testCapacity(s *suite) {
	defer s.SetMost(0)
	wantRoom := s.wantRoom
	wantRoom(true)
	s.SetMost(1)
	wantRoom(true)

	// Without reservations, callers at once do not all get the same room.
	made := s.createAtOnce(3)
	if len(made) != 1 {
		s.Fatalf("with room for one sandbox %d were made", len(made))
	}
	spec := made[0]
	wantRoom(false)
	for name, make := range s.makers() {
		other := s.Spec()
		s.Log(name)
		s.wantNoCapacity(make(other))
		s.wantGone(other.ID)
	}
	if _, err := s.Node.Suspend(s.ctx(), spec.ID, sandbox.KeepAll); err != nil {
		s.Fatal(err)
	}
	wantRoom(true) // a suspended sandbox takes no room

	// A pooled sandbox takes room from other pooled ones alone.
	pooled := s.Spec()
	s.must(s.Node.Prepare(s.ctx(), pooled))
	wantRoom(false)
	s.wantNoCapacity(s.Node.Prepare(s.ctx(), s.Spec()))
	spec = s.wake(spec)
	s.destroy(pooled.ID)
	_, err := s.Node.Suspend(s.ctx(), spec.ID, sandbox.KeepAll)
	s.must(err)

	other := s.create()
	s.wantNoCapacity(s.Node.Wake(s.ctx(), spec))
	if o, err := s.Node.Inspect(s.ctx(), spec.ID); err != nil || o == nil || o.Remains || o.Checkpoint == nil {
		s.Errorf("after a wake without room the node has %+v, %v", o, err)
	}
	s.destroy(other.ID, spec.ID)
}

// createAtOnce makes n sandboxes at once and returns those for which there was room.
func (s *suite) createAtOnce(n int) (made []sandbox.Spec) {
	s.Helper()
	specs, errs := make([]sandbox.Spec, n), make([]error, n)
	var creating sync.WaitGroup
	for i := range n {
		specs[i] = s.Spec()
		creating.Go(func() { errs[i] = s.Node.Create(s.Context(), specs[i]) })
	}
	creating.Wait()
	for i, err := range errs {
		if err == nil {
			made = append(made, specs[i])
			continue
		}
		s.wantNoCapacity(err)
		s.wantGone(specs[i].ID)
	}
	return made
}

func testPolicy(s *suite) {
	spec := s.Spec()
	spec.Egress = sandbox.Egress{Mode: sandbox.DenyAll}
	s.must(s.Node.Create(s.ctx(), spec))
	runs := sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress}
	s.wantObserved(runs)
	before, err := s.Node.Traffic(s.ctx(), spec.ID)
	s.must(err)
	to := netip.MustParseAddrPort("198.51.100.7:443") // of the addresses for documentation
	s.Send(s.T, spec, to)
	for deadline, reported := time.After(patience), false; !reported; {
		select {
		case d := <-s.Node.Denied():
			// On a busy machine the agent may answer the node on a connection that the node has given up.
			if reported = d.Destination == to; reported && (d.ID != spec.ID || d.Protocol != "tcp") {
				s.Errorf("the node reports %+v as denied, want TCP from %s to %s", d, spec.ID, to)
			}
		case <-deadline:
			s.Fatal("a packet that was kept from leaving was not reported")
		}
	}
	if after, err := s.Node.Traffic(s.ctx(), spec.ID); err != nil || after.PacketsDenied <= before.PacketsDenied ||
		after.BytesDenied <= before.BytesDenied || after.PacketsAllowed < before.PacketsAllowed {
		s.Errorf("the traffic was %+v and is %+v, %v", before, after, err)
	}
	for _, e := range []sandbox.Egress{
		{Mode: sandbox.AllowAll},
		{Mode: sandbox.DenyAll, AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")},
			AllowPorts: []uint16{443}},
	} {
		s.must(s.Node.SetEgress(s.ctx(), spec.ID, e))
		runs.Egress = e
		s.wantObserved(runs)
	}
	s.destroy(spec.ID)
}
