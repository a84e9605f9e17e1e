package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// prefixes makes cmp compare values of netip.Prefix with ==.
var prefixes = cmpopts.EquateComparable(netip.Prefix{})

// fullShape returns a shape with a value in every field.
func fullShape(i int) sandbox.Shape {
	var s sandbox.Shape
	caytest.Fill(&s, i+1)
	s.Image, s.Size.VCPUs, s.Size.MemoryMB = fmt.Sprint("image", i), 2, 4096
	s.Env["ü"] = "\"\\\x01\u2028"
	return s
}

// fullSandbox returns a sandbox with a value in every field, so that tests notice a column that is
// not written or read.
func fullSandbox(org string, i int) sandbox.Sandbox {
	created := start.Add(time.Duration(i) * time.Second)
	return sandbox.Sandbox{
		ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Ephemeral, State: sandbox.Creating, Run: fmt.Sprint("run", i),
		Template: "python", TemplateID: "tpl_python", TemplateVersion: 3, Shape: fullShape(i),
		Metadata: map[string]string{"team": "red", "n": fmt.Sprint(i)},
		Timeout:  5 * time.Minute, IdleTimeout: 90 * time.Second, RecoveryInterval: 1500 * time.Millisecond,
		CreatedAt: created, StartedAt: created.Add(1), ExpiresAt: created.Add(time.Hour), LastActivityAt: created.Add(2 * time.Second),
		SuspendedAt: created.Add(3 * time.Second), DestroyedAt: created.Add(4 * time.Second), DestroyReason: sandbox.Lost,
		Error: "it broke", Source: sandbox.Restored, Origin: "snap_a", Token: "secret", AtEnd: sandbox.EndSuspends, FrontData: "kept", Kept: sandbox.KeepFiles,
		Holder: holderOfTests,
	}
}

// asStored returns s as the store returns it, with times to the microsecond.
func asStored(s sandbox.Sandbox) sandbox.Sandbox {
	s.StartedAt = s.StartedAt.Truncate(time.Microsecond)
	s.Holder = holderOfTests
	return s
}

// small returns a sandbox with only the fields that a row needs.
func small(org string, i int) sandbox.Sandbox {
	return sandbox.Sandbox{ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Ephemeral, State: sandbox.Creating, Run: "run1",
		Shape: sandbox.Shape{Size: sandbox.Size{Name: "s", VCPUs: 1, MemoryMB: 512}}, CreatedAt: start.Add(time.Duration(i) * time.Second),
		Holder: holderOfTests}
}

func mustInsert(t *testing.T, st sandbox.Store, s sandbox.Sandbox) sandbox.Sandbox {
	t.Helper()
	if _, found, err := st.Insert(t.Context(), s, sandbox.Quota{}, sandbox.Once{}); err != nil || found {
		t.Fatalf("inserting: found %v, %v", found, err)
	}
	return s
}

func mustMove(t *testing.T, st sandbox.Store, id sandbox.ID, from, to sandbox.State, at time.Time) sandbox.Sandbox {
	t.Helper()
	s, err := st.Transition(t.Context(), sandbox.Change{ID: id, From: []sandbox.State{from}, To: to, At: at})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// wantFault checks that err is a fault of a kind with a code.
func wantFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if fe := fault.As(err); fe == nil || fe.Kind != kind || fe.Code != code {
		t.Errorf("got error %v, want %s with code %q", err, kind, code)
	}
}

// testSandboxStore tests the contract of sandbox.Store, which every implementation must keep.
func testSandboxStore(t *testing.T, open func(t *testing.T) sandbox.Store) {
	for name, f := range map[string]func(*testing.T, sandbox.Store){
		"public ports":           publicPorts,
		"round trip":             sandboxRoundTrip,
		"not found":              sandboxNotFound,
		"quota":                  sandboxQuota,
		"quota in a race":        sandboxQuotaRace,
		"quota of each state":    sandboxQuotaOfStates,
		"quota of a wake":        sandboxQuotaWake,
		"wakes in a race":        sandboxQuotaWakeRace,
		"activity":               sandboxActivity,
		"idempotency":            sandboxOnce,
		"idempotency in a race":  sandboxOnceRace,
		"listing":                sandboxList,
		"listing, the other way": sandboxListUp,
		"front data":             sandboxFrontData,
		"expiry, later only":     sandboxExpiryLater,
		"paging while it grows":  sandboxPaging,
		"bad cursors":            sandboxBadCursors,
		"transition":             sandboxTransition,
		"transition refused":     sandboxTransitionRefused,
		"transition in a race":   sandboxTransitionRace,
		"expiry":                 sandboxExpiry,
		"policy":                 sandboxEgress,
		"notes":                  sandboxNotes,
		"unfinished and images":  sandboxUnfinished,
		"events":                 sandboxEvents,
		"purge":                  sandboxPurge,
		"purge of many":          sandboxPurgeMany,
		"events are bounded":     sandboxEventsBounded,
		"pool":                   poolRows,
		"claim":                  poolClaim,
		"claims in a race":       poolClaimRace,
		"snapshots":              snapshotLives,
		"snapshots listed":       snapshotLists,
		"snapshots in a race":    snapshotNameRace,
		"a context that is over": sandboxContext,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, open(t))
		})
	}
}

