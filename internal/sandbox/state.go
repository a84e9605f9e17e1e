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
// then suspended in the state of that recovery point. A sandbox without one is destroyed: every ephemeral
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

// Status is the form of a state that the API shows.
type Status string

// The public statuses. They are fixed by the contract.
const (
	StatusCreating  Status = "creating"
	StatusRunning   Status = "running"
	StatusSuspended Status = "suspended"
	StatusDestroyed Status = "destroyed"
)

// Charge says what a sandbox takes of its organization's quota.
type Charge int

// The charges.
const (
	ChargeNone   Charge = iota // nothing
	ChargeItself               // one of the quota's sandboxes
	ChargeAll                  // one of its sandboxes, and the vCPUs and the memory of its size
)

// stateFacts has what is decided by the state of a sandbox alone.
type stateFacts struct {
	state  State
	status Status
	claim  bool
	over   bool
	charge Charge
}

// states has the facts of every state, in the order of a sandbox's lifetime. A sandbox that is being
// suspended still shows as running, one that is being woken as suspended, and one that is being
// destroyed as destroyed. A suspended sandbox uses no CPU and no memory, and the owner of one that is
// being destroyed no longer uses it.
var states = []stateFacts{
	{Creating, StatusCreating, true, false, ChargeAll},
	{Running, StatusRunning, false, false, ChargeAll},
	{Suspending, StatusRunning, true, false, ChargeAll},
	{Suspended, StatusSuspended, false, false, ChargeItself},
	{Waking, StatusSuspended, true, false, ChargeAll},
	{Destroying, StatusDestroyed, true, false, ChargeNone},
	{Destroyed, StatusDestroyed, false, true, ChargeNone},
	{Failed, StatusDestroyed, false, true, ChargeNone},
}

// facts returns the facts of a state. A text that is no state has those of no sandbox.
func (s State) facts() stateFacts {
	for _, f := range states {
		if f.state == s {
			return f
		}
	}
	return stateFacts{status: StatusDestroyed}
}

// statesWith returns the states of which has reports true, in the order of a sandbox's lifetime.
func statesWith(has func(stateFacts) bool) []State {
	var some []State
	for _, f := range states {
		if has(f) {
			some = append(some, f.state)
		}
	}
	return some
}

// States returns all states in the order of a sandbox's lifetime.
func States() []State { return statesWith(func(stateFacts) bool { return true }) }

// Status returns the public status of the state.
func (s State) Status() Status { return s.facts().status }

// Of returns the states that show as the status.
func (s Status) Of() []State { return statesWith(func(f stateFacts) bool { return f.status == s }) }

// Claim reports whether the state belongs to an operation under way.
func (s State) Claim() bool { return s.facts().claim }

// Over reports whether a sandbox in this state has nothing on the host and never will have again.
func (s State) Over() bool { return s.facts().over }

// Of returns the states in which a sandbox takes at least the charge.
func (c Charge) Of() []State { return statesWith(func(f stateFacts) bool { return f.charge >= c }) }
