// Package archive copies checkpoints to a bucket, so that they outlive the disk of the machine that made them.
//
// An [Archive] uploads the latest checkpoint of each sandbox and snapshot in the background, the newest first, with the
// programs that it needs, and records the copy. The objects of a checkpoint are
//
//	checkpoints/NAME/FENCE/NUMBER/FILE       the files of the checkpoint
//	checkpoints/NAME/FENCE/NUMBER/seal.json  their names, sizes and SHA-256, with a MAC
//	programs/SHA-256                         a program that checkpoints need
//
// No object is written twice. A copy counts from the moment at which its row has the SHA-256 of its seal; what is in
// the bucket without a row means nothing and is removed after [objects.Grace], and so is a copy that a later one
// replaced. Whoever can write to the bucket can withhold a checkpoint and not change it: the key of the MAC is in the
// database. Objects are not encrypted, and have the memory of tenants in them.
//
// While the bucket or the database is away, everything stays on the machine and is uploaded later, also by the next
// process. All methods are safe for concurrent use.
package archive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
)

// Prefixes of keys.
const (
	checkpointPrefix = "checkpoints/"
	programPrefix    = "programs/"
)

// fence is the fence of all copies. No other node can take over a sandbox of this one, and an upload that a process
// began under its own fence is continued by the next process.
const fence = 0

// collectInterval is the time between two collections. A longer one leaves the objects of destroyed sandboxes for
// longer than the grace; a shorter one lists the bucket more often.
const collectInterval = time.Hour

// Local holds the files of a checkpoint on this machine open.
type Local struct {
	MadeAt       time.Time // time of the state that it holds
	CPUClass     string    // of the machine that made it
	Agent, Runsc string    // paths of the programs that it needs
	Files        []*os.File
}

