package e2b

import (
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestEgress(t *testing.T) {
	no, yes := false, true
	policy := func(r sandbox.EgressRequest) *sandbox.Egress {
		e, err := r.Parse()
		if err != nil {
			t.Fatal(err)
		}
		return &e
	}
	all := "0.0.0.0/0"
	for name, c := range map[string]struct {
		internet *bool
		network  *networkBody
		want     *sandbox.Egress
		field    string // field of the expected error, "" for none
	}{
		"nothing said":           {},
		"allowed":                {internet: &yes},
		"not allowed":            {internet: &no, want: policy(sandbox.EgressRequest{Mode: "deny_all"})},
		"not allowed, but one":   {internet: &no, network: &networkBody{AllowOut: []string{"1.2.3.4"}}, want: policy(sandbox.EgressRequest{Mode: "deny_all", AllowCIDRs: []string{"1.2.3.4/32"}})},
		"all denied":             {network: &networkBody{DenyOut: []string{all}}, want: policy(sandbox.EgressRequest{Mode: "deny_all"})},
		"all denied but names":   {network: &networkBody{DenyOut: []string{all}, AllowOut: []string{"*.example.com", "8.8.8.0/24"}}, want: policy(sandbox.EgressRequest{Mode: "deny_all", AllowDomains: []string{"*.example.com"}, AllowCIDRs: []string{"8.8.8.0/24"}})},
		"only allowed":           {network: &networkBody{AllowOut: []string{"1.2.3.4"}}},
		"one denied":             {network: &networkBody{DenyOut: []string{"10.0.0.1"}}, want: policy(sandbox.EgressRequest{Mode: "deny_all", AllowCIDRs: []string{all}, DenyCIDRs: []string{"10.0.0.1/32"}})},
		"host bits":              {network: &networkBody{DenyOut: []string{"10.0.0.1/8"}}, want: policy(sandbox.EgressRequest{Mode: "deny_all", AllowCIDRs: []string{all}, DenyCIDRs: []string{"10.0.0.0/8"}})},
		"allowed goes first":     {network: &networkBody{DenyOut: []string{"10.0.0.0/30"}, AllowOut: []string{"10.0.0.1"}}, want: policy(sandbox.EgressRequest{Mode: "deny_all", AllowCIDRs: []string{all}, DenyCIDRs: []string{"10.0.0.0/32", "10.0.0.2/31"}})},
		"all that is denied too": {network: &networkBody{DenyOut: []string{"10.0.0.0/30"}, AllowOut: []string{"10.0.0.0/8"}}, want: policy(sandbox.EgressRequest{Mode: "allow_all"})},
		"IPv6 denied":            {network: &networkBody{DenyOut: []string{"::/0"}}},
		"IPv6 allowed":           {network: &networkBody{AllowOut: []string{"2000::/3"}}, field: "network.allowOut"},
		"names without denials":  {network: &networkBody{AllowOut: []string{"example.com"}}, field: "network.allowOut"},
		"names denied":           {network: &networkBody{DenyOut: []string{"example.com"}}, field: "network.denyOut"},
		"no address":             {network: &networkBody{DenyOut: []string{"1.2.3/8"}}, field: "network.denyOut"},
		"no name":                {internet: &no, network: &networkBody{AllowOut: []string{"-x-"}}, field: "network.allowOut[0]"},
		"the metadata range":     {network: &networkBody{DenyOut: []string{"169.254.169.254"}}, field: "network.denyOut[0]"},
	} {
		got, err := egress(c.internet, c.network)
		if c.field != "" {
			if f := fault.As(err); f == nil || f.Field != c.field || f.Kind != fault.Invalid {
				t.Errorf("%s: %v, want a refusal of %s", name, err, c.field)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if diff := cmp.Diff(c.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestSubtract compares subtract with a check of every address.
func TestSubtract(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	draw := func() netip.Prefix {
		p, err := netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(256))}).Prefix(24 + r.IntN(9))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for range 500 {
		p, without := draw(), []netip.Prefix{draw(), draw()}[:r.IntN(3)]
		left := subtract(nil, p, without)
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			holds := func(p netip.Prefix) bool { return p.Contains(a) }
			if want := holds(p) && !slices.ContainsFunc(without, holds); slices.ContainsFunc(left, holds) != want {
				t.Fatalf("%s without %s is %s: %s is wrong", p, without, left, a)
			}
		}
	}
	if left := subtract(nil, everything, []netip.Prefix{netip.MustParsePrefix("255.255.255.255/32")}); len(left) != 32 {
		t.Errorf("all but one address is %s", left)
	}
}

func TestDestination(t *testing.T) {
	const id = "abcdefghijklmnopqrst"
	for name, c := range map[string]struct {
		host    string
		headers map[string][]string
		want    place
		refused bool
	}{
		"nothing":             {host: "127.0.0.1:7070"},
		"headers":             {host: "127.0.0.1", headers: map[string][]string{idHeader: {id}, portHeader: {"49983"}}, want: place{id, 49983, true}},
		"headers before host": {host: "80-" + id + ".x", headers: map[string][]string{idHeader: {"another"}, portHeader: {"1"}}, want: place{"another", 1, true}},
		"id alone":            {headers: map[string][]string{idHeader: {id}}, refused: true},
		"port alone":          {headers: map[string][]string{portHeader: {"80"}}, refused: true},
		"two ids":             {headers: map[string][]string{idHeader: {id, id}, portHeader: {"80"}}, refused: true},
		"port 0":              {headers: map[string][]string{idHeader: {id}, portHeader: {"0"}}, refused: true},
		"port too large":      {headers: map[string][]string{idHeader: {id}, portHeader: {"65536"}}, refused: true},
		"no id":               {headers: map[string][]string{idHeader: {"../x"}, portHeader: {"80"}}, refused: true},
		"host":                {host: "8080-" + id + ".sandbox.example.com:443", want: place{id, 8080, false}},
		"host in capitals":    {host: "8080-" + strings.ToUpper(id) + ".EXAMPLE", want: place{id, 8080, false}},
		"host without a dot":  {host: "8080-" + id},
		"host of port 0":      {host: "0-" + id + ".x"},
		"host too large":      {host: "99999-" + id + ".x"},
		"host of no id":       {host: "8080-api.example.com"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Host = c.host
		for k, v := range c.headers {
			r.Header[k] = v
		}
		got, err := destination(r)
		if got != c.want || (err != nil) != c.refused {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestTokens(t *testing.T) {
	s := &Handler{Config: Config{Secret: []byte("secret")}}
	seen := map[string]bool{}
	for _, kind := range []string{envdToken, trafficToken} {
		for _, id := range []sandbox.ID{"sbx_a", "sbx_b"} {
			if token := s.token(kind, id); seen[token] || !portproxy.HasSecret(token) || token != s.token(kind, id) ||
				!s.isToken(token, kind, id) || !s.isToken(token[len(tokenMark):], kind, id) || s.isToken(token, kind, "sbx_c") {
				t.Errorf("the %s token of %s is %s", kind, id, token)
			} else {
				seen[token] = true
			}
		}
	}
}

func TestMetadataIsEncodedThreeTimes(t *testing.T) {
	r := httptest.NewRequest("GET", "/v2/sandboxes?metadata=a%252520b%3D%2525C3%2525BC%252526%26c%3Dd", nil)
	got, err := metadata(r.URL.Query().Get("metadata"))
	if diff := cmp.Diff(map[string]string{"a b": "ü&", "c": "d"}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for _, wrong := range []string{"a=%zz", "a=b&a=c", "%25zz=1"} {
		if _, err := metadata(wrong); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
}

func TestStates(t *testing.T) {
	for values, want := range map[string]int{"": 4, "running": 1, "paused": 3, "running,paused": 4} {
		got, err := states([]string{values})
		if err != nil || len(got) != want {
			t.Errorf("%q: %v, %v", values, got, err)
		}
	}
	if _, err := states([]string{"running,dead"}); !fault.Is(err, fault.Invalid) {
		t.Errorf("dead: %v", err)
	}
	for _, s := range sandbox.States() {
		shown, ok := apiStates[s]
		if over := s.Status() == sandbox.StatusDestroyed; !ok || (shown.name == "") != over {
			t.Errorf("this API shows %s as %+v, %v", s, shown, ok)
		}
	}
}

func TestServed(t *testing.T) {
	for call, want := range map[string]bool{
		"POST /process.Process/Start": true, "GET /health": true, "GET /files": true, "POST /files": true, "HEAD /files": true,
		"POST /filesystem.Filesystem/Stat": true, "GET /envs": true, "POST /files/compose": true,
		"POST /init": false, "POST /start": false, "GET /busy": false, "POST /memory/relieve": false, "PUT /files": false,
		"DELETE /files": false, "GET /files/list": false, "GET /tunnel": false, "POST /process.Process/../init": false,
		"POST /process.Process/Other": false, "POST //init": false, "POST /files/../init": false, "GET /": false, "DELETE /process.Process/Start": false,
	} {
		method, path, _ := strings.Cut(call, " ")
		if got := served(&http.Request{Method: method, URL: &url.URL{Path: path}}); got != want {
			t.Errorf("%s: %v", call, got)
		}
	}
}

func FuzzQuery(f *testing.F) {
	f.Add("metadata=a%3Db&state=running&limit=3")
	f.Add("metadata=%25zz&startedAfter=2026-01-02T15:04:05Z&order=asc")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		if _, err := metadata(q.Get("metadata")); err != nil && !fault.Is(err, fault.Invalid) {
			t.Error(err)
		}
		if _, err := states(q["state"]); err != nil && !fault.Is(err, fault.Invalid) {
			t.Error(err)
		}
		if limit, _, err := limits(q); err == nil && (limit < 1 || limit > maxPage) {
			t.Errorf("limit %d", limit)
		}
	})
}

func FuzzRange(f *testing.F) {
	for _, seed := range []string{"10.0.0.0/8", "::ffff:1.2.3.4", "example.com", "1.2.3.4/99", "fe80::1%eth0"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, n := range []*networkBody{{AllowOut: []string{text}}, {DenyOut: []string{text}},
			{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{text}}} {
			if e, err := egress(nil, n); err != nil && !fault.Is(err, fault.Invalid) {
				t.Errorf("%q: %+v, %v", text, e, err)
			}
		}
	})
}
