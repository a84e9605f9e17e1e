package sandbox

// State is the exact inner state of a sandbox, stored as this string.
//
//	                 ┌──────── error ───────► failed ──┐
//	          ┌──────┴─┐                               │
//	(create) ►│creating├─► running ◄─────────┐         │
//	          └────────┘  │  │  ▲ error      │         │
//	                 lost │  ▼  │ suspend    │         ▼
//	                      │ suspending     waking   destroying ─► destroyed
//	                      │  │               ▲  │       ▲
//	                      ▼  ▼          wake │  │       │
//	                    suspended ───────────┘  │       │
//	                         ▲                  │       │
//	                         └───── error ──────┘   destroy, from any state
//
// A running sandbox is lost when its processes end unexpectedly. A sandbox with a recovery point is
// then suspended in the state of that point. A sandbox without one is destroyed: every ephemeral
// sandbox, and a persistent one during its first seconds. The same holds for a sandbox that dies
// while it is being suspended.
//
// The -ing states are claims. A conditional update writes a claim before the host is touched, and
// another one ends it.
type State string

// The states.
const (
	Creating   State = "creating"
	Running    State = "running"
	Suspending State = "suspending"
	Suspended  State = "suspended"
	Waking     State = "waking"
	Destroying State = "destroying"
	Destroyed  State = "destroyed"
	Failed     State = "failed" // never ran, or could not go on; cleaned up like a destroyed one
)

// States returns all states in the order of a sandbox's lifetime.
func States() []State {
	return []State{Creating, Running, Suspending, Suspended, Waking, Destroying, Destroyed, Failed}
}

// Status is the form of a state that the API shows.
type Status string

// The public statuses. They are fixed by the contract.
const (
	StatusCreating  Status = "creating"
	StatusRunning   Status = "running"
	StatusSuspended Status = "suspended"
	StatusDestroyed Status = "destroyed"
)

// Status returns the public status of the state. A sandbox that is being suspended still shows as
// running, one that is being woken as suspended, and one that is being destroyed as destroyed.
func (s State) Status() Status {
	switch s {
	case Creating:
		return StatusCreating
	case Running, Suspending:
		return StatusRunning
	case Suspended, Waking:
		return StatusSuspended
	default:
		return StatusDestroyed
	}
}

// Of returns the states that show as the status.
func (s Status) Of() []State {
	var states []State
	for _, state := range States() {
		if state.Status() == s {
			states = append(states, state)
		}
	}
	return states
}

// Claim reports whether the state belongs to an operation under way.
func (s State) Claim() bool {
	return s == Creating || s == Suspending || s == Waking || s == Destroying
}

// Over reports whether a sandbox in this state has nothing on the host and never will have again.
func (s State) Over() bool { return s == Destroyed || s == Failed }
