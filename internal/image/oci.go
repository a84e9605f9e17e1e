package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// maxLayers bounds the number of layers of an image; Docker's own limit is 127.
	maxLayers = 512
	// maxManifest and maxConfig bound manifests and configurations, which are read into memory,
	// in bytes. A configuration holds the history of its image.
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	// maxIndexes bounds the number of indexes that are read to find one image.
	maxIndexes = 16
)

// errDamaged reports that a part of an image does not match its digest.
var errDamaged = errors.New("the image is damaged")

const mediaIndex = types.OCIImageIndex

// platform is the platform that images must be for.
var platform = v1.Platform{OS: "linux", Architecture: runtime.GOARCH}

// blobs has the parts of an OCI image, by their path in a layout.
type blobs interface {
	// open returns a regular file and its size, or fs.ErrNotExist.
	open(name string) (io.ReadCloser, int64, error)
}

// dirBlobs is a layout in a directory. Links cannot lead out of it.
type dirBlobs struct{ *os.Root }

func (d dirBlobs) open(name string) (io.ReadCloser, int64, error) {
	// A pipe instead of a file must not block the build.
	f, err := d.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// ociImage is an OCI image whose parts can be read.
type ociImage struct {
	from     blobs
	manifest string // digest; of the configuration if there is no manifest
	config   *v1.ConfigFile
	layers   []ociLayer
}

// ociLayer is one layer of an image.
type ociLayer struct {
	file   string
	desc   v1.Descriptor // of the file; without a digest if none is known
	diffID v1.Hash       // digest of its tar
}

func blobPath(h v1.Hash) string { return path.Join("blobs", h.Algorithm, h.Hex) }

// openOCI returns the image of a layout: the named manifest, or the one in the index for this
// machine.
func openOCI(from blobs, manifest string, maxSize int64) (*ociImage, error) {
	raw, digest, err := findManifest(from, manifest)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(raw, maxSize)
	if err != nil {
		return nil, err
	}
	config, err := readBlob(from, m.Config, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("reading its configuration: %w", err)
	}
	c, err := parseConfig(config, len(m.Layers))
	if err != nil {
		return nil, err
	}
	p := &ociImage{from: from, manifest: digest.String(), config: c}
	for n, desc := range m.Layers {
		p.layers = append(p.layers, ociLayer{blobPath(desc.Digest), desc, c.RootFS.DiffIDs[n]})
	}
	return p, nil
}

// findManifest reads the manifest of an image, through indexes if needed.
func findManifest(from blobs, named string) (raw []byte, digest v1.Hash, err error) {
	var todo []v1.Descriptor
	if named != "" {
		h, err := v1.NewHash(named)
		if err != nil || h.Algorithm != "sha256" {
			return nil, v1.Hash{}, fmt.Errorf("%.100q is not a sha256 digest", named)
		}
		todo = []v1.Descriptor{{Digest: h, Size: -1}}
	} else {
		b, err := readAll(from, "index.json", -1, maxManifest)
		if err != nil {
			return nil, v1.Hash{}, fmt.Errorf("reading the index of the layout: %w", err)
		}
		if todo, err = forUs(b); err != nil {
			return nil, v1.Hash{}, err
		}
	}
	for read := 0; len(todo) > 0 && read < maxIndexes; read++ {
		desc := todo[0]
		b, err := readBlob(from, desc, maxManifest)
		if err != nil {
			return nil, v1.Hash{}, fmt.Errorf("reading the manifest: %w", err)
		}
		var kind struct {
			MediaType types.MediaType `json:"mediaType"`
			Manifests json.RawMessage `json:"manifests"`
		}
		if err := json.Unmarshal(b, &kind); err != nil {
			return nil, v1.Hash{}, fmt.Errorf("reading the manifest: %w", err)
		}
		if kind.Manifests == nil {
			return b, desc.Digest, nil
		}
		if todo, err = forUs(b); err != nil {
			return nil, v1.Hash{}, err
		}
	}
	return nil, v1.Hash{}, errors.New("its indexes lead to no manifest")
}

// forUs returns an index's entries for this machine's architecture. An entry without a platform
// counts.
func forUs(index []byte) ([]v1.Descriptor, error) {
	var m v1.IndexManifest
	if err := json.Unmarshal(index, &m); err != nil {
		return nil, fmt.Errorf("reading the index: %w", err)
	}
	var fit []v1.Descriptor
	var others []string
	for _, desc := range m.Manifests {
		switch p := desc.Platform; {
		case p == nil || p.OS == "" && p.Architecture == "":
			fit = append(fit, desc)
		case p.OS == platform.OS && p.Architecture == platform.Architecture:
			fit = slices.Insert(fit, 0, desc)
		case len(others) < 10:
			others = append(others, fmt.Sprintf("%.20s/%.20s", p.OS, p.Architecture))
		}
	}
	if len(fit) == 0 {
		return nil, fmt.Errorf("it has no image for %s/%s, only for %s", platform.OS, platform.Architecture,
			strings.Join(append(others, "nothing")[:max(1, len(others))], ", "))
	}
	return fit, nil
}

// parseManifest parses a manifest and checks its numbers against the limits.
func parseManifest(raw []byte, maxSize int64) (*v1.Manifest, error) {
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	if len(m.Layers) > maxLayers {
		return nil, fmt.Errorf("%d layers; at most %d are allowed", len(m.Layers), maxLayers)
	}
	total := int64(0)
	for n, desc := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		what := fmt.Sprintf("layer %d", n)
		if n == 0 {
			what = "the configuration"
		}
		if desc.Digest.Algorithm != "sha256" || len(desc.Digest.Hex) != 2*sha256.Size {
			return nil, fmt.Errorf("%s is named by %.100q, which is not a sha256 digest", what, desc.Digest)
		}
		if desc.Size < 0 || n == 0 && desc.Size > maxConfig || desc.Size > maxSize-total {
			return nil, fmt.Errorf("%s makes the image larger than it may be: %d bytes, after %d", what, desc.Size, total)
		}
		total += desc.Size
	}
	return m, nil
}

