package nodetest

import (
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// wantCheckpoint checks a checkpoint that was just written, and the error of writing it.
func (s *suite) wantCheckpoint(c sandbox.Checkpoint, err error, run string) sandbox.Checkpoint {
	s.Helper()
	s.must(err)
	if age := time.Since(c.At); c.Run != run || c.Size <= 0 || age < 0 || age > 2*patience {
		s.Errorf("a checkpoint of run %s is %+v", run, c)
	}
	return c
}

// suspend suspends a sandbox, which must succeed and leave its recovery point alone.
func (s *suite) suspend(spec sandbox.Spec) sandbox.Checkpoint {
	s.Helper()
	checkpoint, err := s.Node.Suspend(s.ctx(), spec.ID, sandbox.KeepAll)
	s.wantCheckpoint(checkpoint, err, spec.Run)
	s.wantObserved(sandbox.Observed{ID: spec.ID, Checkpoint: &checkpoint})
	return checkpoint
}

func testSuspend(s *suite) {
	spec := with(s.Spec(), "first")
	spec.Workdir = "/tmp"
	s.must(s.Node.Create(s.ctx(), spec))
	s.Write(s.T, spec, "one")
	checkpoint := s.suspend(spec)
	s.wantNotRunning(spec.ID)
	s.must(s.Node.Rest(s.ctx(), spec.ID))
	s.wantObserved(sandbox.Observed{ID: spec.ID, Checkpoint: &checkpoint})

	// A wake keeps the environment of the create and takes the policy of its own spec.
	spec.Egress = sandbox.Egress{Mode: sandbox.DenyAll}
	spec = s.wake(spec)
	s.wantObserved(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress,
		Checkpoint: &checkpoint})
	s.wantText(spec, "one")
	s.wantCommand(spec)
	s.must(s.Node.Check(s.ctx(), spec.ID))
	s.Write(s.T, spec, "two")
	next := s.suspend(spec)
	if !next.At.After(checkpoint.At) {
		s.Errorf("the second checkpoint is from %s, the first from %s", next.At, checkpoint.At)
	}
	spec = s.wake(spec)
	s.wantText(spec, "two")
	s.destroy(spec.ID)
	s.wantFault(s.Node.Wake(s.ctx(), spec), fault.Internal, "wake_failed")
	s.wantGone(spec.ID)
}

// testFilesAlone suspends a sandbox without its memory and boots it with its files, and boots a child with
// the files of its recovery point.
func testFilesAlone(s *suite) {
	spec := with(s.Spec(), "first")
	spec.Workdir = "/tmp"
	s.must(s.Node.Create(s.ctx(), spec))
	s.Write(s.T, spec, "one")
	s.Work(s.T, spec)
	checkpoint, err := s.Node.Suspend(s.ctx(), spec.ID, sandbox.KeepFiles)
	s.wantCheckpoint(checkpoint, err, spec.Run)
	if checkpoint.Kept != sandbox.KeepFiles {
		s.Errorf("the checkpoint keeps %q", checkpoint.Kept)
	}
	s.wantObserved(sandbox.Observed{ID: spec.ID, Checkpoint: &checkpoint})

	// The start command runs again. If it fails, the checkpoint is left.
	fails := spec
	fails.Run, fails.Start = "fails", failingStart
	s.wantFault(s.Node.Wake(s.ctx(), fails), fault.Conflict, "start_failed")
	s.wantObserved(sandbox.Observed{ID: spec.ID, Checkpoint: &checkpoint})

	from := sandbox.NewSnapshotID()
	if c, err := s.Node.SnapshotCheckpoint(s.ctx(), spec.ID, from); err != nil || c != checkpoint {
		s.Errorf("the snapshot is %+v, %v, the checkpoint %+v", c, err, checkpoint)
	}
	spec = s.wake(spec)
	s.wantObserved(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress,
		Checkpoint: &checkpoint})
	if busy, err := s.Node.Busy(s.ctx(), spec.ID); err != nil || busy {
		s.Errorf("after the boot it is busy: %v, %v", busy, err)
	}
	child := s.child(spec, from)
	s.must(s.Node.Create(s.ctx(), child))
	for _, booted := range []sandbox.Spec{spec, child} {
		if text := s.ReadFile(s.T, booted); text != "one" {
			s.Errorf("inside %s is the text %q", booted.ID, text)
		}
		s.wantCommand(booted)
	}
	failing := s.child(spec, from)
	failing.Start = failingStart
	s.wantFault(s.Node.Create(s.ctx(), failing), fault.Conflict, "start_failed")
	s.wantGone(failing.ID)
	s.must(s.Node.DropSnapshot(s.ctx(), from))

	// A suspend with memory follows one without.
	s.Write(s.T, spec, "two")
	s.suspend(spec)
	spec = s.wake(spec)
	s.wantText(spec, "two")
	s.destroy(spec.ID, child.ID)
}

// testRecovery takes recovery points of a running sandbox, ends its processes and wakes it from the
// last one.
func testRecovery(s *suite) {
	spec := s.create()
	runs := sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress}
	for _, text := range []string{"one", "two"} {
		s.Write(s.T, spec, text)
		checkpoint, err := s.Node.Checkpoint(s.ctx(), spec.ID)
		s.wantCheckpoint(checkpoint, err, spec.Run)
		runs.Checkpoint = &checkpoint
		s.wantObserved(runs)
		s.wantText(spec, text)
	}
	s.Write(s.T, spec, "three")
	s.kill(spec)
	dead := runs
	dead.Alive = false
	s.wantObserved(dead)
	s.wantNotRunning(spec.ID)
	if s.Node.Wake(s.ctx(), spec) == nil {
		s.Error("woke a sandbox of which something remains")
	}
	s.wantObserved(dead)
	s.must(s.Node.Rest(s.ctx(), spec.ID))
	s.wantObserved(sandbox.Observed{ID: spec.ID, Checkpoint: runs.Checkpoint})
	spec = s.wake(spec)
	s.wantText(spec, "two")
	s.kill(spec)
	s.destroy(spec.ID)
}

