package image

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/objects"
)

// mirrored opens a store with a mirror in a bucket, which runs until the test ends. No image of inUse is evicted.
func mirrored(t *testing.T, b objects.Bucket, maxLocal int64, inUse func(string) bool, change ...func(*Config)) (*Store,
	*objects.Mirror) {
	t.Helper()
	s := openStore(t, change...)
	m := objects.NewMirror(objects.MirrorConfig{Transfer: objects.NewTransfer(b), Prefix: "images/", Local: s,
		MaxLocal: maxLocal, MaxFile: 1 << 30, Log: slog.New(slog.DiscardHandler)})
	s.UseRemote(m, inUse)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	return s, m
}

func directory(t *testing.T) objects.Bucket {
	t.Helper()
	b, err := objects.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never was so that %s", what)
		}
	}
}

// someImage builds an image and returns it with its source.
func someImage(t *testing.T, h *hub, s *Store, content string) (Image, Source) {
	t.Helper()
	src := Source{Image: h.push(t, "x:"+content, picture(t, runtime.GOARCH, v1.Config{}, archive(t, file("a", content))))}
	img, err := s.Build(t.Context(), src, quiet)
	if err != nil {
		t.Fatal(err)
	}
	return img, src
}

func TestRemote(t *testing.T) {
	b := directory(t)
	s, m := mirrored(t, b, 0, nil)
	img, _ := someImage(t, newHub(t), s, "1")
	eventually(t, "it is uploaded", func() bool { return m.Stored(img.Digest) })

	other, fetched := mirrored(t, b, 0, nil)
	for range 2 {
		path, err := other.Path(t.Context(), img.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := hashFile(t.Context(), path); err != nil || got != img.Digest {
			t.Errorf("its digest is %s, %v; want %s", got, err, img.Digest)
		}
		if info, err := os.Stat(path); err != nil || info.Size() != img.Size || info.Mode().Perm() != 0o444 {
			t.Errorf("it is %v, %v", info, err)
		}
	}
	if c := fetched.Counts(); c.Fetches != 1 || other.Hits() != 1 {
		t.Errorf("it was fetched %d times and found %d times", c.Fetches, other.Hits())
	}
	missing := hashOf([]byte("never built")).Hex
	if _, err := other.Path(t.Context(), missing); !errors.Is(err, ErrMissing) {
		t.Errorf("an image that was never built: %v", err)
	}
	for digest, want := range map[string]error{img.Digest: nil, missing: ErrMissing, "../x": ErrMissing} {
		finder, finds := mirrored(t, b, 0, nil)
		if err := finder.Find(t.Context(), digest); !errors.Is(err, want) || finds.Counts().Fetches != 0 {
			t.Errorf("finding %s gives %v, want %v, and fetches %d", digest, err, want, finds.Counts().Fetches)
		}
	}
	leftovers(t, other)

	// A damaged local file is replaced by the copy.
	if err := os.Chmod(other.file(img.Digest), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(other.file(img.Digest), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	third, err := Open(other.cfg, other.log)
	if err != nil {
		t.Fatal(err)
	}
	third.UseRemote(fetched, nil)
	if _, err := third.Path(t.Context(), img.Digest); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a damaged image: %v", err)
	}
	if _, err := third.Path(t.Context(), img.Digest); err != nil {
		t.Errorf("after that its copy: %v", err)
	}
}

// TestRemoteAway builds and asks for images while the bucket cannot be reached.
func TestRemoteAway(t *testing.T) {
	s3 := caytest.StartS3(t)
	l, err := objects.ParseURL(s3.URL(""))
	if err != nil {
		t.Fatal(err)
	}
	b, err := objects.Open(l, objects.Credentials{AccessKey: s3.AccessKey, SecretKey: s3.SecretKey})
	if err != nil {
		t.Fatal(err)
	}
	s3.Stop()
	s, m := mirrored(t, b, 0, nil)
	img, _ := someImage(t, newHub(t), s, "1")
	if c := m.Counts(); c.Waiting != 1 || c.WaitingBytes != img.Size {
		t.Errorf("what waits is %+v, want one of %d bytes", c, img.Size)
	}
	missing := hashOf([]byte("never built")).Hex
	_, err = s.Path(t.Context(), missing)
	if !errors.Is(err, ErrRemoteUnreachable) || errors.Is(err, ErrMissing) || errors.Is(err, ErrCorrupt) {
		t.Errorf("an image that may be in the bucket: %v", err)
	}
	began := time.Now()
	err = s.Find(t.Context(), missing)
	if !errors.Is(err, ErrRemoteUnreachable) || errors.Is(err, ErrMissing) || time.Since(began) > findPatience {
		t.Errorf("after %v an image that may be in the bucket is found with %v", time.Since(began), err)
	}
	if err := s.Find(t.Context(), img.Digest); err != nil {
		t.Errorf("an image that is here is found with %v", err)
	}
	leftovers(t, s)
}

// TestRemoteOnFullDisk asks for an image that the bucket has, and for which the disk has no room. It is not missing.
func TestRemoteOnFullDisk(t *testing.T) {
	b := directory(t)
	s, m := mirrored(t, b, 0, nil)
	img, _ := someImage(t, newHub(t), s, "1")
	eventually(t, "it is uploaded", func() bool { return m.Stored(img.Digest) })
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		t.Fatal(err)
	}
	// The image has no room beside minFree, which itself is free.
	free := int64(st.Bavail) * st.Bsize
	other := openStore(t)
	other.UseRemote(objects.NewMirror(objects.MirrorConfig{Transfer: objects.NewTransfer(oversized{b, free}),
		Prefix: "images/", Local: other, MaxFile: 2 * free, MinFree: free / 2, Log: slog.New(slog.DiscardHandler)}), nil)
	_, err := other.Path(t.Context(), img.Digest)
	f := fault.As(err)
	if f == nil || f.Code != fault.CodeNoCapacity || f.RetryAfter == 0 || errors.Is(err, ErrMissing) {
		t.Errorf("an image without room is %v, want %s", err, fault.CodeNoCapacity)
	}
	leftovers(t, other)
}

// oversized is a bucket that tells a size of all its objects.
type oversized struct {
	objects.Bucket
	size int64
}

func (o oversized) Stat(ctx context.Context, key string) (objects.Info, error) {
	info, err := o.Bucket.Stat(ctx, key)
	info.Size = o.size
	return info, err
}

// TestRemoteEviction evicts all images but those that are in use, were used lately or must stay here.
func TestRemoteEviction(t *testing.T) {
	clock := time.Now()
	used := ""
	s, m := mirrored(t, directory(t), 1, func(digest string) bool { return digest == used },
		func(c *Config) { c.Now = func() time.Time { return clock } })
	h := newHub(t)
	var all []string
	var sources []Source
	for _, content := range []string{"1", "2", "3", "4"} {
		img, src := someImage(t, h, s, content)
		all, sources = append(all, img.Digest), append(sources, src)
	}
	has := func(n int) bool {
		_, err := os.Stat(s.file(all[n]))
		return err == nil
	}
	for _, digest := range all {
		eventually(t, "it is uploaded", func() bool { return m.Stored(digest) })
		if gone, err := s.Evict(digest); gone || err != nil {
			t.Errorf("an image that was just built was evicted: %v", err)
		}
	}
	clock = clock.Add(collectGrace)
	used = all[0]
	if _, err := s.Path(t.Context(), all[1]); err != nil {
		t.Fatal(err)
	}
	// Templates have all of them, and a suspended sandbox has the last one too.
	if _, _, err := s.Collect(all, all[3:]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the unused one is evicted", func() bool { return !has(2) })
	if gone, err := s.Evict(all[3]); gone || err != nil || !has(3) {
		t.Errorf("an image of a suspended sandbox was evicted: %t, %v", gone, err)
	}
	if !has(0) || !has(1) {
		t.Errorf("the one in use is there: %t, and the one used just now: %t", has(0), has(1))
	}
	// The result of its inputs is still known, without another build.
	if _, _, err := s.Collect(all, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the image of a sandbox that ended is evicted", func() bool { return !has(3) })
	found := false
	img, err := s.Build(t.Context(), sources[2], func(line string) {
		found = found || line == "using the result of an earlier build with the same inputs"
	})
	if err != nil || !found || img.Digest != all[2] || !has(2) {
		t.Errorf("the evicted image: %+v, %v; found: %t, here: %t", img, err, found, has(2))
	}
}

// TestFindWithoutRemote looks for images in a store without a Remote.
func TestFindWithoutRemote(t *testing.T) {
	s := openStore(t)
	img, _ := someImage(t, newHub(t), s, "1")
	if err := s.Find(t.Context(), img.Digest); err != nil {
		t.Errorf("an image that is here: %v", err)
	}
	if err := s.Find(t.Context(), hashOf([]byte("never built")).Hex); !errors.Is(err, ErrMissing) {
		t.Errorf("an image that was never built: %v", err)
	}
}

// TestFindWaitsForLittle looks for an image in a Remote that does not answer, and again while it is fetched from
// there.
func TestFindWaitsForLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, r, digest := slowly(t, time.Hour)
		r.answers = time.Hour
		for _, want := range []time.Duration{findPatience, 0} {
			began := time.Now()
			if err := s.Find(t.Context(), digest); err != nil || time.Since(began) != want {
				t.Errorf("found with %v after %v, want no error after %v", err, time.Since(began), want)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := s.Path(ctx, digest); !errors.Is(err, ErrUnderway) {
				t.Errorf("fetched with %v", err)
			}
		}
		if n := r.fetches.Load(); n != 1 {
			t.Errorf("%d fetches, want 1", n)
		}
	})
}

// slow is a Remote that takes a time to fetch an image, which it has, and to say that it has it.
type slow struct {
	takes   time.Duration
	answers time.Duration
	content string
	fetches atomic.Int32
}

func (r *slow) Offer(string)  {}
func (r *slow) Keep([]string) {}

// Find implements [Remote].
func (r *slow) Find(ctx context.Context, _ string) error {
	select {
	case <-time.After(r.answers):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Fetch implements [Remote].
func (r *slow) Fetch(ctx context.Context, _ string, f *os.File) error {
	r.fetches.Add(1)
	select {
	case <-time.After(r.takes):
		_, err := f.WriteString(r.content)
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// slowly opens a store whose only image takes a time to be fetched.
func slowly(t *testing.T, takes time.Duration) (*Store, *slow, string) {
	t.Helper()
	s, r := openStore(t), &slow{takes: takes, content: "an image"}
	t.Cleanup(s.Close)
	s.UseRemote(r, nil)
	return s, r, hashOf([]byte(r.content)).Hex
}

// TestFetchOutlivesItsCallers fetches an image for longer than its callers wait. Each leaves in its time, the fetch
// goes on without them, and a later caller gets the image that it fetched.
func TestFetchOutlivesItsCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, r, digest := slowly(t, 5*time.Minute)
		began := time.Now()
		var wg sync.WaitGroup
		for _, patience := range []time.Duration{time.Second, time.Minute} {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, err := s.Path(ctx, digest)
				if !errors.Is(err, ErrUnderway) || !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != patience {
					t.Errorf("after %v the error is %v, want after %v that it is under way", time.Since(began), err, patience)
				}
			})
		}
		wg.Wait()
		if _, err := s.Path(t.Context(), digest); err != nil || time.Since(began) != r.takes || r.fetches.Load() != 1 {
			t.Errorf("the image came after %v with fetch %d: %v", time.Since(began), r.fetches.Load(), err)
		}
		leftovers(t, s)
	})
}

