package store

import (
	"crypto/sha256"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

func aKey(org string, i int) auth.Key {
	hash := sha256.Sum256(fmt.Append(nil, org, i))
	return auth.Key{ID: fmt.Sprintf("key_%s%03d", org, i), OrgID: "org_" + org, Name: "ci",
		Hash: hash[:], Prefix: "cay_12345678",
		Scopes: []auth.Scope{auth.Exec, auth.Admin}, CreatedAt: start.Add(time.Duration(i) * time.Second)}
}

// anOrg returns an organization with a value in every field, and its first key.
func anOrg(name string, i int) (auth.Org, auth.Key) {
	var o auth.Org
	caytest.Fill(&o, 7)
	n := 0 // another number for each, so that two columns that are mixed up are noticed
	for _, f := range reflect.ValueOf(&o.Quota).Elem().Fields() {
		n++
		caytest.Fill(f.Addr().Interface(), n)
	}
	o.ID, o.Name, o.CreatedAt = "org_"+name, name, start.Add(time.Duration(i)*time.Second)
	return o, aKey(name, 0)
}

func mustPutOrg(t *testing.T, st auth.Store, name string, i int) (auth.Org, auth.Key) {
	t.Helper()
	o, k := anOrg(name, i)
	if err := st.PutOrg(t.Context(), o, k); err != nil {
		t.Fatal(err)
	}
	return o, k
}

// testAuthStore tests the contract of auth.Store, which every implementation must keep.
func testAuthStore(t *testing.T, open func(t *testing.T) auth.Store) {
	for name, f := range map[string]func(*testing.T, auth.Store){
		"organizations":   authOrgs,
		"name in a race":  authOrgRace,
		"keys":            authKeys,
		"revoking":        authRevoke,
		"touching":        authTouch,
		"listing keys":    authListKeys,
		"limit of keys":   authKeyLimit,
		"nothing is left": authAtomic,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, open(t))
		})
	}
}

func authOrgs(t *testing.T, st auth.Store) {
	var want []auth.Org
	for i := range 5 {
		o, _ := mustPutOrg(t, st, fmt.Sprint("o", i), i)
		want = append([]auth.Org{o}, want...)
		got, err := st.GetOrg(t.Context(), o.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(o, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	_, err := st.GetOrg(t.Context(), "org_none")
	wantFault(t, err, fault.NotFound, "org_not_found")
	var got []auth.Org
	for after := ""; ; {
		page, next, err := st.ListOrgs(t.Context(), 2, after)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, page...)
		if after = next; next == "" {
			break
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("newest first (-want +got):\n%s", diff)
	}
	_, _, err = st.ListOrgs(t.Context(), 2, "bad")
	wantFault(t, err, fault.Invalid, "invalid_cursor")
}

func authOrgRace(t *testing.T, st auth.Store) {
	var mu sync.Mutex
	var made int
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			o, k := anOrg("same", 0)
			o.ID, k.ID, k.Hash = fmt.Sprint("org_", i), fmt.Sprint("key_", i), []byte{byte(i)}
			k.OrgID = o.ID
			err := st.PutOrg(t.Context(), o, k)
			if err != nil {
				wantFault(t, err, fault.Conflict, "org_exists")
				return
			}
			mu.Lock()
			defer mu.Unlock()
			made++
		})
	}
	wg.Wait()
	if made != 1 {
		t.Errorf("made %d organizations with one name", made)
	}
}

func authKeys(t *testing.T, st auth.Store) {
	o, first := mustPutOrg(t, st, "a", 0)
	full := aKey("a", 1)
	full.ExpiresAt, full.RevokedAt, full.LastUsedAt = start.Add(time.Hour), start.Add(time.Minute), start.Add(time.Second)
	for i, f := range reflect.VisibleFields(reflect.TypeFor[auth.Key]()) {
		if reflect.ValueOf(full).Field(i).IsZero() {
			t.Errorf("the test leaves field %s empty", f.Name)
		}
	}
	if err := st.PutKey(t.Context(), full, 0); err != nil {
		t.Fatal(err)
	}
	for _, want := range []auth.Key{first, full} {
		got, org, err := st.KeyByHash(t.Context(), want.Hash)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("key (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(o, org); diff != "" {
			t.Errorf("organization (-want +got):\n%s", diff)
		}
		byID, org, err := st.GetKey(t.Context(), want.ID)
		if err != nil || !cmp.Equal(want, byID) || !cmp.Equal(o, org) {
			t.Errorf("by its ID it is %+v of %+v, %v", byID, org, err)
		}
	}
	_, _, err := st.GetKey(t.Context(), "key_none")
	wantFault(t, err, fault.NotFound, "api_key_not_found")
	for _, hash := range [][]byte{nil, {}, first.Hash[:31], append([]byte{0}, first.Hash...)} {
		_, _, err := st.KeyByHash(t.Context(), hash)
		wantFault(t, err, fault.NotFound, "api_key_not_found")
	}
	orphan := aKey("nobody", 0)
	wantFault(t, st.PutKey(t.Context(), orphan, 0), fault.NotFound, "org_not_found")
	if err := st.PutKey(t.Context(), full, 0); err == nil {
		t.Error("added the same key twice")
	}
}

