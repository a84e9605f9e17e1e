// Package archive copies checkpoints to a bucket, so that they outlive the disk of the machine that made them.
//
// An [Archive] uploads the latest checkpoint of each sandbox and snapshot in the background, with the
// programs that it needs, and records the copy. The objects of a checkpoint are
//
//	checkpoints/NAME/FENCE/NUMBER/FILE       the files of the checkpoint
//	checkpoints/NAME/FENCE/NUMBER/seal.json  their names, sizes, SHA-256 and MACs, with a MAC of the whole
//	programs/SHA-256                         a program that checkpoints need
//
// No object is written twice. A copy counts once its row has the SHA-256 of its seal. Objects without a row mean
// nothing and are removed after [objects.Grace], as is a copy that a later one replaced. A person who can write to the
// bucket can withhold a checkpoint but not change it, since the key of the MACs is in the database. Objects are not
// encrypted, and contain the memory of tenants.
//
// While the bucket or the database is away, checkpoints stay on the machine and are uploaded later, also by the next
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

// fence is the fence of all copies, and not that of the server's session: the next process must be able to continue an
// upload under the same keys. Nodes that share a bucket need none, since each writes copies of its own sandboxes and
// snapshots, and no node can take over those of another one.
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

// Source gives access to the checkpoints of this machine.
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
	Key      []byte // secret that the MACs are made with, 32 bytes or more
	// MaxUnneeded is the size of the objects, in bytes, that stay for [objects.Grace] after they were needed; beyond it
	// the oldest go after an hour. It bounds what the bucket keeps of sandboxes that are saved all the time. 0 is no
	// limit.
	MaxUnneeded int64
	// Alone calls f, unless another process is in such a call under the same name. Objects are removed only within it.
	Alone func(ctx context.Context, name string, f func(context.Context) error) error
	// Foreign reports whether the bucket belongs to other records; then nothing is uploaded. nil is never.
	Foreign func() bool
	Log     *slog.Logger
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

	// programsMu is held while a program is uploaded, so that two checkpoints do not upload the same one.
	programsMu sync.Mutex
	// removing is held while a program is removed, and taken before mu.
	removing sync.Mutex

	mu sync.Mutex
	// +checklocks:mu
	stored map[string]copied // the newest copy, by name
	// +checklocks:mu
	sums map[string]objects.Sum // of the programs that the bucket has, by path
	// +checklocks:mu
	wanted map[string]bool // keys of the programs that this process uploads, or that the bucket has
}

// copied names a copy: number orders the copies of a name, and made is the time of the checkpoint.
type copied struct {
	number int64
	made   time.Time
}

// New returns an Archive.
func New(cfg Config) *Archive {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	a := &Archive{cfg: cfg, queue: objects.NewQueue(checkpointPrefix, cfg.Foreign, cfg.Log, cfg.Now),
		checkpoints: objects.NewSweep(cfg.Transfer, checkpointPrefix, cfg.MaxUnneeded, cfg.Log, cfg.Now),
		programs:    objects.NewSweep(cfg.Transfer, programPrefix, 0, cfg.Log, cfg.Now),
		stored:      map[string]copied{}, sums: map[string]objects.Sum{}, wanted: map[string]bool{}}
	a.programs.Guard = &a.removing
	return a
}

// Offer queues the upload of the latest checkpoint of a sandbox or snapshot, which has about that many bytes. It does
// not wait.
func (a *Archive) Offer(name string, bytes int64) { a.queue.Add(name, bytes) }

// Stored reports whether the bucket has the checkpoint of a sandbox or snapshot that was made at that time.
func (a *Archive) Stored(name string, made time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	at, ok := a.stored[name]
	return ok && at.made.Equal(made)
}

// Counts returns the bytes that the archive has uploaded, and the number, size and age of the uploads that wait.
func (a *Archive) Counts() objects.Counts {
	c := objects.Counts{Uploaded: a.uploaded.Load()}
	c.Waiting, c.WaitingBytes, c.Lag = a.queue.Counts()
	return c
}

