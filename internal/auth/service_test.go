package auth

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

// begin returns a Service on an empty memory store, with its operator.
func begin(t *testing.T, cfg Config) (*Service, *memory, Principal) {
	t.Helper()
	st := &memory{}
	cfg.Log = slog.New(slog.DiscardHandler)
	s := New(st, cfg)
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	var secret string
	if made, err := s.Bootstrap(t.Context(), func(sec string) error { secret = sec; return nil }); err != nil || !made {
		t.Fatal(made, err)
	}
	p, err := s.Authenticate(t.Context(), secret)
	if err != nil {
		t.Fatal(err)
	}
	return s, st, p
}

// principal makes a key in p's organization and authenticates with it.
func principal(t *testing.T, s *Service, p Principal, scopes ...string) (Principal, string) {
	t.Helper()
	_, secret, err := s.CreateKey(t.Context(), p, KeyRequest{Name: "test", Scopes: scopes})
	if err != nil {
		t.Fatal(err)
	}
	made, err := s.Authenticate(t.Context(), secret)
	if err != nil {
		t.Fatal(err)
	}
	return made, secret
}

func wantFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if fe := fault.As(err); fe == nil || fe.Kind != kind || fe.Code != code {
		t.Errorf("got error %v, want %s with code %q", err, kind, code)
	}
}

func TestBootstrap(t *testing.T) {
	s, st, p := begin(t, Config{Quota: Quota{Sandboxes: 7}})
	if p.Org.Name != OperatorOrg || p.Org.Quota.Sandboxes != 7 || !p.May(Admin) {
		t.Errorf("the first principal is %+v", p)
	}
	if ok, _ := regexp.MatchString(`^org_[a-z2-7]{20}$`, p.Org.ID); !ok {
		t.Errorf("organization ID %q", p.Org.ID)
	}
	if ok, _ := regexp.MatchString(`^key_[a-z2-7]{20}$`, p.Key.ID); !ok {
		t.Errorf("key ID %q", p.Key.ID)
	}
	made, err := s.Bootstrap(t.Context(), func(string) error { t.Error("a second first key"); return nil })
	if made || err != nil || len(st.orgs) != 1 || len(st.keys) != 1 {
		t.Errorf("bootstrapped again: %v, %v, %d organizations, %d keys", made, err, len(st.orgs), len(st.keys))
	}
}

// TestBootstrapFails checks that a crash or a full disk between saving and storing leaves a
// server that can still be bootstrapped.
func TestBootstrapFails(t *testing.T) {
	st := &memory{}
	s := New(st, Config{Log: slog.New(slog.DiscardHandler)})
	defer func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	full := errors.New("disk full")
	if made, err := s.Bootstrap(t.Context(), func(string) error { return full }); made || !errors.Is(err, full) ||
		len(st.orgs) != 0 {
		t.Errorf("with a save that fails: %v, %v, %d organizations", made, err, len(st.orgs))
	}
	st.broken = full
	var saved []string
	save := func(secret string) error { saved = append(saved, secret); return nil }
	if made, err := s.Bootstrap(t.Context(), save); made || !errors.Is(err, full) {
		t.Errorf("with a store that fails: %v, %v", made, err)
	}
	st.broken = nil
	if made, err := s.Bootstrap(t.Context(), save); !made || err != nil {
		t.Fatal(made, err)
	}
	if _, err := s.Authenticate(t.Context(), saved[1]); err != nil {
		t.Errorf("the second one saved: %v", err)
	}
	if _, err := s.Authenticate(t.Context(), saved[0]); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("the first one saved: %v", err)
	}
}

func TestAuthenticateRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, st, p := begin(t, Config{})
		_, valid := principal(t, s, p, "exec")
		_, revoked := principal(t, s, p, "exec")
		if err := s.RevokeKey(t.Context(), p, st.keys[2].ID); err != nil {
			t.Fatal(err)
		}
		_, expiring, err := s.CreateKey(t.Context(), p,
			KeyRequest{Name: "short", Scopes: []string{"exec"}, ExpiresIn: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute - 1)
		if _, err := s.Authenticate(t.Context(), expiring); err != nil {
			t.Errorf("a nanosecond before it expires: %v", err)
		}
		time.Sleep(time.Nanosecond)
		texts := make(map[string]bool)
		before := st.looked
		for name, secret := range map[string]string{
			"missing": "", "malformed": "Bearer x", "short": valid[:len(valid)-1], "long": valid + "0", "upper case": "cay_" + strings.ToUpper(valid[4:]),
			"another mark": "key_" + valid[4:], "not hex": valid[:len(valid)-1] + "g", "with a space": " " + valid, "line break": valid + "\n",
			"unknown": "cay_" + strings.Repeat("0", 40), "revoked": revoked, "expired": expiring,
		} {
			got, err := s.Authenticate(t.Context(), secret)
			wantFault(t, err, fault.Unauthenticated, "unauthenticated")
			if got.Key.ID != "" || got.Org.ID != "" {
				t.Errorf("%s: got principal %+v with the error", name, got)
			}
			texts[err.Error()] = true
		}
		if len(texts) != 1 {
			t.Errorf("the refusals differ: %v", texts)
		}
		if st.looked-before != 3 {
			t.Errorf("%d look-ups, want one each for unknown, revoked and expired", st.looked-before)
		}
		if _, err := s.Authenticate(t.Context(), valid); err != nil {
			t.Errorf("the valid one: %v", err)
		}
	})
}

