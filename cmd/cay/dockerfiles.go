package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/template"
)

// buildSlots gives builds network slots that reach what a sandbox without a policy does: not
// the host, no other sandbox, nothing that is always denied.
type buildSlots struct{ slots *network.Network }

// Take implements buildkit.Slots.
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

// dockerfile builds a Dockerfile, and a root file system of the result.
func (b builder) dockerfile(ctx context.Context, j template.Job, progress func(template.Progress)) (_ template.Built, err error) {
	bases := &bases{builder: b, job: j, progress: progress}
	if bases.dir, err = os.MkdirTemp(b.scratch, "bases-"); err != nil {
		return template.Built{}, fmt.Errorf("making room for base images: %w", err)
	}
	defer func() { err = errors.Join(err, bases.close()) }()
	d := j.Definition
	r := buildkit.Request{Context: j.Context, Args: d.BuildArgs, Target: d.Target, Scope: j.OrgID, NoCache: j.Refresh, Limits: b.limits.context,
		MemoryBytes: b.limits.memory, CPUs: b.limits.cpus, Base: bases.find}
	if j.Context == "" {
		r.Dockerfile = d.Dockerfile
	} else {
		r.DockerfilePath = d.Dockerfile
	}
	out, err := b.dockerfiles.Build(ctx, r, newSteps(bases.say, j.Made).event)
	if err != nil {
		return template.Built{}, b.buildError(err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	src := image.Source{Layout: &image.Layout{Dir: out.Layout, Manifest: out.Manifest}, MaxSize: j.MaxDisk}
	img, err := b.images.Build(ctx, src, func(line string) { bases.say(template.Progress{Text: line}) })
	if err != nil {
		return template.Built{}, b.buildError(err)
	}
	img.Source = "dockerfile"
	if names := bases.names(); len(names) > 0 {
		img.Source += " from " + strings.Join(names, ", ")
	}
	return built(img), nil
}

// buildDir is the name of what builds have: in the data directory, in that of sockets, and
// below the instance's control group.
const buildDir = "buildkit"

// buildRemains names the directories and control groups of the builds of an instance.
func buildRemains(instance, dataDir string) buildkit.Config {
	c := buildkit.Config{RunDir: filepath.Join(stateDir(instance), buildDir), CgroupParent: node.GroupRoot(instance) + "/" + buildDir}
	if dataDir != "" {
		c.Dir = filepath.Join(dataDir, buildDir)
	}
	return c
}

// openBuilds opens the room that Dockerfiles are built in. Nothing runs there until one is.
func (s *server) openBuilds(programsDir string, programs embedded.Programs) error {
	program, err := embedded.UnpackBuildkit(programsDir)
	if err != nil {
		return err
	}
	nameservers, err := s.cfg.nameserverAddrs()
	if err != nil {
		return err
	}
	// What a build that a crash ended was made from.
	if err := errors.Join(os.RemoveAll(s.scratch()), os.MkdirAll(s.scratch(), 0o700)); err != nil {
		return fmt.Errorf("making room for builds: %w", err)
	}
	c := buildRemains(s.instance, s.cfg.DataDir)
	c.Program, c.Runsc, c.Platform, c.Slots, c.Nameservers = program, programs.Runsc, s.cfg.Sandbox.Platform, buildSlots{s.slots}, nameservers
	c.IdleTimeout, c.CacheBytes = time.Duration(s.cfg.Build.IdleTimeout), int64(s.cfg.Build.CacheMB)<<20
	c.BuildBytes, c.Builds = int64(s.cfg.Build.DiskMB)<<20, min(s.cfg.Build.PerOrg, s.cfg.Build.Concurrent)
	s.dockerfiles, err = buildkit.Open(c, s.log.With(slog.String("room", "buildkit")))
	if err != nil {
		return err
	}
	s.onClose(s.dockerfiles.Close)
	return nil
}

// scratch is for what a build needs while it runs.
func (s *server) scratch() string { return filepath.Join(s.cfg.DataDir, "scratch") }

// bases finds the images that a Dockerfile names: templates first, then registries.
type bases struct {
	builder
	job template.Job
	dir string // for templates that were written out

	talk     sync.Mutex // progress takes one line at a time
	progress func(template.Progress)

	mu sync.Mutex
	// +checklocks:mu
	from []string // what was found, for people
	// +checklocks:mu
	release []func()
	// +checklocks:mu
	exported int64 // bytes of disk that templates took that were written out
}

func (b *bases) say(p template.Progress) {
	b.talk.Lock()
	defer b.talk.Unlock()
	b.progress(p)
}

// find implements [buildkit.Request].Base, which asks for each name once.
func (b *bases) find(ctx context.Context, name string) (buildkit.Base, error) {
	// The builder says the tag that everybody leaves out.
	if short := strings.TrimSuffix(name, ":latest"); !strings.ContainsAny(short, ":/@") {
		base, ok, err := b.job.Base(ctx, short)
		if err != nil {
			return buildkit.Base{}, err
		}
		if ok {
			return b.export(ctx, short, base)
		}
	}
	if !b.registry {
		return buildkit.Base{}, fmt.Errorf("there is no template %q: %w", name, errNoRegistry)
	}
	layout, err := b.images.Pull(ctx, name, b.auth(b.job, name), func(line string) { b.say(template.Progress{Text: line}) })
	if err != nil {
		return buildkit.Base{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.release = append(b.release, b.images.Hold(layout))
	b.from = append(b.from, layout.Reference)
	return buildkit.Base{Layout: layout.Dir, Manifest: layout.Manifest}, nil
}

// export writes a template out as an image.
func (b *bases) export(ctx context.Context, name string, base template.Base) (buildkit.Base, error) {
	rt := image.Runtime{User: base.User, Workdir: base.Workdir, Entrypoint: base.Entrypoint, Cmd: base.Cmd}
	for _, k := range slices.Sorted(maps.Keys(base.Env)) {
		rt.Env = append(rt.Env, k+"="+base.Env[k])
	}
	path, err := b.images.Path(ctx, base.Image)
	if err != nil {
		return buildkit.Base{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return buildkit.Base{}, fmt.Errorf("looking at the image of template %s: %w", name, err)
	}
	if err := b.reserve(st.Blocks * 512); err != nil {
		return buildkit.Base{}, err
	}
	layout, err := b.images.Export(ctx, base.Image, rt, filepath.Join(b.dir, name))
	if err != nil {
		return buildkit.Base{}, fmt.Errorf("making an image of template %s: %w", name, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.from = append(b.from, "template "+name)
	return buildkit.Base{Layout: layout.Dir, Manifest: layout.Manifest}, nil
}

// reserve counts what a template takes on the disk that is to be written out, in bytes: a Dockerfile may name as
// many as there are.
func (b *bases) reserve(size int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.exported += size; b.exported > b.limits.disk {
		return fmt.Errorf("the templates that it is made from have more than the %d MiB together that a build may write (build.disk_mb)", b.limits.disk>>20)
	}
	return nil
}

func (b *bases) names() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.from
}

func (b *bases) close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, release := range b.release {
		release()
	}
	if err := os.RemoveAll(b.dir); err != nil {
		return fmt.Errorf("removing base images: %w", err)
	}
	return nil
}

// steps makes lines of what BuildKit says, which comes in pieces.
type steps struct {
	say  func(template.Progress)
	made func()         // called when all steps are over
	part map[int]string // the last line of each step, while it has no end
}

func newSteps(say func(template.Progress), made func()) *steps {
	return &steps{say: say, made: made, part: map[int]string{}}
}

// longLine is the length in bytes at which a line that does not end is cut.
const longLine = 4000

func (s *steps) event(e buildkit.Event) {
	switch e.Kind {
	case buildkit.Made:
		s.made()
	case buildkit.Began:
		s.say(template.Progress{Step: e.Step, Name: e.Name})
	case buildkit.Log, buildkit.Note:
		text := s.part[e.Step] + e.Text
		if e.Kind == buildkit.Note {
			text += "\n"
		}
		end := strings.LastIndexByte(text, '\n') + 1
		if len(text)-end > longLine {
			end = len(text)
		}
		s.part[e.Step] = text[end:]
		if end > 0 {
			s.say(template.Progress{Step: e.Step, Text: text[:end]})
		}
	case buildkit.Ended:
		if text := s.part[e.Step]; text != "" {
			s.say(template.Progress{Step: e.Step, Text: text})
		}
		delete(s.part, e.Step)
		if e.Cached {
			s.say(template.Progress{Step: e.Step, Text: "cached"})
		}
	}
}
