// Package checkpoint keeps checkpoints on disk: for each name (of a sandbox or a snapshot) the
// latest whole one, and the draft of the next while it is made.
//
// A checkpoint is a directory of files that the caller writes, with a checksum of each and a
// manifest. One rename makes a draft the latest checkpoint, after all of it was summed and
// synced; only then is the one before removed. So after a crash at any moment the latest is
// either the previous one or the new one, and whole. The package does not look into the files.
// They are secret, so directories have mode 0700 and files 0600.
//
// A [Store] is safe for concurrent use for different names; for one name, make one call at a
// time. In memory it keeps only the space promised to drafts.
package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/hostfile"
)

const (
	manifestFile = "manifest.json"
	// suspectFile marks a checkpoint whose checksums were wrong once.
	suspectFile = "suspect"
	// draftDir is the directory in which the next checkpoint of a name is made.
	draftDir = "draft"
	// format is the version of the manifest; other versions are refused.
	format = 1
)

// Store is a directory of checkpoints.
type Store struct {
	dir     string
	minFree int64 // bytes that drafts leave free on the disk

	mu sync.Mutex
	// +checklocks:mu
	promised int64 // bytes that drafts under way may still write; guarded by mu
}

// Open makes the directory if it does not exist, removes the drafts that a crash left, and
// returns their names. Drafts must leave minFree bytes of the disk free.
func Open(dir string, minFree int64) (s *Store, interrupted []string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("making the directory of checkpoints: %w", err)
	}
	s = &Store{dir: dir, minFree: minFree}
	names, err := s.Names()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		d := &Draft{store: s, name: name}
		if _, err := os.Stat(d.Dir()); err != nil {
			continue
		}
		if err := d.Abandon(); err != nil {
			return nil, nil, err
		}
		interrupted = append(interrupted, name)
	}
	return s, interrupted, nil
}

// Names returns the names that have a checkpoint or a draft.
func (s *Store) Names() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing checkpoints: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// Has reports whether a name has a checkpoint or a draft.
func (s *Store) Has(name string) bool {
	_, err := os.Stat(filepath.Join(s.dir, name))
	return err == nil
}

// gone is the directory name of a checkpoint while its files are removed.
const gone = "gone"

// checkName refuses names that do not name one directory below the store's. Without it an empty name
// would stand for all checkpoints.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is no name of a checkpoint", name)
	}
	return nil
}

// Remove removes all that a name has. If there is nothing it succeeds.
func (s *Store) Remove(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	home := filepath.Join(s.dir, name)
	all, err := numbers(home)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, n := range all { // renamed first, so that no reader finds a part of one
		err = errors.Join(err, os.RemoveAll(filepath.Join(home, gone)),
			os.Rename(filepath.Join(home, strconv.Itoa(n)), filepath.Join(home, gone)))
	}
	if err := errors.Join(err, os.RemoveAll(home)); err != nil {
		return fmt.Errorf("removing the checkpoints of %s: %w", name, err)
	}
	return nil
}

// Draft is a checkpoint in the making. End it with [Draft.Commit] or [Draft.Abandon].
type Draft struct {
	store *Store
	name  string
	size  int64
}

// Begin starts the next checkpoint of a name, which will need about size bytes. Without enough
// space it gives NoSpace, code "disk_full", and does nothing.
func (s *Store) Begin(name string, size int64) (*Draft, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return nil, fmt.Errorf("looking at the free space below %s: %w", s.dir, err)
	}
	s.mu.Lock()
	free := int64(st.Bavail)*st.Bsize - s.promised - s.minFree
	if free < size {
		s.mu.Unlock()
		return nil, fault.New(fault.NoSpace, fault.CodeDiskFull,
			"a checkpoint needs about %d MiB of this machine's disk, and %d MiB are left for it",
			mib(size), mib(max(0, free)))
	}
	s.promised += size
	s.mu.Unlock()
	d := &Draft{store: s, name: name, size: size}
	if err := errors.Join(os.RemoveAll(d.Dir()), os.MkdirAll(d.Dir(), 0o700)); err != nil {
		return nil, errors.Join(fmt.Errorf("making a directory for a checkpoint: %w", err), d.Abandon())
	}
	return d, nil
}

// mib rounds up, so that a small size does not print as 0.
func mib(bytes int64) int64 { return (bytes + 1<<20 - 1) >> 20 }

// Dir returns the empty directory for the checkpoint's files.
func (d *Draft) Dir() string { return filepath.Join(d.store.dir, d.name, draftDir) }

// Abandon removes the draft. The latest checkpoint stays.
func (d *Draft) Abandon() error {
	d.end()
	err := os.RemoveAll(d.Dir())
	// This fails while the name has a checkpoint, as it should.
	_ = os.Remove(filepath.Dir(d.Dir()))
	if err != nil {
		return fmt.Errorf("removing an abandoned checkpoint: %w", err)
	}
	return nil
}