// parseConfig parses a configuration, which must be for this machine and match its manifest.
func parseConfig(raw []byte, layers int) (*v1.ConfigFile, error) {
	c, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("reading its configuration: %w", err)
	}
	// An index was searched for this architecture; an image without an index may be for any.
	if c.OS != platform.OS || c.Architecture != platform.Architecture {
		return nil, fmt.Errorf("it is for %.40s/%.40s, this machine is %s/%s", c.OS, c.Architecture, platform.OS,
			platform.Architecture)
	}
	if layers != len(c.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%d layers, %d of them named in its configuration", layers, len(c.RootFS.DiffIDs))
	}
	return c, nil
}

// readBlob reads a small blob and checks it. A size of -1 is unknown.
func readBlob(from blobs, desc v1.Descriptor, limit int64) ([]byte, error) {
	b, err := readAll(from, blobPath(desc.Digest), desc.Size, limit)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	if got := hex.EncodeToString(sum[:]); desc.Digest.Algorithm != "sha256" || got != desc.Digest.Hex {
		return nil, fmt.Errorf("%w: its bytes have the digest sha256:%s, %s names them", errDamaged, got, desc.Digest)
	}
	return b, nil
}

func readAll(from blobs, name string, want, limit int64) ([]byte, error) {
	f, size, err := from.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit || want >= 0 && size != want {
		return nil, fmt.Errorf("%w: %s has %d bytes, not %d; at most %d are allowed", errDamaged, name, size, want, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// unpack unpacks the layers into an empty tree. It checks every byte against the digests that
// lead to it.
func (p *ociImage) unpack(ctx context.Context, t *tree, progress func(string)) (Runtime, error) {
	for n, l := range p.layers {
		progress(fmt.Sprintf("unpacking layer %d of %d", n+1, len(p.layers)))
		if err := p.unpackLayer(ctx, t, l); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return Runtime{}, fmt.Errorf("layer %d: %w", n+1, err)
		}
	}
	c := p.config.Config
	for _, at := range slices.Sorted(maps.Keys(c.Volumes)) {
		if err := t.volume(at); err != nil {
			return Runtime{}, fmt.Errorf("VOLUME %.100q: %w", at, err)
		}
	}
	return Runtime{Env: c.Env, User: c.User, Workdir: c.WorkingDir, Entrypoint: c.Entrypoint, Cmd: c.Cmd}, nil
}

// volume makes the directory that a container runtime would mount a volume over, if nothing is
// there.
func (t *tree) volume(at string) error {
	parts, err := split(at)
	if err != nil {
		return err
	}
	_, err = t.walk(parts, true, true)
	return err
}

// unpackLayer unpacks one layer over the tree and checks its bytes against the image's digest.
func (p *ociImage) unpackLayer(ctx context.Context, t *tree, l ociLayer) error {
	f, size, err := p.from.open(l.file)
	if err != nil {
		return err
	}
	defer f.Close()
	if l.desc.Digest.Hex != "" && size != l.desc.Size {
		return fmt.Errorf("it is %d bytes, the manifest names %d", size, l.desc.Size)
	}
	in := &counted{Reader: contextReader{ctx, f}}
	plain, closePlain, err := decompress(in)
	if err != nil {
		return err
	}
	ahead := readAhead(t.metered(plain, in))
	err = t.apply(ctx, ahead, true)
	if err == nil {
		// Bytes after the end of the tar belong to the digest too.
		_, err = io.Copy(io.Discard, ahead)
	}
	got := ahead.stop() // nothing reads f any more
	closePlain()
	if err != nil {
		return err
	}
	if want := l.diffID; want.Algorithm != "sha256" || got != want.Hex {
		return fmt.Errorf("its bytes have the digest sha256:%s, the image names %s", got, want)
	}
	return nil
}

// verify checks every layer against the manifest, since a manifest's layers need not match it.
func (p *ociImage) verify(ctx context.Context) error {
	for n, l := range p.layers {
		f, size, err := p.from.open(l.file)
		if err != nil {
			return fmt.Errorf("layer %d: %w", n+1, err)
		}
		hash := sha256.New()
		_, err = io.CopyBuffer(hash, contextReader{ctx, f}, make([]byte, 1<<20))
		f.Close()
		if err != nil {
			return fmt.Errorf("layer %d: %w", n+1, err)
		}
		if got := hex.EncodeToString(hash.Sum(nil)); got != l.desc.Digest.Hex || size != l.desc.Size {
			return fmt.Errorf("layer %d: its bytes (%d) have the digest sha256:%s, the manifest names %d with %s", n+1, size,
				got, l.desc.Size, l.desc.Digest)
		}
	}
	return nil
}

// short returns an error's text for the record of a source, which users see: one line, of bounded
// length, without details of the machine's network.
func short(err error) string {
	if errors.Is(err, ErrUnreachable) {
		return ErrUnreachable.Error()
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
