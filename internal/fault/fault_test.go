package fault

import (
	"net/http"
	"testing"
)

// TestStatuses checks that each kind has a name and a status of HTTP for errors, and is found again by its status.
func TestStatuses(t *testing.T) {
	for k := Internal; k <= Gone; k++ {
		status := k.Status()
		if http.StatusText(status) == "" || status < 400 || kinds[k].name == "" || k.String() != kinds[k].name {
			t.Errorf("the kind %d, %s, has the status %d", int(k), k, status)
		}
		if got := OfStatus(status); got != k {
			t.Errorf("the status %d of %q is that of %q", status, k, got)
		}
	}
	if len(kinds) != int(Gone)+1 {
		t.Errorf("there are %d kinds in the table, and the last kind is %d", len(kinds), int(Gone))
	}
	for _, k := range []Kind{-1, Gone + 1} {
		if k.Status() != http.StatusInternalServerError || k.String() == "" {
			t.Errorf("%d, which is no kind, has the status %d", int(k), k.Status())
		}
	}
	for _, status := range []int{0, http.StatusOK, http.StatusTeapot} {
		if k := OfStatus(status); k != Internal {
			t.Errorf("the status %d, which is no kind's, is that of %q", status, k)
		}
	}
}
