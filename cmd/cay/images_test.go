package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/template"
)

// With images.registry off no registry is asked for what users name: there is no store here
// that could.
func TestNoRegistryIsAsked(t *testing.T) {
	var b builder
	job := template.Job{Definition: template.Definition{Name: "mine", Image: "docker.io/library/alpine:3.22"},
		Base: func(context.Context, string) (template.Base, bool, error) { return template.Base{}, false, nil }}
	_, err := b.Build(t.Context(), job, func(p template.Progress) { t.Errorf("it goes on: %+v", p) })
	failed := new(template.BuildError)
	if !errors.As(err, &failed) || failed.Message != errNoRegistry.Error() {
		t.Errorf("an image: %v", err)
	}
	for _, name := range []string{"nosuch:latest", "docker.io/library/alpine:3.22"} {
		if _, err := (&bases{builder: b, job: job}).find(t.Context(), name); !errors.Is(err, errNoRegistry) {
			t.Errorf("FROM %s: %v", name, err)
		}
	}
}

// TestBasesAreBounded: the templates that a Dockerfile names are written out as far as a build may write.
func TestBasesAreBounded(t *testing.T) {
	b := &bases{builder: builder{limits: buildLimits{disk: 100 << 20}}}
	for i, size := range []int64{60 << 20, 40 << 20, 1} {
		err := b.reserve(size)
		if last := i == 2; (err != nil) != last || last && !strings.Contains(err.Error(), "100 MiB together that a build may write (build.disk_mb)") {
			t.Errorf("template %d: %v", i, err)
		}
	}
}

// TestStepsAreOver hands on that all steps of a build are over.
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