func authRevoke(t *testing.T, st auth.Store) {
	_, k := mustPutOrg(t, st, "a", 0)
	mustPutOrg(t, st, "b", 0)
	wantFault(t, st.RevokeKey(t.Context(), "org_b", k.ID, start), fault.NotFound, "api_key_not_found")
	wantFault(t, st.RevokeKey(t.Context(), "org_a", "key_none", start), fault.NotFound, "api_key_not_found")
	if got, _, err := st.KeyByHash(t.Context(), k.Hash); err != nil || !got.RevokedAt.IsZero() {
		t.Fatalf("revoked by another organization: %v, %v", got, err)
	}
	for i := range 2 {
		if err := st.RevokeKey(t.Context(), "org_a", k.ID, start.Add(time.Duration(i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
		if got, _, err := st.KeyByHash(t.Context(), k.Hash); err != nil || !got.RevokedAt.Equal(start) {
			t.Errorf("time %d: revoked at %s, %v; want %s", i+1, got.RevokedAt, err, start)
		}
	}
}

func authTouch(t *testing.T, st auth.Store) {
	_, k := mustPutOrg(t, st, "a", 0)
	for _, c := range []struct{ at, want time.Duration }{
		{time.Hour, time.Hour},
		{time.Minute, time.Hour},
		{2 * time.Hour, 2 * time.Hour},
	} {
		if err := st.TouchKey(t.Context(), k.ID, start.Add(c.at)); err != nil {
			t.Fatal(err)
		}
		if got, _, err := st.KeyByHash(t.Context(), k.Hash); err != nil || !got.LastUsedAt.Equal(start.Add(c.want)) {
			t.Errorf("used at +%s: last %s, %v", c.at, got.LastUsedAt, err)
		}
	}
	if err := st.TouchKey(t.Context(), "key_none", start); err != nil {
		t.Errorf("touching a key that does not exist: %v", err)
	}
}

func authListKeys(t *testing.T, st auth.Store) {
	mustPutOrg(t, st, "b", 0)
	_, first := mustPutOrg(t, st, "a", 0)
	want := []auth.Key{first}
	for i := range 6 {
		k := aKey("a", i+1)
		if err := st.PutKey(t.Context(), k, 0); err != nil {
			t.Fatal(err)
		}
		want = append([]auth.Key{k}, want...)
	}
	var got []auth.Key
	for after := ""; ; {
		page, next, err := st.ListKeys(t.Context(), "org_a", 3, after)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, page...)
		if after = next; next == "" {
			break
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("newest first (-want +got):\n%s", diff)
	}
	_, _, err := st.ListKeys(t.Context(), "org_a", 3, "bad")
	wantFault(t, err, fault.Invalid, "invalid_cursor")
}

// authKeyLimit adds keys up to the limit, and far more that are revoked or expire at once.
func authKeyLimit(t *testing.T, st auth.Store) {
	const limit = 5
	_, first := mustPutOrg(t, st, "a", 0)
	mustPutOrg(t, st, "b", 0)
	ctx := t.Context()
	for i := range limit - 1 {
		if err := st.PutKey(ctx, aKey("a", i+1), limit); err != nil {
			t.Fatalf("key %d: %v", i+1, err)
		}
	}
	more := aKey("a", 100)
	wantFault(t, st.PutKey(ctx, more, limit), fault.Exhausted, "quota_exceeded")
	if err := st.PutKey(ctx, aKey("b", 1), limit); err != nil {
		t.Errorf("adding a key to another organization: %v", err)
	}
	if err := st.RevokeKey(ctx, "org_a", first.ID, start); err != nil {
		t.Fatal(err)
	}
	for i := range 4 * limit { // each takes the place of the key before it
		k := aKey("a", 200+i)
		if i%2 == 0 {
			k.ExpiresAt = k.CreatedAt.Add(time.Millisecond)
		}
		if err := st.PutKey(ctx, k, limit); err != nil {
			t.Fatalf("adding key %d in a free place: %v", i, err)
		}
		if err := st.RevokeKey(ctx, "org_a", k.ID, k.CreatedAt); i%2 == 1 && err != nil {
			t.Fatal(err)
		}
	}
	all, _, err := st.ListKeys(ctx, "org_a", 100, "")
	if err != nil || len(all) > 2*limit {
		t.Errorf("the store kept %d keys, %v; want at most %d", len(all), err, 2*limit)
	}
	for i := range limit - 1 {
		if _, _, err := st.KeyByHash(ctx, aKey("a", i+1).Hash); err != nil {
			t.Errorf("live key %d is gone: %v", i+1, err)
		}
	}
}

// authAtomic checks that an organization is not stored if its first key cannot be stored.
func authAtomic(t *testing.T, st auth.Store) {
	_, k := mustPutOrg(t, st, "a", 0)
	o, _ := anOrg("b", 0)
	k.OrgID = o.ID // the hash is taken
	if err := st.PutOrg(t.Context(), o, k); err == nil {
		t.Fatal("stored two keys with one hash")
	}
	_, err := st.GetOrg(t.Context(), o.ID)
	wantFault(t, err, fault.NotFound, "org_not_found")
}
