package store

import (
	"slices"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func publicPorts(t *testing.T, st sandbox.Store) {
	ctx := t.Context()
	a, b := mustInsert(t, st, small("org_a", 0)), mustInsert(t, st, small("org_a", 1))
	set := func(id sandbox.ID, port int, public bool) {
		t.Helper()
		if err := st.SetPublicPort(ctx, id, port, public); err != nil {
			t.Fatal(err)
		}
	}
	want := func(id sandbox.ID, ports ...int) {
		t.Helper()
		if got, err := st.PublicPorts(ctx, id); err != nil || !slices.Equal(got, ports) {
			t.Errorf("ports %v, %v, want %v", got, err, ports)
		}
	}
	want(a.ID)
	for range 2 {
		set(a.ID, 8080, true)
		set(a.ID, 80, true)
		set(b.ID, 443, true)
	}
	want(a.ID, 80, 8080)
	set(a.ID, 80, false)
	set(a.ID, 80, false)
	set(a.ID, 81, false)
	want(a.ID, 8080)
	want(b.ID, 443)
	for port := 1; port < sandbox.MaxPublicPorts; port++ {
		set(a.ID, port, true)
	}
	set(a.ID, 8080, true) // port 8080 is public already
	wantFault(t, st.SetPublicPort(ctx, a.ID, 9000, true), fault.Conflict, "too_many_public_ports")
	wantFault(t, st.SetPublicPort(ctx, sandbox.NewID(), 9000, true), fault.NotFound, "sandbox_not_found")

	mustMove(t, st, b.ID, sandbox.Creating, sandbox.Destroyed, start)
	want(b.ID, 443)
	if n, err := st.Purge(ctx, start.Add(time.Hour), start, 0); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	want(b.ID)
}
