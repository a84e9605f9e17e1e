package store

import (
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// fullSnapshot returns a snapshot with a value in every field.
func fullSnapshot(org, name string, i int) sandbox.Snapshot {
	return sandbox.Snapshot{ID: sandbox.NewSnapshotID(), OrgID: org, Name: name,
		State: sandbox.SnapshotCreating, SandboxID: sandbox.NewID(),
		Template: "python", TemplateID: "tpl_python", TemplateVersion: 3, Shape: fullShape(i),
		Bytes: 7, Kept: sandbox.KeepFiles, Holder: holderOfTests, CreatedAt: start.Add(time.Duration(i) * time.Second)}
}

// mustSave adds a snapshot and makes it ready.
func mustSave(t *testing.T, st sandbox.Store, s sandbox.Snapshot) sandbox.Snapshot {
	t.Helper()
	if err := st.AddSnapshot(t.Context(), s, 0); err != nil {
		t.Fatal(err)
	}
	s, err := st.ReadySnapshot(t.Context(), s.ID, s.CreatedAt, s.Bytes, sandbox.Event{At: s.CreatedAt})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func snapshotLives(t *testing.T, st sandbox.Store) {
	ctx := t.Context()
	s := fullSnapshot("org_a", "first", 0)
	for _, f := range reflect.VisibleFields(reflect.TypeFor[sandbox.Snapshot]()) {
		if reflect.ValueOf(s).FieldByIndex(f.Index).IsZero() {
			t.Errorf("the test leaves field %s empty", f.Name)
		}
	}
	if err := st.AddSnapshot(ctx, s, 1); err != nil {
		t.Fatal(err)
	}
	got, err := st.GetSnapshot(ctx, s.ID)
	if d := cmp.Diff(s, got, prefixes); err != nil || d != "" {
		t.Errorf("the row (-want +got), %v:\n%s", err, d)
	}
	// A snapshot that is not ready cannot be found, but its name is taken.
	_, err = st.FindSnapshot(ctx, "org_a", "first")
	wantFault(t, err, fault.NotFound, "snapshot_not_found")
	wantFault(t, st.AddSnapshot(ctx, fullSnapshot("org_a", "first", 1), 2), fault.Conflict, "snapshot_exists")
	wantFault(t, st.AddSnapshot(ctx, fullSnapshot("org_a", "second", 1), 1), fault.Exhausted, "quota_exceeded")
	if err := st.AddSnapshot(ctx, fullSnapshot("org_b", "first", 1), 1); err != nil {
		t.Errorf("using the name in another organization: %v", err)
	}
	if unready, err := st.UnreadySnapshots(ctx); err != nil || len(unready) != 2 || unready[0].ID != s.ID {
		t.Errorf("the snapshots that are not ready are %+v, %v", unready, err)
	}

	s.State, s.CreatedAt, s.Bytes = sandbox.SnapshotReady, start.Add(time.Minute), 1<<40
	got, err = st.ReadySnapshot(ctx, s.ID, s.CreatedAt, s.Bytes, sandbox.Event{At: s.CreatedAt})
	if d := cmp.Diff(s, got, prefixes); err != nil || d != "" {
		t.Errorf("ready (-want +got), %v:\n%s", err, d)
	}
	_, err = st.ReadySnapshot(ctx, s.ID, s.CreatedAt, s.Bytes, sandbox.Event{At: s.CreatedAt})
	wantFault(t, err, fault.Conflict, "snapshot_state")
	if got, err = st.FindSnapshot(ctx, "org_a", "first"); err != nil || got.ID != s.ID {
		t.Errorf("found %+v, %v", got, err)
	}
	if images, err := st.Images(ctx); err != nil || cmp.Diff([]string{"image0", "image1"}, images) != "" {
		t.Errorf("images are %v, %v", images, err)
	}

	// A snapshot that is being deleted cannot be found, and its name is free.
	for range 2 {
		if err := st.EndSnapshot(ctx, s.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err = st.FindSnapshot(ctx, "org_a", "first")
	wantFault(t, err, fault.NotFound, "snapshot_not_found")
	again := mustSave(t, st, fullSnapshot("org_a", "first", 2))
	for range 2 {
		if err := st.DropSnapshot(ctx, s.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err = st.GetSnapshot(ctx, s.ID)
	wantFault(t, err, fault.NotFound, "snapshot_not_found")
	wantFault(t, st.EndSnapshot(ctx, s.ID), fault.NotFound, "snapshot_not_found")
	if got, err = st.FindSnapshot(ctx, "org_a", "first"); err != nil || got.ID != again.ID {
		t.Errorf("found %+v, %v", got, err)
	}
	// Snapshots without a name do not count as having the same name.
	mustSave(t, st, fullSnapshot("org_a", "", 3))
	mustSave(t, st, fullSnapshot("org_a", "", 4))
	_, err = st.FindSnapshot(ctx, "org_a", "")
	wantFault(t, err, fault.NotFound, "snapshot_not_found")
}

func snapshotLists(t *testing.T, st sandbox.Store) {
	var all []sandbox.Snapshot
	for i := range 5 {
		all = append(all, mustSave(t, st, fullSnapshot("org_a", fmt.Sprint("s", i), i)))
	}
	mustSave(t, st, fullSnapshot("org_b", "s1", 0))
	if err := st.AddSnapshot(t.Context(), fullSnapshot("org_a", "unready", 9), 0); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		f    sandbox.SnapshotFilter
		want []int
	}{
		"all":              {sandbox.SnapshotFilter{OrgID: "org_a"}, []int{4, 3, 2, 1, 0}},
		"by name":          {sandbox.SnapshotFilter{OrgID: "org_a", Name: "s1"}, []int{1}},
		"by sandbox":       {sandbox.SnapshotFilter{OrgID: "org_a", SandboxID: all[2].SandboxID}, []int{2}},
		"by both, neither": {sandbox.SnapshotFilter{OrgID: "org_a", Name: "s1", SandboxID: all[2].SandboxID}, nil},
		"none":             {sandbox.SnapshotFilter{OrgID: "org_c"}, nil},
	} {
		var got []sandbox.SnapshotID
		c.f.Limit = 2
		for pages := 0; ; pages++ {
			page, next, err := st.ListSnapshots(t.Context(), c.f)
			if err != nil || pages > 3 {
				t.Fatalf("%s: page %d, %v", name, pages, err)
			}
			for _, s := range page {
				got = append(got, s.ID)
			}
			if c.f.Cursor = next; next == "" {
				break
			}
		}
		var want []sandbox.SnapshotID
		for _, i := range c.want {
			want = append(want, all[i].ID)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	_, _, err := st.ListSnapshots(t.Context(), sandbox.SnapshotFilter{OrgID: "org_a", Limit: 2, Cursor: "nonsense"})
	wantFault(t, err, fault.Invalid, "invalid_cursor")
}

// snapshotNameRace adds many snapshots at once with one name and one place left in the quota, and
// checks that one succeeds.
func snapshotNameRace(t *testing.T, st sandbox.Store) {
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if st.AddSnapshot(t.Context(), fullSnapshot("org_a", "same", i), 5) == nil {
				won.Add(1)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d snapshots have one name", won.Load())
	}
}
