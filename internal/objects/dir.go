package objects

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/hostfile"
)

// Names in the directory of a Dir. None of them is an element of a key.
const (
	dirUploads = ".uploads" // a directory for each upload, with its key and its parts
	dirTmp     = ".tmp"     // files that are being written
	dirLock    = ".lock"    // held while an object is put in place
	uploadKey  = "key"
)

// Dir is a [Bucket] in a directory, which several processes may use at once.
type Dir struct{ dir string }

// OpenDir opens a directory that exists. It does not make one, since one that is missing may belong to a file system
// that is not mounted, and the files would then be on the disk below.
func OpenDir(dir string) (*Dir, error) {
	for _, sub := range []string{dirUploads, dirTmp} {
		err := os.Mkdir(filepath.Join(dir, sub), 0o700)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("mount the file system of the directory %s, or create the directory: %w", dir, err)
		case err != nil && !errors.Is(err, fs.ErrExist):
			return nil, fmt.Errorf("opening the directory of objects: %w", err)
		}
	}
	d := &Dir{dir}
	return d, d.sweep()
}

// leftoverAge is the age from which on a file that is being written is taken for a leftover of a crash. A write that
// takes longer loses its file and fails.
const leftoverAge = 24 * time.Hour

// sweep removes what crashed processes left.
func (d *Dir) sweep() error {
	tmp := filepath.Join(d.dir, dirTmp)
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return fmt.Errorf("looking for leftovers: %w", err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > leftoverAge {
			_ = os.Remove(filepath.Join(tmp, e.Name())) // another process may have removed it
		}
	}
	return nil
}

// path returns the file of an object.
func (d *Dir) path(key string) (string, error) {
	if err := checkKey(key); err != nil {
		return "", err
	}
	return filepath.Join(d.dir, filepath.FromSlash(key)), nil
}

// Put implements [Bucket].
func (d *Dir) Put(ctx context.Context, key string, body *io.SectionReader, sum Sum, when Condition) (string, error) {
	f, err := d.write(ctx, body, sha256.New(), sum[:])
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name()) // fails if the file was renamed
	defer f.Close()
	return d.place(f, key, when)
}

// write writes a synced file below dirTmp, whose content must have a sum.
func (d *Dir) write(ctx context.Context, body *io.SectionReader, sum hash.Hash, want []byte) (*os.File, error) {
	f, err := os.CreateTemp(filepath.Join(d.dir, dirTmp), "put-")
	if err != nil {
		return nil, fmt.Errorf("making object: %w", err)
	}
	_, err = body.Seek(0, io.SeekStart)
	if err == nil {
		_, err = io.CopyBuffer(io.MultiWriter(f, sum), onlyReader{ctx, body}, make([]byte, bufferSize))
	}
	if err == nil && !bytes.Equal(sum.Sum(nil), want) {
		err = ErrDamaged
	}
	if err := errors.Join(err, f.Sync()); err != nil {
		return nil, errors.Join(fmt.Errorf("writing object: %w", err), f.Close(), os.Remove(f.Name()))
	}
	return f, nil
}

// place renames a file to an object, if the condition holds.
func (d *Dir) place(f *os.File, key string, when Condition) (string, error) {
	path, err := d.path(key)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", fmt.Errorf("making directory of object: %w", err)
	}
	unlock, err := d.lock()
	if err != nil {
		return "", err
	}
	defer unlock()
	if when != (Condition{}) {
		info, err := os.Stat(path)
		exists := err == nil
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return "", fmt.Errorf("looking at object: %w", err)
		case when.Absent && exists, when.ETag != "" && (!exists || etagOf(info) != when.ETag):
			return "", fmt.Errorf("object %s: %w", key, ErrCondition)
		}
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return "", fmt.Errorf("naming object: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("looking at object: %w", err)
	}
	return etagOf(info), hostfile.SyncDir(filepath.Dir(path))
}

// lock excludes other writes that put objects in place, of all processes.
func (d *Dir) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(d.dir, dirLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return func() { _ = f.Close() }, nil // which unlocks it
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("locking: %w", err), f.Close())
		}
	}
}

