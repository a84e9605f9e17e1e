package objects

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
)

const (
	// tries limits how often a request is made that the server or the network fails, with up to a second between them.
	// More tries delay the answer that the bucket is unreachable; callers try again later anyway.
	tries = 4
	// maxUploads and maxParts bound what is kept of the listings of uploads and of the parts of one.
	maxUploads = 1000
	maxParts   = 10_000 // S3's own limit
	// maxPages bounds the requests for one list, in which objects that cay did not write may be.
	maxPages = 1000
)

// Credentials sign the requests to an S3 server.
type Credentials struct {
	AccessKey, SecretKey string
	Token                string // of temporary credentials; "" for others
}

// S3 is a [Bucket] of an S3 server.
type S3 struct {
	client *s3.Client
	bucket *string
	prefix string // of all keys, "" or with a "/" at its end
	wire   *wire
	puts   checksums
	parts  checksums
}

// OpenS3 returns the bucket at a location. It makes no request.
func OpenS3(l Location, c Credentials) (*S3, error) {
	if c.AccessKey == "" || c.SecretKey == "" {
		return nil, errors.New("an S3 bucket needs an access key and a secret key")
	}
	signing := aws.Credentials{AccessKeyID: c.AccessKey, SecretAccessKey: c.SecretKey, SessionToken: c.Token}
	wire := newWire()
	client := s3.New(s3.Options{
		BaseEndpoint: &l.Endpoint, Region: l.Region, UsePathStyle: l.PathStyle, AppID: "cay",
		Credentials: aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) { return signing, nil }),
		HTTPClient: &http.Client{Transport: wire, // credentials go to no other server
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		Retryer: retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts, o.MaxBackoff = tries, time.Second
			o.RateLimiter = ratelimit.None // the callers' pauses are longer
		}),
		// The other checksums that Amazon's servers know are unknown to many other servers.
		RequestChecksumCalculation:   aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation:   aws.ResponseChecksumValidationWhenRequired,
		ContinueHeaderThresholdBytes: -1, // no round trip before a body
	})
	return &S3{client: client, bucket: &l.Bucket, prefix: l.Prefix, wire: wire}, nil
}

// key returns the key in the bucket.
func (s *S3) key(key string) (*string, error) {
	name := s.prefix + key
	return &name, checkKey(key)
}

// fail returns the error of a request about a key.
func fail(doing, key string, err error) error {
	if err == nil {
		return nil
	}
	var answer smithy.APIError
	if !errors.As(err, &answer) {
		return fmt.Errorf("%s object %s: %w", doing, key, err)
	}
	var kind error
	switch answer.ErrorCode() {
	case "NoSuchKey", "NoSuchUpload", "NotFound":
		kind = notExist(key)
	case "PreconditionFailed", "ConditionalRequestConflict":
		kind = ErrCondition
	case "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "BadDigest", "InvalidDigest":
		kind = ErrDamaged
	default:
		return fmt.Errorf("%s object %s: %w", doing, key, err)
	}
	return fmt.Errorf("%s object %s: %w: %s", doing, key, kind, answer.ErrorCode())
}

// headers returns the values of If-None-Match and If-Match, nil for none.
func (w Condition) headers() (ifNoneMatch, ifMatch *string) {
	if w.Absent {
		ifNoneMatch = aws.String("*")
	}
	if w.ETag != "" {
		ifMatch = aws.String(`"` + w.ETag + `"`)
	}
	return ifNoneMatch, ifMatch
}

// unsigned stands for the SHA-256 of a body in a signature.
const unsigned = "UNSIGNED-PAYLOAD"

// signed makes the client sign a request with sum, the SHA-256 of its body or unsigned. By default the client computes
// the SHA-256 again or, over TLS, leaves it out.
func signed(sum string) func(*s3.Options) {
	set := func(ctx context.Context, in middleware.InitializeInput, next middleware.InitializeHandler) (
		middleware.InitializeOutput, middleware.Metadata, error) {
		return next.HandleInitialize(v4.SetPayloadHash(ctx, sum), in)
	}
	return s3.WithAPIOptions(func(stack *middleware.Stack) error {
		return stack.Initialize.Add(middleware.InitializeMiddlewareFunc("cay.sum", set), middleware.Before)
	})
}

// checksums knows whether a server compares the checksum of a body, which is a header of its own and signed like all
// headers. It has one of the constants below.
type checksums struct{ state atomic.Int32 }

const (
	checksumUnknown  int32 = iota // nothing was sent yet
	checksumCompared              // its answers repeat the checksum
	checksumUnused                // it knows no checksums, or refuses bodies that are not in the signature
)

