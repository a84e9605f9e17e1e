package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/imagebuild"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/template"
)

// openTemplates opens the templates, and registers the built-in ones of a server that is alone.
func (s *server) openTemplates(ctx context.Context) (*template.Service, error) {
	builtins, err := template.Builtins()
	if err != nil {
		return nil, err
	}
	for _, name := range s.cfg.Templates.Prepare {
		if !slices.ContainsFunc(builtins, func(d template.Definition) bool { return d.Name == name }) {
			return nil, fmt.Errorf("templates.prepare: there is no built-in template %q", name)
		}
	}
	cfg := template.Config{Builtins: builtins, Prepare: s.cfg.Templates.Prepare, MaxDiskMB: s.cfg.Sandbox.MaxDiskMB,
		MaxTemplates: s.cfg.Templates.MaxPerOrg, ContextLimit: int64(s.cfg.Build.ContextLimitMB) << 20,
		ContextTotal: int64(s.cfg.Build.ContextsMB) << 20, Concurrent: s.cfg.Build.Concurrent, PerOrg: s.cfg.Build.PerOrg,
		Timeout: time.Duration(s.cfg.Build.Timeout), MaxDisk: int64(s.cfg.Build.DiskMB) << 20, Observe: s.observeBuilds(),
		Shared: inFleet(s.cfg)}
	for _, size := range s.cfg.Sandbox.Sizes {
		cfg.Sizes = append(cfg.Sizes, size.Name)
	}
	builder := imagebuild.New(imagebuild.Config{Images: s.images, Dockerfiles: s.dockerfiles,
		Registry: s.cfg.Images.Registry, DataDir: s.cfg.DataDir, Scratch: s.scratch(),
		StepMemory: int64(s.cfg.Build.MemoryMB) << 20, StepCPUs: s.cfg.Build.CPUs,
		Context: buildkit.Limits{Bytes: int64(s.cfg.Build.ContextLimitMB) << 20}, MaxDisk: int64(s.cfg.Build.DiskMB) << 20})
	templates := template.New(cfg, s.db, builder, s.contexts, s.db,
		s.log.With(slog.String("room", "template")))
	if inFleet(s.cfg) {
		return templates, nil // the server that leads builds registers
	}
	return templates, templates.Register(ctx)
}

// buildSlots gives builds network slots that reach the same as a sandbox without a policy: neither the host, nor
// another sandbox, nor an address that is always denied. It implements [buildkit.Slots].
type buildSlots struct{ slots *network.Network }

// Take implements [buildkit.Slots].
func (b buildSlots) Take(ctx context.Context) (string, func(context.Context) error, error) {
	slot, err := b.slots.Acquire(ctx)
	if err != nil {
		return "", nil, err
	}
	release := func(ctx context.Context) error { return b.slots.Release(ctx, slot) }
	if err := b.slots.SetPolicy(ctx, slot, network.Policy{Open: true}); err != nil {
		return "", nil, errors.Join(err, release(context.WithoutCancel(ctx)))
	}
	return slot.Namespace, release, nil
}

// buildDir names the directory of builds in the data directory and in the directory of sockets, and their control group
// below that of the server instance.
const buildDir = "buildkit"

// buildRemains returns the directories and control groups of the builds of a server instance.
func buildRemains(runDir, instance, dataDir string) buildkit.Config {
	c := buildkit.Config{RunDir: filepath.Join(stateDir(runDir, instance), buildDir),
		CgroupParent: node.GroupRoot(instance) + "/" + buildDir}
	if dataDir != "" {
		c.Dir = filepath.Join(dataDir, buildDir)
	}
	return c
}

// openBuilds opens the room that builds Dockerfiles. It starts no program before the first build.
func (s *server) openBuilds(programsDir string, programs embedded.Programs) error {
	program, err := embedded.UnpackBuildkit(programsDir)
	if err != nil {
		return err
	}
	nameservers, err := nameserverAddrs(s.cfg.Network.Nameservers)
	if err != nil {
		return err
	}
	// A build that a crash ended may have left base images there.
	if err := errors.Join(os.RemoveAll(s.scratch()), os.MkdirAll(s.scratch(), 0o700)); err != nil {
		return fmt.Errorf("making room for builds: %w", err)
	}
	c := buildRemains(RunDir, s.instance, s.cfg.DataDir)
	c.Program, c.Runsc, c.Platform = program, programs.Runsc, s.cfg.Sandbox.Platform
	c.Slots, c.Nameservers = buildSlots{s.slots}, nameservers
	c.IdleTimeout, c.CacheBytes = time.Duration(s.cfg.Build.IdleTimeout), int64(s.cfg.Build.CacheMB)<<20
	c.BuildBytes, c.Builds = int64(s.cfg.Build.DiskMB)<<20, min(s.cfg.Build.PerOrg, s.cfg.Build.Concurrent)
	s.dockerfiles, err = buildkit.Open(c, s.log.With(slog.String("room", "buildkit")))
	if err != nil {
		return err
	}
	s.onClose(s.dockerfiles.Close)
	return nil
}

// scratch returns the directory for the temporary files of builds.
func (s *server) scratch() string { return filepath.Join(s.cfg.DataDir, "scratch") }
