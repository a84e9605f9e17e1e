package nodetest

import (
	"sync"

	"github.com/cayhq/cay/internal/sandbox"
)

// reserve reserves room for a sandbox, which there must be.
func (s *suite) reserve(spec sandbox.Spec) (release func()) {
	s.Helper()
	release, err := s.Node.Reserve(s.ctx(), spec.ID, spec.Size)
	s.must(err)
	s.Cleanup(release)
	return release
}

// wantRoom checks whether there is room for another sandbox, twice, since a look takes none.
func (s *suite) wantRoom(room bool) {
	s.Helper()
	for range 2 {
		spare, err := s.Node.Spare(s.ctx())
		if err != nil || (spare > 0) != room || spare < 0 {
			s.Errorf("%d spare, %v, want room: %v", spare, err, room)
		}
		spec := s.Spec()
		release, err := s.Node.Reserve(s.ctx(), spec.ID, spec.Size)
		if !room {
			s.wantNoCapacity(err)
			continue
		}
		s.must(err)
		release()
		s.wantGone(spec.ID)
	}
}

// testReserve takes over the only room that there is, or gives it back, in each way that there is.
func testReserve(s *suite) {
	defer s.SetMost(0)
	s.SetMost(1)
	spec := s.Spec()
	s.must(s.Node.FindImage(s.ctx(), spec.Image))
	release := s.reserve(spec)
	s.wantRoom(false)
	s.wantGone(spec.ID)
	for name, make := range s.makers() {
		other := s.Spec()
		s.Log(name)
		s.wantNoCapacity(make(other))
		s.wantGone(other.ID)
	}
	if _, err := s.Node.Reserve(s.ctx(), spec.ID, spec.Size); err == nil {
		s.Error("room for the same sandbox was reserved twice")
	}
	for range 2 {
		release()
		s.wantRoom(true)
	}

	// A create takes the room over once.
	release = s.reserve(spec)
	s.must(s.Node.Create(s.ctx(), spec))
	s.wantRoom(false)
	release()
	s.wantRoom(false)
	if _, err := s.Node.Suspend(s.ctx(), spec.ID, sandbox.KeepAll); err != nil {
		s.Fatal(err)
	}
	s.wantRoom(true)

	// So does a wake, of a room of its own: the release of the create does not concern it.
	again := s.reserve(spec)
	release()
	s.wantRoom(false)
	spec = s.wake(spec)
	again()
	s.wantRoom(false)
	s.destroy(spec.ID)
	s.wantRoom(true)

	// A create that fails leaves its room to the caller at most.
	spec = s.Spec()
	spec.Start = failingStart
	release = s.reserve(spec)
	if s.Node.Create(s.ctx(), spec) == nil {
		s.Error("a start command that fails was started")
	}
	release()
	s.wantRoom(true)

	// A pooled sandbox takes room from reservations too: the pool gives way.
	pooled := s.Spec()
	s.must(s.Node.Prepare(s.ctx(), pooled))
	s.wantRoom(false)
	s.destroy(pooled.ID)
}

// testReserveAtOnce reserves from 100 goroutines, with room for 7 beside a sandbox.
func testReserveAtOnce(s *suite) {
	const all, fit = 100, 7
	defer s.SetMost(0)
	first := s.create()
	s.SetMost(fit + 1)
	specs, releases, errs := make([]sandbox.Spec, all), make([]func(), all), make([]error, all)
	var reserving sync.WaitGroup
	for i := range specs {
		specs[i] = s.Spec()
		reserving.Go(func() { releases[i], errs[i] = s.Node.Reserve(s.Context(), specs[i].ID, specs[i].Size) })
	}
	reserving.Wait()
	reserved := 0
	for i, err := range errs {
		if err != nil {
			s.wantNoCapacity(err)
			continue
		}
		reserved++
		defer releases[i]()
	}
	if reserved != fit {
		s.Errorf("%d reservations, want %d", reserved, fit)
	}
	s.wantRoom(false)
	for i, err := range errs {
		if err == nil {
			releases[i]()
			s.wantRoom(true)
			break
		}
	}
	s.destroy(first.ID)
}
