package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/diff/apply"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	ctdsnapshot "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/gc"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/solver/llbsolver"
	"github.com/moby/buildkit/solver/llbsolver/history"
	"github.com/moby/buildkit/util/db"
	"github.com/moby/buildkit/util/db/boltutil"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// engine is BuildKit with one worker: the solver of builds, and the cache.
type engine struct {
	sessions    *session.Manager
	worker      *base.Worker
	solver      *llbsolver.Solver
	results     solver.CacheManager
	store       *bboltcachestorage.Store
	past        db.DB
	snapshotter string
	cacheBytes  int64
	blobs       string                                  // directory of the content
	collect     func(context.Context) (gc.Stats, error) // removes content that no record of the cache names
	builds      sync.Map                                // *build by the ID of its session
}

// openEngine opens the cache below dir, or makes one. exec runs the steps.
func openEngine(ctx context.Context, dir string, cacheBytes int64, exec executor.Executor) (_ *engine, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the cache: %w", err)
	}
	e := &engine{cacheBytes: cacheBytes, blobs: filepath.Join(dir, "content")}
	opt, err := e.workerOptions(ctx, dir, exec)
	if err != nil {
		return nil, err
	}
	e.collect = opt.GarbageCollect
	if e.worker, err = base.NewWorker(ctx, opt); err != nil {
		return nil, fmt.Errorf("opening the cache: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.worker.Close())
		}
	}()
	if e.sessions, err = session.NewManager(); err != nil {
		return nil, fmt.Errorf("opening the cache: %w", err)
	}
	workers := &worker.Controller{}
	if err := workers.Add(e.worker); err != nil {
		return nil, fmt.Errorf("opening the cache: %w", err)
	}
	if e.store, err = bboltcachestorage.NewStore(filepath.Join(dir, "cache.db")); err != nil {
		return nil, fmt.Errorf("opening the cache's index: %w", err)
	}
	e.results = solver.NewCacheManager(ctx, "local", e.store, worker.NewCacheResultStorage(workers))
	past, err := e.history(dir, opt)
	if err != nil {
		return nil, errors.Join(err, e.store.Close())
	}
	// This is the only front end. A gateway would start others from images.
	e.solver, err = llbsolver.New(llbsolver.Opt{
		WorkerController: workers,
		Frontends:        map[string]frontend.Frontend{frontendName: forwarder.NewGatewayForwarder(workers.Infos(), e.frontEnd)},
		CacheManager:     e.results,
		SessionManager:   e.sessions,
		HistoryQueue:     past,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting the solver: %w", err), e.store.Close())
	}
	return e, nil
}

// workerOptions opens what the worker keeps on disk.
func (e *engine) workerOptions(ctx context.Context, dir string,
	exec executor.Executor) (opt base.WorkerOpt, err error) {
	snapshots, err := e.openSnapshots(filepath.Join(dir, "snapshots"))
	if err != nil {
		return opt, fmt.Errorf("opening the snapshots: %w", err)
	}
	blobs, err := local.NewStore(e.blobs)
	if err != nil {
		return opt, fmt.Errorf("opening the blobs: %w", err)
	}
	db, err := boltutil.Open(filepath.Join(dir, "containerd.db"), 0o600,
		&bolt.Options{FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	if err != nil {
		return opt, fmt.Errorf("opening the cache's records: %w", err)
	}
	records := ctdmetadata.NewDB(db, blobs, map[string]ctdsnapshot.Snapshotter{e.snapshotter: snapshots})
	if err := records.Init(ctx); err != nil {
		return opt, errors.Join(fmt.Errorf("opening the cache's records: %w", err), db.Close())
	}
	meta, err := metadata.NewStore(filepath.Join(dir, "metadata.db"))
	if err != nil {
		return opt, errors.Join(fmt.Errorf("opening the cache's records: %w", err), db.Close())
	}
	id, err := base.ID(dir)
	if err != nil {
		return opt, errors.Join(fmt.Errorf("naming the worker: %w", err), db.Close(), meta.Close())
	}
	const namespace = "cay"
	content := containerdsnapshot.NewContentStore(records.ContentStore(), namespace)
	return base.WorkerOpt{
		ID:              id,
		Root:            dir,
		MetadataStore:   meta,
		ContentMetadata: db,
		Executor:        exec,
		Snapshotter:     containerdsnapshot.NewSnapshotter(e.snapshotter, records.Snapshotter(e.snapshotter), namespace, nil),
		ContentStore:    content,
		Applier:         apply.NewFileSystemApplier(content),
		Differ:          walking.NewWalkingDiff(content),
		Platforms:       []ocispecs.Platform{platforms.Normalize(platforms.DefaultSpec())},
		LeaseManager:    leaseutil.WithNamespace(ctdmetadata.NewLeaseManager(records), namespace),
		GarbageCollect:  records.GarbageCollect,
		MountPoolRoot:   filepath.Join(dir, "mounts"),
		RegistryHosts:   noRegistry,
	}, nil
}

// history returns the record of past builds that the solver needs. It stays empty.
func (e *engine) history(dir string, opt base.WorkerOpt) (*history.Queue, error) {
	var err error
	if e.past, err = boltutil.Open(filepath.Join(dir, "history.db"), 0o600, nil); err != nil {
		return nil, fmt.Errorf("opening the history: %w", err)
	}
	q, err := history.NewQueue(history.QueueOpt{
		DB: e.past, LeaseManager: opt.LeaseManager, ContentStore: opt.ContentStore,
		CleanConfig: &config.HistoryConfig{MaxEntries: new(int64)},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the history: %w", err), e.past.Close())
	}
	return q, nil
}

// openSnapshots uses overlayfs if the directory's file system can carry it, or else copies.
func (e *engine) openSnapshots(dir string) (ctdsnapshot.Snapshotter, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if overlayutils.Supported(dir) == nil {
		e.snapshotter = "overlayfs"
		return overlay.NewSnapshotter(filepath.Join(dir, e.snapshotter), overlay.AsynchronousRemove)
	}
	e.snapshotter = "native"
	return native.NewSnapshotter(filepath.Join(dir, e.snapshotter))
}

// sourceAge is the time for which a build's context is kept in the cache after its last use. It
// is cached under the build's own name, so that no later build finds it, but a running one may.
const sourceAge = time.Minute

// prune removes unused entries, the longest unused first, until at most keep bytes are left.
func (e *engine) prune(ctx context.Context, keep int64) (freed int64, err error) {
	removed := make(chan client.UsageInfo)
	summed := make(chan struct{})
	go func() {
		defer close(summed)
		for r := range removed {
			freed += r.Size
		}
	}()
	err = e.worker.Prune(ctx, removed,
		client.PruneInfo{Filter: []string{"type==source.local"}, KeepDuration: sourceAge},
		client.PruneInfo{All: true, MaxUsedSpace: keep, ReservedSpace: keep})
	close(removed)
	<-summed
	if err == nil && freed > 0 {
		err = e.results.ReleaseUnreferenced(ctx)
	}
	if err == nil {
		_, err = e.collect(ctx) // a failed build has no record
	}
	if err != nil {
		return freed, fmt.Errorf("pruning the cache: %w", err)
	}
	return freed, nil
}

func (e *engine) close() error {
	return errors.Join(e.solver.Close(), e.worker.Close(), e.store.Close(), e.past.Close())
}
