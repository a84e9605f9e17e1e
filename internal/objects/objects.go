// Package objects keeps files as objects, by key, in a bucket of an S3 server or in a directory, and copies the files
// of other rooms there and back.
//
// It has three layers. A [Bucket] makes single requests. A [Transfer] uploads and downloads whole files over it, in
// parts, with bounds on memory and on requests at once that hold for all files together. A [Mirror] keeps copies of the
// files of one directory ([Local]), which are named by their SHA-256: it uploads them in the background, fetches those
// that are missing, evicts local files that the bucket has too, and removes objects that are not needed any more.
//
// Content is verified in both directions: every request that sends content has its SHA-256, or for a part of a large
// object its CRC-32C, which the server compares, and a file that was downloaded with another SHA-256 than the wanted
// one is refused. A file whose SHA-256 is not known before its upload, such as a checkpoint's, is described by the
// SHA-256 and the [MAC] of each of its pieces, and a download compares the MACs, which are faster. A bucket that lies
// can withhold files, but not change them. All types are safe for concurrent use. An error leaves no part of an object
// under its key. Uploads that an error or a crash ended continue where they were; those that are not continued are
// removed after [UploadKept], or after [Grace] if nothing needs their objects.
package objects

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"regexp"
	"strings"
	"time"
)

// Errors that callers decide by, beside [fs.ErrNotExist] for an object or an upload that does not exist.
var (
	// ErrCondition reports that the condition of a write did not hold. Nothing was written.
	ErrCondition = errors.New("the condition of the write does not hold")
	// ErrDamaged reports content that does not have its SHA-256, its CRC-32C or its MAC.
	ErrDamaged = errors.New("the content does not have its checksum")
)

// Sum is a SHA-256.
type Sum [sha256.Size]byte

// String returns the sum in hexadecimal.
func (s Sum) String() string { return hex.EncodeToString(s[:]) }

// MarshalText implements [encoding.TextMarshaler].
func (s Sum) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (s *Sum) UnmarshalText(text []byte) (err error) {
	*s, err = ParseSum(string(text))
	return err
}

// ParseSum returns the sum with a text of 64 lower-case hexadecimal digits.
func ParseSum(text string) (s Sum, err error) {
	if len(text) != 2*len(s) || strings.ToLower(text) != text {
		return s, fmt.Errorf("%.80q is not a SHA-256", text)
	}
	if _, err := hex.Decode(s[:], []byte(text)); err != nil {
		return s, fmt.Errorf("%.80q is not a SHA-256", text)
	}
	return s, nil
}

// Condition limits a write by what is at its key. The zero Condition allows every write.
type Condition struct {
	// Absent allows the write only if there is no object.
	Absent bool
	// ETag allows the write only if the object has this ETag.
	ETag string
}

// Info describes an object.
type Info struct {
	Key  string
	Size int64 // bytes
	// ETag changes whenever the object is written.
	ETag string
	// Modified is the time of the write by the bucket's clock, see [Bucket.Skew].
	Modified time.Time
}

// Part describes a part of an upload.
type Part struct {
	Number int // from 1
	ETag   string
	Size   int64 // bytes
	// CRC is the CRC-32C of the part, 0 if the bucket does not tell. A part whose CRC-32C happens to be 0 is sent again
	// when its upload is continued.
	CRC uint32
}

// Upload describes an upload in parts that was begun.
type Upload struct {
	Key, ID string
	Begun   time.Time // by the bucket's clock
}

// Bucket keeps objects. A method returns [fs.ErrNotExist] if there is no object or no upload, and [ErrDamaged] if
// content arrived with another SHA-256 than sum, or another CRC-32C than crc.
type Bucket interface {
	// Put writes an object as a whole. It returns ErrCondition if the condition does not hold.
	Put(ctx context.Context, key string, body *io.SectionReader, sum Sum, when Condition) (etag string, err error)
	// Get reads n bytes of an object from off on, n > 0. The caller closes the reader, which fails if the object is
	// shorter.
	Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, error)
	// Stat describes an object.
	Stat(ctx context.Context, key string) (Info, error)
	// List returns up to most objects, whose keys have the prefix and are greater than after, in the order of keys.
	List(ctx context.Context, prefix, after string, most int) ([]Info, error)
	// Delete removes an object. It succeeds if there is none.
	Delete(ctx context.Context, key string) error

	// Begin begins an upload in parts.
	Begin(ctx context.Context, key string) (id string, err error)
	// PutPart writes a part, instead of an earlier one with the number.
	PutPart(ctx context.Context, key, id string, number int, body *io.SectionReader, crc uint32) (Part, error)
	// Parts returns the parts of an upload, in order. An upload that takes no parts with a CRC-32C, since an earlier
	// version began it, is not found.
	Parts(ctx context.Context, key, id string) ([]Part, error)
	// Complete makes the object of the parts, and ends the upload. If the condition does not hold it returns
	// ErrCondition, and the upload stays.
	Complete(ctx context.Context, key, id string, parts []Part, when Condition) (etag string, err error)
	// Abort removes an upload. It succeeds if there is none.
	Abort(ctx context.Context, key, id string) error
	// Uploads returns the uploads under way of keys with the prefix, at most 1000.
	Uploads(ctx context.Context, prefix string) ([]Upload, error)

	// Skew returns how far the bucket's clock is ahead of this machine's, to the second.
	Skew(ctx context.Context) (time.Duration, error)
}

// keyPattern limits keys to what S3 servers and file systems take alike: elements of these characters, none of which
// begins with a dot. For the same reason no key may be another one and a "/" and more.
var keyPattern = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$`)

// maxKey is the longest key in bytes. S3 allows 1024; with the prefix of the bucket's URL a longer key might not fit.
const maxKey = 512

func checkKey(key string) error {
	if len(key) > maxKey || !keyPattern.MatchString(key) {
		return fmt.Errorf("%.80q is not a key", key)
	}
	return nil
}

// Read returns a small object of at most most bytes.
func Read(ctx context.Context, b Bucket, key string, most int64) ([]byte, Info, error) {
	info, err := b.Stat(ctx, key)
	if err != nil || info.Size == 0 {
		return nil, info, err
	}
	if info.Size > most {
		return nil, info, fmt.Errorf("object %s has %d bytes, more than %d", key, info.Size, most)
	}
	r, err := b.Get(ctx, key, 0, info.Size)
	if err != nil {
		return nil, info, err
	}
	defer r.Close()
	data := make([]byte, info.Size)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, info, fmt.Errorf("reading object %s: %w", key, err)
	}
	return data, info, nil
}

// Write writes a small object.
func Write(ctx context.Context, b Bucket, key string, data []byte, when Condition) (etag string, err error) {
	return b.Put(ctx, key, section(data), sha256.Sum256(data), when)
}

func section(data []byte) *io.SectionReader {
	return io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data)))
}

// castagnoli is the table of the CRC-32C, which processors compute about 15 times as fast as a SHA-256.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// bigEndian returns the bytes of a CRC-32C, as S3's headers have them and its [hash.Hash] returns them.
func bigEndian(crc uint32) []byte { return binary.BigEndian.AppendUint32(nil, crc) }

// notExist returns the error for an object or an upload that does not exist.
func notExist(key string) error {
	return fmt.Errorf("object %s: %w", key, fs.ErrNotExist)
}