// TestAuthenticateStoreFails checks that a failing store is not reported as a wrong key, which
// would make the caller give up.
func TestAuthenticateStoreFails(t *testing.T) {
	s := New(failing{}, Config{Log: slog.New(slog.DiscardHandler)})
	_, err := s.Authenticate(t.Context(), newSecret(FormatCay))
	if fault.KindOf(err) != fault.Internal || err == nil {
		t.Errorf("got %v, want an internal error", err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

type failing struct{ Store }

func (failing) KeyByHash(context.Context, []byte) (Key, Org, error) {
	return Key{}, Org{}, errors.New("disk on fire")
}

func TestSecretsAreNotKept(t *testing.T) {
	s, st, p := begin(t, Config{})
	k, secret, err := s.CreateKey(t.Context(), p,
		KeyRequest{Name: "ci", Scopes: []string{"files", "exec", "exec"}, ExpiresIn: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if ok, _ := regexp.MatchString(`^cay_[0-9a-f]{40}$`, secret); !ok {
		t.Errorf("secret %q", secret)
	}
	if hash := sha256.Sum256([]byte(secret)); !bytes.Equal(k.Hash, hash[:]) {
		t.Error("the hash is not that of the secret")
	}
	if k.Prefix != secret[:12] || !slices.Equal(k.Scopes, []Scope{Exec, Files}) ||
		!k.ExpiresAt.Equal(k.CreatedAt.Add(time.Hour)) {
		t.Errorf("the key is %+v", k)
	}
	for _, stored := range st.keys {
		if strings.Contains(stored.Name+stored.ID+stored.Prefix+string(stored.Hash), secret[12:]) {
			t.Errorf("the secret is in %+v", stored)
		}
	}
}

func TestCreateKeyRefuses(t *testing.T) {
	s, st, p := begin(t, Config{})
	lesser, _ := principal(t, s, p, "exec", "templates:write")
	before := len(st.keys)
	for _, c := range []struct {
		who       Principal
		name      string
		scopes    []string
		expires   time.Duration
		kind      fault.Kind
		code, fld string
	}{
		{p, "", []string{"exec"}, 0, fault.Invalid, "invalid_name", "name"},
		{p, strings.Repeat("ü", maxKeyName+1), []string{"exec"}, 0, fault.Invalid, "invalid_name", "name"},
		{p, "two\nlines", []string{"exec"}, 0, fault.Invalid, "invalid_name", "name"},
		{p, "bad \xff", []string{"exec"}, 0, fault.Invalid, "invalid_name", "name"},
		{p, "n", nil, 0, fault.Invalid, "invalid_scopes", "scopes"},
		{p, "n", []string{"exec", "fly"}, 0, fault.Invalid, "invalid_scopes", "scopes"},
		{p, "n", []string{"Exec"}, 0, fault.Invalid, "invalid_scopes", "scopes"},
		{p, "n", []string{"exec"}, -1, fault.Invalid, "invalid_expires_in", "expires_in"},
		{p, "n", []string{"exec"}, time.Second - 1, fault.Invalid, "invalid_expires_in", "expires_in"},
		{lesser, "n", []string{"exec"}, 0, fault.Denied, "scope_missing", ""},
	} {
		_, secret, err := s.CreateKey(t.Context(), c.who, KeyRequest{Name: c.name, Scopes: c.scopes, ExpiresIn: c.expires})
		wantFault(t, err, c.kind, c.code)
		if fe := fault.As(err); fe != nil && fe.Field != c.fld {
			t.Errorf("field %q, want %q", fe.Field, c.fld)
		}
		if secret != "" {
			t.Error("a secret with an error")
		}
	}
	if len(st.keys) != before {
		t.Errorf("%d keys were made", len(st.keys)-before)
	}
	if _, _, err := s.CreateKey(t.Context(), p,
		KeyRequest{Name: strings.Repeat("ü", maxKeyName), Scopes: []string{"exec"}, ExpiresIn: time.Second}); err != nil {
		t.Errorf("exactly at the limits: %v", err)
	}
}

// TestE2BKeyHasDefaultScopes checks that only a key for E2B's clients may be created without scopes.
func TestE2BKeyHasDefaultScopes(t *testing.T) {
	s, _, p := begin(t, Config{})
	k, _, err := s.CreateKey(t.Context(), p, KeyRequest{Name: "n", Format: FormatE2B})
	if want := []Scope{SandboxesWrite, Exec, Files, TemplatesWrite}; err != nil || !slices.Equal(k.Scopes, want) {
		t.Errorf("the scopes are %v, want %v; %v", k.Scopes, want, err)
	}
	_, _, err = s.CreateKey(t.Context(), p, KeyRequest{Name: "n", Format: FormatCay})
	wantFault(t, err, fault.Invalid, "invalid_scopes")
}

func TestMay(t *testing.T) {
	if all := caytest.Constants[Scope](t, "Scope"); !slices.Equal(all, Scopes()) {
		t.Errorf("the constants are %q, Scopes returns %q", all, Scopes())
	}
	implied := map[Scope][]Scope{SandboxesWrite: {SandboxesRead}, TemplatesWrite: {TemplatesRead}, Admin: Scopes()}
	for _, have := range Scopes() {
		p := Principal{Key: Key{Scopes: []Scope{have}}}
		for _, want := range Scopes() {
			if may := want == have || slices.Contains(implied[have], want); p.May(want) != may {
				t.Errorf("a key with %s may %s: %v, want %v", have, want, !may, may)
			}
		}
	}
	if (Principal{}).May(SandboxesRead) {
		t.Error("a key without scopes may read")
	}
}

func TestRevoke(t *testing.T) {
	s, _, p := begin(t, Config{})
	lesser, secret := principal(t, s, p, "exec")
	wantFault(t, s.RevokeKey(t.Context(), lesser, p.Key.ID), fault.Denied, "scope_missing")
	wantFault(t, s.RevokeKey(t.Context(), p, "key_none"), fault.NotFound, "api_key_not_found")
	if err := s.RevokeKey(t.Context(), lesser, lesser.Key.ID); err != nil {
		t.Errorf("a key that revokes itself: %v", err)
	}
	if _, err := s.Authenticate(t.Context(), secret); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("the next call of a revoked key: %v", err)
	}
}

// TestQuotaIsTaken fails for a field of the quota, also for one that is added later, that an operator's
// request does not set.
func TestQuotaIsTaken(t *testing.T) {
	s, _, operator := begin(t, Config{})
	var asked QuotaRequest // with a value in every field
	var want Quota
	caytest.Fill(&asked, 7)
	caytest.Fill(&want, 7)
	if full, _, _, err := s.CreateOrg(t.Context(), operator, "full", asked); err != nil || full.Quota != want {
		t.Errorf("made %+v, %v, want the quota %+v", full, err, want)
	}
}

func TestOrganizationsAreApart(t *testing.T) {
	s, _, operator := begin(t, Config{Quota: Quota{Sandboxes: 10, VCPUs: 20, MemoryMB: 30}})
	none := 0
	org, key, secret, err := s.CreateOrg(t.Context(), operator, "acme", QuotaRequest{VCPUs: &none})
	if err != nil {
		t.Fatal(err)
	}
	if org.Quota != (Quota{Sandboxes: 10, VCPUs: 0, MemoryMB: 30}) || key.OrgID != org.ID {
		t.Errorf("made %+v with %+v", org, key)
	}
	acme, err := s.Authenticate(t.Context(), secret)
	if err != nil || acme.Org.ID != org.ID || !acme.May(Admin) {
		t.Fatalf("its first key is %+v, %v", acme, err)
	}

	wantFault(t, s.RevokeKey(t.Context(), acme, operator.Key.ID), fault.NotFound, "api_key_not_found")
	keys, _, err := s.ListKeys(t.Context(), acme, 50, "")
	if err != nil || len(keys) != 1 || keys[0].ID != key.ID {
		t.Errorf("keys of acme: %v, %v", keys, err)
	}
	lesser, _ := principal(t, s, operator, "exec")
	for _, c := range []struct {
		who  Principal
		code string
	}{{acme, "not_the_operator"}, {lesser, "scope_missing"}} {
		_, _, _, err := s.CreateOrg(t.Context(), c.who, "other", QuotaRequest{})
		wantFault(t, err, fault.Denied, c.code)
		_, _, err = s.ListOrgs(t.Context(), c.who, 50, "")
		wantFault(t, err, fault.Denied, c.code)
	}
	_, _, err = s.ListKeys(t.Context(), lesser, 50, "")
	wantFault(t, err, fault.Denied, "scope_missing")

	_, _, _, err = s.CreateOrg(t.Context(), operator, "acme", QuotaRequest{})
	wantFault(t, err, fault.Conflict, "org_exists")
	less := -1
	_, _, _, err = s.CreateOrg(t.Context(), operator, "other", QuotaRequest{MemoryMB: &less})
	wantFault(t, err, fault.Invalid, "invalid_quota")
	for _, bad := range []string{"", "-a", "A", "a b", "a_b", "ü", strings.Repeat("a", 64)} {
		_, _, _, err = s.CreateOrg(t.Context(), operator, bad, QuotaRequest{})
		wantFault(t, err, fault.Invalid, "invalid_name")
	}
	if orgs, _, err := s.ListOrgs(t.Context(), operator, 50, ""); err != nil || len(orgs) != 2 {
		t.Errorf("organizations: %v, %v", orgs, err)
	}
}

func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, p := begin(t, Config{Rate: 2, Burst: 3})
		other, _ := principal(t, s, p, "exec")
		for i := range 3 {
			if err := s.Allow(p); err != nil {
				t.Fatalf("call %d of the burst: %v", i, err)
			}
		}
		for range 5 { // a refused call costs nothing
			err := s.Allow(p)
			wantFault(t, err, fault.Exhausted, "rate_limited")
			if wait := fault.As(err).RetryAfter; wait != 500*time.Millisecond {
				t.Errorf("retry after %s, want 500ms", wait)
			}
		}
		if err := s.Allow(other); err != nil {
			t.Errorf("another key: %v", err)
		}
		time.Sleep(500 * time.Millisecond)
		if err := s.Allow(p); err != nil {
			t.Errorf("after waiting as told: %v", err)
		}
		if err := s.Allow(p); !fault.Is(err, fault.Exhausted) {
			t.Errorf("twice after waiting once: %v", err)
		}

		// Idle buckets are dropped, and no caller gets more than the burst.
		time.Sleep(sweepEvery)
		if err := s.Allow(other); err != nil {
			t.Fatal(err)
		}
		if n := len(s.buckets.byKey); n != 1 {
			t.Errorf("%d buckets after a minute of quiet, want that of the last call alone", n)
		}
		for i := range 4 {
			if err := s.Allow(p); (err == nil) != (i < 3) {
				t.Errorf("call %d after idling: %v", i, err)
			}
		}
	})
}

// TestRateOfAnOrganization checks that many keys do not multiply an organization's rate, that a refused
// call takes from neither bucket, and that no other organization feels it.
func TestRateOfAnOrganization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, p := begin(t, Config{Rate: 2, Burst: 3, OrgFactor: 2})
		keys := []Principal{p}
		for range 4 {
			k, _ := principal(t, s, p, "exec")
			keys = append(keys, k)
		}
		for range 10 { // the calls that its own bucket refuses are no calls of the organization
			_ = s.Allow(keys[0])
		}
		for i := range 3 {
			if err := s.Allow(keys[1]); err != nil {
				t.Fatalf("call %d of the second key: %v", i, err)
			}
		}
		for range 5 {
			err := s.Allow(keys[2])
			wantFault(t, err, fault.Exhausted, "rate_limited")
			if wait := fault.As(err).RetryAfter; wait != 250*time.Millisecond {
				t.Errorf("retry after %s, want 250ms", wait)
			}
		}
		_, other, _, err := s.CreateOrg(t.Context(), p, "other", QuotaRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Allow(Principal{Org: Org{ID: other.OrgID}, Key: other}); err != nil {
			t.Errorf("another organization: %v", err)
		}
		time.Sleep(750 * time.Millisecond)
		for i := range 3 { // what the organization's bucket refused took nothing from the key's
			if err := s.Allow(keys[2]); err != nil {
				t.Errorf("call %d of the third key: %v", i, err)
			}
		}
		if err := s.Allow(keys[3]); !fault.Is(err, fault.Exhausted) {
			t.Errorf("a key that never called: %v", err)
		}
	})
}

