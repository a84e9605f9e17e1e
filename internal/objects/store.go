package objects

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// ownerKey is the object that names the owner of a bucket.
	ownerKey = "cay.json"
	maxOwner = 4 << 10 // bytes of it
	// claimRetry bounds the pause between two tries to claim a bucket that cannot be reached, which doubles from
	// firstRetry on. A longer one delays the first uploads after the bucket is back.
	claimRetry = 15 * time.Second
)

// ErrForeign reports that a bucket, or the prefix in it, belongs to another owner.
var ErrForeign = errors.New("the bucket belongs to other records")

// Fleet is the directory of an owner that consists of several servers with the same records. No data directory has it
// as its id.
const Fleet = "fleet"

// Owner names the server or the fleet that may remove objects of a bucket. It is the content of ownerKey.
type Owner struct {
	// Cluster identifies the records whose files are in the bucket. A server with other records would take these files for
	// unneeded and remove them.
	Cluster string `json:"owner"`
	// Directory identifies the data directory of the server. A copy of the records elsewhere has the same cluster, but
	// lacks what the server has recorded since. Owners that earlier versions wrote have none.
	Directory string `json:"directory,omitempty"`
	// Generation tells the records of a fleet from a copy whose restore was accepted; 0 for a single server. The servers
	// of a fleet have no directory in common that a copy lacks.
	Generation int64 `json:"generation,omitempty"`
	// Before identifies the data directory of a server of a fleet. A bucket that was this server's becomes the fleet's.
	Before string `json:"-"`
}

// named returns o as ownerKey has it.
func (o Owner) named() Owner {
	o.Before = ""
	return o
}

// replaces reports whether o may claim a bucket of its own records that names found as its owner.
func (o Owner) replaces(found Owner) bool {
	return found.Directory == "" || o.Directory == Fleet && found.Directory == o.Before
}

// find reads the owner of a bucket. It returns [ErrForeign] if the owner is neither o nor one that o replaces, and
// fs.ErrNotExist if there is none.
func (o Owner) find(ctx context.Context, b Bucket) (found Owner, info Info, err error) {
	data, info, err := Read(ctx, b, ownerKey, maxOwner)
	if err != nil {
		return found, info, fmt.Errorf("reading the owner of the bucket: %w", err)
	}
	switch err := json.Unmarshal(data, &found); {
	case err != nil || found.Cluster != o.Cluster:
		return found, info, fmt.Errorf("%w: its %s names the owner %.40q, and this server's records are %.40q", ErrForeign,
			ownerKey, found.Cluster, o.Cluster)
	case found == o.named() || o.replaces(found):
		return found, info, nil
	case found.Directory == o.Directory:
		return found, info, fmt.Errorf("%w: its %s names generation %d of the records, and this server's are generation %d",
			ErrForeign, ownerKey, found.Generation, o.Generation)
	case found.Directory == Fleet:
		return found, info, fmt.Errorf("%w: its %s names a fleet, and this server is not in one", ErrForeign, ownerKey)
	default:
		return found, info, fmt.Errorf("%w: its %s names the data directory %.40q, and this server's is %.40q, with a copy "+
			"of the records", ErrForeign, ownerKey, found.Directory, o.Directory)
	}
}

// Claim makes a bucket the owner's. A bucket that is another owner's gives [ErrForeign].
func Claim(ctx context.Context, b Bucket, o Owner) error {
	const most = 2 // tries: the object may be written between reading and writing
	for try := 1; ; try++ {
		found, info, err := o.find(ctx, b)
		var only Condition
		switch {
		case err == nil && found == o.named():
			return nil
		case err == nil: // one that o replaces
			only.ETag = info.ETag
		case errors.Is(err, fs.ErrNotExist):
			only.Absent = true
		default:
			return err
		}
		data, err := json.Marshal(o)
		if err != nil {
			return err
		}
		_, err = Write(ctx, b, ownerKey, data, only)
		if err == nil || !errors.Is(err, ErrCondition) || try == most {
			return err
		}
	}
}

// Open opens the bucket at a location. It makes no request to an S3 server.
func Open(l Location, c Credentials) (Bucket, error) {
	if l.Dir != "" {
		return OpenDir(l.Dir)
	}
	return OpenS3(l, c)
}

// Store runs the mirrors of a bucket and the other functions that [Store.OnClaim] adds.
type Store struct {
	transfer *Transfer
	owner    Owner
	log      *slog.Logger
	runs     []func(context.Context)
	claimed  atomic.Bool
	foreign  atomic.Bool // the last owner that the bucket named was another one
}

// NewStore returns the store of an owner over a bucket. Nothing is written before [Store.Run].
func NewStore(b Bucket, owner Owner, log *slog.Logger) *Store {
	return &Store{transfer: NewTransfer(b), owner: owner, log: log}
}

// Mirror adds a mirror with the configuration, before Run.
func (s *Store) Mirror(cfg MirrorConfig) *Mirror {
	cfg.Transfer, cfg.Log, cfg.Owned, cfg.Foreign = s.transfer, s.log, s.Owned, s.Foreign
	m := NewMirror(cfg)
	s.OnClaim(m.Run)
	return m
}

// Owned returns an error unless the bucket is still the owner's.
func (s *Store) Owned(ctx context.Context) error {
	found, _, err := s.owner.find(ctx, s.transfer.bucket)
	if err == nil && found != s.owner.named() { // an earlier version has claimed it, or a server outside its fleet
		err = fmt.Errorf("%w: its %s names the data directory %.40q", ErrForeign, ownerKey, found.Directory)
	}
	if err == nil || errors.Is(err, ErrForeign) || errors.Is(err, fs.ErrNotExist) {
		s.claimed.Store(err == nil)
	}
	if err == nil || errors.Is(err, ErrForeign) {
		s.foreign.Store(err != nil)
	}
	return err
}

// OnClaim makes Run call f once the bucket is the owner's. f must return when its context ends. Call OnClaim before
// Run.
func (s *Store) OnClaim(f func(context.Context)) { s.runs = append(s.runs, f) }

// Transfer returns the Transfer that all mirrors share.
func (s *Store) Transfer() *Transfer { return s.transfer }

// Claimed reports whether the bucket was reached and is the owner's.
func (s *Store) Claimed() bool { return s.claimed.Load() }

// Foreign reports whether the bucket is another owner's, by what [Store.Run] or [Store.Owned] has read last.
func (s *Store) Foreign() bool { return s.foreign.Load() }

// Run claims the bucket and runs the mirrors until ctx ends. Until the bucket is reached the mirrors wait, and
// everything stays local. If the bucket is another owner's, Run returns [ErrForeign].
func (s *Store) Run(ctx context.Context) error {
	for pause := firstRetry; ; pause = min(2*pause, claimRetry) {
		err := Claim(ctx, s.transfer.bucket, s.owner)
		if err == nil {
			break
		}
		if errors.Is(err, ErrForeign) {
			s.foreign.Store(true)
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		if pause == firstRetry {
			s.log.Warn("cannot reach the bucket of files; they stay on this machine until it answers", "error", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
	s.claimed.Store(true)
	var wg sync.WaitGroup
	for _, run := range s.runs {
		wg.Go(func() { run(ctx) })
	}
	wg.Wait()
	return nil
}
