package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of Dockerfile builds. Their base is the template python.
const (
	buildFirst   = "build, the first of a server"
	buildCold    = "build with one new RUN"
	buildCached  = "build, all RUN cached"
	buildSame    = "rebuild of the same (nothing to do)"
	buildConvert = "  of it: writing the root file system"
	buildMemory  = "memory of the build program, at its most"
)

// measureBuilds builds the same Dockerfile several times, with the first new step further and
// further down.
func measureBuilds(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	for i := range max(3, o.starts/8) {
		// The first build also starts the build program and unpacks the base.
		name := buildCold
		if i == 0 {
			name = buildFirst
		}
		run := fmt.Sprintf("FROM %s\nRUN echo %d >/number\n", template, i)
		first := fmt.Sprintf("bench-%d", i)
		if err := s.build(ctx, first, run, name, r); err != nil {
			return err
		}
		if err := s.build(ctx, first+"-cached", run+"ENV NEW=yes\n", buildCached, r); err != nil {
			return err
		}
		began := time.Now()
		if _, err := s.api.RebuildTemplate(ctx, first, &cay.RebuildTemplateRequest{Dockerfile: &run}, nil); err != nil {
			return fmt.Errorf("rebuilding: %w", err)
		}
		if err := s.awaitBuild(ctx, first); err != nil {
			return err
		}
		r.took(buildSame, began)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/memory/cay-*/buildkit/program/memory.max_usage_in_bytes",
		"/sys/fs/cgroup/cay-*/buildkit/program/memory.peak"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) != 1 {
			continue // of the other cgroup version, or of several servers
		}
		text, err := os.ReadFile(files[0])
		if err != nil {
			return err
		}
		bytes, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		if err != nil {
			return err
		}
		r.add(buildMemory, unitMB, bytes/1e6)
	}
	return nil
}

// wrote matches the log line that says how large the root file system is and how long it took to
// write.
var wrote = regexp.MustCompile(`^wrote (\d+) MB in ([0-9.]+) s`)

func (s *server) build(ctx context.Context, name, dockerfile, row string, r *results) error {
	began := time.Now()
	if _, err := s.api.CreateTemplate(ctx, cay.CreateTemplateRequest{Name: name, Dockerfile: &dockerfile},
		nil); err != nil {
		return fmt.Errorf("creating template %s: %w", name, err)
	}
	if err := s.awaitBuild(ctx, name); err != nil {
		return err
	}
	r.took(row, began)
	lines, err := s.api.TemplateLogs(ctx, name)
	if err != nil {
		return err
	}
	for _, l := range lines {
		m := wrote.FindStringSubmatch(l.Text)
		if m == nil {
			continue
		}
		size, _ := strconv.ParseFloat(m[1], 64) // the expression matches only digits
		took, _ := strconv.ParseFloat(m[2], 64)
		if took > 0 {
			r.add(buildConvert, unitMBps, size/took)
		}
	}
	return nil
}

func (s *server) awaitBuild(ctx context.Context, name string) error {
	return s.poll(ctx, templatePatience, func() (bool, error) {
		t, err := s.api.GetTemplate(ctx, name)
		if err != nil {
			return false, err
		}
		if t.Status == cay.TemplateStatusFailed {
			return false, fmt.Errorf("building template %s failed: %+v", name, t.BuildError)
		}
		return t.Status == cay.TemplateStatusReady, nil
	})
}