// TestHolder checks that a key which is revoked, expired or unknown allows nothing any more.
func TestHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, p := begin(t, Config{})
		made, _ := principal(t, s, p, "exec")
		if got, err := s.Holder(t.Context(), made.Key.ID); err != nil || got.Org.ID != p.Org.ID || !got.May(Exec) ||
			got.May(Files) {
			t.Errorf("the holder is %+v, %v", got, err)
		}
		short, _, err := s.CreateKey(t.Context(), p, KeyRequest{Name: "s", Scopes: []string{"exec"}, ExpiresIn: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if err := s.RevokeKey(t.Context(), p, made.Key.ID); err != nil {
			t.Fatal(err)
		}
		for _, id := range []string{made.Key.ID, short.ID, "key_none", ""} {
			_, err := s.Holder(t.Context(), id)
			wantFault(t, err, fault.Unauthenticated, "unauthenticated")
		}
	})
}

func TestNoRateLimit(t *testing.T) {
	s, _, p := begin(t, Config{})
	for range 10_000 {
		if err := s.Allow(p); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLastUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, st, p := begin(t, Config{})
		time.Sleep(30 * time.Second) // so that the use falls into a later minute than the creation
		_, secret := principal(t, s, p, "exec")
		synctest.Wait()
		if k := st.keys[1]; !k.LastUsedAt.Equal(k.CreatedAt) {
			t.Errorf("made at %s, used at %s: not before it was made", k.CreatedAt, k.LastUsedAt)
		}
		use := func() {
			t.Helper()
			if _, err := s.Authenticate(t.Context(), secret); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		begun := st.touches
		for range 100 {
			use()
			synctest.Wait()
		}
		if n := st.touches - begun; n != 0 {
			t.Errorf("%d writes for 100 uses in the minute that is written already", n)
		}
		time.Sleep(useEvery)
		use()
		synctest.Wait()
		if st.touches != begun+1 {
			t.Errorf("%d writes a minute later, want 1", st.touches-begun)
		}
		if last := st.keys[1].LastUsedAt; !last.Equal(time.Now().Truncate(time.Minute)) || last.Location() != time.UTC {
			t.Errorf("last used %s, now %s", last, time.Now())
		}

		// The next use tries again after a write that failed.
		time.Sleep(useEvery)
		st.broken = errors.New("disk full")
		use()
		synctest.Wait()
		st.broken = nil
		use()
		synctest.Wait()
		if st.touches != begun+2 {
			t.Errorf("%d writes, want 2", st.touches-begun)
		}

		// Close writes what is pending.
		time.Sleep(useEvery)
		use()
		if err := s.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if st.touches != begun+3 {
			t.Errorf("%d writes after closing, want 3", st.touches-begun)
		}
	})
}

