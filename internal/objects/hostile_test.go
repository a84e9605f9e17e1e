package objects

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// hostile opens a bucket whose server answers with a handler.
func hostile(t *testing.T, answer http.HandlerFunc) Bucket {
	t.Helper()
	s := httptest.NewServer(answer)
	t.Cleanup(s.Close)
	b, err := OpenS3(Location{Bucket: "cay", Endpoint: s.URL, Region: "r", PathStyle: true},
		Credentials{AccessKey: "a", SecretKey: "b"})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestEndlessAnswers lets the server answer without end. Every call must end, without the memory for it.
func TestEndlessAnswers(t *testing.T) {
	piece := []byte(strings.Repeat("<Contents><Key>a</Key></Contents><Part><PartNumber>1</PartNumber></Part>"+
		"<Upload><Key>a</Key></Upload>", 1000))
	for _, status := range []int{http.StatusOK, http.StatusForbidden} {
		b := hostile(t, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(status)
			w.Write([]byte(`<?xml version="1.0"?><Result>`))
			for r.Context().Err() == nil {
				if _, err := w.Write(piece); err != nil {
					return
				}
			}
		})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		calls := map[string]func() error{
			"list":     func() error { _, err := b.List(t.Context(), "", "", 10); return err },
			"parts":    func() error { _, err := b.Parts(t.Context(), "a", "id"); return err },
			"uploads":  func() error { _, err := b.Uploads(t.Context(), ""); return err },
			"begin":    func() error { _, err := b.Begin(t.Context(), "a"); return err },
			"complete": func() error { _, err := b.Complete(t.Context(), "a", "id", nil, Condition{}); return err },
		}
		for name, call := range calls {
			if err := call(); err == nil {
				t.Errorf("%s with status %d: no error", name, status)
			}
		}
		runtime.ReadMemStats(&after)
		// Decoding takes several times the bytes of an answer, and failed calls are tried again.
		if most := uint64(len(calls)) * tries * 40 * maxAnswer; after.TotalAlloc-before.TotalAlloc > most {
			t.Errorf("%d MiB were allocated, more than %d", (after.TotalAlloc-before.TotalAlloc)>>20, most>>20)
		}
	}
}

// TestLyingAnswers lets the server tell things that are not so.
func TestLyingAnswers(t *testing.T) {
	b := hostile(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodHead:
			w.Header().Set("Content-Length", "1000000000000")
		case r.URL.Query().Get("prefix") == "none":
			w.Write([]byte(`<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>` +
				`</ListBucketResult>`))
		case r.URL.Query().Has("list-type"):
			w.Write([]byte(`<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>` +
				`<Contents><Key>../../etc/passwd</Key></Contents><Contents><Key>a</Key></Contents>` +
				`<Contents><Key>ok</Key><Size>-5</Size></Contents><Contents><Key>okay</Key></Contents>` +
				`</ListBucketResult>`))
		case r.URL.Query().Has("uploadId"):
			w.Write([]byte(`<ListPartsResult><IsTruncated>true</IsTruncated><NextPartNumberMarker>-1</NextPartNumberMarker>` +
				`<Part><PartNumber>-7</PartNumber><Size>-1</Size><ChecksumCRC32C>!</ChecksumCRC32C></Part></ListPartsResult>`))
		default:
			http.Redirect(w, r, "http://192.0.2.1/stolen", http.StatusTemporaryRedirect)
		}
	})
	if all, err := b.List(t.Context(), "", "", 3); err != nil || len(all) != 3 || all[0].Key != "a" {
		t.Errorf("the list is %v, %v", all, err)
	}
	if all, err := b.List(t.Context(), "o", "ok", 2); err != nil || len(all) != 2 || all[0].Key != "okay" ||
		all[1].Key != "okay" {
		t.Errorf("the list of what begins with o, after ok, is %v, %v", all, err)
	}
	if _, err := b.List(t.Context(), "none", "", 3); err == nil {
		t.Error("a list without end that has nothing of ours ended without an error")
	}
	if parts, err := b.Parts(t.Context(), "a", "id"); err != nil || len(parts) != 1 || parts[0].CRC != 0 {
		t.Errorf("the parts are %v, %v", parts, err)
	}
	if _, err := b.Get(t.Context(), "a", 0, 10); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an answer from elsewhere: %v", err)
	}
	if _, err := NewTransfer(b).Download(t.Context(), "a", emptyFile(t), Sum{1}, 1<<30, 0); !errors.Is(err, ErrDamaged) {
		t.Errorf("an object of a terabyte: %v", err)
	}
}

// TestKindsOfErrors lets the server refuse a write with the codes that servers of several makers use.
func TestKindsOfErrors(t *testing.T) {
	for code, want := range map[string]error{"NoSuchUpload": fs.ErrNotExist, "PreconditionFailed": ErrCondition,
		"ConditionalRequestConflict": ErrCondition, "BadDigest": ErrDamaged, "XAmzContentSHA256Mismatch": ErrDamaged,
		"XAmzContentChecksumMismatch": ErrDamaged} {
		b := hostile(t, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, "<Error><Code>%s</Code></Error>", code)
		})
		if _, err := b.PutPart(t.Context(), "a", "id", 1, section([]byte("b")), 0); !errors.Is(err, want) {
			t.Errorf("%s: %v; want %v", code, err, want)
		}
	}
}

