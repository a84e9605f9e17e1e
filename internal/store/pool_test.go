package store

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// fullPooled returns a pooled sandbox with a value in every field.
func fullPooled(i int) sandbox.Pooled {
	return sandbox.Pooled{ID: sandbox.NewID(), Run: fmt.Sprint("run", i), Token: "secret",
		OrgID: "org_a", Template: "python", TemplateID: "tpl_python", TemplateVersion: 3, Shape: fullShape(i),
		CreatedAt: start.Add(time.Duration(i) * time.Second), Holder: holderOfTests}
}

func mustAdd(t *testing.T, st sandbox.Store, m sandbox.Pooled) sandbox.Pooled {
	t.Helper()
	if err := st.AddPooled(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	return m
}

// claimed returns the sandbox that a pooled sandbox becomes when org claims it.
func claimed(m sandbox.Pooled, org string) sandbox.Sandbox {
	s := fullSandbox(org, 0)
	s.ID, s.Run, s.State = m.ID, m.Run, sandbox.Running
	s.StartedAt = s.CreatedAt.Add(time.Millisecond)
	return s
}

func wantPooled(t *testing.T, st sandbox.Store, want ...sandbox.Pooled) {
	t.Helper()
	got, err := st.ListPooled(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, prefixes); d != "" {
		t.Errorf("pooled sandboxes (-want +got):\n%s", d)
	}
}

func poolRows(t *testing.T, st sandbox.Store) {
	wantPooled(t, st)
	b, a := mustAdd(t, st, fullPooled(2)), mustAdd(t, st, fullPooled(1))
	wantPooled(t, st, a, b)
	if err := st.AddPooled(t.Context(), a); err == nil {
		t.Error("added a pooled sandbox twice")
	}
	s := mustInsert(t, st, small("org_a", 0))
	taken := fullPooled(3)
	taken.ID = s.ID
	if err := st.AddPooled(t.Context(), taken); err == nil {
		t.Error("added a pooled sandbox with the ID of a sandbox")
	}
	if images, err := st.Images(t.Context()); err != nil || len(images) != 2 ||
		images[0] != a.Image || images[1] != b.Image {
		t.Errorf("images %v, %v", images, err)
	}
	for range 2 {
		if err := st.DropPooled(t.Context(), a.ID); err != nil {
			t.Error(err)
		}
	}
	wantPooled(t, st, b)
}

func poolClaim(t *testing.T, st sandbox.Store) {
	ctx := t.Context()
	a, b := mustAdd(t, st, fullPooled(1)), mustAdd(t, st, fullPooled(2))
	once := sandbox.Once{Key: "key", Hash: "hash"}
	want := claimed(a, "org_a")
	if _, found, err := st.Claim(ctx, want, sandbox.Quota{Sandboxes: 1}, once); err != nil || found {
		t.Fatalf("claiming: found %v, %v", found, err)
	}
	wantPooled(t, st, b)
	got, err := st.Get(ctx, a.ID)
	if d := cmp.Diff(asStored(want), got, prefixes); err != nil || d != "" {
		t.Errorf("the row (-want +got), %v:\n%s", err, d)
	}
	events, _, err := st.Events(ctx, a.ID, 10, "")
	if err != nil || len(events) != 2 ||
		events[1].From != "" || events[1].To != sandbox.Creating || !events[1].At.Equal(want.CreatedAt) ||
		events[0].From != sandbox.Creating || events[0].To != sandbox.Running ||
		!events[0].At.Equal(asStored(want).StartedAt) {
		t.Errorf("events %+v, %v", events, err)
	}
	if ids := listIDs(t, st, sandbox.Filter{OrgID: "org_a", Metadata: map[string]string{"team": "red"},
		Limit: 10}); len(ids) != 1 {
		t.Errorf("sandboxes found by metadata: %v", ids)
	}

	// A refused claim writes nothing, and Admit returns the same error before it.
	for name, c := range map[string]struct {
		sbx  sandbox.Sandbox
		q    sandbox.Quota
		once sandbox.Once
		code string
		kind fault.Kind
	}{
		"quota":    {claimed(b, "org_a"), sandbox.Quota{Sandboxes: 1}, sandbox.Once{}, "quota_exceeded", fault.Exhausted},
		"other":    {claimed(b, "org_a"), sandbox.Quota{}, sandbox.Once{Key: "key", Hash: "other"}, "idempotency_key_reused", fault.Conflict},
		"repeated": {claimed(b, "org_a"), sandbox.Quota{}, once, "", 0},
	} {
		for what, do := range map[string]func() (sandbox.Sandbox, bool, error){
			"admit": func() (sandbox.Sandbox, bool, error) { return st.Admit(ctx, c.sbx, c.q, c.once) },
			"claim": func() (sandbox.Sandbox, bool, error) { return st.Claim(ctx, c.sbx, c.q, c.once) },
		} {
			prior, found, err := do()
			switch {
			case c.code != "":
				wantFault(t, err, c.kind, c.code)
			case err != nil || !found || prior.ID != a.ID:
				t.Errorf("%s, %s: %s, found %v, %v", name, what, prior.ID, found, err)
			}
			wantPooled(t, st, b)
		}
	}
	if _, found, err := st.Admit(ctx, claimed(b, "org_a"), sandbox.Quota{Sandboxes: 2},
		sandbox.Once{Key: "new"}); err != nil || found {
		t.Errorf("admitting an allowed create: found %v, %v", found, err)
	}
	if err := st.DropPooled(ctx, b.ID); err != nil {
		t.Fatal(err)
	}
	_, _, err = st.Claim(ctx, claimed(b, "org_a"), sandbox.Quota{}, sandbox.Once{})
	wantFault(t, err, fault.Conflict, "no_member")
	if _, err := st.Get(ctx, b.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("claiming a dropped pooled sandbox made a row: %v", err)
	}
}

// poolClaimRace makes many claims at once, several for each of a few pooled sandboxes.
func poolClaimRace(t *testing.T, st sandbox.Store) {
	pooled := []sandbox.Pooled{
		mustAdd(t, st, fullPooled(1)),
		mustAdd(t, st, fullPooled(2)),
		mustAdd(t, st, fullPooled(3)),
	}
	var won atomic.Int64
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			m := pooled[i%len(pooled)]
			_, _, err := st.Claim(t.Context(), claimed(m, fmt.Sprint("org_", i)), sandbox.Quota{}, sandbox.Once{})
			if err == nil {
				won.Add(1)
				return
			}
			wantFault(t, err, fault.Conflict, "no_member")
		})
	}
	wg.Wait()
	if won.Load() != 3 {
		t.Errorf("%d claims of 3 pooled sandboxes succeeded", won.Load())
	}
	wantPooled(t, st)
}
