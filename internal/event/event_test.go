package event

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
)

func TestIDs(t *testing.T) {
	var ids []string
	for _, s := range []Seq{0, 1, 31, 32, 1 << 20, 1_700_000_000_000_000, 1_700_000_000_000_001, math.MaxInt64} {
		back, err := ParseID("after", "invalid_after", s.ID())
		if err != nil || back != s || len(s.ID()) != 17 {
			t.Errorf("%d is %q and comes back as %d, %v", s, s.ID(), back, err)
		}
		ids = append(ids, s.ID())
	}
	if !slices.IsSorted(ids) {
		t.Errorf("ids are not in the order of what they name: %q", ids)
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", "evt_", "evt_0000000003", Seq(7).ID(), Seq(7).ID() + "\n",
		strings.ToUpper(Seq(31).ID()), "evt_vvvvvvvvvvvvv",
		"evt_000000000000\n", "evt_0000000000001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseID("after", "invalid_after", text)
		if err == nil && (s < 0 || s.ID() != text) {
			t.Errorf("%q is the place %d, whose id is %q", text, s, s.ID())
		}
	})
}

func TestTypes(t *testing.T) {
	all := Types()
	if constants := caytest.Constants[Type](t, "Type"); !slices.Equal(all, constants) {
		t.Errorf("the types are %q, the constants %q", all, constants)
	}
	for i, typ := range all {
		if !typ.Known() || !slices.Contains([]string{"sandbox", "snapshot", "template", "api_key", "org", "webhook"},
			typ.Subject()) || slices.Index(all, typ) != i {
			t.Errorf("type %q", typ)
		}
	}
	if Type("sandbox").Known() || Transition("running") != SandboxRunning {
		t.Error("types are not what they are called")
	}
}
