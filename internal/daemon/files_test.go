package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/archive"
	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

// noSource has no checkpoints.
type noSource struct{}

func (noSource) SavedNames() ([]string, error)            { return nil, nil }
func (noSource) OpenSaved(string) (*archive.Local, error) { return nil, errors.New("there is none") }

// TestStoredInTakenOverBucket gives the bucket of a copy to another server, and back.
func TestStoredInTakenOverBucket(t *testing.T) {
	ctx, log := t.Context(), slog.New(slog.DiscardHandler)
	db, err := store.Open(ctx, filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	bucket, err := objects.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	me, other := objects.Owner{Cluster: "mine", Directory: "here"}, objects.Owner{Cluster: "theirs", Directory: "there"}
	f := &files{store: objects.NewStore(bucket, me, log)}
	f.checkpoints = archive.New(archive.Config{Bucket: bucket, Transfer: f.store.Transfer(), Records: db,
		Source: noSource{}, Foreign: f.store.Foreign, Log: log})
	s := &server{files: f, log: log}

	snap := sandbox.Snapshot{ID: sandbox.NewSnapshotID(), OrgID: "org_a", State: sandbox.SnapshotCreating,
		CreatedAt: time.Now()}
	if err := db.AddSnapshot(ctx, snap, 0); err != nil {
		t.Fatal(err)
	}
	c, err := db.BeginCheckpoint(ctx, sandbox.StoredCheckpoint{Name: string(snap.ID), MadeAt: time.UnixMicro(1)})
	if err != nil {
		t.Fatal(err)
	}
	c.UploadedAt = time.Now()
	if err := db.EndCheckpoint(ctx, c); err != nil {
		t.Fatal(err)
	}
	f.checkpoints.Load(ctx)
	if !s.stored(c.Name, c.MadeAt) {
		t.Fatal("the copy is not stored")
	}
	for _, owner := range []objects.Owner{other, me} {
		if err := errors.Join(bucket.Delete(ctx, "cay.json"), objects.Claim(ctx, bucket, owner)); err != nil {
			t.Fatal(err)
		}
		err := f.store.Owned(ctx) // as each collection asks
		if got, want := s.stored(c.Name, c.MadeAt), owner == me; got != want || (err == nil) != want {
			t.Errorf("in the bucket of %s the copy is stored: %t, %v", owner.Cluster, got, err)
		}
	}
}

// TestBucketOfUnmountedDirectory names a directory that does not exist, and makes it.
func TestBucketOfUnmountedDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cay")
	cfg := config.Files{URL: "file://" + dir}
	all := CheckFiles(t.Context(), cfg)
	if len(all) != 1 || all[0].OK || !strings.Contains(all[0].Detail, "files.url: ") ||
		!strings.Contains(all[0].Detail, "create the directory") {
		t.Errorf("without the directory the findings are %+v", all)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range CheckFiles(t.Context(), cfg) {
		if !f.OK {
			t.Errorf("with the directory: %+v", f)
		}
	}
}

// TestBucketOfServers claims a bucket as a single server does, and then as the servers of a fleet do.
func TestBucketOfServers(t *testing.T) {
	bucket, err := objects.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	fleet := config.Config{Fleet: config.Fleet{Listen: "127.0.0.1:0"}, Store: config.Store{URL: "postgres:///cay"}}
	sqlite := config.Config{Fleet: fleet.Fleet}
	now, restored := store.Session{Cluster: "records", Generation: 1}, store.Session{Cluster: "records", Generation: 2}
	for i, c := range []struct {
		cfg       config.Config
		session   store.Session
		directory string
		refused   bool
	}{
		{config.Config{}, now, "here", false},
		{sqlite, now, "here", false},
		{config.Config{}, restored, "here", false}, // as before there were fleets
		{config.Config{}, now, "there", true},
		{fleet, now, "there", true}, // the bucket is not the fleet's yet
		{fleet, now, "here", false},
		{fleet, now, "there", false},
		{fleet, now, "here", false},
		{fleet, restored, "here", true},
		{fleet, store.Session{Cluster: "others", Generation: 1}, "here", true},
		{config.Config{}, now, "here", true},
	} {
		err := objects.Claim(t.Context(), bucket, ownerOf(c.cfg, c.session, c.directory))
		if errors.Is(err, objects.ErrForeign) != c.refused || !c.refused && err != nil {
			t.Errorf("claim %d: %v, want a refusal: %t", i, err, c.refused)
		}
	}
}
