package store

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestExpect checks what a call reads that expects a sandbox after its key, on both databases.
func TestExpect(t *testing.T) {
	for name, open := range map[string]func(t testing.TB) *DB{"sqlite": open, "postgres": openPostgres} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			expects(t, open(t))
		})
	}
}

func expects(t *testing.T, db *DB) {
	org, key := mustPutOrg(t, db, "a", 0)
	s := fullSandbox(org.ID, 0)
	mustInsert(t, db, s)
	want, err := db.Get(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	// begin reads the key in a call that expects a sandbox.
	begin := func(id sandbox.ID) context.Context {
		t.Helper()
		ctx := db.Expect(t.Context(), id)
		k, o, err := db.KeyByHash(ctx, key.Hash)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(key, k) + cmp.Diff(org, o); diff != "" {
			t.Errorf("key and organization (-want +got):\n%s", diff)
		}
		return ctx
	}
	get := func(ctx context.Context) sandbox.Sandbox {
		t.Helper()
		got, err := db.Get(ctx, s.ID)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}

	// A canceled context shows which reads ask the database.
	ctx, cancel := context.WithCancel(begin(s.ID))
	cancel()
	if diff := cmp.Diff(want, get(ctx)); diff != "" {
		t.Errorf("the sandbox that was read with the key (-want +got):\n%s", diff)
	}
	if _, err := db.Get(ctx, s.ID); err == nil {
		t.Error("the row was returned twice")
	}
	ctx, cancel = context.WithCancel(begin("sbx_aaaaaaaaaaaaaaaaaaaa"))
	cancel()
	if _, err := db.Get(ctx, s.ID); err == nil {
		t.Error("a call that expects another sandbox did not read this one")
	}

	// A write that has returned is seen, of this sandbox or of another.
	ctx = begin(s.ID)
	moved, err := db.Transition(t.Context(), sandbox.Change{ID: s.ID, From: []sandbox.State{sandbox.Creating},
		To: sandbox.Running, At: start})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(moved, get(ctx)); diff != "" {
		t.Errorf("after a transition (-want +got):\n%s", diff)
	}
	ctx = begin(s.ID)
	if err := db.SetActivity(t.Context(), map[sandbox.ID]time.Time{s.ID: start.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if got := get(ctx); !got.LastActivityAt.Equal(start.Add(time.Hour)) {
		t.Errorf("after an activity its last one is %s", got.LastActivityAt)
	}

	// A key without the sandbox, and a sandbox without the key.
	ctx = begin("sbx_aaaaaaaaaaaaaaaaaaaa")
	_, err = db.Get(ctx, "sbx_aaaaaaaaaaaaaaaaaaaa")
	wantFault(t, err, fault.NotFound, fault.CodeSandboxNotFound)
	ctx = db.Expect(t.Context(), s.ID)
	_, _, err = db.KeyByHash(ctx, []byte("another"))
	wantFault(t, err, fault.NotFound, fault.CodeAPIKeyNotFound)
	// A revoked key comes with its revocation.
	if err := db.RevokeKey(t.Context(), org.ID, key.ID, start); err != nil {
		t.Fatal(err)
	}
	if k, _, err := db.KeyByHash(db.Expect(t.Context(), s.ID), key.Hash); err != nil || !k.RevokedAt.Equal(start) {
		t.Errorf("a revoked key is revoked at %s, %v", k.RevokedAt, err)
	}
}