func FuzzParseSecret(f *testing.F) {
	for _, seed := range []string{"", "cay_", "cay_" + strings.Repeat("a", 40), "cay_" + strings.Repeat("A", 40),
		"cay_" + strings.Repeat("0", 39) + "\x00", newSecret(FormatCay)} {
		f.Add(seed)
	}
	form := regexp.MustCompile(`\Acay_[0-9a-f]{40}\z`)
	f.Fuzz(func(t *testing.T, text string) {
		hash, ok := parseSecret(text)
		if ok != form.MatchString(text) {
			t.Fatalf("%q is a secret: %v", text, ok)
		}
		if ok && hash != sha256.Sum256([]byte(text)) {
			t.Fatalf("%q has another hash", text)
		}
	})
}

func FuzzParseScopes(f *testing.F) {
	for _, seed := range []string{"", "exec", "exec,admin", "exec,,", "ADMIN", "admin,admin",
		"sandboxes:read,sandboxes:write,files"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		names := strings.Split(text, ",")
		scopes, err := ParseScopes(names)
		if err != nil {
			if fe := fault.As(err); fe == nil || fe.Kind != fault.Invalid || fe.Field != "scopes" {
				t.Fatalf("%q: %v is not Invalid in field scopes", text, err)
			}
			return
		}
		for _, s := range scopes {
			if !slices.Contains(names, string(s)) || !slices.Contains(Scopes(), s) {
				t.Fatalf("%q gave the scope %q", text, s)
			}
		}
		for _, name := range names {
			if !slices.Contains(scopes, Scope(name)) {
				t.Fatalf("%q lost %q", text, name)
			}
		}
	})
}

