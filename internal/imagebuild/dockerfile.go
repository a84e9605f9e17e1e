package imagebuild

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/template"
)

// dockerfile builds the job's Dockerfile and makes a root file system of the result.
func (b *Builder) dockerfile(ctx context.Context, j template.Job,
	progress func(template.Progress)) (_ template.Built, err error) {
	bases := &bases{Builder: b, job: j, progress: progress}
	if bases.dir, err = os.MkdirTemp(b.cfg.Scratch, "bases-"+j.ID+"-"); err != nil {
		return template.Built{}, fmt.Errorf("making room for base images: %w", err)
	}
	defer func() { err = errors.Join(err, bases.close()) }()
	d := j.Definition
	r := buildkit.Request{Context: j.Context, Args: d.BuildArgs, Target: d.Target, Scope: j.OrgID, NoCache: j.Refresh,
		Limits: b.cfg.Context, MemoryBytes: b.cfg.StepMemory, CPUs: b.cfg.StepCPUs, Base: bases.find}
	if j.Context == "" {
		r.Dockerfile = d.Dockerfile
	} else {
		r.DockerfilePath = d.Dockerfile
	}
	out, err := b.cfg.Dockerfiles.Build(ctx, r, newSteps(bases.say, j.Made).event)
	if err != nil {
		return template.Built{}, b.buildError(err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	src := image.Source{Layout: &image.Layout{Dir: out.Layout, Manifest: out.Manifest}, MaxSize: j.MaxDisk}
	img, err := b.cfg.Images.Build(ctx, src, func(line string) { bases.say(template.Progress{Text: line}) })
	if err != nil {
		return template.Built{}, b.buildError(err)
	}
	img.Source = "dockerfile"
	if names := bases.names(); len(names) > 0 {
		img.Source += " from " + strings.Join(names, ", ")
	}
	return built(img), nil
}

// bases finds the base images that a Dockerfile names: templates first, then images of registries. Its methods may be
// called at the same time.
type bases struct {
	*Builder
	job template.Job
	dir string // for exported templates

	progressMu sync.Mutex // progress takes one line at a time
	// +checklocks:progressMu
	progress func(template.Progress)

	mu sync.Mutex
	// +checklocks:mu
	from []string // the names of the bases that were found, for the template's source
	// +checklocks:mu
	release []func()
	// +checklocks:mu
	exports int // exported templates
	// +checklocks:mu
	exported int64 // disk that they take, bytes
}

// say reports progress of the build.
func (b *bases) say(p template.Progress) {
	b.progressMu.Lock()
	defer b.progressMu.Unlock()
	b.progress(p)
}

// find implements [buildkit.Request].Base, which asks for each name once.
func (b *bases) find(ctx context.Context, name string) (buildkit.Base, error) {
	// BuildKit adds the tag to a name without one.
	if short := strings.TrimSuffix(name, ":latest"); !strings.ContainsAny(short, ":/@") {
		base, ok, err := b.job.Base(ctx, short)
		if err != nil {
			return buildkit.Base{}, err
		}
		if ok {
			return b.export(ctx, short, base)
		}
	}
	if !b.cfg.Registry {
		return b.instead(ctx, name, fmt.Errorf("there is no template %q: %w", name, errNoRegistry))
	}
	layout, err := b.cfg.Images.Pull(ctx, name, b.auth(b.job, name),
		func(line string) { b.say(template.Progress{Text: line}) })
	if errors.Is(err, image.ErrUnreachable) && ctx.Err() == nil {
		return b.instead(ctx, name, err)
	}
	if err != nil {
		return buildkit.Base{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.release = append(b.release, b.cfg.Images.Hold(layout))
	b.from = append(b.from, layout.Reference)
	return buildkit.Base{Layout: layout.Dir, Manifest: layout.Manifest}, nil
}

// instead finds the template that the build names for an image without a registry, or returns why there is no image.
func (b *bases) instead(ctx context.Context, name string, why error) (buildkit.Base, error) {
	for image, other := range b.job.Definition.Instead {
		if strings.TrimSuffix(image, ":latest") != strings.TrimSuffix(name, ":latest") {
			continue
		}
		base, ok, err := b.job.Base(ctx, other)
		if err != nil {
			return buildkit.Base{}, err
		}
		if ok {
			b.say(template.Progress{Text: fmt.Sprintf("warning: no registry answers for %s: the template %s is used instead",
				name, other)})
			return b.export(ctx, other, base)
		}
	}
	return buildkit.Base{}, why
}

// export writes the image of a template as an OCI layout.
func (b *bases) export(ctx context.Context, name string, base template.Base) (buildkit.Base, error) {
	rt := image.Runtime{User: base.User, Workdir: base.Workdir, Entrypoint: base.Entrypoint, Cmd: base.Cmd}
	for _, k := range slices.Sorted(maps.Keys(base.Env)) {
		rt.Env = append(rt.Env, k+"="+base.Env[k])
	}
	path, err := b.cfg.Images.Path(ctx, base.Image)
	if err != nil {
		return buildkit.Base{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return buildkit.Base{}, fmt.Errorf("looking at the image of template %s: %w", name, err)
	}
	dir, err := b.reserve(st.Blocks * 512)
	if err != nil {
		return buildkit.Base{}, err
	}
	layout, err := b.cfg.Images.Export(ctx, base.Image, rt, dir)
	if err != nil {
		return buildkit.Base{}, fmt.Errorf("making an image of template %s: %w", name, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.from = append(b.from, "template "+name)
	return buildkit.Base{Layout: layout.Dir, Manifest: layout.Manifest}, nil
}

// reserve returns a directory for one more exported template. It counts the disk that exported templates take, in
// bytes, and refuses more than a build may write. Without it a Dockerfile that names every template could fill the
// disk.
func (b *bases) reserve(size int64) (dir string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.exported += size; b.exported > b.cfg.MaxDisk {
		return "", fmt.Errorf("the templates that it is made from have more than the %d MiB together that a build may write "+
			"(build.disk_mb)", b.cfg.MaxDisk>>20)
	}
	b.exports++
	return filepath.Join(b.dir, strconv.Itoa(b.exports)), nil
}

// names returns the names of the bases that were found.
func (b *bases) names() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.from
}

// close releases the pulled images and removes the exported templates.
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

// steps turns the events of BuildKit, which carry pieces of output, into lines of progress. It is not safe for
// concurrent use.
type steps struct {
	say  func(template.Progress)
	made func()         // called when all steps are over
	part map[int]string // the unfinished last line of each step
}

// newSteps returns steps that report progress to say.
func newSteps(say func(template.Progress), made func()) *steps {
	return &steps{say: say, made: made, part: map[int]string{}}
}

// longLine is the length at which an unfinished line is reported as it is, in bytes. Without it a step that never ends
// its line would grow the server's memory; a much smaller one cuts lines that users want whole.
const longLine = 4000

// event reports an event of BuildKit.
func (s *steps) event(e buildkit.Event) {
	switch e.Kind {
	case buildkit.Made:
		s.made()
	case buildkit.Began:
		s.say(template.Progress{Step: e.Step, Name: e.Name, Line: e.Line})
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