// Load reads from the records which checkpoints are stored, and offers the other checkpoints of this machine. It makes
// no request to the bucket. Call it before Run, once the source can list its checkpoints.
func (a *Archive) Load(ctx context.Context) {
	if _, err := a.copies(ctx); err != nil && ctx.Err() == nil {
		a.cfg.Log.Warn("cannot read which checkpoints were copied, and may copy them again", "error", err)
	}
	names, err := a.cfg.Source.SavedNames()
	if err != nil {
		a.cfg.Log.Error("cannot list the checkpoints that are to be copied", "error", err)
	}
	for _, name := range names {
		l, err := a.cfg.Source.OpenSaved(name)
		if err != nil {
			continue // it is gone, or its next use reports what is wrong with it
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
		// Another node may have found that a copy of this one is lost, and the queue drops what it gets while it is closed.
		a.Load(ctx)
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
	a.stored[name] = copied{c.Number, c.MadeAt}
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
		file.Pieces, err = a.cfg.Transfer.UploadPieces(ctx, home(*c)+file.Name, f, file.Size, a.cfg.Key)
		if err != nil {
			return away(err)
		}
		s.Files = append(s.Files, file)
		c.Bytes += file.Size
	}
	return away(a.uploadSeal(ctx, c, s, files))
}

// uploadSeal uploads the seal of files, and sets the sum of the copy. If an earlier try has written the seal, that one
// is kept.
func (a *Archive) uploadSeal(ctx context.Context, c *sandbox.StoredCheckpoint, s seal, files []*os.File) error {
	data, err := s.encode(a.cfg.Key)
	if err != nil {
		return err
	}
	_, err = objects.Write(ctx, a.cfg.Bucket, home(*c)+sealName, data, objects.Condition{Absent: true})
	if errors.Is(err, objects.ErrCondition) {
		data, err = a.earlierSeal(ctx, *c, s, files)
	}
	if err != nil {
		return err
	}
	c.Bytes += int64(len(data))
	c.Sum = sumOf(data).String()
	return nil
}

// earlierSeal returns the seal that an earlier try has written, maybe of an earlier version. It must be authentic,
// since its sum gets into the row, and describe the files, whose seal is s.
func (a *Archive) earlierSeal(ctx context.Context, c sandbox.StoredCheckpoint, s seal, files []*os.File) ([]byte,
	error) {
	key := home(c) + sealName
	data, _, err := objects.Read(ctx, a.cfg.Bucket, key, maxSeal)
	if err != nil {
		return nil, err
	}
	c.Sum = sumOf(data).String()
	earlier, err := openSeal(a.cfg.Key, data, c)
	if err == nil && !earlier.sameNames(s) {
		err = fmt.Errorf("object %s exists with other files", key)
	}
	for i := 0; i < len(files) && err == nil; i++ { // each try to upload a file gives its MACs another salt
		f := earlier.Files[i]
		err = f.Verify(ctx, home(c)+f.Name, files[i], f.Size, a.cfg.Key)
	}
	return data, err
}

// away hides fs.ErrNotExist in an error of the bucket: a missing object does not mean that the checkpoint is gone.
func away(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New(err.Error())
	}
	return err
}

// uploadProgram uploads a program, unless the bucket has it, and returns its SHA-256.
func (a *Archive) uploadProgram(ctx context.Context, path string) (string, error) {
	a.programsMu.Lock()
	defer a.programsMu.Unlock()
	a.mu.Lock()
	sum, known := a.sums[path]
	a.mu.Unlock()
	if known {
		return sum.String(), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("opening a program that a checkpoint needs: %v", err) // %v hides fs.ErrNotExist
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("looking at a program: %w", err)
	}
	if sum, err = sumFile(f); err != nil {
		return "", fmt.Errorf("reading a program: %w", err)
	}
	key := programPrefix + sum.String()
	a.want(key) // from here on it is not removed if it is found
	if err := a.cfg.Transfer.Upload(ctx, key, f, info.Size(), sum); err != nil {
		return "", away(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sums[path] = sum
	return sum.String(), nil
}
