package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

const (
	// answerFactor times the time to connect is what a registry has to answer the
	// question for a manifest, its token service included.
	answerFactor = 4
	// stallTimeout ends a download that brings nothing: a dead connection would
	// otherwise hold a build for hours.
	stallTimeout = time.Minute
	// maxLayers bounds the layers of an image; Docker's own limit is 127.
	maxLayers = 512
)

// parseReference checks an OCI reference as users write it ("python:3.13",
// "ghcr.io/a/b@sha256:…").
func parseReference(text string) (name.Reference, error) {
	ref, err := name.ParseReference(text)
	if err != nil {
		return nil, fmt.Errorf("%.200q is not an image reference: %w", text, err)
	}
	return ref, nil
}

// moves reports whether a source can give something else tomorrow.
func (src Source) moves() bool {
	ref, err := parseReference(src.Image)
	if err != nil {
		return true
	}
	_, digest := ref.(name.Digest)
	return !digest
}

// fromRegistry lays the layers of an OCI image over an empty tree and returns
// what the image says about starting it and its reference by digest. Every byte
// is checked against the digests that lead to it.
func (s *Store) fromRegistry(ctx context.Context, t *tree, image string, progress func(string)) (Runtime, string, error) {
	step := "pulling " + image
	fail := func(err error) (Runtime, string, error) {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return Runtime{}, "", &StepError{Step: step, ExitCode: -1, Err: err}
	}
	ref, err := parseReference(image)
	if err != nil {
		return fail(err)
	}
	progress(step + ": asking " + ref.Context().RegistryStr())
	img, err := s.find(ctx, ref)
	if err != nil {
		return fail(err)
	}
	digest, err := img.Digest()
	if err != nil {
		return fail(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		return fail(fmt.Errorf("reading its configuration: %w", err))
	}
	// An index is searched for this architecture; a lone image may be of any.
	if config.OS != "linux" || config.Architecture != runtime.GOARCH {
		return fail(fmt.Errorf("it is for %s/%s, this machine is linux/%s", config.OS, config.Architecture, runtime.GOARCH))
	}
	layers, err := img.Layers()
	if err != nil {
		return fail(err)
	}
	if len(layers) > maxLayers || len(layers) != len(config.RootFS.DiffIDs) {
		return fail(fmt.Errorf("%d layers, %d of them named in its configuration; at most %d", len(layers), len(config.RootFS.DiffIDs), maxLayers))
	}
	for n, layer := range layers {
		size, err := layer.Size()
		if err != nil {
			return fail(err)
		}
		progress(fmt.Sprintf("%s: layer %d of %d (%d MB)", step, n+1, len(layers), (size+500_000)/1_000_000))
		if err := applyLayer(ctx, t, layer, config.RootFS.DiffIDs[n]); err != nil {
			return fail(fmt.Errorf("layer %d: %w", n+1, err))
		}
	}
	c := config.Config
	return Runtime{Env: c.Env, User: c.User, Workdir: c.WorkingDir, Entrypoint: c.Entrypoint, Cmd: c.Cmd},
		ref.Context().Name() + "@" + digest.String(), nil
}

// find asks the registry for the image of this machine's architecture. It gives
// up soon: most machines without a registry must not wait for one.
func (s *Store) find(ctx context.Context, ref name.Reference) (v1.Image, error) {
	dialer := &net.Dialer{Timeout: s.cfg.RegistryTimeout}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DialContext = dialer.DialContext
	transport.TLSHandshakeTimeout = s.cfg.RegistryTimeout
	transport.ResponseHeaderTimeout = answerFactor * s.cfg.RegistryTimeout

	asking, answered := context.WithCancelCause(ctx)
	giveUp := time.AfterFunc(answerFactor*s.cfg.RegistryTimeout, func() {
		answered(fmt.Errorf("no answer within %v", answerFactor*s.cfg.RegistryTimeout))
	})
	defer giveUp.Stop()
	// The image keeps the context for its layers, so it must live on: only the
	// timer above or ctx ends it.
	img, err := remote.Image(ref, remote.WithContext(asking), remote.WithTransport(transport), remote.WithAuth(authn.Anonymous),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}),
		remote.WithRetryBackoff(remote.Backoff{Duration: time.Millisecond, Factor: 1, Steps: 1}), remote.WithJobs(1))
	if err != nil {
		if cause := context.Cause(asking); cause != nil {
			err = fmt.Errorf("%w: %w", errUnreachable, cause)
		} else if network := new(net.OpError); errors.As(err, &network) || os.IsTimeout(err) {
			err = fmt.Errorf("%w: %w", errUnreachable, err)
		}
		answered(err)
		return nil, fmt.Errorf("asking the registry: %w", err)
	}
	return img, nil
}

// applyLayer lays one layer over the tree and checks that its bytes are those
// its image names.
func applyLayer(ctx context.Context, t *tree, layer v1.Layer, want v1.Hash) error {
	stream, err := layer.Uncompressed()
	if err != nil {
		return err
	}
	defer stream.Close()
	// A read that hangs ends when its stream is closed under it.
	var gaveUp atomic.Bool
	stalled := time.AfterFunc(stallTimeout, func() {
		gaveUp.Store(true)
		stream.Close()
	})
	defer stalled.Stop()
	hash := sha256.New()
	r := io.TeeReader(readerFunc(func(p []byte) (int, error) {
		n, err := stream.Read(p)
		if n > 0 {
			stalled.Reset(stallTimeout)
		} else if err != nil && gaveUp.Load() {
			err = fmt.Errorf("nothing came for %v", stallTimeout)
		}
		return n, err
	}), hash)
	if err := t.apply(ctx, r, true); err != nil {
		return err
	}
	// What follows the end of the tar belongs to the digest too.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("reading the end of the layer: %w", err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		return fmt.Errorf("its bytes have the digest sha256:%s, the image names %s", got, want)
	}
	return nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// errUnreachable says that a registry gave no answer.
var errUnreachable = errors.New("its registry is not reachable")

// short is an error's text for the record of a source, which users see: one
// line, not endless, and nothing of the machine's network.
func short(err error) string {
	if errors.Is(err, errUnreachable) {
		return errUnreachable.Error()
	}
	var step *StepError
	if errors.As(err, &step) {
		err = step.Err
	}
	text, _, _ := strings.Cut(err.Error(), "\n")
	if len(text) > 200 {
		text = strings.ToValidUTF8(text[:200], "") + "…"
	}
	return text
}
