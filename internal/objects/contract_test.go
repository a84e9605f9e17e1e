package objects

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// eachBucket runs a test over every kind of bucket, each empty.
func eachBucket(t *testing.T, test func(t *testing.T, b Bucket)) {
	t.Run("dir", func(t *testing.T) {
		b, err := OpenDir(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		test(t, b)
	})
	t.Run("s3", func(t *testing.T) { test(t, openS3(t, caytest.StartS3(t), "some/prefix")) })
}

func openS3(t *testing.T, s *caytest.S3, prefix string) Bucket {
	t.Helper()
	l, err := ParseURL(s.URL(prefix))
	if err != nil {
		t.Fatal(err)
	}
	b, err := Open(l, Credentials{AccessKey: s.AccessKey, SecretKey: s.SecretKey})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, b Bucket, key, text string, when Condition) string {
	t.Helper()
	etag, err := Write(t.Context(), b, key, []byte(text), when)
	if err != nil {
		t.Fatal(err)
	}
	return etag
}

func read(t *testing.T, b Bucket, key string) string {
	t.Helper()
	data, _, err := Read(t.Context(), b, key, 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestContract holds every kind of bucket to what Bucket promises.
func TestContract(t *testing.T) {
	eachBucket(t, func(t *testing.T, b Bucket) {
		for _, c := range []struct {
			name string
			test func(*testing.T, Bucket)
		}{
			{"objects", contractObjects}, {"ranges", contractRanges}, {"sums", contractSums}, {"keys", contractKeys},
			{"conditions", contractConditions}, {"one winner", contractOneWinner}, {"lists", contractLists},
			{"parts", contractParts}, {"uploads", contractUploads}, {"check", contractCheck},
		} {
			t.Run(c.name, func(t *testing.T) { c.test(t, b) })
		}
	})
}

func contractObjects(t *testing.T, b Bucket) {
	before := time.Now()
	for _, text := range []string{"", "hello", strings.Repeat("x", 3<<20)} {
		etag := write(t, b, "objects/a", text, Condition{})
		if got := read(t, b, "objects/a"); got != text {
			t.Errorf("read back %d bytes, want %d", len(got), len(text))
		}
		info, err := b.Stat(t.Context(), "objects/a")
		if err != nil || info.Size != int64(len(text)) || info.Key != "objects/a" || info.ETag != etag {
			t.Errorf("it is %+v, %v, and was written with ETag %s", info, err, etag)
		}
		if d := info.Modified.Sub(before); d < -5*time.Second || d > time.Minute {
			t.Errorf("it was modified %s after the test began", d)
		}
	}
	for range 2 {
		if err := b.Delete(t.Context(), "objects/a"); err != nil {
			t.Error(err)
		}
	}
	if _, err := b.Stat(t.Context(), "objects/a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is removed, and Stat returns %v", err)
	}
	if _, err := b.Get(t.Context(), "objects/a", 0, 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is removed, and Get returns %v", err)
	}
	if skew, err := b.Skew(t.Context()); err != nil || skew.Abs() > 5*time.Second {
		t.Errorf("the clock of this machine is %s ahead of itself, %v", skew, err)
	}
}

func contractRanges(t *testing.T, b Bucket) {
	write(t, b, "ranges/a", "0123456789", Condition{})
	for _, c := range []struct {
		off, n int64
		want   string
		short  bool
	}{{0, 10, "0123456789", false}, {3, 4, "3456", false}, {9, 1, "9", false}, {5, 10, "56789", true}} {
		r, err := b.Get(t.Context(), "ranges/a", c.off, c.n)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if string(got) != c.want || errors.Is(err, io.ErrUnexpectedEOF) != c.short {
			t.Errorf("%d bytes from %d: %q, %v", c.n, c.off, got, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// contractSums sends content whose SHA-256 or CRC-32C is another one, as a fault on the way would.
func contractSums(t *testing.T, b Bucket) {
	other, otherCRC := sha256.Sum256([]byte("other")), crcOf([]byte("other"))
	write(t, b, "sums/right", "text", Condition{}) // after it a server with checksums gets no sum in the signature
	if _, err := b.Put(t.Context(), "sums/a", section([]byte("text")), other, Condition{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("a put of other content: %v", err)
	}
	if _, err := b.Stat(t.Context(), "sums/a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after that there is an object: %v", err)
	}
	id, err := b.Begin(t.Context(), "sums/a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.PutPart(t.Context(), "sums/a", id, 1, section([]byte("text")), otherCRC); !errors.Is(err, ErrDamaged) {
		t.Errorf("a part of other content: %v", err)
	}
	if parts, err := b.Parts(t.Context(), "sums/a", id); err != nil || len(parts) != 0 {
		t.Errorf("after that there are parts %v, %v", parts, err)
	}
	putPart(t, b, "sums/a", id, 1, []byte("text")) // after it a server with checksums gets no sum in the signature
	if _, err := b.PutPart(t.Context(), "sums/a", id, 2, section([]byte("text")), otherCRC); !errors.Is(err, ErrDamaged) {
		t.Errorf("a second part of other content: %v", err)
	}
	if err := b.Abort(t.Context(), "sums/a", id); err != nil {
		t.Error(err)
	}
}

func contractKeys(t *testing.T, b Bucket) {
	for _, key := range []string{"", "/a", "a/", "a//b", "..", "a/../b", ".tmp/a", "a b", "a\x00", "ä",
		strings.Repeat("a", maxKey+1)} {
		if _, err := Write(t.Context(), b, key, nil, Condition{}); err == nil {
			t.Errorf("%.20q was taken for a key", key)
		}
		if _, err := b.Stat(t.Context(), key); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Stat of %.20q: %v", key, err)
		}
		if _, err := b.Begin(t.Context(), key); err == nil {
			t.Errorf("an upload of %.20q was begun", key)
		}
	}
}

func contractConditions(t *testing.T, b Bucket) {
	first := write(t, b, "conditions/a", "1", Condition{Absent: true})
	_, err := Write(t.Context(), b, "conditions/a", []byte("2"), Condition{Absent: true})
	if !errors.Is(err, ErrCondition) {
		t.Errorf("a write over an object: %v", err)
	}
	second := write(t, b, "conditions/a", "2", Condition{ETag: first})
	if first == second {
		t.Errorf("two contents have the ETag %s", first)
	}
	_, err = Write(t.Context(), b, "conditions/a", []byte("3"), Condition{ETag: first})
	if !errors.Is(err, ErrCondition) {
		t.Errorf("a write over a later object: %v", err)
	}
	if got := read(t, b, "conditions/a"); got != "2" {
		t.Errorf("it is %q after refused writes", got)
	}
}

func contractOneWinner(t *testing.T, b Bucket) {
	for round := range 5 {
		key := fmt.Sprintf("winner/%d", round)
		var won atomic.Int32
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				_, err := Write(t.Context(), b, key, []byte(fmt.Sprint(i)), Condition{Absent: true})
				if err == nil {
					won.Add(1)
				} else if !errors.Is(err, ErrCondition) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Errorf("%d of 16 writers were first", won.Load())
		}
	}
}

func contractLists(t *testing.T, b Bucket) {
	var want []string
	for i := range 12 {
		want = append(want, fmt.Sprintf("lists/%02d", i))
	}
	want = append(want, "lists/12/deep/er", "lists/a")
	for _, key := range append(want, "listsnot") /* which only begins like the prefix */ {
		write(t, b, key, key, Condition{})
	}
	slices.Sort(want)
	for _, most := range []int{1, 5, 100} {
		var got []string
		for after := ""; ; after = got[len(got)-1] {
			page, err := b.List(t.Context(), "lists/", after, most)
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range page {
				if o.Size != int64(len(o.Key)) || o.Modified.IsZero() {
					t.Errorf("the list has %+v", o)
				}
				got = append(got, o.Key)
			}
			if len(page) < most {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("by %d they are %v, want %v", most, got, want)
		}
	}
	if page, err := b.List(t.Context(), "lists/0", "", 100); err != nil || len(page) != 10 {
		t.Errorf("with half a name as prefix there are %d, %v", len(page), err)
	}
	if page, err := b.List(t.Context(), "none/", "", 100); err != nil || len(page) != 0 {
		t.Errorf("below nothing there are %v, %v", page, err)
	}
}

func crcOf(data []byte) uint32 { return crc32.Checksum(data, castagnoli) }

func putPart(t *testing.T, b Bucket, key, id string, number int, data []byte) Part {
	t.Helper()
	p, err := b.PutPart(t.Context(), key, id, number, section(data), crcOf(data))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func contractParts(t *testing.T, b Bucket) {
	const key = "parts/a"
	id, err := b.Begin(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, z := bytes.Repeat([]byte("a"), 5<<20), []byte("z")
	putPart(t, b, key, id, 1, []byte("replaced"))
	parts := []Part{{}, putPart(t, b, key, id, 2, z)}
	parts[0] = putPart(t, b, key, id, 1, a)
	if _, err := b.Stat(t.Context(), key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before the end there is an object: %v", err)
	}
	got, err := b.Parts(t.Context(), key, id)
	if err != nil || !slices.Equal(got, parts) {
		t.Errorf("the parts are %v, %v; want %v", got, err, parts)
	}
	write(t, b, key, "in the way", Condition{})
	if _, err := b.Complete(t.Context(), key, id, parts, Condition{Absent: true}); !errors.Is(err, ErrCondition) {
		t.Errorf("completed over an object: %v", err)
	}
	if got := read(t, b, key); got != "in the way" {
		t.Errorf("it was overwritten with %d bytes", len(got))
	}
	if err := b.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Complete(t.Context(), key, id, parts, Condition{Absent: true}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, b, key); got != string(a)+"z" {
		t.Errorf("the object has %d bytes", len(got))
	}
	if _, err := b.Parts(t.Context(), key, id); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the upload is complete, and Parts returns %v", err)
	}
}

func contractUploads(t *testing.T, b Bucket) {
	var ids []string
	for _, key := range []string{"uploads/a", "uploads/a", "uploads/ab"} {
		id, err := b.Begin(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	all, err := b.Uploads(t.Context(), "uploads/")
	if err != nil || len(all) != 3 {
		t.Fatalf("there are %v, %v", all, err)
	}
	for _, u := range all {
		if !slices.Contains(ids, u.ID) || !strings.HasPrefix(u.Key, "uploads/a") || time.Since(u.Begun).Abs() > time.Minute {
			t.Errorf("there is %+v", u)
		}
		for range 2 {
			if err := b.Abort(t.Context(), u.Key, u.ID); err != nil {
				t.Error(err)
			}
		}
		_, err := b.PutPart(t.Context(), u.Key, u.ID, 1, section(nil), crcOf(nil))
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a part of an upload that was ended: %v", err)
		}
	}
	if all, err := b.Uploads(t.Context(), "uploads/"); err != nil || len(all) != 0 {
		t.Errorf("there are still %v, %v", all, err)
	}
}

func contractCheck(t *testing.T, b Bucket) {
	for _, f := range Check(t.Context(), b) {
		if !f.OK {
			t.Errorf("%s: %s", f.Name, f.Detail)
		}
	}
	if left, err := b.List(t.Context(), checkPrefix, "", 10); err != nil || len(left) != 0 {
		t.Errorf("it left %v, %v", left, err)
	}
	if left, err := b.Uploads(t.Context(), checkPrefix); err != nil || len(left) != 0 {
		t.Errorf("it left the uploads %v, %v", left, err)
	}
}
