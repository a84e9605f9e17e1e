package fleet

import (
	"fmt"
	"slices"
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

// machine returns a ready node with 16 GiB and room for 1000 sandboxes, of which it has some.
func machine(id ID, active int) Node {
	return Node{ID: id, Status: Ready, Active: active,
		About: About{Address: "10.0.0.1:7443", MemoryMB: 16 << 10, MaxSandboxes: 1000},
		Load:  Load{MemoryFreeMB: 12 << 10, Sandboxes: active}}
}

func with(n Node, change func(*Node)) Node {
	change(&n)
	return n
}

// TestOrder checks which nodes a new sandbox is offered to, and that equal ones take turns.
func TestOrder(t *testing.T) {
	full := with(machine("full", 3), func(n *Node) { n.MaxSandboxes = 3 })
	all := []Node{full, machine("a", 900), machine("b", 900), machine("empty", 0),
		with(machine("gone", 0), func(n *Node) { n.Status = Unreachable }),
		with(machine("cordoned", 0), func(n *Node) { n.Status = Cordoned }),
		with(machine("draining", 0), func(n *Node) { n.Status = Draining }),
		with(machine("drained", 0), func(n *Node) { n.Status = Drained }),
		with(machine("joined", 0), func(n *Node) { n.Address = "" })}
	second := map[ID]bool{}
	for range 200 {
		got := order(all, "empty", 0)
		if len(got) != 4 || got[0] != "empty" || got[3] != "full" {
			t.Fatalf("the order is %v", got)
		}
		second[got[1]] = true
	}
	if !second["a"] || !second["b"] {
		t.Errorf("of two equal nodes only %v came first", second)
	}
	if got := order(nil, "empty", 0); len(got) != 0 {
		t.Errorf("without nodes the order is %v", got)
	}
	if all[0].ID != "full" || all[8].ID != "joined" {
		t.Error("the caller's nodes were changed")
	}
}

// TestOrderByFit offers a sandbox of 4 GiB to machines that differ in one thing each.
func TestOrderByFit(t *testing.T) {
	const memoryMB = 4096
	small := with(machine("small", 0), func(n *Node) { n.MemoryMB, n.Load.MemoryFreeMB = 2048, 2048 })
	little := with(machine("little", 0), func(n *Node) { n.Load.MemoryFreeMB = 4000 })
	for name, tt := range map[string]struct {
		all  []Node
		want []ID
	}{
		"too little memory at all":      {[]Node{small, machine("a", 500)}, []ID{"a"}},
		"too little memory now":         {[]Node{little, machine("a", 900)}, []ID{"a", "little"}},
		"more used":                     {[]Node{machine("b", 800), machine("a", 700)}, []ID{"a", "b"}},
		"said nothing":                  {[]Node{with(machine("b", 0), func(n *Node) { n.Load = Load{} }), machine("a", 900)}, []ID{"a", "b"}},
		"many have come since it spoke": {[]Node{with(machine("b", 200), func(n *Node) { n.Load.Sandboxes = 0 }), machine("a", 200)}, []ID{"a", "b"}},
		"starts in progress":            {[]Node{with(machine("b", 1), func(n *Node) { n.Load.Starting = 9 }), machine("a", 1)}, []ID{"a", "b"}},
		"none has room":                 {[]Node{little}, []ID{"little"}},
	} {
		for range 20 {
			if got := order(tt.all, "empty", memoryMB); !slices.Equal(got, tt.want) {
				t.Errorf("%s: the order is %v, want %v", name, got, tt.want)
			}
		}
	}
}

// TestNeverFits checks that only a size that no machine has the memory for is refused, also by a full fleet.
func TestNeverFits(t *testing.T) {
	away := with(machine("away", 0), func(n *Node) { n.Status, n.MemoryMB = Unreachable, 64<<10 })
	unknown := with(machine("unknown", 0), func(n *Node) { n.MemoryMB = 0 })
	for name, tt := range map[string]struct {
		all     []Node
		refused bool
	}{
		"one that is large enough":       {[]Node{machine("a", 1000), away}, false},
		"one that has not said its size": {[]Node{machine("a", 0), unknown}, false},
		"small ones":                     {[]Node{machine("a", 0), machine("b", 0)}, true},
		"none":                           {nil, false},
	} {
		err := neverFits(tt.all, 32<<10)
		if f := fault.As(err); (err != nil) != tt.refused || err != nil && (f.Kind != fault.Invalid || f.Field != "size") {
			t.Errorf("%s: %v, want refused: %v", name, err, tt.refused)
		}
		if err := neverFits(tt.all, 0); err != nil {
			t.Errorf("%s: a size that is not known is refused: %v", name, err)
		}
	}
}

// TestOrderSpreads makes 1,000 sandboxes on equal machines that say nothing new meanwhile.
func TestOrderSpreads(t *testing.T) {
	for _, count := range []int{3, 20} {
		var all []Node
		for i := range count {
			all = append(all, machine(fmt.Sprint(i), 0))
		}
		for range 1000 {
			first := order(all, "empty", 0)[0]
			all[slices.IndexFunc(all, func(n Node) bool { return n.ID == first })].Active++
		}
		least := slices.MinFunc(all, lessUsed).Active
		most := slices.MaxFunc(all, lessUsed).Active
		if limit := map[int]int{3: 1, 20: 8}[count]; most-least > limit {
			t.Errorf("of %d machines one has %d sandboxes and another %d", count, most, least)
		}
	}
}