// etagOf returns the ETag of a file. Every write makes a new file.
func etagOf(info fs.FileInfo) string {
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%x-%x-%x", st.Ino, info.ModTime().UnixNano(), info.Size())
}

// Get implements [Bucket].
func (d *Dir) Get(_ context.Context, key string, off, n int64) (io.ReadCloser, error) {
	path, err := d.path(key)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notExist(key)
	}
	if err != nil {
		return nil, fmt.Errorf("opening object: %w", err)
	}
	return exactly(io.NewSectionReader(f, off, n), f, n), nil
}

// Stat implements [Bucket].
func (d *Dir) Stat(_ context.Context, key string) (Info, error) {
	path, err := d.path(key)
	if err != nil {
		return Info{}, err
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Info{}, notExist(key)
	}
	if err != nil {
		return Info{}, fmt.Errorf("looking at object: %w", err)
	}
	return infoOf(key, info), nil
}

func infoOf(key string, info fs.FileInfo) Info {
	return Info{Key: key, Size: info.Size(), ETag: etagOf(info), Modified: info.ModTime()}
}

// List implements [Bucket].
func (d *Dir) List(ctx context.Context, prefix, after string, most int) ([]Info, error) {
	var all []Info
	parent := prefix[:strings.LastIndexByte(prefix, '/')+1]
	root := filepath.Join(d.dir, filepath.FromSlash(parent))
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil || ctx.Err() != nil {
			return cmp.Or(err, context.Cause(ctx))
		}
		if e.IsDir() {
			if strings.HasPrefix(e.Name(), ".") && path != d.dir {
				return fs.SkipDir
			}
			return nil
		}
		rel, err := filepath.Rel(d.dir, path)
		key := filepath.ToSlash(rel)
		if err != nil || checkKey(key) != nil || !strings.HasPrefix(key, prefix) || key <= after {
			return err
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		all = append(all, infoOf(key, info))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing objects: %w", err)
	}
	slices.SortFunc(all, func(a, b Info) int { return strings.Compare(a.Key, b.Key) })
	return all[:min(most, len(all))], nil
}

// Delete implements [Bucket].
func (d *Dir) Delete(_ context.Context, key string) error {
	path, err := d.path(key)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing object: %w", err)
	}
	return nil
}

