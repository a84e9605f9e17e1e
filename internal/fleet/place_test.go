package fleet

import (
	"slices"
	"testing"
)

// TestOrder checks which nodes a new sandbox is offered to, and that equal ones take turns.
func TestOrder(t *testing.T) {
	all := []Node{{ID: "full", Status: Ready, Active: 9}, {ID: "gone", Status: Unreachable},
		{ID: "a", Status: Ready, Active: 1}, {ID: "cordoned", Status: Cordoned}, {ID: "b", Status: Ready, Active: 1},
		{ID: "draining", Status: Draining}, {ID: "drained", Status: Drained}, {ID: "empty", Status: Ready}}
	first := map[ID]bool{}
	for range 200 {
		got := order(all)
		if len(got) != 4 || got[0] != "empty" || got[3] != "full" {
			t.Fatalf("the order is %v", got)
		}
		first[got[1]] = true
	}
	if !first["a"] || !first["b"] {
		t.Errorf("of two equal nodes only %v came first", first)
	}
	if got := order(nil); len(got) != 0 {
		t.Errorf("without nodes the order is %v", got)
	}
	if !slices.EqualFunc(all[:2], []ID{"full", "gone"}, func(n Node, id ID) bool { return n.ID == id }) {
		t.Error("the caller's nodes were changed")
	}
}