// TestFailedAttempts checks that calls without a valid key are counted by address, each address
// by itself.
func TestFailedAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, p := begin(t, Config{FailedRate: 2, FailedBurst: 3})
		for i := range 3 {
			// one subscriber has all these addresses
			if err := s.Failed(fmt.Sprintf("[2001:db8::%d]:%d", i, 1000+i)); err != nil {
				t.Fatalf("attempt %d of the burst: %v", i, err)
			}
		}
		err := s.Failed("[2001:db8::9]:1")
		wantFault(t, err, fault.Exhausted, fault.CodeTooManyAttempts)
		if wait := fault.As(err).RetryAfter; wait != 500*time.Millisecond {
			t.Errorf("retry after %s, want 500ms", wait)
		}
		for _, other := range []string{"[2001:db8:0:1::9]:1", "192.0.2.1:1", "192.0.2.2:1", "odd"} {
			if err := s.Failed(other); err != nil {
				t.Errorf("%s: %v", other, err)
			}
		}
		if err := s.Allow(p); err != nil {
			t.Errorf("a key: %v", err)
		}
	})
}

// TestAddress checks which connections are counted together.
func TestAddress(t *testing.T) {
	for want, all := range map[string][]string{
		"192.0.2.1":       {"192.0.2.1:1", "192.0.2.1:65535", "[::ffff:192.0.2.1]:1", "[::ffff:c000:201%eth0]:1", "192.0.2.1"},
		"192.0.2.2":       {"192.0.2.2:1"},
		"2001:db8:0:1::":  {"[2001:db8:0:1::1]:1", "[2001:db8:0:1:ffff:ffff:ffff:ffff]:2", "2001:db8:0:1::"},
		"2001:db8:0:2::":  {"[2001:db8:0:2::1]:1"},
		"fe80::":          {"[fe80::1%eth0]:1", "[fe80::ffff:1%eth0]:1", "[fe80::2%eth1]:1", "fe80::3%eth0"},
		"odd":             {"odd"},
		"192.0.2.1:70000": {"192.0.2.1:70000"},
	} {
		for _, remote := range all {
			if got := Address(remote); got != want {
				t.Errorf("%s is counted as %s, want %s", remote, got, want)
			}
		}
	}
}

// TestBucketsAreBounded has more callers than there may be buckets.
func TestBucketsAreBounded(t *testing.T) {
	b := NewBuckets(1, 10)
	now := time.Now()
	for i := range maxBuckets + 20 {
		wait := b.Take(fmt.Sprint(i), now)
		if shared := i - maxBuckets; (wait > 0) != (shared >= 10) {
			t.Fatalf("caller %d waits %s", i, wait)
		}
	}
	if len(b.byKey) > maxBuckets+1 {
		t.Errorf("%d buckets", len(b.byKey))
	}
}

// TestKeysExpireByOneClock checks that keys are made, used and revoked by the clock that the service is given.
func TestKeysExpireByOneClock(t *testing.T) {
	now := time.Now().Add(-48 * time.Hour).UTC().Truncate(time.Second)
	s, st, p := begin(t, Config{Now: func() time.Time { return now }})
	short := KeyRequest{Name: "short", Scopes: []string{"exec"}, ExpiresIn: time.Minute}
	k, secret, err := s.CreateKey(t.Context(), p, short)
	if err != nil || !k.CreatedAt.Equal(now) || !k.ExpiresAt.Equal(now.Add(time.Minute)) {
		t.Fatalf("made at %s: %+v, %v", now, k, err)
	}
	if _, err := s.Authenticate(t.Context(), secret); err != nil {
		t.Errorf("a new key: %v", err)
	}
	now = now.Add(time.Minute)
	_, err = s.Authenticate(t.Context(), secret)
	wantFault(t, err, fault.Unauthenticated, fault.CodeUnauthenticated)
	if err := s.RevokeKey(t.Context(), p, k.ID); err != nil {
		t.Fatal(err)
	}
	if revoked, _, err := st.GetKey(t.Context(), k.ID); err != nil || !revoked.RevokedAt.Equal(now) {
		t.Errorf("revoked at %s, want %s, %v", revoked.RevokedAt, now, err)
	}
}
