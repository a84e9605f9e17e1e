package network

import (
	"flag"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestRulesGolden compares the table, as nft prints it, with a golden file.
func TestRulesGolden(t *testing.T) {
	c := newConfig()
	c.Range = netip.MustParsePrefix("10.66.0.0/18")
	c.AlwaysDeny = []netip.Prefix{
		netip.MustParsePrefix("203.0.113.192/26"),
		netip.MustParsePrefix("10.0.0.0/24"),
		netip.MustParsePrefix("10.0.0.128/25"), // inside the one before
		netip.MustParsePrefix("fd00::/8"),
	}
	c.Services = Services{DNS: 5301, Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	acquire(t, n)
	names, lists, ports, closed := acquire(t, n), acquire(t, n), acquire(t, n), acquire(t, n)
	allow := []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("203.0.113.0/26")}
	deny := []netip.Prefix{netip.MustParsePrefix("203.0.113.8/32")}
	setPolicy(t, n, names, Policy{Names: true, Allow: allow, Deny: deny})
	setPolicy(t, n, lists, Policy{Allow: allow, Deny: deny})
	setPolicy(t, n, ports, Policy{Allow: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
		Ports: []uint16{443, 80, 443}})
	setPolicy(t, n, closed, Policy{})
	got := regexp.MustCompile(c.Instance).ReplaceAllString(listTable(t, "cay-"+c.Instance), "abc123")
	got = regexp.MustCompile(`log group \d+`).ReplaceAllString(got, "log group 51712")
	// These numbers depend on the size of the host's table of connections.
	got = regexp.MustCompile(`ct id & \d+ ct count over \d+`).ReplaceAllString(got, "ct id & 4095 ct count over 32")
	got = regexp.MustCompile(`(type mark\n\t\tsize )\d+`).ReplaceAllString(got, "${1}4096")
	got = asOldNft(t, got)
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

// asOldNft returns a listing of nft 1.1 as nft 1.0 prints it: timeouts of connections in seconds without a unit, and
// masks in decimal.
func asOldNft(t *testing.T, listing string) string {
	t.Helper()
	listing = regexp.MustCompile(`policy = \{[^}]*\}`).ReplaceAllStringFunc(listing, func(policy string) string {
		return regexp.MustCompile(`\b\d+[hms]\w*`).ReplaceAllStringFunc(policy, func(text string) string {
			d, err := time.ParseDuration(text)
			if err != nil {
				t.Error(err)
			}
			return strconv.Itoa(int(d / time.Second))
		})
	})
	return regexp.MustCompile(`frag-off & 0x\w+ != 0x\w+`).ReplaceAllStringFunc(listing, func(match string) string {
		return regexp.MustCompile(`0x\w+`).ReplaceAllStringFunc(match, func(text string) string {
			n, err := strconv.ParseInt(text, 0, 64)
			if err != nil {
				t.Error(err)
			}
			return strconv.FormatInt(n, 10)
		})
	})
}

// TestAsOldNft has lines as nft 1.1 prints them, and as nft 1.0 does.
func TestAsOldNft(t *testing.T) {
	const old = "policy = { established : 43200, close : 5, retrans : 120 }\nip frag-off & 16383 != 0 drop\n"
	for _, listing := range []string{old,
		"policy = { established : 12h, close : 5s, retrans : 2m }\nip frag-off & 0x3fff != 0x0 drop\n"} {
		if got := asOldNft(t, listing); got != old {
			t.Errorf("%q became %q", listing, got)
		}
	}
}
