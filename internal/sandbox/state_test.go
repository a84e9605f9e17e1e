package sandbox_test

import (
	"slices"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestStatesAreDecided fails for a state without a line in the table of states, and for a line that
// contradicts another one of the same state.
func TestStatesAreDecided(t *testing.T) {
	if all := caytest.Constants[sandbox.State](t, "State"); !slices.Equal(all, sandbox.States()) {
		t.Errorf("the constants are %v, the table has %v", all, sandbox.States())
	}
	var shown []sandbox.State
	for _, status := range caytest.Constants[sandbox.Status](t, "Status") {
		if len(status.Of()) == 0 {
			t.Errorf("no state shows as %s", status)
		}
		shown = append(shown, status.Of()...)
	}
	if !slices.Equal(shown, sandbox.States()) {
		t.Errorf("the statuses show the states %v, want each once", shown)
	}
	for _, s := range sandbox.States() {
		charged := slices.Contains(sandbox.ChargeItself.Of(), s)
		switch {
		case s.Over() && (s.Claim() || s.Status() != sandbox.StatusDestroyed):
			t.Errorf("a sandbox that is %s is over and more", s)
		case charged == (s.Status() == sandbox.StatusDestroyed):
			t.Errorf("a sandbox that is %s shows as %s, and counts against the quota: %v", s, s.Status(), charged)
		case !charged && slices.Contains(sandbox.ChargeAll.Of(), s):
			t.Errorf("a sandbox that is %s counts with its CPUs alone", s)
		}
	}
	if s := sandbox.State("none"); s.Claim() || s.Over() || s.Status() != sandbox.StatusDestroyed {
		t.Error("a text that is no state shows as a sandbox")
	}
}