func sandboxRoundTrip(t *testing.T, st sandbox.Store) {
	full := fullSandbox("org_a", 0)
	for _, f := range reflect.VisibleFields(reflect.TypeFor[sandbox.Sandbox]()) {
		if reflect.ValueOf(full).FieldByIndex(f.Index).IsZero() {
			t.Errorf("the test leaves field %s empty", f.Name)
		}
	}
	for _, s := range []sandbox.Sandbox{full, small("org_a", 1)} {
		mustInsert(t, st, s)
		got, err := st.Get(t.Context(), s.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(asStored(s), got, prefixes); diff != "" {
			t.Errorf("stored and read back (-want +got):\n%s", diff)
		}
	}
	wrong := small("org_a", 2)
	wrong.State = sandbox.Running
	if _, _, err := st.Insert(t.Context(), wrong, sandbox.Quota{}, sandbox.Once{}); err == nil {
		t.Error("inserted a sandbox that is not creating")
	}
	if _, _, err := st.Insert(t.Context(), full, sandbox.Quota{}, sandbox.Once{}); err == nil {
		t.Error("inserted the same ID twice")
	}
}

func sandboxNotFound(t *testing.T, st sandbox.Store) {
	id := sandbox.NewID()
	_, err := st.Get(t.Context(), id)
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
	_, err = st.Transition(t.Context(), sandbox.Change{ID: id, From: sandbox.States(), To: sandbox.Running, At: start})
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
	_, err = st.SetExpiry(t.Context(), id, start, time.Second, false)
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
	if err := st.Forget(t.Context(), id); err != nil {
		t.Errorf("forgetting a sandbox that does not exist: %v", err)
	}
	events, next, err := st.Events(t.Context(), id, 5, "")
	if len(events) != 0 || next != "" || err != nil {
		t.Errorf("events of a sandbox that does not exist: %v, %q, %v", events, next, err)
	}
}

// sandboxQuotaOfStates checks that a sandbox counts against a quota as its state says.
func sandboxQuotaOfStates(t *testing.T, st sandbox.Store) {
	for i, state := range sandbox.States() {
		org := fmt.Sprint("org_", i)
		mustMove(t, st, mustInsert(t, st, small(org, 0)).ID, sandbox.Creating, state, start)
		for _, c := range []struct {
			quota   sandbox.Quota
			charged []sandbox.State
		}{
			{sandbox.Quota{Sandboxes: 1}, sandbox.ChargeItself.Of()},
			{sandbox.Quota{VCPUs: 1}, sandbox.ChargeAll.Of()},
			{sandbox.Quota{MemoryMB: 600}, sandbox.ChargeAll.Of()},
		} {
			_, _, err := st.Admit(t.Context(), small(org, 1), c.quota, sandbox.Once{})
			if over, want := fault.Is(err, fault.Exhausted), slices.Contains(c.charged, state); over != want {
				t.Errorf("with one that is %s the quota %+v is exceeded: %v, want %v; %v", state, c.quota, over, want, err)
			}
		}
	}
}

func sandboxQuota(t *testing.T, st sandbox.Store) {
	insert := func(org string, q sandbox.Quota) (sandbox.ID, error) {
		s := small(org, 0)
		_, _, err := st.Insert(t.Context(), s, q, sandbox.Once{Key: string(s.ID), Hash: "h"})
		return s.ID, err
	}
	two := sandbox.Quota{Sandboxes: 2}
	first, err := insert("org_a", two)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := insert("org_a", two); err != nil {
		t.Fatal(err)
	}
	third, err := insert("org_a", two)
	wantFault(t, err, fault.Exhausted, "quota_exceeded")
	if _, err := st.Get(t.Context(), third); !fault.Is(err, fault.NotFound) {
		t.Errorf("a sandbox over quota was written: %v", err)
	}
	if _, err := insert("org_b", two); err != nil {
		t.Errorf("inserting for another organization: %v", err)
	}
	_, err = insert("org_a", sandbox.Quota{VCPUs: 2})
	wantFault(t, err, fault.Exhausted, "quota_exceeded")
	_, err = insert("org_a", sandbox.Quota{MemoryMB: 1535})
	wantFault(t, err, fault.Exhausted, "quota_exceeded")
	if _, err := insert("org_a", sandbox.Quota{VCPUs: 3, MemoryMB: 1536}); err != nil {
		t.Errorf("using the quota exactly: %v", err)
	}

	// A suspended sandbox counts as a sandbox, but without CPU and memory.
	mustMove(t, st, first, sandbox.Creating, sandbox.Suspended, start)
	if _, err := insert("org_a", sandbox.Quota{VCPUs: 3, MemoryMB: 1536}); err != nil {
		t.Errorf("a suspended sandbox counts for CPU or memory: %v", err)
	}
	_, err = insert("org_a", sandbox.Quota{Sandboxes: 4})
	wantFault(t, err, fault.Exhausted, "quota_exceeded")
	// A sandbox that is being destroyed or is over does not count.
	mustMove(t, st, first, sandbox.Suspended, sandbox.Destroying, start)
	if _, err := insert("org_a", sandbox.Quota{Sandboxes: 4}); err != nil {
		t.Errorf("a sandbox being destroyed counts: %v", err)
	}
	mustMove(t, st, first, sandbox.Destroying, sandbox.Destroyed, start)
	if _, err := insert("org_a", sandbox.Quota{Sandboxes: 5}); err != nil {
		t.Errorf("a destroyed sandbox counts: %v", err)
	}
}

func sandboxQuotaRace(t *testing.T, st sandbox.Store) {
	var mu sync.Mutex
	var made, refused int
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() {
			_, _, err := st.Insert(t.Context(), small("org_a", 0), sandbox.Quota{Sandboxes: 7}, sandbox.Once{})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				made++
			case fault.Is(err, fault.Exhausted):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made != 7 || refused != 33 {
		t.Errorf("%d made and %d refused, want 7 and 33", made, refused)
	}
}

// sandboxQuotaWake checks that a suspended sandbox that wakes counts against the quota like a new one,
// and not twice.
func sandboxQuotaWake(t *testing.T, st sandbox.Store) {
	mustInsert(t, st, small("org_a", 0))
	mustInsert(t, st, small("org_b", 0))
	asleep := mustInsert(t, st, small("org_a", 1))
	want := mustMove(t, st, asleep.ID, sandbox.Creating, sandbox.Suspended, start)
	wake := func(q sandbox.Quota) (sandbox.Sandbox, error) {
		run := "run2"
		return st.Transition(t.Context(), sandbox.Change{ID: asleep.ID, From: []sandbox.State{sandbox.Suspended},
			To: sandbox.Waking, At: start, Quota: &q, OrgID: "org_a", NewRun: &run})
	}
	for _, q := range []sandbox.Quota{{Sandboxes: 1}, {VCPUs: 1}, {MemoryMB: 1023}} {
		got, err := wake(q)
		wantFault(t, err, fault.Exhausted, "quota_exceeded")
		if diff := cmp.Diff(want, got, prefixes); diff != "" {
			t.Errorf("the returned row (-want +got):\n%s", diff)
		}
		if now, err := st.Get(t.Context(), asleep.ID); err != nil || !cmp.Equal(want, now, prefixes) {
			t.Errorf("a refused wake changed the row: %+v, %v", now, err)
		}
	}
	if events, _, err := st.Events(t.Context(), asleep.ID, 10, ""); err != nil || len(events) != 2 {
		t.Errorf("refused wakes left events: %v, %v", events, err)
	}
	if got, err := wake(sandbox.Quota{Sandboxes: 2, VCPUs: 2, MemoryMB: 1024}); err != nil || got.State != sandbox.Waking {
		t.Errorf("using the quota exactly: %s, %v", got.State, err)
	}
	// The woken sandbox counts from now on.
	_, _, err := st.Insert(t.Context(), small("org_a", 2), sandbox.Quota{VCPUs: 2}, sandbox.Once{})
	wantFault(t, err, fault.Exhausted, "quota_exceeded")
	// A change without a quota is not checked against one.
	mustMove(t, st, asleep.ID, sandbox.Waking, sandbox.Running, start)
}

func sandboxQuotaWakeRace(t *testing.T, st sandbox.Store) {
	var ids []sandbox.ID
	for i := range 20 {
		s := mustInsert(t, st, small("org_a", i))
		mustMove(t, st, s.ID, sandbox.Creating, sandbox.Suspended, start)
		ids = append(ids, s.ID)
	}
	var mu sync.Mutex
	var woken, refused int
	var wg sync.WaitGroup
	for _, id := range ids {
		wg.Go(func() {
			_, err := st.Transition(t.Context(), sandbox.Change{ID: id, From: []sandbox.State{sandbox.Suspended},
				To: sandbox.Waking, At: start, Quota: &sandbox.Quota{VCPUs: 7}, OrgID: "org_a"})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				woken++
			case fault.Is(err, fault.Exhausted):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if woken != 7 || refused != 13 {
		t.Errorf("%d woken and %d refused, want 7 and 13", woken, refused)
	}
}

func sandboxActivity(t *testing.T, st sandbox.Store) {
	if err := st.SetActivity(t.Context(), nil); err != nil {
		t.Errorf("setting the activity of no sandbox: %v", err)
	}
	older := small("org_a", 0)
	older.LastActivityAt = start.Add(time.Minute)
	mustInsert(t, st, older)
	fresh, gone, other := mustInsert(t, st, small("org_a", 1)), mustInsert(t, st, small("org_a", 2)),
		mustInsert(t, st, small("org_a", 3))
	mustMove(t, st, gone.ID, sandbox.Creating, sandbox.Destroyed, start)
	set := func(at time.Time) {
		t.Helper()
		if err := st.SetActivity(t.Context(), map[sandbox.ID]time.Time{
			older.ID: at, fresh.ID: at, gone.ID: at, sandbox.NewID(): at,
		}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(id sandbox.ID, want time.Time) {
		t.Helper()
		if s, err := st.Get(t.Context(), id); err != nil || !s.LastActivityAt.Equal(want) {
			t.Errorf("last activity %s, %v; want %s", s.LastActivityAt, err, want)
		}
	}
	set(start)
	check(older.ID, start.Add(time.Minute)) // a time never moves back
	check(fresh.ID, start)
	check(gone.ID, time.Time{})
	check(other.ID, time.Time{})
	set(start.Add(time.Hour))
	check(older.ID, start.Add(time.Hour))
	check(fresh.ID, start.Add(time.Hour))
	if events, _, err := st.Events(t.Context(), fresh.ID, 10, ""); err != nil || len(events) != 1 {
		t.Errorf("activity left an event: %v, %v", events, err)
	}
}

// later lets the keys of creates grow older, and returns the process's time then. PostgreSQL has the time, so that the
// keys must change there.
func later(t *testing.T, st sandbox.Store, now time.Time, d time.Duration) time.Time {
	t.Helper()
	db := st.(*DB)
	if _, is := db.dialect.(*postgresDialect); !is {
		return now.Add(d)
	}
	_, err := db.writer.ExecContext(t.Context(), "UPDATE idempotency SET created_at = created_at - $1", d.Microseconds())
	if err != nil {
		t.Fatal(err)
	}
	return now
}

func sandboxOnce(t *testing.T, st sandbox.Store) {
	s := fullSandbox("org_a", 0)
	once := sandbox.Once{Key: "k", Hash: "h1"}
	if _, found, err := st.Insert(t.Context(), s, sandbox.Quota{Sandboxes: 1}, once); err != nil || found {
		t.Fatal(found, err)
	}
	moved := mustMove(t, st, s.ID, sandbox.Creating, sandbox.Running, start)

	again := small("org_a", 3600)
	// The quota is used up, which must not matter.
	prior, found, err := st.Insert(t.Context(), again, sandbox.Quota{Sandboxes: 1}, once)
	if err != nil || !found {
		t.Fatal(found, err)
	}
	if diff := cmp.Diff(moved, prior, prefixes); diff != "" {
		t.Errorf("the first sandbox as it is now (-want +got):\n%s", diff)
	}
	if _, err := st.Get(t.Context(), again.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("the repeated create wrote a row: %v", err)
	}
	_, _, err = st.Insert(t.Context(), again, sandbox.Quota{}, sandbox.Once{Key: "k", Hash: "h2"})
	wantFault(t, err, fault.Conflict, "idempotency_key_reused")
	if _, found, err := st.Insert(t.Context(), small("org_b", 0), sandbox.Quota{},
		sandbox.Once{Key: "k", Hash: "h2"}); err != nil || found {
		t.Errorf("the same key of another organization: %v, %v", found, err)
	}

	// The key is known until a minute before 24 h; after 24 h it is a new key.
	late := small("org_a", 0)
	late.CreatedAt = later(t, st, s.CreatedAt, onceFor-time.Minute)
	if _, found, err := st.Insert(t.Context(), late, sandbox.Quota{}, once); err != nil || !found {
		t.Errorf("just inside 24 h: %v, %v", found, err)
	}
	late.CreatedAt = later(t, st, late.CreatedAt, time.Minute)
	if _, found, err := st.Insert(t.Context(), late, sandbox.Quota{},
		sandbox.Once{Key: "k", Hash: "h3"}); err != nil || found {
		t.Errorf("after 24 h: %v, %v", found, err)
	}

	// The key of a forgotten sandbox can be used again.
	if err := st.Forget(t.Context(), late.ID); err != nil {
		t.Fatal(err)
	}
	anew := small("org_a", 90000)
	if _, found, err := st.Insert(t.Context(), anew, sandbox.Quota{},
		sandbox.Once{Key: "k", Hash: "h4"}); err != nil || found {
		t.Errorf("after forgetting: %v, %v", found, err)
	}
}

func sandboxOnceRace(t *testing.T, st sandbox.Store) {
	var mu sync.Mutex
	ids := make(map[sandbox.ID]int)
	var made int
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			s := small("org_a", 0)
			prior, found, err := st.Insert(t.Context(), s, sandbox.Quota{}, sandbox.Once{Key: "k", Hash: "h"})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if found {
				ids[prior.ID]++
			} else {
				ids[s.ID]++
				made++
			}
		})
	}
	wg.Wait()
	if made != 1 || len(ids) != 1 {
		t.Errorf("%d made, answers named %d sandboxes; want 1 and 1", made, len(ids))
	}
}

func listIDs(t *testing.T, st sandbox.Store, f sandbox.Filter) []sandbox.ID {
	t.Helper()
	var ids []sandbox.ID
	for pages := 0; ; pages++ {
		all, next, err := st.List(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		if len(all) > f.Limit || next != "" && len(all) != f.Limit {
			t.Errorf("a page of %d with limit %d, next %q", len(all), f.Limit, next)
		}
		for _, s := range all {
			ids = append(ids, s.ID)
		}
		if next == "" {
			return ids
		}
		if f.Cursor = next; pages > 1000 {
			t.Fatal("paging does not end")
		}
	}
}

func sandboxList(t *testing.T, st sandbox.Store) {
	var newest []sandbox.ID // of org_a
	for i := range 7 {
		s := fullSandbox("org_a", i/2) // pairs share their second
		s.Metadata = map[string]string{"even": fmt.Sprint(i%2 == 0), "i": fmt.Sprint(i)}
		mustInsert(t, st, s)
		newest = append(newest, s.ID)
	}
	mustInsert(t, st, fullSandbox("org_b", 0))
	byAge := make(map[sandbox.ID]int)
	for i, id := range newest {
		byAge[id] = i / 2
	}
	slices.SortFunc(newest, func(a, b sandbox.ID) int {
		if byAge[a] != byAge[b] {
			return byAge[b] - byAge[a]
		}
		return cmp2(b, a)
	})
	for _, limit := range []int{1, 2, 3, 6, 7, 8, 200} {
		if diff := cmp.Diff(newest, listIDs(t, st, sandbox.Filter{OrgID: "org_a", Limit: limit})); diff != "" {
			t.Errorf("limit %d (-want +got):\n%s", limit, diff)
		}
	}
	count := func(f sandbox.Filter) int {
		f.OrgID, f.Limit = "org_a", 2
		return len(listIDs(t, st, f))
	}
	if n := count(sandbox.Filter{Metadata: map[string]string{"even": "true"}}); n != 4 {
		t.Errorf("%d with even=true, want 4", n)
	}
	if n := count(sandbox.Filter{Metadata: map[string]string{"even": "true", "i": "4"}}); n != 1 {
		t.Errorf("%d with both, want 1", n)
	}
	if n := count(sandbox.Filter{Metadata: map[string]string{"even": "true", "i": "3"}}); n != 0 {
		t.Errorf("%d with both of two, want 0", n)
	}
	if n := count(sandbox.Filter{Metadata: map[string]string{"team": "red"}}); n != 0 {
		t.Errorf("%d of another organization, want 0", n)
	}

	mustMove(t, st, newest[0], sandbox.Creating, sandbox.Destroyed, start)
	mustMove(t, st, newest[1], sandbox.Creating, sandbox.Running, start)
	mustMove(t, st, newest[2], sandbox.Creating, sandbox.Failed, start)
	for want, states := range map[int][]sandbox.State{
		7: nil,
		1: {sandbox.Running},
		4: {sandbox.Creating},
		5: {sandbox.Creating, sandbox.Running, sandbox.Suspended},
		2: {sandbox.Destroyed, sandbox.Failed},
		3: {sandbox.Destroyed, sandbox.Failed, sandbox.Running},
		0: {sandbox.Waking},
	} {
		if n := count(sandbox.Filter{States: states}); n != want {
			t.Errorf("%d in states %v, want %d", n, states, want)
		}
	}
	if _, _, err := st.List(t.Context(), sandbox.Filter{OrgID: "org_a"}); err == nil {
		t.Error("a listing without a limit was answered")
	}
}

// sandboxListUp lists sandboxes oldest first, from a time on, and of one template.
func sandboxListUp(t *testing.T, st sandbox.Store) {
	var oldest []sandbox.ID
	for i := range 5 {
		s := fullSandbox("org_a", i)
		if i == 4 {
			s.Template, s.TemplateID = "node", "tpl_node"
		}
		oldest = append(oldest, mustInsert(t, st, s).ID)
	}
	for _, limit := range []int{1, 2, 5, 6} {
		if diff := cmp.Diff(oldest,
			listIDs(t, st, sandbox.Filter{OrgID: "org_a", OldestFirst: true, Limit: limit})); diff != "" {
			t.Errorf("limit %d (-want +got):\n%s", limit, diff)
		}
	}
	for name, c := range map[string]struct {
		filter sandbox.Filter
		want   []sandbox.ID
	}{
		"from":             {sandbox.Filter{CreatedFrom: start.Add(2 * time.Second)}, oldest[2:]},
		"from a bit later": {sandbox.Filter{CreatedFrom: start.Add(2*time.Second + time.Microsecond)}, oldest[3:]},
		"template by name": {sandbox.Filter{Template: "node"}, oldest[4:]},
		"template by id":   {sandbox.Filter{Template: "tpl_python"}, oldest[:4]},
		"version":          {sandbox.Filter{Template: "tpl_python", TemplateVersion: 3}, oldest[:4]},
		"another version":  {sandbox.Filter{Template: "tpl_python", TemplateVersion: 4}, nil},
		"unknown template": {sandbox.Filter{Template: "go"}, nil},
	} {
		c.filter.OrgID, c.filter.OldestFirst, c.filter.Limit = "org_a", true, 2
		if diff := cmp.Diff(c.want, listIDs(t, st, c.filter)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	// A cursor of one order is invalid for the other.
	_, next, err := st.List(t.Context(), sandbox.Filter{OrgID: "org_a", OldestFirst: true, Limit: 1})
	if err != nil || next == "" {
		t.Fatalf("next is %q, %v", next, err)
	}
	_, _, err = st.List(t.Context(), sandbox.Filter{OrgID: "org_a", Limit: 1, Cursor: next})
	wantFault(t, err, fault.Invalid, "invalid_cursor")
}

func cmp2(a, b sandbox.ID) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// sandboxPaging checks that pages contain each sandbox that existed before the first page exactly
// once, while other sandboxes are inserted.
func sandboxPaging(t *testing.T, st sandbox.Store) {
	want := make(map[sandbox.ID]bool)
	for i := range 30 {
		want[mustInsert(t, st, small("org_a", i)).ID] = true
	}
	seen := make(map[sandbox.ID]int)
	f := sandbox.Filter{OrgID: "org_a", Limit: 4}
	for i := 0; ; i++ {
		page, next, err := st.List(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range page {
			seen[s.ID]++
		}
		mustInsert(t, st, small("org_a", 1000+i))
		if next == "" {
			break
		}
		f.Cursor = next
	}
	for id := range want {
		if seen[id] != 1 {
			t.Errorf("pages contain %s %d times", id, seen[id])
		}
	}
	if len(seen) != len(want) {
		t.Errorf("pages contain %d sandboxes, %d existed before", len(seen), len(want))
	}
}

func sandboxBadCursors(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	for range 2 {
		mustInsert(t, st, small("org_a", 1))
		if err := errors.Join(move(t, st, s.ID, sandbox.Creating, sandbox.Running),
			move(t, st, s.ID, sandbox.Running, sandbox.Creating)); err != nil {
			t.Fatal(err)
		}
	}
	_, list, err := st.List(t.Context(), sandbox.Filter{OrgID: "org_a", Limit: 1})
	if err != nil || list == "" {
		t.Fatal(list, err)
	}
	_, events, err := st.Events(t.Context(), s.ID, 1, "")
	if err != nil || events == "" {
		t.Fatal(events, err)
	}
	for _, bad := range []string{"x", "!", "AAAA", list + "A", list[:len(list)-1],
		list + "=", " " + list, list + "\n", events, "' OR 1=1 --"} {
		_, _, err := st.List(t.Context(), sandbox.Filter{OrgID: "org_a", Limit: 1, Cursor: bad})
		if fe := fault.As(err); fe == nil || fe.Kind != fault.Invalid || fe.Field != "cursor" {
			t.Errorf("listing with cursor %q: %v, want Invalid in field cursor", bad, err)
		}
	}
	_, _, err = st.Events(t.Context(), s.ID, 1, list)
	wantFault(t, err, fault.Invalid, "invalid_cursor")
	_, _, err = st.Events(t.Context(), sandbox.NewID(), 1, events)
	wantFault(t, err, fault.Invalid, "invalid_cursor")
}

func move(t *testing.T, st sandbox.Store, id sandbox.ID, from, to sandbox.State) error {
	t.Helper()
	_, err := st.Transition(t.Context(), sandbox.Change{ID: id, From: []sandbox.State{from}, To: to, At: start})
	return err
}

func sandboxTransition(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	run, token, started, expires := "run2", "tok", start.Add(time.Second), start.Add(time.Hour)
	suspended, active := start.Add(2*time.Second), start.Add(3*time.Second)
	got, err := st.Transition(t.Context(), sandbox.Change{ID: s.ID,
		From: []sandbox.State{sandbox.Running, sandbox.Creating}, Run: "run1", To: sandbox.Running,
		At: started, Reason: "booted", NewRun: &run, StartedAt: &started, ExpiresAt: &expires, Token: &token,
		SuspendedAt: &suspended, LastActivityAt: &active})
	if err != nil {
		t.Fatal(err)
	}
	want := s
	want.State, want.Run, want.Token, want.StartedAt, want.ExpiresAt = sandbox.Running, run, token, started, expires
	want.SuspendedAt, want.LastActivityAt = suspended, active
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("after the first (-want +got):\n%s", diff)
	}

	reason, text, ended := sandbox.Lost, "it went away", start.Add(2*time.Second)
	got, err = st.Transition(t.Context(), sandbox.Change{ID: s.ID,
		From: []sandbox.State{sandbox.Running}, Run: "run2", To: sandbox.Destroyed,
		At: ended, DestroyedAt: &ended, DestroyReason: &reason, Error: &text,
		ExpiresAt: &time.Time{}, SuspendedAt: &time.Time{}})
	if err != nil {
		t.Fatal(err)
	}
	want.State, want.DestroyedAt, want.DestroyReason, want.Error, want.ExpiresAt =
		sandbox.Destroyed, ended, reason, text, time.Time{}
	want.SuspendedAt = time.Time{}
	want.Env, want.Token = map[string]string{}, "" // a sandbox that is over has no secrets
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("after the second (-want +got):\n%s", diff)
	}
	read, err := st.Get(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, read, prefixes); diff != "" {
		t.Errorf("read afterwards (-want +got):\n%s", diff)
	}
}

func sandboxTransitionRefused(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	for name, c := range map[string]sandbox.Change{
		"state":         {From: []sandbox.State{sandbox.Running, sandbox.Suspended}},
		"nothing named": {},
		"run":           {From: []sandbox.State{sandbox.Creating}, Run: "run0"},
	} {
		text := "must not be written"
		c.ID, c.To, c.At, c.Error = s.ID, sandbox.Destroyed, start, &text
		got, err := st.Transition(t.Context(), c)
		wantFault(t, err, fault.Conflict, "sandbox_state")
		if diff := cmp.Diff(s, got, prefixes); diff != "" {
			t.Errorf("%s: the returned row (-want +got):\n%s", name, diff)
		}
	}
	if read, err := st.Get(t.Context(), s.ID); err != nil || !cmp.Equal(s, read, prefixes) {
		t.Errorf("the row was changed: %+v, %v", read, err)
	}
	if events, _, err := st.Events(t.Context(), s.ID, 10, ""); err != nil || len(events) != 1 {
		t.Errorf("events %v, %v; want only the first", events, err)
	}
}

func sandboxTransitionRace(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	const racers = 100
	var mu sync.Mutex
	var winners []string
	var lost int
	var wg sync.WaitGroup
	for i := range racers {
		wg.Go(func() {
			run := fmt.Sprint("racer", i)
			_, err := st.Transition(t.Context(), sandbox.Change{ID: s.ID,
				From: []sandbox.State{sandbox.Creating}, Run: "run1", To: sandbox.Running, At: start, NewRun: &run})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				winners = append(winners, run)
			case fault.As(err) != nil && fault.As(err).Code == "sandbox_state":
				lost++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 || lost != racers-1 {
		t.Fatalf("%d won and %d lost, want 1 and %d", len(winners), lost, racers-1)
	}
	got, err := st.Get(t.Context(), s.ID)
	if err != nil || got.Run != winners[0] || got.State != sandbox.Running {
		t.Errorf("the row says %s in %s, %v; the winner is %s", got.State, got.Run, err, winners[0])
	}
	if events, _, err := st.Events(t.Context(), s.ID, 10, ""); err != nil || len(events) != 2 {
		t.Errorf("%d events, %v; want 2", len(events), err)
	}
}

func sandboxExpiry(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	got, err := st.SetExpiry(t.Context(), s.ID, start.Add(time.Hour), time.Hour, false)
	wantFault(t, err, fault.Conflict, "sandbox_not_running")
	if diff := cmp.Diff(s, got, prefixes); diff != "" {
		t.Errorf("the returned row (-want +got):\n%s", diff)
	}
	want := mustMove(t, st, s.ID, sandbox.Creating, sandbox.Running, start)
	want.ExpiresAt, want.Timeout = start.Add(time.Hour), time.Hour
	if got, err = st.SetExpiry(t.Context(), s.ID, want.ExpiresAt, want.Timeout, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if read, err := st.Get(t.Context(), s.ID); err != nil || !cmp.Equal(want, read, prefixes) {
		t.Errorf("read afterwards: %+v, %v", read, err)
	}
}

// sandboxExpiryLater checks that SetExpiry with later set never makes the expiry earlier.
func sandboxExpiryLater(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	mustMove(t, st, s.ID, sandbox.Creating, sandbox.Running, start)
	for _, c := range []struct {
		to, want time.Duration
		later    bool
	}{
		{time.Hour, time.Hour, false},
		{time.Minute, time.Hour, true},
		{2 * time.Hour, 2 * time.Hour, true},
		{time.Minute, time.Minute, false},
	} {
		got, err := st.SetExpiry(t.Context(), s.ID, start.Add(c.to), c.to, c.later)
		if err != nil || !got.ExpiresAt.Equal(start.Add(c.want)) || got.Timeout != c.want {
			t.Errorf("%+v gives %s, %s, %v", c, got.ExpiresAt, got.Timeout, err)
		}
	}
	mustMove(t, st, s.ID, sandbox.Running, sandbox.Suspended, start)
	_, err := st.SetExpiry(t.Context(), s.ID, start.Add(time.Hour), time.Hour, true)
	wantFault(t, err, fault.Conflict, "sandbox_not_running")
}

func sandboxFrontData(t *testing.T, st sandbox.Store) {
	want := asStored(mustInsert(t, st, fullSandbox("org_a", 0)))
	want.FrontData = `{"other":"ü"}`
	got, err := st.SetFrontData(t.Context(), want.ID, want.FrontData)
	if diff := cmp.Diff(want, got, prefixes); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	ids, err := st.Living(t.Context())
	if err != nil || len(ids) != 1 || ids[0] != want.ID {
		t.Errorf("the living sandboxes are %v, %v", ids, err)
	}
	mustMove(t, st, want.ID, sandbox.Creating, sandbox.Failed, start)
	_, err = st.SetFrontData(t.Context(), want.ID, "")
	wantFault(t, err, fault.Conflict, "sandbox_state")
	_, err = st.SetFrontData(t.Context(), sandbox.NewID(), "")
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
	if ids, err := st.Living(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("the living sandboxes are %v, %v", ids, err)
	}
}

func sandboxEgress(t *testing.T, st sandbox.Store) {
	want := mustInsert(t, st, fullSandbox("org_a", 0))
	want = asStored(want)
	want.Egress = sandbox.Egress{Mode: sandbox.DenyAll, AllowDomains: []string{"example.org"}}
	got, err := st.SetEgress(t.Context(), want.ID, want.Egress, sandbox.Event{At: start})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if read, err := st.Get(t.Context(), want.ID); err != nil || !cmp.Equal(want, read, prefixes) {
		t.Errorf("read afterwards: %+v, %v", read, err)
	}
	mustMove(t, st, want.ID, sandbox.Creating, sandbox.Failed, start)
	_, err = st.SetEgress(t.Context(), want.ID, sandbox.Egress{Mode: sandbox.AllowAll}, sandbox.Event{At: start})
	wantFault(t, err, fault.Conflict, "sandbox_state")
	_, err = st.SetEgress(t.Context(), sandbox.NewID(), sandbox.Egress{Mode: sandbox.AllowAll}, sandbox.Event{At: start})
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
	if read, err := st.Get(t.Context(), want.ID); err != nil || !read.Egress.Equal(want.Egress) {
		t.Errorf("the refused change wrote %+v, %v", read.Egress, err)
	}
}

func sandboxNotes(t *testing.T, st sandbox.Store) {
	lives, over := mustInsert(t, st, small("org_a", 0)).ID, mustInsert(t, st, small("org_a", 1)).ID
	mustMove(t, st, lives, sandbox.Creating, sandbox.Running, start)
	if err := st.Note(t.Context(), []sandbox.Event{{SandboxID: lives, At: start, Reason: "unheard_of"}}); err == nil {
		t.Error("noted a reason that is no type of events")
	}
	mustMove(t, st, over, sandbox.Creating, sandbox.Failed, start)
	for i := range 150 {
		at := start.Add(time.Duration(i) * time.Second)
		denied := sandbox.Event{SandboxID: lives, At: at, Reason: "egress_denied", Detail: fmt.Sprint(i)}
		err := st.Note(t.Context(), []sandbox.Event{denied, {SandboxID: over, At: at, Reason: "egress_denied"},
			{SandboxID: sandbox.NewID(), At: at, Reason: "egress_denied"}})
		if err != nil {
			t.Fatal(err)
		}
		if i == 10 {
			if err := st.Note(t.Context(), []sandbox.Event{{SandboxID: lives, At: at, Reason: "forked"}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	all, next, err := st.Events(t.Context(), lives, 200, "")
	if err != nil || next != "" {
		t.Fatalf("%v, %q", err, next)
	}
	// The listing has the newest 100 notes, the note of another reason, and the two transitions.
	if len(all) != 103 {
		t.Fatalf("there are %d events", len(all))
	}
	want := sandbox.Event{ID: all[0].ID, SandboxID: lives, At: start.Add(149 * time.Second),
		From: sandbox.Running, To: sandbox.Running, Reason: "egress_denied", Detail: "149"}
	if diff := cmp.Diff(want, all[0]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if all[99].Detail != "50" || all[100].Reason != "forked" ||
		all[101].To != sandbox.Running || all[102].To != sandbox.Creating {
		t.Errorf("the oldest are %+v", all[99:])
	}
	if all, _, err := st.Events(t.Context(), over, 200, ""); err != nil || len(all) != 2 {
		t.Errorf("a sandbox that is over has %d events, %v", len(all), err)
	}
}

func sandboxUnfinished(t *testing.T, st sandbox.Store) {
	var want []sandbox.ID
	for i, state := range sandbox.States() {
		s := small("org_"+fmt.Sprint(i%2), i)
		s.Image = fmt.Sprint("image", i/2)
		mustInsert(t, st, s)
		if state != sandbox.Creating {
			mustMove(t, st, s.ID, sandbox.Creating, state, start)
		}
		if !state.Over() {
			want = append(want, s.ID)
		}
	}
	all, err := st.Unfinished(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []sandbox.ID
	for _, s := range all {
		got = append(got, s.ID)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("unfinished, oldest first (-want +got):\n%s", diff)
	}
	images, err := st.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(images)
	if diff := cmp.Diff([]string{"image0", "image1", "image2"}, images); diff != "" {
		t.Errorf("images (-want +got):\n%s", diff)
	}

	// A suspended sandbox needs its image to wake.
	asleep := small("org_s", 50)
	asleep.Image = "of one asleep"
	mustMove(t, st, mustInsert(t, st, asleep).ID, sandbox.Creating, sandbox.Suspended, start)
	if images, err = st.Images(t.Context()); err != nil || !slices.Contains(images, asleep.Image) {
		t.Errorf("images are %q, %v; a suspended sandbox needs its own", images, err)
	}
	mustMove(t, st, asleep.ID, sandbox.Suspended, sandbox.Destroyed, start)

	// A failed sandbox that is being destroyed again is no longer over.
	failed := mustInsert(t, st, small("org_f", 100))
	mustMove(t, st, failed.ID, sandbox.Creating, sandbox.Failed, start)
	mustMove(t, st, failed.ID, sandbox.Failed, sandbox.Destroying, start)
	if again, err := st.Unfinished(t.Context()); err != nil || len(again) != len(want)+1 {
		t.Errorf("%d unfinished, %v; want %d", len(again), err, len(want)+1)
	}
}

func sandboxEvents(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	other := mustInsert(t, st, small("org_a", 0))
	const rounds = 12
	for i := range rounds {
		from, to := sandbox.Creating, sandbox.Running
		if i%2 == 1 {
			from, to = to, from
		}
		// The clock goes backwards, which must not change the order of events.
		mustMove(t, st, s.ID, from, to, start.Add(-time.Duration(i)*time.Minute))
		mustMove(t, st, other.ID, from, to, start)
	}
	var got []sandbox.Event
	for after := ""; ; {
		page, next, err := st.Events(t.Context(), s.ID, 5, after)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, page...)
		if after = next; next == "" {
			break
		}
	}
	if len(got) != rounds+1 {
		t.Fatalf("%d events, want %d", len(got), rounds+1)
	}
	for i := range got[1:] {
		if got[i].ID <= got[i+1].ID {
			t.Errorf("event %q comes before the older %q", got[i].ID, got[i+1].ID)
		}
		if got[i].From != got[i+1].To {
			t.Errorf("event %d is from state %q, the event before is to %q", i, got[i].From, got[i+1].To)
		}
	}
	if _, err := st.Transition(t.Context(), sandbox.Change{ID: other.ID, From: sandbox.States(),
		To: sandbox.Suspended, At: start, Reason: "lost", Detail: "fell back"}); err != nil {
		t.Fatal(err)
	}
	if page, _, err := st.Events(t.Context(), other.ID, 1, ""); err != nil || len(page) != 1 ||
		page[0].Reason != "lost" || page[0].Detail != "fell back" {
		t.Errorf("the event with a detail is %+v, %v", page, err)
	}
	first := got[rounds]
	if diff := cmp.Diff(sandbox.Event{ID: first.ID, SandboxID: s.ID, At: s.CreatedAt, To: sandbox.Creating},
		first); diff != "" {
		t.Errorf("the first event (-want +got):\n%s", diff)
	}
	if _, _, err := st.Events(t.Context(), s.ID, 0, ""); err == nil {
		t.Error("a listing without a limit was answered")
	}
}

func sandboxPurge(t *testing.T, st sandbox.Store) {
	const old, young = purgeBatch + 3, 2
	var ids []sandbox.ID
	for i := range old + young {
		s := small("org_a", 0)
		s.Metadata = map[string]string{"a": "b"}
		if _, _, err := st.Insert(t.Context(), s, sandbox.Quota{}, sandbox.Once{Key: fmt.Sprint(i), Hash: "h"}); err != nil {
			t.Fatal(err)
		}
		at := start
		if i >= old {
			at = start.Add(time.Hour)
		}
		to := sandbox.Destroyed
		if i%2 == 0 {
			to = sandbox.Failed
		}
		mustMove(t, st, s.ID, sandbox.Creating, to, at)
		ids = append(ids, s.ID)
	}
	living := mustInsert(t, st, small("org_a", 0))

	if n, err := st.Purge(t.Context(), start, start, 0); err != nil || n != 0 {
		t.Errorf("purged %d, %v; want none, since all ended later", n, err)
	}
	if _, found, err := st.Insert(t.Context(), small("org_a", 1), sandbox.Quota{},
		sandbox.Once{Key: "1", Hash: "h"}); err != nil || !found {
		t.Errorf("using an idempotency key of today: %v, %v", found, err)
	}
	n, err := st.Purge(t.Context(), start.Add(time.Minute), start, 0)
	if err != nil || n != old {
		t.Errorf("purged %d, %v; want %d", n, err, old)
	}
	if _, err := st.Get(t.Context(), ids[0]); !fault.Is(err, fault.NotFound) {
		t.Errorf("an old sandbox was not purged: %v", err)
	}
	if events, _, err := st.Events(t.Context(), ids[0], 10, ""); err != nil || len(events) != 0 {
		t.Errorf("the events of an old sandbox were not purged: %v, %v", events, err)
	}
	for _, id := range []sandbox.ID{ids[old], ids[old+1], living.ID} {
		if _, err := st.Get(t.Context(), id); err != nil {
			t.Errorf("purged too much: %v", err)
		}
	}
	// After a day the key of a young sandbox is dropped, so a create with it makes a new sandbox.
	if _, err := st.Purge(t.Context(), start, later(t, st, start, onceFor), 0); err != nil {
		t.Fatal(err)
	}
	if _, found, err := st.Insert(t.Context(), small("org_a", 1), sandbox.Quota{},
		sandbox.Once{Key: fmt.Sprint(old), Hash: "other"}); err != nil || found {
		t.Errorf("using a dropped idempotency key: %v, %v", found, err)
	}
}

// sandboxPurgeMany purges organizations that have more ended sandboxes than allowed.
func sandboxPurgeMany(t *testing.T, st sandbox.Store) {
	const most = purgeBatch + 10
	ctx := t.Context()
	end := func(org string, i int, metadata string) sandbox.ID {
		s := small(org, i)
		s.Metadata = map[string]string{}
		for len(metadata) > 0 { // in values that an index can have
			n := min(len(metadata), sandbox.MaxMetadataValue)
			s.Metadata[fmt.Sprint("a", len(metadata))], metadata = metadata[:n], metadata[n:]
		}
		mustInsert(t, st, s)
		mustMove(t, st, s.ID, sandbox.Creating, sandbox.Destroyed, start.Add(time.Duration(i)*time.Second))
		return s.ID
	}
	var many []sandbox.ID
	for i := range 2*most + 1 {
		many = append(many, end("org_many", i, ""))
	}
	few := end("org_few", 0, "")
	living := mustInsert(t, st, small("org_many", 0))
	heavy := end("org_heavy", 0, strings.Repeat("x", (most-8)*4096/2)) // weighs nearly as much as the limit
	var after []sandbox.ID
	for i := range 10 {
		after = append(after, end("org_heavy", 1+i, ""))
	}
	if n, err := st.Purge(ctx, start, start, 0); err != nil || n != 0 {
		t.Errorf("purged %d without a limit, %v", n, err)
	}
	if n, err := st.Purge(ctx, start, start, most); err != nil || n != most+2 {
		t.Errorf("purged %d, %v; want %d", n, err, most+2)
	}
	for id, kept := range map[sandbox.ID]bool{
		many[0]: false, many[most]: false, many[most+1]: true, many[2*most]: true, few: true, living.ID: true,
		heavy: false, after[0]: true, after[9]: true,
	} {
		if _, err := st.Get(ctx, id); (err == nil) != kept {
			t.Errorf("%s is kept: %v, want %v", id, err, kept)
		}
	}
}

// sandboxEventsBounded moves a sandbox more often than its listing keeps events, and checks that the
// listing keeps the newest.
func sandboxEventsBounded(t *testing.T, st sandbox.Store) {
	s := mustInsert(t, st, small("org_a", 0))
	from := sandbox.Creating
	for i := range eventsKept + 10 {
		to := sandbox.Suspended
		if i%2 == 0 {
			to = sandbox.Running
		}
		mustMove(t, st, s.ID, from, to, start)
		from = to
	}
	count := func() (n int, newest string) {
		for cursor := ""; ; {
			page, next, err := st.Events(t.Context(), s.ID, 200, cursor)
			if err != nil {
				t.Fatal(err)
			}
			if newest == "" {
				newest = page[0].ID
			}
			n += len(page)
			if cursor = next; next == "" {
				return n, newest
			}
		}
	}
	if n, newest := count(); n != eventsKept || newest != listedID(eventsKept+11) {
		t.Errorf("%d events, the newest is %s", n, newest)
	}
	mustMove(t, st, s.ID, from, sandbox.Destroyed, start)
	if n, newest := count(); n != eventsKeptOver || newest != listedID(eventsKept+12) {
		t.Errorf("after its end %d events, the newest is %s", n, newest)
	}
}

// sandboxContext checks that a canceled call writes nothing and that the store works afterwards.
func sandboxContext(t *testing.T, st sandbox.Store) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	s := small("org_a", 0)
	if _, _, err := st.Insert(over, s, sandbox.Quota{}, sandbox.Once{}); !errors.Is(err, context.Canceled) {
		t.Errorf("inserting: %v", err)
	}
	if _, err := st.Get(t.Context(), s.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("a canceled call wrote a row: %v", err)
	}
	// Calls that are canceled at random moments leave no lock and no incomplete row.
	for range 30 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(1500))*time.Microsecond)
		s := small("org_c", 0)
		_, _, err := st.Insert(ctx, s, sandbox.Quota{}, sandbox.Once{Key: string(s.ID), Hash: "h"})
		cancel()
		_, getErr := st.Get(t.Context(), s.ID)
		if err == nil && getErr != nil {
			t.Errorf("lost a sandbox whose insert succeeded: %v", getErr)
		}
		if events, _, eventsErr := st.Events(t.Context(), s.ID, 5, ""); eventsErr != nil ||
			(len(events) == 1) != (getErr == nil) {
			t.Errorf("incomplete row: %d events, row %v, %v", len(events), getErr, eventsErr)
		}
	}
	mustInsert(t, st, small("org_a", 0))
}