// Full reports whether the disk has no room left for the draft. The draft's writer may not report
// it.
func (d *Draft) Full() bool {
	const least = 1 << 20 // bytes; several writers at once may leave this much of a full disk
	var st unix.Statfs_t
	return unix.Statfs(d.store.dir, &st) == nil && int64(st.Bavail)*st.Bsize < least
}

func (d *Draft) end() {
	d.store.mu.Lock()
	defer d.store.mu.Unlock()
	d.store.promised -= d.size
	d.size = 0
}

// Commit makes the draft the latest checkpoint of its name, durably, and removes the one before.
// about is stored in the manifest, for [Checkpoint.Understand]. After an error the latest
// checkpoint is unchanged, and the draft must still be abandoned.
func (d *Draft) Commit(at time.Time, about any) (*Checkpoint, error) {
	return d.CommitAs(d.name, at, about)
}

// CommitAs commits the draft as the latest checkpoint of another name. A crash before the end can
// leave that name without a checkpoint, see [Store.Names].
func (d *Draft) CommitAs(name string, at time.Time, about any) (*Checkpoint, error) {
	data, err := json.Marshal(about)
	if err != nil {
		return nil, fmt.Errorf("encoding a checkpoint's description: %w", err)
	}
	// Rows keep times to the microsecond; so the checkpoint has the same time everywhere.
	m := manifest{Format: format, At: at.UTC().Truncate(time.Microsecond), About: data}
	if m.Files, m.Size, err = seal(d.Dir()); err != nil {
		return nil, err
	}
	if data, err = m.encode(); err != nil {
		return nil, err
	}
	if err := hostfile.CreateSynced(filepath.Join(d.Dir(), manifestFile), data, 0o600); err != nil {
		return nil, fmt.Errorf("writing a checkpoint's manifest: %w", err)
	}
	home := filepath.Join(d.store.dir, name)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, fmt.Errorf("making a directory for a checkpoint: %w", err)
	}
	older, err := numbers(home)
	if err != nil {
		return nil, err
	}
	next := 1
	if len(older) > 0 {
		next = older[0] + 1
	}
	c := &Checkpoint{Dir: filepath.Join(home, strconv.Itoa(next)), manifest: m}
	if err := errors.Join(hostfile.SyncDir(d.Dir()), os.Rename(d.Dir(), c.Dir), hostfile.SyncDir(home),
		hostfile.SyncDir(d.store.dir)); err != nil {
		return nil, fmt.Errorf("putting a checkpoint in place: %w", err)
	}
	d.end()
	if name != d.name {
		// This fails while that name has a checkpoint, as it should.
		_ = os.Remove(filepath.Dir(d.Dir()))
	}
	for _, n := range older {
		// The next commit removes one that stays; until then it is never read.
		_ = os.RemoveAll(filepath.Join(home, strconv.Itoa(n)))
	}
	_ = os.RemoveAll(filepath.Join(home, gone)) // the next commit tries again
	return c, nil
}

// seal sums and syncs the files in dir, sets their mode, and returns their size on disk.
func seal(dir string) (files []file, size int64, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0, fmt.Errorf("listing a checkpoint's files: %w", err)
	}
	for _, e := range entries {
		one, blocks, err := sealFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, 0, fmt.Errorf("sealing a checkpoint: %w", err)
		}
		files, size = append(files, one), size+blocks*512
	}
	return files, size, nil
}

func sealFile(path string) (one file, blocks int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return one, 0, err
	}
	defer f.Close()
	// The sum reads the page cache, so that it runs while the disk writes.
	synced := make(chan error, 1)
	go func() { synced <- f.Sync() }()
	one.Name = filepath.Base(path)
	one.Size, one.Sum, err = sum(context.Background(), f)
	var st unix.Stat_t
	err = errors.Join(err, <-synced, f.Chmod(0o600), unix.Fstat(int(f.Fd()), &st))
	return one, st.Blocks, err
}

// numbers returns the numbers of the checkpoints in a name's directory, latest first.
func numbers(home string) ([]int, error) {
	entries, err := os.ReadDir(home)
	if err != nil {
		return nil, fmt.Errorf("listing checkpoints: %w", err)
	}
	var all []int
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, n)
		}
	}
	slices.Sort(all)
	slices.Reverse(all)
	return all, nil
}

// castagnoli is the table of CRC-32C, which processors compute at some 10 GB/s. The sum finds
// damage; it does not protect against an attacker who can write here.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sumPiece is the number of bytes read at once. A larger piece delays the end of a cancelled
// read.
const sumPiece = 1 << 20