// child returns the spec of a sandbox that is made from a snapshot of another.
func (s *suite) child(of sandbox.Spec, from sandbox.SnapshotID) sandbox.Spec {
	spec := with(of, "child")
	spec.ID, spec.Run, spec.Token, spec.From = sandbox.NewID(), "child", "token of a child", from
	spec.Workdir = "/"
	return spec
}

func testSnapshots(s *suite) {
	spec := with(s.Spec(), "first")
	spec.Workdir = "/tmp"
	s.must(s.Node.Create(s.ctx(), spec))
	s.Write(s.T, spec, "one")
	checkpoint, err := s.Node.Checkpoint(s.ctx(), spec.ID)
	s.must(err)
	s.Write(s.T, spec, "two")
	of := sandbox.NewSnapshotID()
	made, err := s.Node.Snapshot(s.ctx(), spec.ID, of)
	s.wantCheckpoint(made, err, spec.Run)
	s.wantSnapshots(of)
	s.Write(s.T, spec, "three")

	// A snapshot leaves its sandbox and the recovery point of that as they are.
	s.wantObserved(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress,
		Checkpoint: &checkpoint})

	child := s.child(spec, of)
	child.Egress = sandbox.Egress{Mode: sandbox.DenyAll}
	child.Start = failingStart // the snapshot has the processes already
	s.must(s.Node.Create(s.ctx(), child))
	s.wantObserved(sandbox.Observed{ID: child.ID, Run: child.Run, Alive: true, Remains: true, Egress: child.Egress})
	s.wantText(child, "two")
	s.wantCommand(child)
	s.wantText(spec, "three")
	s.wantCommand(spec)

	// It outlives its sandbox, and the child outlives it.
	s.destroy(spec.ID)
	s.wantSnapshots(of)
	for range 2 {
		s.must(s.Node.DropSnapshot(s.ctx(), of))
	}
	s.wantSnapshots()
	s.wantText(child, "two")
	s.Write(s.T, child, "four")
	s.suspend(child)
	child.From = ""
	child = s.wake(child)
	s.wantText(child, "four")
	s.destroy(child.ID)
}

// testSnapshotCheckpoint makes a snapshot of a recovery point, while the sandbox has none, runs, and is
// suspended.
func testSnapshotCheckpoint(s *suite) {
	spec := s.create()
	none, running, suspended := sandbox.NewSnapshotID(), sandbox.NewSnapshotID(), sandbox.NewSnapshotID()
	_, err := s.Node.SnapshotCheckpoint(s.ctx(), spec.ID, none)
	s.wantFault(err, fault.Conflict, "sandbox_not_running")
	s.wantSnapshots()
	s.Write(s.T, spec, "one")
	checkpoint, err := s.Node.Checkpoint(s.ctx(), spec.ID)
	s.must(err)
	s.Write(s.T, spec, "two")
	if c, err := s.Node.SnapshotCheckpoint(s.ctx(), spec.ID, running); err != nil || c != checkpoint {
		s.Errorf("the snapshot is %+v, %v, the checkpoint %+v", c, err, checkpoint)
	}
	checkpoint = s.suspend(spec)
	if c, err := s.Node.SnapshotCheckpoint(s.ctx(), spec.ID, suspended); err != nil || c != checkpoint {
		s.Errorf("the snapshot is %+v, %v, the checkpoint %+v", c, err, checkpoint)
	}
	s.wantObserved(sandbox.Observed{ID: spec.ID, Checkpoint: &checkpoint})
	s.destroy(spec.ID)
	s.wantSnapshots(running, suspended)
	for from, text := range map[sandbox.SnapshotID]string{running: "one", suspended: "two"} {
		child := s.child(spec, from)
		s.must(s.Node.Create(s.ctx(), child))
		s.wantText(child, text)
		s.must(s.Node.DropSnapshot(s.ctx(), from))
		s.destroy(child.ID)
	}
}

// testNoSpace writes checkpoints to a disk that has no room for them.
func testNoSpace(s *suite) {
	spec := s.create()
	s.Write(s.T, spec, "one")
	s.SetDiskFull(true)
	defer s.SetDiskFull(false)
	of := sandbox.NewSnapshotID()
	for name, call := range map[string]func() (sandbox.Checkpoint, error){
		"Suspend":    func() (sandbox.Checkpoint, error) { return s.Node.Suspend(s.ctx(), spec.ID, sandbox.KeepAll) },
		"Checkpoint": func() (sandbox.Checkpoint, error) { return s.Node.Checkpoint(s.ctx(), spec.ID) },
		"Snapshot":   func() (sandbox.Checkpoint, error) { return s.Node.Snapshot(s.ctx(), spec.ID, of) },
	} {
		s.Log(name)
		_, err := call()
		s.wantFault(err, fault.NoSpace, "disk_full")
		s.wantObserved(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress})
	}
	s.must(s.Node.DropSnapshot(s.ctx(), of))
	s.wantSnapshots()
	s.wantText(spec, "one")
	s.destroy(spec.ID)
}
