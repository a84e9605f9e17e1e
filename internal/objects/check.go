package objects

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"strings"
	"time"
)

// Finding holds the result of one check of a bucket.
type Finding struct {
	Name   string
	OK     bool
	Detail string
	Fix    string
}

// maxSkew is the difference of clocks from which on Check complains. S3 servers refuse requests from 15 minutes on;
// a clock that is minutes wrong soon is more.
const maxSkew = time.Minute

// checkPrefix begins the keys of the objects of checks, which Check removes.
const checkPrefix = "check/"

// Check tries everything that cay needs of a bucket, with small objects that it removes again.
func Check(ctx context.Context, b Bucket) []Finding {
	key := checkPrefix + strings.ToLower(rand.Text())
	rights := Finding{Name: "bucket", OK: true, Detail: "objects can be written, read, listed and removed",
		Fix: "check files.url and the credentials, and allow GetObject, PutObject, DeleteObject, ListBucket, " +
			"ListBucketMultipartUploads, ListMultipartUploadParts and AbortMultipartUpload"}
	if err := checkRights(ctx, b, key); err != nil {
		rights.OK, rights.Detail = false, err.Error()
	}
	conditions := Finding{Name: "conditional writes", OK: true,
		Detail: "the server refuses to overwrite where it is told to",
		Fix:    "use an S3 server that obeys If-None-Match and If-Match of PutObject and CompleteMultipartUpload"}
	if !rights.OK {
		conditions.OK, conditions.Detail = false, "not checked, since the bucket cannot be used"
	} else if err := checkConditions(ctx, b, key); err != nil {
		conditions.OK, conditions.Detail = false, err.Error()
	}
	sums := Finding{Name: "checksums", OK: true, Detail: "the server refuses content that changed on the way",
		Fix: "use an S3 server that compares X-Amz-Content-Sha256, X-Amz-Checksum-Sha256 and X-Amz-Checksum-Crc32c, " +
			"and https"}
	if !rights.OK {
		sums.OK, sums.Detail = false, conditions.Detail
	} else if err := checkSums(ctx, b, key); err != nil {
		sums.OK, sums.Detail = false, err.Error()
	}
	return []Finding{rights, conditions, sums, checkClock(ctx, b)}
}

// checkSums writes an object and a part with the sum of other content, after some with their own.
func checkSums(ctx context.Context, b Bucket, key string) (err error) {
	defer func() { err = errors.Join(err, b.Delete(ctx, key)) }()
	right, wrong := []byte("4"), []byte("5")
	if _, err := Write(ctx, b, key, right, Condition{}); err != nil {
		return err
	}
	_, err = b.Put(ctx, key, section(right), sha256.Sum256(wrong), Condition{})
	if err := refusesSum(err); err != nil {
		return err
	}
	id, err := b.Begin(ctx, key)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Abort(ctx, key, id)) }()
	if _, err := b.PutPart(ctx, key, id, 1, section(right), crc32.Checksum(right, castagnoli)); err != nil {
		return err
	}
	_, err = b.PutPart(ctx, key, id, 2, section(right), crc32.Checksum(wrong, castagnoli))
	return refusesSum(err)
}

// refusesSum returns an error unless err says that a write was refused because its content has another sum.
func refusesSum(err error) error {
	if errors.Is(err, ErrDamaged) {
		return nil
	}
	if err == nil {
		err = errors.New("the server wrote it")
	}
	return fmt.Errorf("content with the checksum of other content: %w", err)
}

func checkRights(ctx context.Context, b Bucket, key string) (err error) {
	defer func() { err = errors.Join(err, b.Delete(ctx, key)) }()
	if _, err := Write(ctx, b, key, []byte(key), Condition{}); err != nil {
		return err
	}
	if data, _, err := Read(ctx, b, key, maxKey); err != nil || string(data) != key {
		return errors.Join(fmt.Errorf("what was written was read back as %.80q", data), err)
	}
	found, err := b.List(ctx, key, "", 2)
	if err != nil {
		return err
	}
	if len(found) != 1 || found[0].Key != key {
		return fmt.Errorf("the list has %d objects instead of the 1 that was written", len(found))
	}
	return nil
}

func checkConditions(ctx context.Context, b Bucket, key string) (err error) {
	defer func() { err = errors.Join(err, b.Delete(ctx, key)) }()
	etag, err := Write(ctx, b, key, []byte("1"), Condition{Absent: true})
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name string
		when Condition
		ok   bool
	}{
		{"If-None-Match over an object", Condition{Absent: true}, false},
		{"If-Match of another ETag", Condition{ETag: strings.Repeat("0", 32)}, false},
		{"If-Match of the object's ETag", Condition{ETag: etag}, true},
	} {
		_, err := Write(ctx, b, key, []byte("2"), c.when)
		if err != nil && !errors.Is(err, ErrCondition) {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		switch ok := err == nil; {
		case ok && !c.ok:
			return fmt.Errorf("%s: the server wrote the object and must refuse", c.name)
		case !ok && c.ok:
			return fmt.Errorf("%s: the server refused the write and must do it", c.name)
		}
	}
	return checkParts(ctx, b, key)
}

// checkParts completes an upload over an object, which must be refused.
func checkParts(ctx context.Context, b Bucket, key string) (err error) {
	id, err := b.Begin(ctx, key)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Abort(ctx, key, id)) }()
	data := []byte("3")
	p, err := b.PutPart(ctx, key, id, 1, section(data), crc32.Checksum(data, castagnoli))
	if err != nil {
		return err
	}
	if _, err := b.Uploads(ctx, key); err != nil {
		return err
	}
	if parts, err := b.Parts(ctx, key, id); err != nil || len(parts) != 1 {
		return errors.Join(fmt.Errorf("the list of parts has %d of one", len(parts)), err)
	}
	_, err = b.Complete(ctx, key, id, []Part{p}, Condition{Absent: true})
	if errors.Is(err, ErrCondition) {
		return nil
	}
	if err == nil {
		err = errors.New("the object was overwritten")
	}
	return fmt.Errorf("If-None-Match of a completed upload over an object: %w", err)
}

func checkClock(ctx context.Context, b Bucket) Finding {
	f := Finding{Name: "bucket's clock", Fix: "set both clocks by NTP"}
	skew, err := b.Skew(ctx)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		f.Detail = err.Error()
	case skew.Abs() > maxSkew:
		f.Detail = fmt.Sprintf("it is %s ahead of this machine's", skew)
	default:
		f.OK, f.Detail = true, fmt.Sprintf("it differs from this machine's by %s", skew.Abs())
	}
	return f
}
