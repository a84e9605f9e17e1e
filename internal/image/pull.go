package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cayhq/cay/internal/hostfile"
)

// pull is one download that any number of callers wait for. It ends early when the last of them
// leaves.
type pull struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
	err    error // valid once done is closed

	mu sync.Mutex // taken while Store.mu is held, never the other way
	// +checklocks:mu
	waiting map[*waiter]bool
}

// waiter is one caller of [Store.Pull].
type waiter struct{ progress func(string) }

// errAbandoned ends a download when its last caller has left.
var errAbandoned = errors.New("all callers have left")

// Pull fetches the OCI image for this machine's architecture into a layout below the store's
// directory, and checks every byte against the digests that lead to it. It asks the registry each
// time, with auth, what the reference stands for now. It downloads that once, however many
// callers ask at the same time, and keeps it until the budget needs the space: at least for 15
// minutes after its last use, and while it is held ([Store.Hold]). It calls progress with lines
// for people, from one goroutine at a time and not after Pull has returned. A failure is a
// *[StepError] without credentials.
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth, progress func(string)) (Layout, error) {
	l, err := s.pull(ctx, ref, auth, progress)
	if err == nil {
		s.trimLayouts()
		return l, nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return Layout{}, &StepError{Step: "pulling " + ref, ExitCode: -1, Err: err}
}

func (s *Store) pull(ctx context.Context, text string, auth *Auth, progress func(string)) (Layout, error) {
	ref, err := s.reference(text)
	if err != nil {
		return Layout{}, err
	}
	transport := s.transport()
	defer transport.CloseIdleConnections()
	progress(fmt.Sprintf("pulling %s: asking %s", text, ref.Context().RegistryStr()))
	if auth, err = s.exchange(ctx, auth, transport); err != nil {
		return Layout{}, err
	}
	img, err := s.find(ctx, ref, auth, transport)
	if err != nil {
		return Layout{}, err
	}
	digest, err := img.Digest()
	if err != nil {
		return Layout{}, auth.hide(err)
	}
	if digest.Algorithm != "sha256" {
		return Layout{}, fmt.Errorf("its digest is %s; only sha256 is known", digest.Algorithm)
	}
	full := ref.Context().Digest(digest.String())
	// The key includes the repository: a caller who may read one repository must not read
	// another's blobs by naming them in a manifest.
	sum := sha256.Sum256([]byte(full.Name()))
	l := Layout{Dir: filepath.Join(s.cfg.Dir, layoutsDir, hex.EncodeToString(sum[:])), Manifest: digest.String(),
		Reference: full.Name()}
	return l, s.join(ctx, l, progress, func(ctx context.Context, progress func(string)) error {
		return s.download(ctx, text, full, auth, l.Dir, progress)
	})
}

// join waits for the download of a layout, and begins it if there is none.
func (s *Store) join(ctx context.Context, l Layout, progress func(string),
	work func(context.Context, func(string)) error) error {
	id := filepath.Base(l.Dir)
	s.mu.Lock()
	if s.useLayoutLocked(id) {
		s.mu.Unlock()
		progress("pulled before: " + l.Reference)
		return nil
	}
	p := s.pulls[id]
	if p == nil {
		working, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		p = &pull{cancel: cancel, done: make(chan struct{}), waiting: map[*waiter]bool{}}
		s.pulls[id] = p
		go s.run(working, id, p, work)
	}
	me := &waiter{progress}
	p.mu.Lock()
	p.waiting[me] = true
	p.mu.Unlock()
	s.mu.Unlock()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
	}
	if s.leave(id, p, me) {
		p.cancel(errAbandoned)
		<-p.done // it leaves nothing behind
	}
	return context.Cause(ctx)
}

// run carries out a pull.
func (s *Store) run(ctx context.Context, id string, p *pull, work func(context.Context, func(string)) error) {
	ctx, stop := context.WithTimeoutCause(ctx, pullTimeout, fmt.Errorf("not done within %v", pullTimeout))
	defer stop()
	p.err = work(ctx, p.tell)
	if p.err != nil && ctx.Err() != nil {
		p.err = context.Cause(ctx)
	}
	p.cancel(nil)
	s.mu.Lock()
	if s.pulls[id] == p {
		delete(s.pulls, id)
	}
	s.mu.Unlock()
	close(p.done)
}

// leave removes a waiter, and reports whether it was the last one.
func (s *Store) leave(id string, p *pull, w *waiter) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waiting, w)
	if len(p.waiting) > 0 {
		return false
	}
	if s.pulls[id] == p {
		delete(s.pulls, id) // a later caller begins a new download
	}
	return true
}

// tell passes a line to all waiters.
func (p *pull) tell(line string) {
	p.mu.Lock()
	defer p.mu.Unlock() // held, so that no waiter is called after it has left
	for w := range p.waiting {
		w.progress(line)
	}
}

