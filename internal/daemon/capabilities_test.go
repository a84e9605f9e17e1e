package daemon

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestUnitDropsTheSame compares the capabilities that the server drops with those that the unit takes from it.
func TestUnitDropsTheSame(t *testing.T) {
	unit, err := os.ReadFile("../../deploy/cay.service")
	if err != nil {
		t.Fatal(err)
	}
	set := regexp.MustCompile(`(?m)^CapabilityBoundingSet=~(.*)$`).FindSubmatch(unit)
	if set == nil {
		t.Fatal("the unit takes no capability away")
	}
	got := slices.Sorted(slices.Values(strings.Fields(string(set[1]))))
	if diff := cmp.Diff(slices.Sorted(maps.Keys(unneeded)), got); diff != "" {
		t.Errorf("the unit takes others (-server +unit):\n%s", diff)
	}
}
