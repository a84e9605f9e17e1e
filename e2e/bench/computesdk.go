package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements by ComputeSDK, which is written in JavaScript.
const (
	computeWarm = "ComputeSDK's time to interactive (node -v), with the pool"
	computeCold = "ComputeSDK's time to interactive (node -v), cold"
)

// computeTemplate is the template of sandboxes for which ComputeSDK names none, as its benchmark does.
const computeTemplate = "base"

// computeDir has the packages of JavaScript, and the program that measures with them.
const computeDir = "e2e/e2b/integrations"

// measureComputeSDK has ComputeSDK's provider for E2B measure servers with and without a pool.
// Without npm there are no such numbers.
func measureComputeSDK(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	if _, err := exec.LookPath("npm"); err != nil {
		progress("leaving out ComputeSDK: there is no npm")
		return nil
	}
	for _, way := range []struct{ name, pool string }{{computeWarm, "true"}, {computeCold, "false"}} {
		if err := computeOnce(ctx, o, s, way.name, way.pool, r); err != nil {
			return err
		}
	}
	return nil
}

func computeOnce(ctx context.Context, o options, beside *server, name, pool string, r *results) (err error) {
	s, err := startServer(ctx, beside.program, beside.outside, "CAY_POOL_ENABLED="+pool,
		"CAY_TEMPLATES_PREPARE="+computeTemplate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.awaitTemplate(ctx, computeTemplate); err != nil {
		return err
	}
	key, err := s.api.CreateAPIKey(ctx, cay.CreateAPIKeyRequest{Name: "bench", Format: new("e2b")})
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	// The first create is cold, and makes the pool keep that kind of sandbox.
	samples, err := s.timeToInteractive(ctx, key.APIKey, o.starts+1)
	if err != nil {
		return err
	}
	for _, ms := range samples[1:] {
		r.add(name, unitMS, ms)
	}
	return nil
}

// timeToInteractive runs the program that measures with ComputeSDK and returns its samples.
func (s *server) timeToInteractive(ctx context.Context, key string, n int) ([]float64, error) {
	node, err := caytest.Node(ctx, "e2e/e2b/node")
	if err != nil {
		return nil, err
	}
	packages, err := caytest.NPM(ctx, computeDir)
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(filepath.Join(computeDir, "tti.mjs"))
	if err != nil {
		return nil, err
	}
	// Node.js looks for the packages in the directories above the program.
	dir, err := os.MkdirTemp(packages, "bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) // at worst a small file is left in a cache
	if err := os.WriteFile(filepath.Join(dir, "tti.mjs"), program, 0o600); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, node, "tti.mjs", strconv.Itoa(n))
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "E2B_API_URL="+s.url, "E2B_SANDBOX_URL="+s.url, "E2B_API_KEY="+key)
	var failed bytes.Buffer
	cmd.Stderr = &failed
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("measuring with ComputeSDK: %w: %s", err, failed.Bytes())
	}
	var samples []float64
	if err := json.Unmarshal(out, &samples); err != nil || len(samples) != n {
		return nil, fmt.Errorf("measuring with ComputeSDK: %q, %v", out, err)
	}
	return samples, nil
}