// download fetches an image into a new layout.
func (s *Store) download(ctx context.Context, text string, ref name.Digest, auth *Auth, dir string,
	progress func(string)) error {
	transport := s.transport()
	defer transport.CloseIdleConnections()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	img, err := s.find(ctx, ref, auth, transport)
	if err != nil {
		return err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return auth.hide(err)
	}
	m, err := parseManifest(raw, s.cfg.MaxSize)
	if err != nil {
		return err
	}
	w, err := newLayout(s.tmpDir())
	if err != nil {
		return err
	}
	defer os.RemoveAll(w.dir) // gone if it was renamed
	// The library reads it at once, so only its end can be awaited.
	stalled := time.AfterFunc(configTimeout,
		func() { end(fmt.Errorf("its configuration did not come within %v", configTimeout)) })
	config, err := img.RawConfigFile()
	stalled.Stop()
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("reading its configuration: %w", auth.hide(err))
	}
	if _, err := parseConfig(config, len(m.Layers)); err != nil {
		return err
	}
	if err := errors.Join(w.blob(m.Config.Digest, config), w.finish(raw, m)); err != nil {
		return err
	}
	for n, desc := range m.Layers {
		progress(fmt.Sprintf("pulling %s: layer %d of %d (%d MB)", text, n+1, len(m.Layers), (desc.Size+500_000)/1_000_000))
		layer, err := img.LayerByDigest(desc.Digest)
		if err == nil {
			err = w.layer(ctx, desc, layer.Compressed)
		}
		if err != nil {
			return fmt.Errorf("layer %d: %w", n+1, auth.hide(err))
		}
	}
	return s.placeLayout(w.dir, dir)
}

// layoutWriter writes an OCI layout.
type layoutWriter struct{ dir string }

// newLayout makes an empty layout in a new directory.
func newLayout(parent string) (layoutWriter, error) {
	dir, err := os.MkdirTemp(parent, "layout-")
	if err != nil {
		return layoutWriter{}, fmt.Errorf("making layout: %w", err)
	}
	w := layoutWriter{dir}
	return w, errors.Join(os.Chmod(dir, 0o755), w.begin())
}

// begin writes the parts that every layout has.
func (w layoutWriter) begin() error {
	if err := os.MkdirAll(filepath.Join(w.dir, "blobs", "sha256"), 0o755); err != nil {
		return fmt.Errorf("making layout: %w", err)
	}
	return hostfile.CreateSynced(filepath.Join(w.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

func (w layoutWriter) file(digest v1.Hash) string {
	return filepath.Join(w.dir, "blobs", "sha256", digest.Hex)
}

// blob writes a small blob.
func (w layoutWriter) blob(digest v1.Hash, b []byte) error {
	return hostfile.CreateSynced(w.file(digest), b, 0o644)
}

// finish writes a manifest and the index that names it.
func (w layoutWriter) finish(manifest []byte, m *v1.Manifest) error {
	sum := sha256.Sum256(manifest)
	digest := v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}
	index, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: mediaIndex, Manifests: []v1.Descriptor{{
		MediaType: cmp.Or(m.MediaType, types.OCIManifestSchema1), // an index must have a type, a manifest need not
		Size:      int64(len(manifest)), Digest: digest, Platform: &platform}}})
	if err != nil {
		return fmt.Errorf("encoding index: %w", err)
	}
	return errors.Join(w.blob(digest, manifest), hostfile.CreateSynced(filepath.Join(w.dir, "index.json"), index, 0o644))
}

// layer writes a layer from a stream, checks it, and gives up when the stream stalls.
func (w layoutWriter) layer(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	if _, err := os.Stat(w.file(desc.Digest)); err == nil {
		return nil // images name empty layers many times
	}
	stream, err := open()
	if err != nil {
		return err
	}
	defer stream.Close()
	f, err := os.OpenFile(w.file(desc.Digest), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("making blob: %w", err)
	}
	defer f.Close()
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, hash), io.LimitReader(unstalled(ctx, stream), desc.Size+1))
	if err != nil {
		return err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); n != desc.Size || got != desc.Digest.Hex {
		return fmt.Errorf("its bytes (%d) have the digest sha256:%s, the manifest names %d with %s", n, got, desc.Size,
			desc.Digest)
	}
	return errors.Join(f.Sync(), f.Close())
}

// unstalled returns a reader that fails when nothing has come for stallTimeout, or when ctx ends.
// It closes the stream to end a blocked read.
func unstalled(ctx context.Context, stream io.ReadCloser) io.Reader {
	var gaveUp atomic.Bool
	timer := time.AfterFunc(stallTimeout, func() {
		gaveUp.Store(true)
		stream.Close()
	})
	return readerFunc(func(p []byte) (int, error) {
		if ctx.Err() != nil {
			timer.Stop()
			return 0, context.Cause(ctx)
		}
		timer.Reset(stallTimeout)
		n, err := stream.Read(p)
		timer.Stop() // the time of writing does not count
		if err != nil && gaveUp.Load() {
			err = fmt.Errorf("nothing came for %v", stallTimeout)
		}
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
