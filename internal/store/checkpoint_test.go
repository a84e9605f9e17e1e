package store

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// checkpointOf returns a copy with a value in every field that BeginCheckpoint writes.
func checkpointOf(name string, made time.Time) sandbox.StoredCheckpoint {
	return sandbox.StoredCheckpoint{Name: name, Node: holderOfTests.Node, Fence: 7, MadeAt: made, CPUClass: "amd64-1",
		Agent: "aa", Runsc: "bb"}
}

func testCheckpointStore(t *testing.T, db *DB) {
	var st sandbox.CheckpointStore = db
	ctx := t.Context()
	begin := func(c sandbox.StoredCheckpoint) sandbox.StoredCheckpoint {
		t.Helper()
		c, err := st.BeginCheckpoint(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	want := func(all ...sandbox.StoredCheckpoint) {
		t.Helper()
		got, err := st.StoredCheckpoints(ctx)
		if d := cmp.Diff(all, got); err != nil || d != "" {
			t.Errorf("the rows (-want +got), %v:\n%s", err, d)
		}
	}
	sbx := mustInsert(t, db, small("org_a", 1))
	snap := fullSnapshot("org_a", "first", 0)
	if err := db.AddSnapshot(ctx, snap, 0); err != nil {
		t.Fatal(err)
	}
	_, err := st.BeginCheckpoint(ctx, checkpointOf("sbx_none", start))
	wantFault(t, err, fault.NotFound, "sandbox_not_found")

	ofSandbox, ofSnap := begin(checkpointOf(string(sbx.ID), start)), begin(checkpointOf(string(snap.ID), start))
	for _, c := range []sandbox.StoredCheckpoint{ofSandbox, ofSnap} {
		if c.Number != start.UnixMicro() {
			t.Errorf("the first copy of %s has the number %d", c.Name, c.Number)
		}
	}
	if again := begin(checkpointOf(string(sbx.ID), start)); again != ofSandbox {
		t.Errorf("the same checkpoint begun again is %+v, want %+v", again, ofSandbox)
	}
	end := func(c *sandbox.StoredCheckpoint) {
		t.Helper()
		c.Bytes, c.Sum, c.UploadedAt = 11, "cc", c.MadeAt.Add(time.Minute)
		for _, f := range reflect.VisibleFields(reflect.TypeFor[sandbox.StoredCheckpoint]()) {
			if reflect.ValueOf(*c).FieldByIndex(f.Index).IsZero() {
				t.Errorf("the test leaves field %s empty", f.Name)
			}
		}
		if err := st.EndCheckpoint(ctx, *c); err != nil {
			t.Fatal(err)
		}
	}
	end(&ofSnap)
	end(&ofSandbox)
	want(ofSandbox, ofSnap)

	// The earlier copy stays until the later one is uploaded.
	later := begin(checkpointOf(string(sbx.ID), start.Add(time.Hour)))
	if later.Number != later.MadeAt.UnixMicro() {
		t.Errorf("the second copy has the number %d", later.Number)
	}
	want(ofSandbox, later, ofSnap)
	end(&later)
	want(later, ofSnap)
	newest := begin(checkpointOf(string(sbx.ID), start.Add(2*time.Hour)))
	abandoned := newest
	want(later, newest, ofSnap)
	// A copy that is begun ends those that were begun before and are not whole, of its name alone.
	again := begin(checkpointOf(string(snap.ID), start.Add(time.Hour)))
	newest = begin(checkpointOf(string(sbx.ID), start.Add(3*time.Hour)))
	want(later, newest, ofSnap, again)
	end(&newest)
	want(newest, ofSnap, again)
	end(&again)
	ofSnap = again
	want(newest, ofSnap)
	wantFault(t, st.EndCheckpoint(ctx, abandoned), fault.NotFound, "sandbox_not_found")
	want(newest, ofSnap)

	// A lost copy is no upload to continue. It may be found again, unless a later one was begun.
	mark := func(c sandbox.StoredCheckpoint, uploaded time.Time) sandbox.StoredCheckpoint {
		t.Helper()
		c.UploadedAt = uploaded
		if err := st.MarkCheckpoint(ctx, c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	lost := mark(newest, time.Time{})
	want(lost, ofSnap)
	if !lost.Lost() || newest.Lost() || ofSandbox.Lost() {
		t.Errorf("lost are %t, %t, %t", lost.Lost(), newest.Lost(), ofSandbox.Lost())
	}
	want(mark(newest, newest.UploadedAt), ofSnap)
	mark(newest, time.Time{})
	again = begin(checkpointOf(newest.Name, newest.MadeAt))
	if again.Number != newest.Number+1 || again.Lost() {
		t.Errorf("the lost copy %+v is begun again as %+v", newest, again)
	}
	mark(newest, newest.UploadedAt)
	mark(again, newest.UploadedAt) // it was never uploaded
	want(again, ofSnap)
	end(&again)
	newest = again
	want(newest, ofSnap)
	other := checkpointOf(newest.Name, start)
	other.Node = "node_b"
	_, err = st.BeginCheckpoint(ctx, other)
	wantFault(t, err, fault.Unavailable, "not_ready")
	wantFault(t, st.EndCheckpoint(ctx, other), fault.Unavailable, "not_ready")

	// A higher fence is later, whatever the numbers.
	fenced := checkpointOf(string(sbx.ID), start)
	fenced.Fence = 8
	if fenced = begin(fenced); fenced.Number != start.UnixMicro() {
		t.Errorf("the first copy of a fence has the number %d", fenced.Number)
	}
	lower := begin(checkpointOf(string(sbx.ID), start.Add(5*time.Hour))) // ends no later copy
	want(newest, lower, fenced, ofSnap)
	end(&fenced)
	want(fenced, ofSnap)

	// A clock that was set back gives no lower number.
	back := checkpointOf(string(sbx.ID), start.Add(-time.Hour))
	back.Fence = fenced.Fence
	if back = begin(back); back.Number != fenced.Number+1 {
		t.Errorf("the copy after %d has the number %d", fenced.Number, back.Number)
	}
	end(&back)
	fenced = back
	want(fenced, ofSnap)

	if err := st.DropCheckpoints(ctx); err != nil {
		t.Fatal(err)
	}
	want(fenced, ofSnap)
	mustMove(t, db, sbx.ID, sandbox.Creating, sandbox.Destroyed, start)
	if err := st.DropCheckpoints(ctx); err != nil {
		t.Fatal(err)
	}
	want(ofSnap)
	wantFault(t, st.EndCheckpoint(ctx, fenced), fault.NotFound, "sandbox_not_found")
	_, err = st.BeginCheckpoint(ctx, fenced)
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
	if err := db.DropSnapshot(ctx, snap.ID); err != nil {
		t.Fatal(err)
	}
	if err := st.DropCheckpoints(ctx); err != nil {
		t.Fatal(err)
	}
	want()
}

// testAlone has two servers with the same records do the same.
func testAlone(t *testing.T, one, other *DB) {
	ran, failed := false, errors.New("failed")
	err := one.Alone(t.Context(), "a", func(ctx context.Context) error {
		run := func(db *DB, name string) (ran bool) {
			if err := db.Alone(ctx, name, func(context.Context) error { ran = true; return nil }); err != nil {
				t.Error(err)
			}
			return ran
		}
		if run(other, "a") {
			t.Error("two servers did the same at once")
		}
		if !run(other, "b") {
			t.Error("another name was locked too")
		}
		ran = true
		return failed
	})
	if !ran || !errors.Is(err, failed) {
		t.Errorf("ran: %t, %v", ran, err)
	}
	ran = false
	if err := other.Alone(t.Context(), "a", func(context.Context) error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("after that the other ran: %t, %v", ran, err)
	}
}

// TestAlone has two servers on one PostgreSQL, and lets the connection of one break.
func TestAlone(t *testing.T) {
	url := newDatabase(t, true)
	one, other := openURL(t, url), openURL(t, url)
	testAlone(t, one, other)
	err := one.Alone(t.Context(), "a", func(ctx context.Context) error {
		if _, err := other.writer.ExecContext(t.Context(), `SELECT pg_terminate_backend(l.pid) FROM pg_locks l
			WHERE l.locktype = 'advisory' AND l.pid <> pg_backend_pid() AND l.granted`); err != nil {
			t.Error(err)
		}
		<-ctx.Done() // within aloneCheck
		return context.Cause(ctx)
	})
	if err == nil {
		t.Error("a broken connection is no error")
	}
	testAlone(t, other, one)
}
