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
// Lost: the processes of a running sandbox ended without being asked to. With a
// recovery point it is suspended as it was then. Without one, as every ephemeral
// sandbox is and a persistent one for its first seconds, it is destroyed. The same
// holds for one that dies while it is being suspended.
//
// The -ing states are claims: written before the host is touched, by one
// conditional update, and left by another.
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
	Failed     State = "failed" // never ran, or could not go on; cleaned up, as good as destroyed
)

// States lists all states in the order of a life.
func States() []State {
	return []State{Creating, Running, Suspending, Suspended, Waking, Destroying, Destroyed, Failed}
}

// Status is what the API shows of a state.
type Status string

// The public statuses. Fixed by the contract.
const (
	StatusCreating  Status = "creating"
	StatusRunning   Status = "running"
	StatusSuspended Status = "suspended"
	StatusDestroyed Status = "destroyed"
)

// Status is the public side of the state. A sandbox being suspended still shows
// as running, one being woken as suspended, one being destroyed as destroyed.
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

// Of lists the states that show as the status.
func (s Status) Of() []State {
	var states []State
	for _, state := range States() {
		if state.Status() == s {
			states = append(states, state)
		}
	}
	return states
}

// Claim reports whether somebody is at work on a sandbox in this state.
func (s State) Claim() bool {
	return s == Creating || s == Suspending || s == Waking || s == Destroying
}

// Over reports whether a sandbox in this state has nothing on the host and
// never will again.
func (s State) Over() bool { return s == Destroyed || s == Failed }