// Begin implements [Bucket].
func (d *Dir) Begin(_ context.Context, key string) (string, error) {
	if err := checkKey(key); err != nil {
		return "", err
	}
	id := rand.Text()
	dir := filepath.Join(d.dir, dirUploads, id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("beginning upload: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, uploadKey), []byte(key), 0o600); err != nil {
		return "", errors.Join(fmt.Errorf("beginning upload: %w", err), os.RemoveAll(dir))
	}
	return id, nil
}

// upload returns the directory of an upload.
func (d *Dir) upload(key, id string) (string, error) {
	dir := filepath.Join(d.dir, dirUploads, id)
	if strings.Contains(id, "/") || strings.HasPrefix(id, ".") || id == "" {
		return "", notExist(key)
	}
	of, err := os.ReadFile(filepath.Join(dir, uploadKey))
	if errors.Is(err, fs.ErrNotExist) || err == nil && string(of) != key {
		return "", notExist(key)
	}
	if err != nil {
		return "", fmt.Errorf("looking at upload: %w", err)
	}
	return dir, nil
}

// PutPart implements [Bucket]. The name of a part's file has its number and its ETag, the CRC-32C in hexadecimal.
func (d *Dir) PutPart(ctx context.Context, key, id string, number int, body *io.SectionReader, crc uint32) (Part,
	error) {
	dir, err := d.upload(key, id)
	if err != nil {
		return Part{}, err
	}
	f, err := d.write(ctx, body, crc32.New(castagnoli), bigEndian(crc))
	if err != nil {
		return Part{}, err
	}
	defer os.Remove(f.Name()) // fails if the file was renamed
	if err := f.Close(); err != nil {
		return Part{}, fmt.Errorf("writing part: %w", err)
	}
	older, err := filepath.Glob(filepath.Join(dir, strconv.Itoa(number)+"-*"))
	if err != nil {
		return Part{}, err
	}
	etag := hex.EncodeToString(bigEndian(crc))
	name := filepath.Join(dir, fmt.Sprintf("%d-%s", number, etag))
	if err := os.Rename(f.Name(), name); err != nil {
		return Part{}, fmt.Errorf("naming part: %w", err)
	}
	for _, other := range older {
		if other != name {
			_ = os.Remove(other) // Complete names the part by its ETag
		}
	}
	return Part{Number: number, ETag: etag, Size: body.Size(), CRC: crc}, nil
}

// Parts implements [Bucket].
func (d *Dir) Parts(_ context.Context, key, id string) ([]Part, error) {
	dir, err := d.upload(key, id)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("listing parts: %w", err)
	}
	var parts []Part
	for _, e := range entries {
		number, etag, _ := strings.Cut(e.Name(), "-")
		p := Part{ETag: etag}
		if p.Number, err = strconv.Atoi(number); err != nil {
			continue
		}
		crc, err := hex.DecodeString(etag)
		if err != nil || len(crc) != crc32.Size {
			continue // of an earlier version
		}
		p.CRC = binary.BigEndian.Uint32(crc)
		info, err := e.Info()
		if err != nil {
			continue // replaced meanwhile
		}
		p.Size = info.Size()
		parts = append(parts, p)
	}
	slices.SortFunc(parts, func(a, b Part) int { return cmp.Compare(a.Number, b.Number) })
	return parts, nil
}

// Complete implements [Bucket].
func (d *Dir) Complete(ctx context.Context, key, id string, parts []Part, when Condition) (string, error) {
	dir, err := d.upload(key, id)
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(filepath.Join(d.dir, dirTmp), "put-")
	if err != nil {
		return "", fmt.Errorf("making object: %w", err)
	}
	defer os.Remove(f.Name()) // fails if the file was renamed
	defer f.Close()
	buf := make([]byte, bufferSize)
	for _, p := range parts {
		if err := appendPart(ctx, f, filepath.Join(dir, fmt.Sprintf("%d-%s", p.Number, p.ETag)), buf); err != nil {
			return "", fmt.Errorf("joining part %d: %w", p.Number, err)
		}
	}
	if err := f.Sync(); err != nil {
		return "", fmt.Errorf("syncing object: %w", err)
	}
	etag, err := d.place(f, key, when)
	if err != nil {
		return "", err
	}
	return etag, d.Abort(ctx, key, id)
}

func appendPart(ctx context.Context, to *os.File, path string, buf []byte) error {
	part, err := os.Open(path)
	if err != nil {
		return err
	}
	defer part.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{to}, onlyReader{ctx, part}, buf)
	return err
}

// Abort implements [Bucket].
func (d *Dir) Abort(_ context.Context, key, id string) error {
	dir, err := d.upload(key, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing upload: %w", err)
	}
	return nil
}

// Uploads implements [Bucket].
func (d *Dir) Uploads(_ context.Context, prefix string) ([]Upload, error) {
	entries, err := os.ReadDir(filepath.Join(d.dir, dirUploads))
	if err != nil {
		return nil, fmt.Errorf("listing uploads: %w", err)
	}
	var all []Upload
	for _, e := range entries {
		file := filepath.Join(d.dir, dirUploads, e.Name(), uploadKey)
		key, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(key), prefix) {
			continue // ended meanwhile, or of another key
		}
		info, err := os.Stat(file)
		if err != nil {
			continue
		}
		all = append(all, Upload{Key: string(key), ID: e.Name(), Begun: info.ModTime()})
	}
	return all[:min(len(all), maxUploads)], nil
}

// Skew implements [Bucket].
func (d *Dir) Skew(context.Context) (time.Duration, error) { return 0, nil }