// send makes a request with a body by calling do, which applies the options and returns the checksum in the answer. A
// server sums the body once for the signature and once more for the checksum. If it compares the checksum, send leaves
// the SHA-256 out of the signature.
func (s *checksums) send(body *io.SectionReader, sum func() (Sum, error), checksum *string,
	do func(options func(*s3.Options)) (*string, error)) error {
	checked := func(options func(*s3.Options)) (compared bool, err error) {
		got, err := do(options)
		if err == nil && got != nil && *got != *checksum {
			err = fmt.Errorf("the server has got other content: %w", ErrDamaged)
		}
		return got != nil, err
	}
	if s.state.Load() == checksumCompared {
		_, err := checked(signed(unsigned))
		var answer smithy.APIError
		if !errors.As(err, &answer) || answer.ErrorCode() != "AccessDenied" {
			return err
		}
		s.state.Store(checksumUnused) // a policy of the bucket may refuse such bodies
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	inSignature, err := sum()
	if err != nil {
		return err
	}
	compared, err := checked(signed(inSignature.String()))
	if err == nil && compared {
		s.state.CompareAndSwap(checksumUnknown, checksumCompared)
	}
	return err
}

// encoded returns a checksum as S3's headers have it.
func encoded(sum []byte) *string { return aws.String(base64.StdEncoding.EncodeToString(sum)) }

// etag returns an ETag without its quotes.
func etag(text *string) string { return strings.Trim(aws.ToString(text), `"`) }

// Put implements [Bucket].
func (s *S3) Put(ctx context.Context, key string, body *io.SectionReader, sum Sum, when Condition) (string, error) {
	name, err := s.key(key)
	if err != nil {
		return "", err
	}
	checksum := encoded(sum[:])
	in := &s3.PutObjectInput{Bucket: s.bucket, Key: name, Body: body, ContentLength: aws.Int64(body.Size()),
		ChecksumSHA256: checksum}
	in.IfNoneMatch, in.IfMatch = when.headers()
	var tag string
	known := func() (Sum, error) { return sum, nil }
	err = s.puts.send(body, known, checksum, func(options func(*s3.Options)) (*string, error) {
		out, err := s.client.PutObject(ctx, in, options)
		if err != nil {
			return nil, err
		}
		tag = etag(out.ETag)
		return out.ChecksumSHA256, nil
	})
	return tag, fail("writing", key, err)
}

// Get implements [Bucket].
func (s *S3) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, error) {
	name, err := s.key(key)
	if err != nil {
		return nil, err
	}
	out, err := s.client.GetObject(content(ctx, n), &s3.GetObjectInput{Bucket: s.bucket, Key: name,
		Range: aws.String(fmt.Sprintf("bytes=%d-%d", off, off+n-1))})
	if err != nil {
		return nil, fail("reading", key, err)
	}
	return exactly(out.Body, out.Body, n), nil
}

// Stat implements [Bucket].
func (s *S3) Stat(ctx context.Context, key string) (Info, error) {
	name, err := s.key(key)
	if err != nil {
		return Info{}, err
	}
	out, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: s.bucket, Key: name})
	if err != nil {
		return Info{}, fail("looking at", key, err)
	}
	return Info{Key: key, Size: aws.ToInt64(out.ContentLength), ETag: etag(out.ETag),
		Modified: aws.ToTime(out.LastModified)}, nil
}

// List implements [Bucket].
func (s *S3) List(ctx context.Context, prefix, after string, most int) ([]Info, error) {
	in := &s3.ListObjectsV2Input{Bucket: s.bucket, Prefix: aws.String(s.prefix + prefix)}
	if after != "" {
		in.StartAfter = aws.String(s.prefix + after)
	}
	var all []Info
	for pages := 0; len(all) < most; pages++ {
		if pages == maxPages {
			return nil, fmt.Errorf("listing objects %s: there are too many that are not cay's", prefix)
		}
		in.MaxKeys = aws.Int32(int32(min(most-len(all), 1000)))
		page, err := s.client.ListObjectsV2(ctx, in)
		if err != nil {
			return nil, fail("listing", prefix, err)
		}
		for _, o := range page.Contents {
			// Some servers list more than was asked for, and not all objects were written by cay.
			key, ours := strings.CutPrefix(aws.ToString(o.Key), s.prefix)
			if !ours || !strings.HasPrefix(key, prefix) || key <= after || checkKey(key) != nil {
				continue
			}
			all = append(all, Info{Key: key, Size: aws.ToInt64(o.Size), ETag: etag(o.ETag),
				Modified: aws.ToTime(o.LastModified)})
		}
		if !aws.ToBool(page.IsTruncated) || page.NextContinuationToken == nil {
			break
		}
		in.ContinuationToken = page.NextContinuationToken
	}
	return all[:min(most, len(all))], nil
}

// Delete implements [Bucket].
func (s *S3) Delete(ctx context.Context, key string) error {
	name, err := s.key(key)
	if err != nil {
		return err
	}
	_, err = s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: s.bucket, Key: name})
	return ignoreAbsent(fail("removing", key, err))
}

// Begin implements [Bucket].
func (s *S3) Begin(ctx context.Context, key string) (string, error) {
	name, err := s.key(key)
	if err != nil {
		return "", err
	}
	out, err := s.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: s.bucket, Key: name,
		ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c})
	if err != nil {
		return "", fail("beginning upload of", key, err)
	}
	return aws.ToString(out.UploadId), nil
}