// TestFetchIsBounded fetches an image that does not come. It is not missing, and the next caller begins a new fetch.
func TestFetchIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, r, digest := slowly(t, 1000*time.Hour)
		for n := range int32(2) {
			began := time.Now()
			_, err := s.Path(t.Context(), digest)
			if !errors.Is(err, ErrRemoteUnreachable) || errors.Is(err, ErrMissing) || time.Since(began) != fetchTimeout ||
				r.fetches.Load() != n+1 {
				t.Errorf("after %v and %d fetches: %v", time.Since(began), r.fetches.Load(), err)
			}
			leftovers(t, s)
		}
	})
}

// TestCloseEndsFetches closes a store while a fetch has a caller, and while another has none any more.
func TestCloseEndsFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, digest := slowly(t, time.Hour)
		left, leave := context.WithCancel(t.Context())
		leave()
		if _, err := s.Path(left, hashOf([]byte("another")).Hex); !errors.Is(err, ErrUnderway) {
			t.Errorf("a caller that has left: %v", err)
		}
		waits := make(chan error)
		go func() {
			_, err := s.Path(t.Context(), digest)
			waits <- err
		}()
		synctest.Wait()
		began := time.Now()
		go s.Close()
		if err := <-waits; !errors.Is(err, errClosed) {
			t.Errorf("the caller that waits: %v", err)
		}
		s.Close()
		leftovers(t, s)
		if _, err := s.Path(t.Context(), digest); !errors.Is(err, errClosed) || time.Since(began) != 0 {
			t.Errorf("after %v a caller of the closed store: %v", time.Since(began), err)
		}
	})
}