// Close closes the files.
func (l *Local) Close() error {
	var errs []error
	for _, f := range l.Files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// size returns the bytes of the files.
func (l *Local) size() (bytes int64) {
	for _, f := range l.Files {
		if info, err := f.Stat(); err == nil {
			bytes += info.Size()
		}
	}
	return bytes
}

// Source has the checkpoints of this machine.
type Source interface {
	// SavedNames returns the IDs of the sandboxes and snapshots that may have a checkpoint here.
	SavedNames() ([]string, error)
	// OpenSaved opens the latest checkpoint of one. It returns fs.ErrNotExist if there is none.
	OpenSaved(name string) (*Local, error)
}

// Config configures an Archive.
type Config struct {
	Bucket   objects.Bucket
	Transfer *objects.Transfer // over Bucket
	Node     string            // whose checkpoints they are
	Records  sandbox.CheckpointStore
	Source   Source
	Key      []byte // of the MACs
	// MaxUnneeded is the size of the objects, in bytes, that stay for [objects.Grace] after they were needed; beyond it
	// the oldest go after an hour. It bounds what the bucket keeps of sandboxes that are saved all the time. 0 is no
	// limit.
	MaxUnneeded int64
	// Alone calls f, unless another process does so under the name. Objects are removed in it.
	Alone func(ctx context.Context, name string, f func(context.Context) error) error
	Log   *slog.Logger
	// Now replaces the clock in tests; nil is time.Now.
	Now func() time.Time
}

// Archive copies checkpoints. [Archive.Run] does the work in the background.
type Archive struct {
	cfg         Config
	queue       *objects.Queue
	checkpoints *objects.Sweep
	programs    *objects.Sweep
	uploaded    atomic.Int64

	mu sync.Mutex
	// +checklocks:mu
	stored map[string]time.Time // the MadeAt of the newest copy, by name
	// +checklocks:mu
	sums map[string]objects.Sum // of the programs that the bucket has, by path
}

// New returns an Archive.
func New(cfg Config) *Archive {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Archive{cfg: cfg, queue: objects.NewQueue(checkpointPrefix, cfg.Log, cfg.Now),
		checkpoints: objects.NewSweep(cfg.Transfer, checkpointPrefix, cfg.MaxUnneeded, cfg.Log, cfg.Now),
		programs:    objects.NewSweep(cfg.Transfer, programPrefix, 0, cfg.Log, cfg.Now),
		stored:      map[string]time.Time{}, sums: map[string]objects.Sum{}}
}

// Offer has the latest checkpoint of a sandbox or snapshot uploaded, of about that many bytes. It does not wait.
func (a *Archive) Offer(name string, bytes int64) { a.queue.Add(name, bytes) }

// Stored reports whether the bucket has the checkpoint of a sandbox or snapshot that was made at that time, or a later
// one.
func (a *Archive) Stored(name string, made time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	at, ok := a.stored[name]
	return ok && !at.Before(made)
}

// Counts returns what the archive has done and has still to do.
func (a *Archive) Counts() objects.Counts {
	c := objects.Counts{Uploaded: a.uploaded.Load()}
	c.Waiting, c.WaitingBytes, c.Lag = a.queue.Counts()
	return c
}

// Load learns from the records which checkpoints are stored, and offers the others that are on this machine. It needs
// no bucket. Call it before Run, when the source has its checkpoints.
func (a *Archive) Load(ctx context.Context) {
	if _, err := a.copies(ctx); err != nil && ctx.Err() == nil {
		a.cfg.Log.Warn("cannot read which checkpoints were copied, and copies all", "error", err)
	}
	names, err := a.cfg.Source.SavedNames()
	if err != nil {
		a.cfg.Log.Error("cannot list the checkpoints that are to be copied", "error", err)
	}
	for _, name := range names {
		l, err := a.cfg.Source.OpenSaved(name)
		if err != nil {
			continue // it is gone, or its next use tells what is wrong with it
		}
		if !a.Stored(name, l.MadeAt) {
			a.Offer(name, l.size())
		}
		_ = l.Close() // it was only read
	}
}

// Run uploads and collects until ctx ends.
func (a *Archive) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { a.queue.Run(ctx, a.upload) })
	tick := time.NewTicker(collectInterval)
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := a.cfg.Alone(ctx, checkpointPrefix, a.collect); err != nil && ctx.Err() == nil {
			a.cfg.Log.Warn("cannot collect copies of checkpoints, and will try again", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// upload uploads the latest checkpoint of a name. It returns an error if it is to be tried again.
func (a *Archive) upload(ctx context.Context, name string) error {
	l, err := a.cfg.Source.OpenSaved(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // its sandbox or snapshot is gone
	case fault.As(err) != nil: // it is damaged, and later tries would find it so too
		a.cfg.Log.Error("cannot upload a checkpoint", "of", name, "error", err)
		return nil
	case err != nil:
		return err
	}
	defer l.Close() // it was only read
	if a.Stored(name, l.MadeAt) {
		return nil
	}
	c := sandbox.StoredCheckpoint{Name: name, Node: a.cfg.Node, Fence: fence, MadeAt: l.MadeAt, CPUClass: l.CPUClass}
	if c.Agent, err = a.uploadProgram(ctx, l.Agent); err != nil {
		return err
	}
	if c.Runsc, err = a.uploadProgram(ctx, l.Runsc); err != nil {
		return err
	}
	c, err = a.cfg.Records.BeginCheckpoint(ctx, c)
	if err == nil {
		err = a.uploadFiles(ctx, &c, l.Files)
	}
	if err == nil {
		c.UploadedAt = a.cfg.Now()
		err = a.cfg.Records.EndCheckpoint(ctx, c)
	}
	if fault.Is(err, fault.NotFound) {
		return nil // its sandbox or snapshot is gone, or its fork is over
	}
	if err != nil {
		return err
	}
	a.uploaded.Add(c.Bytes)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stored[name] = c.MadeAt
	return nil
}

// home returns the prefix of the keys of a checkpoint's objects.
func home(c sandbox.StoredCheckpoint) string {
	return fmt.Sprintf("%s%s/%d/%d/", checkpointPrefix, c.Name, c.Fence, c.Number)
}

// uploadFiles uploads the files of a checkpoint and their seal, and sets the sum and the size of the copy.
func (a *Archive) uploadFiles(ctx context.Context, c *sandbox.StoredCheckpoint, files []*os.File) error {
	s := newSeal(*c)
	for _, f := range files {
		info, err := f.Stat()
		if err != nil {
			return fmt.Errorf("looking at a file of the checkpoint of %s: %w", c.Name, err)
		}
		file := sealedFile{Name: filepath.Base(f.Name()), Size: info.Size()}
		file.Pieces, err = a.cfg.Transfer.UploadPieces(ctx, home(*c)+file.Name, f, file.Size)
		if err != nil {
			return away(err)
		}
		s.Files = append(s.Files, file)
		c.Bytes += file.Size
	}
	data, err := s.encode(a.cfg.Key)
	if err != nil {
		return err
	}
	c.Bytes += int64(len(data))
	c.Sum = sumOf(data).String()
	key := home(*c) + sealName
	_, err = objects.Write(ctx, a.cfg.Bucket, key, data, objects.Condition{Absent: true})
	if errors.Is(err, objects.ErrCondition) { // of an earlier try, which had the same files
		var there []byte
		if there, _, err = objects.Read(ctx, a.cfg.Bucket, key, maxSeal); err == nil && sumOf(there) != sumOf(data) {
			err = fmt.Errorf("object %s is another one than what is to be written", key)
		}
	}
	return away(err)
}

// away returns an error without its kind, which for an object does not mean that the checkpoint is gone.
func away(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New(err.Error())
	}
	return err
}

// uploadProgram uploads a program, unless the bucket has it, and returns its SHA-256.
func (a *Archive) uploadProgram(ctx context.Context, path string) (string, error) {
	a.mu.Lock()
	sum, known := a.sums[path]
	a.mu.Unlock()
	if known {
		return sum.String(), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("opening a program that a checkpoint needs: %v", err) // nothing that was to be uploaded is gone
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("looking at a program: %w", err)
	}
	if sum, err = sumFile(f); err != nil {
		return "", fmt.Errorf("reading a program: %w", err)
	}
	if err := a.cfg.Transfer.Upload(ctx, programPrefix+sum.String(), f, info.Size(), sum); err != nil {
		return "", away(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sums[path] = sum
	return sum.String(), nil
}