// lies are the ways in which a server answers a request for n bytes of content, from off on, with something else. Each
// says what a download must return.
var lies = map[string]struct {
	answer func(w http.ResponseWriter, content []byte, off, n int)
	want   string // "damaged", "failed", or "" for none
}{
	"other bytes": {func(w http.ResponseWriter, content []byte, off, n int) {
		w.WriteHeader(http.StatusPartialContent)
		w.Write([]byte{content[off] + 1})
		w.Write(content[off+1 : off+n])
	}, "damaged"},
	"the beginning of the object": {func(w http.ResponseWriter, content []byte, _, _ int) { w.Write(content) }, "damaged"},
	"more and more": {func(w http.ResponseWriter, content []byte, off, n int) {
		w.Write(content[off : off+n])
		for {
			if _, err := w.Write(content); err != nil {
				return
			}
		}
	}, ""},
	"an error with status 200": {func(w http.ResponseWriter, _ []byte, _, _ int) {
		w.Write([]byte("<Error><Code>InternalError</Code></Error>"))
	}, "failed"},
	"half of it": {func(w http.ResponseWriter, content []byte, off, n int) {
		w.WriteHeader(http.StatusPartialContent)
		w.Write(content[off : off+n/2])
	}, "failed"},
	"half of it and a broken connection": {func(w http.ResponseWriter, content []byte, off, n int) {
		w.Header().Set("Content-Length", strconv.Itoa(n))
		w.Write(content[off : off+n/2])
		panic(http.ErrAbortHandler)
	}, "failed"},
	"a byte from time to time": {func(w http.ResponseWriter, content []byte, off, n int) {
		for _, b := range content[off : off+n] {
			if _, err := w.Write([]byte{b}); err != nil {
				return
			}
			http.NewResponseController(w).Flush()
			time.Sleep(10 * time.Millisecond)
		}
	}, "failed"},
}

// TestDownloadsFromLiars downloads an object of two pieces, so that there are ranges, from servers that lie. Each
// download must end, and none with a wrong file.
func TestDownloadsFromLiars(t *testing.T) {
	const size = minPart + 1000
	f, sum := testFile(t, size)
	content := make([]byte, size)
	if _, err := f.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewTransfer(dir).UploadPieces(t.Context(), "a", f, size, testSecret)
	if err != nil {
		t.Fatal(err)
	}
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := hostile(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodHead {
					w.Header().Set("Content-Length", strconv.Itoa(size))
					return
				}
				var from, to int
				if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
					t.Error(err)
				}
				lie.answer(w, content, from, to+1-from)
			})
			if name == "a byte from time to time" {
				b.(*S3).wire.patience, b.(*S3).wire.rate = 200*time.Millisecond, math.MaxInt64 // it would need days
			}
			var wg sync.WaitGroup
			defer wg.Wait()
			for how, download := range map[string]func(transfer *Transfer, to *os.File) error{
				"whole": func(transfer *Transfer, to *os.File) error {
					_, err := transfer.Download(t.Context(), "a", to, sum, size, 0)
					return err
				},
				"pieces": func(transfer *Transfer, to *os.File) error {
					return transfer.DownloadPieces(t.Context(), "a", to, size, p, testSecret, 0)
				},
				"pieces without MACs": func(transfer *Transfer, to *os.File) error {
					return transfer.DownloadPieces(t.Context(), "a", to, size, Pieces{Sums: sumsOf(t, f, size)}, testSecret, 0)
				},
			} {
				to, transfer := emptyFile(t), NewTransfer(b)
				wg.Go(func() {
					err := download(transfer, to)
					got := "failed"
					if err == nil {
						got = ""
					} else if errors.Is(err, ErrDamaged) {
						got = "damaged"
					}
					if got != lie.want || errors.Is(err, fs.ErrNotExist) {
						t.Errorf("%s: %v; want %q", how, err, lie.want)
					}
					data, readErr := os.ReadFile(to.Name())
					if readErr != nil || len(data) > size || err == nil && sha256.Sum256(data) != sum {
						t.Errorf("%s: the file has %d bytes, %v", how, len(data), readErr)
					}
					if left := promisedBy(transfer); left != 0 {
						t.Errorf("%s: %d bytes are still promised", how, left)
					}
				})
			}
		})
	}
}

