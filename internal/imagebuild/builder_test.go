package imagebuild

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/buildkit"
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

// TestBasesAreBounded exports templates until they take more disk than a build may write.
func TestBasesAreBounded(t *testing.T) {
	b := &bases{Builder: New(Config{MaxDisk: 100 << 20})}
	for i, size := range []int64{60 << 20, 40 << 20, 1} {
		err := b.reserve(size)
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
