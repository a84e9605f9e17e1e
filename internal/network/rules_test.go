package network

import (
	"flag"
	"net/netip"
	"os"
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The golden file is the table as nft prints it: what an operator would see.
func TestRulesGolden(t *testing.T) {
	c := newConfig()
	c.Range = netip.MustParsePrefix("10.66.0.0/18")
	c.AlwaysDeny = []netip.Prefix{
		netip.MustParsePrefix("203.0.113.192/26"),
		netip.MustParsePrefix("10.0.0.0/24"),
		netip.MustParsePrefix("10.0.0.128/25"), // inside of the one before
		netip.MustParsePrefix("fd00::/8"),
	}
	n := open(t, c)
	acquire(t, n)
	acquire(t, n)
	got := regexp.MustCompile(c.Instance).ReplaceAllString(listTable(t, "cay-"+c.Instance), "abc123")
	const golden = "testdata/rules.nft"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("rules differ from %s (-want +got):\n%s", golden, d)
	}
}
