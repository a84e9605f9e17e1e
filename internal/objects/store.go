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

// owner is the content of ownerKey.
type owner struct {
	// Owner names the records whose files the bucket has. A server with other records would take the files for
	// unneeded and remove them.
	Owner string `json:"owner"`
}

// Claim makes a bucket the owner's. A bucket that is another owner's gives [ErrForeign].
func Claim(ctx context.Context, b Bucket, name string) error {
	const most = 2 // tries: the object may be written between reading and writing
	for try := 1; ; try++ {
		data, _, err := Read(ctx, b, ownerKey, maxOwner)
		if err == nil {
			var o owner
			if err := json.Unmarshal(data, &o); err != nil || o.Owner != name {
				return fmt.Errorf("%w: its %s names the owner %.40q, and this server's records are %.40q", ErrForeign, ownerKey,
					o.Owner, name)
			}
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("claiming the bucket: %w", err)
		}
		if data, err = json.Marshal(owner{name}); err != nil {
			return err
		}
		_, err = Write(ctx, b, ownerKey, data, Condition{Absent: true})
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

// Store has the mirrors of a bucket.
type Store struct {
	transfer *Transfer
	owner    string
	log      *slog.Logger
	mirrors  []*Mirror
	claimed  atomic.Bool
}

// NewStore returns the store of an owner over a bucket. Nothing is written before [Store.Run].
func NewStore(b Bucket, owner string, log *slog.Logger) *Store {
	return &Store{transfer: NewTransfer(b), owner: owner, log: log}
}

// Mirror adds a mirror with the configuration, before Run.
func (s *Store) Mirror(cfg MirrorConfig) *Mirror {
	cfg.Transfer, cfg.Log = s.transfer, s.log
	m := NewMirror(cfg)
	s.mirrors = append(s.mirrors, m)
	return m
}

// Claimed reports whether the bucket was reached and is the owner's.
func (s *Store) Claimed() bool { return s.claimed.Load() }

// Run claims the bucket and runs the mirrors until ctx ends. Until the bucket is reached the mirrors wait, and
// everything stays local. If the bucket is another owner's, Run returns [ErrForeign].
func (s *Store) Run(ctx context.Context) error {
	for pause := firstRetry; ; pause = min(2*pause, claimRetry) {
		err := Claim(ctx, s.transfer.bucket, s.owner)
		if err == nil {
			break
		}
		if errors.Is(err, ErrForeign) {
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
	for _, m := range s.mirrors {
		wg.Go(func() { m.Run(ctx) })
	}
	wg.Wait()
	return nil
}
