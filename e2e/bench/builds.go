package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
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
	buildE2B     = "  the same asked for as E2B's clients do"
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
		if i > 0 {
			if err := s.buildE2B(ctx, first+"-e2b", fmt.Sprintf("echo e2b %d >number", i), r); err != nil {
				return err
			}
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

// buildE2B builds a template from code: with one command, in the calls of E2B's clients.
func (s *server) buildE2B(ctx context.Context, name, command string, r *results) error {
	type object = map[string]any
	began := time.Now()
	var made struct{ TemplateID, BuildID string }
	if err := s.e2b(ctx, "POST", "/v3/templates", object{"name": name}, &made); err != nil {
		return err
	}
	path := fmt.Sprintf("/templates/%s/builds/%s", made.TemplateID, made.BuildID)
	err := s.e2b(ctx, "POST", "/v2"+path, object{"fromTemplate": template,
		"steps": []object{{"type": "RUN", "args": []string{command}}}}, nil)
	if err != nil {
		return err
	}
	err = s.poll(ctx, templatePatience, func() (bool, error) {
		var state struct {
			Status string
			Reason struct{ Message string }
		}
		if err := s.e2b(ctx, "GET", path+"/status", nil, &state); err != nil {
			return false, err
		}
		if state.Status == "error" {
			return false, fmt.Errorf("building template %s failed: %s", name, state.Reason.Message)
		}
		return state.Status == "ready", nil
	})
	if err == nil {
		r.took(buildE2B, began)
	}
	return err
}

// e2b makes a call of E2B's control API.
func (s *server) e2b(ctx context.Context, method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, s.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("X-API-Key", s.key)
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode/100 != 2 {
		return errors.Join(fmt.Errorf("%s %s: %d %s", method, path, resp.StatusCode, answer), err)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
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
