package imagebuild

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/template"
)

// TestNoRegistryIsAsked builds with images.registry off. A build that asked a registry would fail in another way, since
// the Builder has no image store.
func TestNoRegistryIsAsked(t *testing.T) {
	b := New(Config{})
	job := template.Job{Definition: template.Definition{Name: "mine", Image: "docker.io/library/alpine:3.22"},
		Base: func(context.Context, string) (template.Base, bool, error) { return template.Base{}, false, nil }}
	_, err := b.Build(t.Context(), job, func(p template.Progress) { t.Errorf("the build goes on: %+v", p) })
	failed := new(template.BuildError)
	if !errors.As(err, &failed) || failed.Message != errNoRegistry.Error() {
		t.Errorf("an image: %v", err)
	}
	for _, name := range []string{"nosuch:latest", "docker.io/library/alpine:3.22"} {
		if _, err := (&bases{Builder: b, job: job}).find(t.Context(), name); !errors.Is(err, errNoRegistry) {
			t.Errorf("FROM %s: %v", name, err)
		}
	}
}

// TestInstead checks that an image is replaced by the template that is named for it only if its registry does not
// answer.
func TestInstead(t *testing.T) {
	store, err := image.Open(image.Config{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	found := errors.New("the template was asked for")
	job := template.Job{Definition: template.Definition{Instead: map[string]string{"127.0.0.1:1/python:3": "python"}},
		Base: func(_ context.Context, name string) (template.Base, bool, error) {
			if name == "python" {
				return template.Base{}, false, found
			}
			return template.Base{}, false, nil
		}}
	b := &bases{Builder: New(Config{Images: store, Registry: true}), job: job, progress: func(template.Progress) {}}
	if _, err := b.find(t.Context(), "127.0.0.1:1/python:3"); !errors.Is(err, found) {
		t.Errorf("an image without a registry: %v", err)
	}
	if _, err := b.find(t.Context(), "127.0.0.1:1/other:3"); !errors.Is(err, image.ErrUnreachable) {
		t.Errorf("another image: %v", err)
	}
	answers := httptest.NewServer(http.NotFoundHandler())
	defer answers.Close()
	name := strings.TrimPrefix(answers.URL, "http://") + "/python:3"
	job.Definition.Instead[name] = "python"
	if _, err := b.find(t.Context(), name); err == nil || errors.Is(err, found) {
		t.Errorf("an image that its registry does not have: %v", err)
	}
}

// TestBasesOfOneTemplate exports one template twice: the Dockerfile names it, and an image without a registry that it
// replaces.
func TestBasesOfOneTemplate(t *testing.T) {
	store, err := image.Open(image.Config{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	platform := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	config := &v1.ConfigFile{OS: platform.OS, Architecture: platform.Architecture,
		Config: v1.Config{Env: []string{"A=b"}}, RootFS: v1.RootFS{Type: "layers"}}
	made, err := mutate.ConfigFile(empty.Image, config)
	if err != nil {
		t.Fatal(err)
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(made, layout.WithPlatform(platform)); err != nil {
		t.Fatal(err)
	}
	img, err := store.Build(t.Context(), image.Source{Layout: &image.Layout{Dir: dir}}, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	const replaced = "127.0.0.1:1/python:3"
	job := template.Job{Definition: template.Definition{Instead: map[string]string{replaced: "python"}},
		Base: func(_ context.Context, name string) (template.Base, bool, error) {
			return template.Base{Image: img.Digest}, name == "python", nil
		}}
	b := &bases{Builder: New(Config{Images: store, MaxDisk: 100 << 20}), job: job, dir: t.TempDir(),
		progress: func(template.Progress) {}}
	one, err := b.find(t.Context(), "python:latest")
	if err != nil {
		t.Fatal(err)
	}
	other, err := b.find(t.Context(), replaced)
	if err != nil {
		t.Fatal(err)
	}
	if one.Layout == other.Layout || one.Manifest != other.Manifest {
		t.Errorf("the exports are %+v and %+v", one, other)
	}
}

// TestBasesAreBounded exports templates until they take more disk than a build may write.
func TestBasesAreBounded(t *testing.T) {
	b := &bases{Builder: New(Config{MaxDisk: 100 << 20})}
	for i, size := range []int64{60 << 20, 40 << 20, 1} {
		_, err := b.reserve(size)
		const refusal = "100 MiB together that a build may write (build.disk_mb)"
		if last := i == 2; (err != nil) != last || last && !strings.Contains(err.Error(), refusal) {
			t.Errorf("template %d: %v", i, err)
		}
	}
}

// TestStepsAreOver checks that made is called when BuildKit has finished all steps, and not before.
func TestStepsAreOver(t *testing.T) {
	over := 0
	s := newSteps(func(template.Progress) {}, func() { over++ })
	for _, kind := range []string{buildkit.Began, buildkit.Log, buildkit.Ended, buildkit.Made} {
		if over != 0 {
			t.Errorf("over before %s", kind)
		}
		s.event(buildkit.Event{Kind: kind, Step: 1, Name: "RUN true"})
	}
	if over != 1 {
		t.Errorf("over %d times", over)
	}
}

// TestCredentialsAreGiven fails for a field of the credentials, also for one that is added later, that
// does not reach package image.
func TestCredentialsAreGiven(t *testing.T) {
	full := func() (c template.Credentials) {
		caytest.Fill(&c, 7)
		return c
	}
	want := *authOf(full())
	caytest.EachWithout(full, func(name string, without template.Credentials) {
		// The registry decides whether the credentials are given at all.
		if lost := *authOf(without) == want; lost != (name == "Registry") {
			t.Errorf("the credentials of a build without %s are the same: %v", name, lost)
		}
	})
}

// endless is an image.Remote whose fetches end with their context alone.
type endless struct{ image.Remote }

func (endless) Fetch(ctx context.Context, _ string, _ *os.File) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestCreateDuringFetch asks for the image of a sandbox whose fetch takes longer than the create may. The create can be
// tried again, and the image is checked, since nobody may be left to learn that it is gone.
func TestCreateDuringFetch(t *testing.T) {
	store, err := image.Open(image.Config{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	store.UseRemote(endless{}, nil)
	digest := strings.Repeat("0", 64)
	var rechecked []string
	roots := RootFS{Images: store, Recheck: func(image string) { rechecked = append(rechecked, image) }}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	_, err = roots.Path(ctx, digest)
	f := fault.As(err)
	if f == nil || f.Kind != fault.Unavailable || f.Code != fault.CodeImageUnavailable || f.RetryAfter == 0 {
		t.Errorf("an image that is being fetched: %v, want %s", err, fault.CodeImageUnavailable)
	}
	if !slices.Equal(rechecked, []string{digest}) {
		t.Errorf("checked are %v, want the image", rechecked)
	}
	if err := roots.Find(t.Context(), digest); err != nil {
		t.Errorf("an image that is being fetched is found with %v", err)
	}
}

// gone is an image.Remote that has no image, or does not answer.
type gone struct {
	image.Remote
	err error
}

func (g gone) Find(context.Context, string) error { return g.err }

// TestFindRefuses looks for images that no sandbox can have now. A missing one is checked, so that it is built again.
func TestFindRefuses(t *testing.T) {
	for err, checked := range map[error]int{fs.ErrNotExist: 1, errors.New("no route"): 0} {
		store, openErr := image.Open(image.Config{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
		if openErr != nil {
			t.Fatal(openErr)
		}
		defer store.Close()
		store.UseRemote(gone{err: err}, nil)
		var rechecked []string
		roots := RootFS{Images: store, Recheck: func(image string) { rechecked = append(rechecked, image) }}
		f := fault.As(roots.Find(t.Context(), strings.Repeat("0", 64)))
		if f == nil || f.Kind != fault.Unavailable || f.Code != fault.CodeImageUnavailable || f.RetryAfter == 0 {
			t.Errorf("%v gives %v, want %s", err, f, fault.CodeImageUnavailable)
		}
		if len(rechecked) != checked {
			t.Errorf("after %v the images %v are checked, want %d", err, rechecked, checked)
		}
	}
}