func sum(ctx context.Context, r io.Reader) (size int64, crc uint32, err error) {
	buf := make([]byte, sumPiece)
	for ctx.Err() == nil {
		n, err := r.Read(buf)
		size, crc = size+int64(n), crc32.Update(crc, castagnoli, buf[:n])
		if errors.Is(err, io.EOF) {
			return size, crc, nil
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return 0, 0, context.Cause(ctx)
}

// manifest describes a checkpoint; it is a file in the checkpoint's directory.
type manifest struct {
	Format int             `json:"format"`
	At     time.Time       `json:"at"`
	Size   int64           `json:"size"` // bytes on disk, without holes
	Files  []file          `json:"files"`
	About  json.RawMessage `json:"about"`
}

type file struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	Sum  uint32 `json:"crc32c"`
}

// envelope is the content of the manifest's file, with a sum so that damage to it is found too.
type envelope struct {
	Sum      uint32          `json:"crc32c"`
	Manifest json.RawMessage `json:"manifest"`
}

func (m *manifest) encode() ([]byte, error) {
	data, err := json.Marshal(m)
	if err == nil {
		data, err = json.Marshal(envelope{crc32.Checksum(data, castagnoli), data})
	}
	if err != nil {
		return nil, fmt.Errorf("encoding a checkpoint's manifest: %w", err)
	}
	return data, nil
}

func (m *manifest) decode(data []byte) error {
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return damaged("%s cannot be understood", manifestFile).Because(err)
	}
	if crc32.Checksum(e.Manifest, castagnoli) != e.Sum {
		return damaged("%s does not have the content that was written", manifestFile)
	}
	if err := json.Unmarshal(e.Manifest, m); err != nil {
		return damaged("%s cannot be understood", manifestFile).Because(err)
	}
	if m.Format != format {
		return damaged("%s has format %d; this version of cay knows %d", manifestFile, m.Format, format)
	}
	return nil
}

// Checkpoint is a whole checkpoint on disk.
type Checkpoint struct {
	Dir string // directory of its files
	manifest
}

// Latest returns the latest checkpoint of a name, or nil if there is none. Its files exist and
// have their sizes; [Checkpoint.Verify] reads them.
func (s *Store) Latest(name string) (*Checkpoint, error) {
	home := filepath.Join(s.dir, name)
	const tries = 3 // a checkpoint may be removed or replaced between listing and reading
	for try := 1; ; try++ {
		all, err := numbers(home)
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(all) == 0 {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		c, err := read(filepath.Join(home, strconv.Itoa(all[0])))
		if !errors.Is(err, fs.ErrNotExist) || try == tries {
			return c, err
		}
	}
}

func read(dir string) (*Checkpoint, error) {
	c := &Checkpoint{Dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, damaged("%s cannot be read", manifestFile).Because(err)
	}
	return c, c.decode(data)
}

// damaged returns the error for a damaged checkpoint. Its text is for the user.
func damaged(what string, args ...any) *fault.Error {
	return fault.New(fault.Internal, fault.CodeCheckpointDamaged, "the checkpoint is damaged: "+what, args...)
}

// Understand decodes the description that Commit stored.
func (c *Checkpoint) Understand(about any) error {
	if err := json.Unmarshal(c.About, about); err != nil {
		return damaged("%s cannot be understood", manifestFile).Because(err)
	}
	return nil
}

// Verify checks that every file exists with its size, and compares the sums of the files that
// pick chooses. Damage gives Internal, code "checkpoint_damaged", with a detail for the user.
func (c *Checkpoint) Verify(ctx context.Context, pick func(name string) bool) error {
	for _, want := range c.Files {
		if err := c.verify(ctx, want, pick(want.Name)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Checkpoint) verify(ctx context.Context, want file, whole bool) error {
	if strings.Contains(want.Name, "/") {
		return damaged("%s names %q", manifestFile, want.Name)
	}
	f, err := os.Open(filepath.Join(c.Dir, want.Name))
	if err != nil {
		return damaged("%s cannot be read", want.Name).Because(err)
	}
	defer f.Close()
	return verifyFile(ctx, want, f, whole)
}

// verifyFile checks an open file from its beginning.
func verifyFile(ctx context.Context, want file, f *os.File, whole bool) error {
	info, err := f.Stat()
	if err != nil {
		return damaged("%s cannot be read", want.Name).Because(err)
	}
	if info.Size() != want.Size {
		return damaged("%s has %d bytes instead of %d", want.Name, info.Size(), want.Size)
	}
	if !whole {
		return nil
	}
	_, crc, err := sum(ctx, f)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return damaged("%s cannot be read", want.Name).Because(err)
	case crc != want.Sum:
		return damaged("%s does not have the content that was written", want.Name)
	}
	return nil
}

// Suspect reports whether the checkpoint's sums were wrong once. Verify such a checkpoint as a
// whole before using it again.
func (c *Checkpoint) Suspect() bool {
	_, err := os.Stat(filepath.Join(c.Dir, suspectFile))
	return err == nil
}

// Distrust marks the checkpoint as suspect.
func (c *Checkpoint) Distrust() error {
	if err := os.WriteFile(filepath.Join(c.Dir, suspectFile), nil, 0o600); err != nil {
		return fmt.Errorf("marking a damaged checkpoint: %w", err)
	}
	return nil
}
