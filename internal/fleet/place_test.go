package fleet

import (
	"slices"
	"testing"
	"time"
)

// TestOrder checks which nodes a new sandbox is offered to, and that equal ones take turns.
func TestOrder(t *testing.T) {
	at := func(id ID, status Status, active int) Node {
		return Node{ID: id, Status: status, Active: active, About: About{Address: "10.0.0.1:7443"}}
	}
	all := []Node{at("full", Ready, 9), at("gone", Unreachable, 0), at("a", Ready, 1), at("cordoned", Cordoned, 0),
		at("b", Ready, 1), at("draining", Draining, 0), at("drained", Drained, 0), at("empty", Unreachable, 0),
		{ID: "joined", Status: Ready}}
	all[3].CordonedAt = time.Now()
	first := map[ID]bool{}
	for range 200 {
		got := order(all, "empty")
		if len(got) != 4 || got[0] != "empty" || got[3] != "full" {
			t.Fatalf("the order is %v", got)
		}
		first[got[1]] = true
	}
	if !first["a"] || !first["b"] {
		t.Errorf("of two equal nodes only %v came first", first)
	}
	if got := order(all, "cordoned"); slices.Contains(got, "cordoned") {
		t.Errorf("the own node takes sandboxes although it is cordoned: %v", got)
	}
	if got := order(nil, "empty"); len(got) != 0 {
		t.Errorf("without nodes the order is %v", got)
	}
	if !slices.EqualFunc(all[:2], []ID{"full", "gone"}, func(n Node, id ID) bool { return n.ID == id }) {
		t.Error("the caller's nodes were changed")
	}
}