// PutPart implements [Bucket].
func (s *S3) PutPart(ctx context.Context, key, id string, number int, body *io.SectionReader, crc uint32) (Part,
	error) {
	name, err := s.key(key)
	if err != nil {
		return Part{}, err
	}
	p := Part{Number: number, Size: body.Size(), CRC: crc}
	checksum := encoded(bigEndian(crc))
	sum := func() (Sum, error) { return sumOf(ctx, body, make([]byte, bufferSize)) }
	err = s.parts.send(body, sum, checksum, func(options func(*s3.Options)) (*string, error) {
		out, err := s.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: s.bucket, Key: name, UploadId: &id,
			PartNumber: aws.Int32(int32(number)), Body: body, ContentLength: aws.Int64(body.Size()),
			ChecksumCRC32C: checksum}, options)
		if err != nil {
			return nil, err
		}
		p.ETag = etag(out.ETag)
		return out.ChecksumCRC32C, nil
	})
	if err != nil {
		return Part{}, fail("writing a part of", key, err)
	}
	return p, nil
}

// Parts implements [Bucket].
func (s *S3) Parts(ctx context.Context, key, id string) ([]Part, error) {
	name, err := s.key(key)
	if err != nil {
		return nil, err
	}
	var parts []Part
	in := &s3.ListPartsInput{Bucket: s.bucket, Key: name, UploadId: &id, MaxParts: aws.Int32(1000)}
	for after := 0; len(parts) < maxParts; {
		page, err := s.client.ListParts(ctx, in)
		if err != nil {
			return nil, fail("listing parts of", key, err)
		}
		if page.ChecksumAlgorithm == types.ChecksumAlgorithmSha256 {
			return nil, fmt.Errorf("listing parts of an earlier version: %w", notExist(key))
		}
		for _, p := range page.Parts {
			part := Part{Number: int(aws.ToInt32(p.PartNumber)), ETag: etag(p.ETag), Size: aws.ToInt64(p.Size)}
			crc, err := base64.StdEncoding.DecodeString(aws.ToString(p.ChecksumCRC32C))
			if err == nil && len(crc) == crc32.Size {
				part.CRC = binary.BigEndian.Uint32(crc)
			}
			parts = append(parts, part)
		}
		next, err := strconv.Atoi(aws.ToString(page.NextPartNumberMarker))
		if !aws.ToBool(page.IsTruncated) || err != nil || next <= after {
			break
		}
		after, in.PartNumberMarker = next, page.NextPartNumberMarker
	}
	slices.SortFunc(parts, func(a, b Part) int { return cmp.Compare(a.Number, b.Number) })
	return parts, nil
}

// Complete implements [Bucket].
func (s *S3) Complete(ctx context.Context, key, id string, parts []Part, when Condition) (string, error) {
	name, err := s.key(key)
	if err != nil {
		return "", err
	}
	var all types.CompletedMultipartUpload
	for _, p := range parts {
		all.Parts = append(all.Parts, types.CompletedPart{PartNumber: aws.Int32(int32(p.Number)), ETag: aws.String(p.ETag),
			ChecksumCRC32C: encoded(bigEndian(p.CRC))})
	}
	in := &s3.CompleteMultipartUploadInput{Bucket: s.bucket, Key: name, UploadId: &id, MultipartUpload: &all}
	in.IfNoneMatch, in.IfMatch = when.headers()
	out, err := s.client.CompleteMultipartUpload(ctx, in)
	if err != nil {
		return "", fail("completing upload of", key, err)
	}
	return etag(out.ETag), nil
}

// Abort implements [Bucket].
func (s *S3) Abort(ctx context.Context, key, id string) error {
	name, err := s.key(key)
	if err != nil {
		return err
	}
	_, err = s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: s.bucket, Key: name, UploadId: &id})
	return ignoreAbsent(fail("ending upload of", key, err))
}

// Uploads implements [Bucket].
func (s *S3) Uploads(ctx context.Context, prefix string) ([]Upload, error) {
	page, err := s.client.ListMultipartUploads(ctx, &s3.ListMultipartUploadsInput{Bucket: s.bucket,
		Prefix: aws.String(s.prefix + prefix), MaxUploads: aws.Int32(maxUploads)})
	if err != nil {
		return nil, fail("listing uploads of", prefix, err)
	}
	var all []Upload
	for _, u := range page.Uploads {
		// Some servers list more than was asked for.
		key, ours := strings.CutPrefix(aws.ToString(u.Key), s.prefix)
		if ours && strings.HasPrefix(key, prefix) && checkKey(key) == nil {
			all = append(all, Upload{Key: key, ID: aws.ToString(u.UploadId), Begun: aws.ToTime(u.Initiated)})
		}
	}
	return all, nil
}

// Skew implements [Bucket].
func (s *S3) Skew(ctx context.Context) (time.Duration, error) {
	if _, err := s.Stat(ctx, "clock"); ignoreAbsent(err) != nil {
		return 0, err
	}
	return s.wire.skew()
}