// TestUploadsToLiars uploads a file to servers that do not store it and say so in an unusual place.
func TestUploadsToLiars(t *testing.T) {
	const size = minPart + 1000
	f, sum := testFile(t, size)
	fine := map[string]string{
		"begin": "<InitiateMultipartUploadResult><UploadId>id</UploadId></InitiateMultipartUploadResult>",
		"list":  "<ListMultipartUploadsResult/>", "complete": "<CompleteMultipartUploadResult/>"}
	fault := "<Error><Code>InternalError</Code></Error>"
	for name, lie := range map[string]struct{ complete, checksum string }{
		"an error with status 200":   {complete: fault},
		"spaces and then an error":   {complete: strings.Repeat(" ", 1000) + fault},
		"the checksum of other data": {complete: fine["complete"], checksum: *encoded(bigEndian(1))},
	} {
		b := hostile(t, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			switch query := r.URL.Query(); {
			case r.Method == http.MethodHead:
				w.WriteHeader(http.StatusNotFound)
			case r.Method == http.MethodPut:
				w.Header().Set("ETag", `"a"`)
				if lie.checksum != "" {
					w.Header().Set("X-Amz-Checksum-Crc32c", lie.checksum)
				}
			case r.Method == http.MethodPost && query.Has("uploads"):
				w.Write([]byte(fine["begin"]))
			case r.Method == http.MethodPost:
				w.Write([]byte(lie.complete))
			default:
				w.Write([]byte(fine["list"]))
			}
		})
		if err := NewTransfer(b).Upload(t.Context(), "a", f, size, sum); err == nil {
			t.Errorf("%s: the upload succeeded", name)
		} else if errors.Is(err, errWrongSum) {
			t.Errorf("%s: the local file is blamed: %v", name, err)
		}
	}
}

// surplus is a bucket that lists an object beside those that it was asked for.
type surplus struct {
	Bucket
	key string
}

func (s surplus) List(ctx context.Context, prefix, after string, most int) ([]Info, error) {
	all, err := s.Bucket.List(ctx, prefix, after, most)
	return append(all, Info{Key: s.key, Size: 1}), err
}

// TestMirrorCollectsFromSurplus checks that a collection neither fails by nor touches objects of other prefixes that
// the bucket lists.
func TestMirrorCollectsFromSurplus(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Repeat("0", 64)
	write(t, dir, other, "of another program", Condition{})
	for _, key := range []string{"a", other} {
		w := newWorld(t, surplus{dir, key}, t.TempDir(), 0)
		for range 3 {
			w.keep(t)
			w.pass(10 * Grace)
		}
	}
	if read(t, dir, other) == "" {
		t.Error("an object of another program was removed")
	}
}

// careless is a bucket that writes whatever arrives.
type careless struct{ Bucket }

func (c careless) Put(ctx context.Context, key string, body *io.SectionReader, _ Sum, when Condition) (string, error) {
	sum, err := sumOf(ctx, body, make([]byte, bufferSize))
	if err != nil {
		return "", err
	}
	return c.Bucket.Put(ctx, key, body, sum, when)
}

// carelessParts is a bucket that writes whatever parts arrive.
type carelessParts struct{ Bucket }

func (c carelessParts) PutPart(ctx context.Context, key, id string, number int, body *io.SectionReader, _ uint32) (
	Part, error) {
	data, err := io.ReadAll(body)
	if err != nil {
		return Part{}, err
	}
	return c.Bucket.PutPart(ctx, key, id, number, section(data), crcOf(data))
}

// overwriting is a bucket that ignores conditions.
type overwriting struct{ Bucket }

func (o overwriting) Put(ctx context.Context, key string, body *io.SectionReader, sum Sum, _ Condition) (string,
	error) {
	return o.Bucket.Put(ctx, key, body, sum, Condition{})
}

// joining is a bucket that ignores the conditions of uploads in parts.
type joining struct{ Bucket }

func (j joining) Complete(ctx context.Context, key, id string, parts []Part, _ Condition) (string, error) {
	return j.Bucket.Complete(ctx, key, id, parts, Condition{})
}

// unlisted is a bucket that may not be listed.
type unlisted struct{ Bucket }

func (u unlisted) List(context.Context, string, string, int) ([]Info, error) {
	return nil, errors.New("AccessDenied")
}

// early is a bucket whose clock is an hour behind.
type early struct{ Bucket }

func (e early) Skew(context.Context) (time.Duration, error) { return -time.Hour, nil }

// TestCheckFindsFaults has the doctor check buckets that lack what cay needs.
func TestCheckFindsFaults(t *testing.T) {
	dir, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		bucket Bucket
		wrong  []string // findings
	}{
		{dir, nil},
		{careless{dir}, []string{"checksums"}},
		{carelessParts{dir}, []string{"checksums"}},
		{overwriting{dir}, []string{"conditional writes"}},
		{joining{dir}, []string{"conditional writes"}},
		{unlisted{dir}, []string{"bucket", "conditional writes", "checksums"}}, // without rights the others are not known
		{early{dir}, []string{"bucket's clock"}},
	} {
		for _, f := range Check(t.Context(), c.bucket) {
			if f.OK == slices.Contains(c.wrong, f.Name) {
				t.Errorf("%T: %s: %t, %s", c.bucket, f.Name, f.OK, f.Detail)
			}
		}
		if left, err := dir.List(t.Context(), "", "", 10); err != nil || len(left) != 0 {
			t.Errorf("%T: left are %v, %v", c.bucket, left, err)
		}
		if left, err := dir.Uploads(t.Context(), ""); err != nil || len(left) != 0 {
			t.Errorf("%T: left are the uploads %v, %v", c.bucket, left, err)
		}
	}
}
