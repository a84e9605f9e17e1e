package fleet_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/noderpc"
	"github.com/cayhq/cay/internal/pki"
)

// withCA makes the Service one that other machines may join.
func (f *fixture) withCA(t *testing.T) {
	t.Helper()
	authority, err := pki.NewAuthority("ABC", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f.Service = fleet.New(fleet.Config{Self: "abcdef", Now: f.db.Now, Log: slog.New(slog.DiscardHandler),
		Obey: func(fleet.Orders) {}, CA: noderpc.CA{Signer: authority, Trusted: authority.Certificate()}}, f.db)
}

// TestNoFleet checks that a server without an authority takes no machine.
func TestNoFleet(t *testing.T) {
	f := newFixture(t)
	_, _, err := f.NewToken(t.Context(), "key_a", "", fleet.TokenSettings{}, time.Minute)
	wantCode(t, err, fault.Conflict, "fleet_off")
	_, err = f.Join(t.Context(), fleet.JoinRequest{})
	wantCode(t, err, fault.Conflict, "fleet_off")
	wantCode(t, f.Check(t.Context(), fleet.Identity{}, ""), fault.Conflict, "fleet_off")
}

func wantCode(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if e := fault.As(err); e == nil || e.Kind != kind || e.Code != code {
		t.Errorf("the error is %v, want %s", err, code)
	}
}

func TestTokens(t *testing.T) {
	f := newFixture(t)
	f.withCA(t)
	ctx := t.Context()
	text, expires, err := f.NewToken(ctx, "key_a", "", fleet.TokenSettings{Name: "n", Labels: map[string]string{"a": "b"}},
		fleet.MaxTokenTime)
	if left := time.Until(expires); err != nil || left < 14*time.Minute || left > fleet.MaxTokenTime {
		t.Errorf("the token expires in %s, %v", left, err)
	}
	if secret, _, err := fleet.ParseToken(text); err != nil || !strings.HasPrefix(secret, "cayn_") {
		t.Errorf("read %q, %v", secret, err)
	}
	many := map[string]string{}
	for i := range fleet.MaxLabels + 1 {
		many[strings.Repeat("a", 1+i)] = ""
	}
	for name, c := range map[string]struct {
		rejoin   string
		settings fleet.TokenSettings
		valid    time.Duration
		field    string
	}{
		"no time":         {"", fleet.TokenSettings{}, 0, "expires_in"},
		"a long time":     {"", fleet.TokenSettings{}, fleet.MaxTokenTime + 1, "expires_in"},
		"a bad name":      {"", fleet.TokenSettings{Name: "A B"}, time.Minute, "name"},
		"a bad label":     {"", fleet.TokenSettings{Labels: map[string]string{"A": "b"}}, time.Minute, "labels"},
		"a bad value":     {"", fleet.TokenSettings{Labels: map[string]string{"a": "b c"}}, time.Minute, "labels"},
		"many labels":     {"", fleet.TokenSettings{Labels: many}, time.Minute, "labels"},
		"rejoin and name": {"host", fleet.TokenSettings{Name: "n"}, time.Minute, "rejoin"},
		"never joined":    {"host", fleet.TokenSettings{}, time.Minute, "rejoin"},
	} {
		if _, _, err := f.NewToken(ctx, "key_a", c.rejoin, c.settings, c.valid); !fault.Is(err, fault.Invalid) ||
			fault.As(err).Field != c.field {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, _, err = f.NewToken(ctx, "key_a", "none", fleet.TokenSettings{}, time.Minute)
	wantCode(t, err, fault.NotFound, "node_not_found")
	wantCode(t, f.Remove(ctx, "host"), fault.Conflict, "node_in_use")
	err = f.Check(ctx, fleet.Identity{Cluster: "OTHER", Node: "abcdef"}, strings.Repeat("s", 16))
	wantCode(t, err, fault.Denied, "node_refused")
}

// TestSessionsOfAnIdentity checks which processes with one certificate may speak, and which may renew it.
func TestSessionsOfAnIdentity(t *testing.T) {
	f := newFixture(t)
	f.withCA(t)
	ctx := t.Context()
	token, _, err := f.NewToken(ctx, "key_a", "", fleet.TokenSettings{}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	request, err := pki.NewRequest(key)
	if err != nil {
		t.Fatal(err)
	}
	csr := string(request)
	j, err := f.Join(ctx, fleet.JoinRequest{Token: token, CSR: csr, Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	sum, err := pki.RequestKeySum(request)
	if err != nil {
		t.Fatal(err)
	}
	who := fleet.Identity{Cluster: j.Cluster, Node: j.Node, KeySum: sum}
	one, two := strings.Repeat("1", 16), strings.Repeat("2", 16)
	begin := func(session string, lease time.Duration) {
		t.Helper()
		if _, err := f.db.BeginLease(ctx, who.Node, who.KeySum, session, lease); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		what           string
		do             func()
		speaks, renews map[string]bool
	}{
		{"no session", func() {}, map[string]bool{}, map[string]bool{one: true, two: true}},
		{"the first, over", func() { begin(one, time.Microsecond) }, map[string]bool{one: true}, map[string]bool{one: true}},
		{"the second", func() { begin(two, time.Hour) }, map[string]bool{two: true}, map[string]bool{two: true}},
		{"none any more", func() {
			if err := f.Leave(ctx, who, two); err != nil {
				t.Fatal(err)
			}
		}, map[string]bool{}, map[string]bool{one: true, two: true}},
	} {
		step.do()
		for _, session := range []string{one, two} {
			err := f.Check(ctx, who, session)
			_, renewErr := f.Renew(ctx, who, session, csr)
			if (err == nil) != step.speaks[session] || (renewErr == nil) != step.renews[session] {
				t.Errorf("%s: %.1s speaks: %v, renews: %v", step.what, session, err, renewErr)
			}
			for _, err := range []error{err, renewErr} {
				if err != nil {
					wantCode(t, err, fault.Denied, "node_refused")
				}
			}
		}
		for _, err := range []error{f.Check(ctx, who, ""), f.Check(ctx, who, one[1:])} {
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("%s: a name that no session has: %v", step.what, err)
			}
		}
		if _, err := f.Renew(ctx, who, "", csr); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: renewed without a session: %v", step.what, err)
		}
	}
}

// FuzzToken reads any text as a token. A token that is accepted is the only text of its secret and fingerprint.
func FuzzToken(f *testing.F) {
	sum := sha256.Sum256([]byte("a"))
	good := "cayn_" + strings.Repeat("a", 26) + "." + base64.RawURLEncoding.EncodeToString(sum[:])
	for _, s := range []string{good, "", ".", good + "=", good + "\n", good[:len(good)-1], strings.ToUpper(good),
		" " + good,
		strings.Replace(good, ".", "..", 1), "cayn_." + hex.EncodeToString(sum[:]), good[:40] + "\n" + good[40:]} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		secret, fingerprint, err := fleet.ParseToken(text)
		if err != nil {
			return
		}
		again := secret + "." + base64.RawURLEncoding.EncodeToString(fingerprint[:])
		if again != text || len(text) != len(good) {
			t.Errorf("%q is read as %q", text, again)
		}
	})
}
