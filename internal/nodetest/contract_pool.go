package nodetest

import (
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func testPool(s *suite) {
	spec := s.Spec()
	s.must(s.Node.Prepare(s.ctx(), spec))
	pooled := sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Warm: true}
	s.wantObserved(pooled)
	s.must(s.Node.Check(s.ctx(), spec.ID))
	for _, change := range []func(*sandbox.Spec){
		func(spec *sandbox.Spec) { spec.ID = sandbox.NewID() },
		func(spec *sandbox.Spec) { spec.Run = "other" },
		func(spec *sandbox.Spec) { spec.Token = "other" },
	} {
		other := spec
		change(&other)
		s.wantFault(s.Node.Claim(s.ctx(), other), fault.Conflict, "no_member")
	}
	s.wantObserved(pooled)

	spec = with(spec, "claimed")
	spec.Workdir, spec.Egress = "/tmp", sandbox.Egress{Mode: sandbox.DenyAll, AllowPorts: []uint16{443}}
	s.must(s.Node.Claim(s.ctx(), spec))
	claimed := sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress}
	s.wantObserved(claimed)
	s.wantCommand(spec)
	s.wantFault(s.Node.Claim(s.ctx(), spec), fault.Conflict, "no_member")
	s.wantObserved(claimed)
	s.Write(s.T, spec, "one")
	s.suspend(spec)
	spec = s.wake(spec)
	s.wantText(spec, "one")
	s.wantCommand(spec)
	s.destroy(spec.ID)

	// A claim of a pooled sandbox that has died leaves nothing.
	spec = s.Spec()
	s.must(s.Node.Prepare(s.ctx(), spec))
	s.kill(spec)
	if s.Node.Claim(s.ctx(), spec) == nil {
		s.Error("claimed a sandbox that is dead")
	}
	s.wantGone(spec.ID)
}

// testPoolServes prepares a sandbox with a start command, which runs under its policy from the
// beginning.
func testPoolServes(s *suite) {
	spec := s.Spec()
	spec.Start = sandbox.Start{Command: "while :; do sleep 1; done"}
	spec.Egress = sandbox.Egress{Mode: sandbox.DenyAll}
	s.must(s.Node.Prepare(s.ctx(), spec))
	want := sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Warm: true, Egress: spec.Egress}
	s.wantObserved(want)
	s.must(s.Node.Claim(s.ctx(), spec))
	want.Warm = false
	s.wantObserved(want)
	s.destroy(spec.ID)
}

// testPoolRestores prepares a sandbox from a snapshot.
func testPoolRestores(s *suite) {
	first, of := s.create(), sandbox.NewSnapshotID()
	s.Write(s.T, first, "one")
	_, err := s.Node.Snapshot(s.ctx(), first.ID, of)
	s.must(err)
	s.destroy(first.ID)
	spec := s.child(first, of)
	s.must(s.Node.Prepare(s.ctx(), spec))
	s.wantObserved(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Warm: true})
	spec = with(spec, "claimed")
	s.must(s.Node.Claim(s.ctx(), spec))
	s.wantObserved(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress})
	s.wantText(spec, "one")
	s.wantCommand(spec)
	s.must(s.Node.DropSnapshot(s.ctx(), of))
	s.destroy(spec.ID)
}
