package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/blob"
	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/template"
)

// builder makes templates' images in the image room, and those of Dockerfiles in the build
// room before. The rooms do not know each other: one speaks of templates, one of file
// systems, one of steps.
type builder struct {
	images      *image.Store
	dockerfiles *buildkit.Builder
	registry    bool   // whether OCI images may be tried
	dir         string // of the server's data, which is nobody's business
	scratch     string // for what a build needs while it runs
	limits      buildLimits
}

// errNoRegistry refuses what only a registry has, where the operator wants none asked.
var errNoRegistry = errors.New("this server asks no image registry")

// buildLimits bound one build.
type buildLimits struct {
	memory  int64   // of one step, bytes
	cpus    float64 // of one step
	context buildkit.Limits
	disk    int64 // bytes
}

// Build implements template.Builder.
func (b builder) Build(ctx context.Context, j template.Job, progress func(template.Progress)) (template.Built, error) {
	d := j.Definition
	if d.Dockerfile != "" {
		return b.dockerfile(ctx, j, progress)
	}
	src := image.Source{Require: d.Require, Setup: image.Setup{Remove: d.Remove}, MaxSize: j.MaxDisk, Fresh: j.Refresh,
		Made: j.Made}
	switch {
	case d.Image != "" && j.Context != "":
		src.Archive, src.Within = j.Context, d.Image
	case d.Image != "" && b.registry:
		src.Image, src.Auth = d.Image, b.auth(j, d.Image)
	case d.Image != "" && d.Debian == nil:
		return template.Built{}, &template.BuildError{Step: "pulling " + d.Image, ExitCode: -1, Message: errNoRegistry.Error()}
	}
	if d.Debian != nil {
		src.Debian = &image.Debian{Suite: d.Debian.Suite, Packages: d.Debian.Packages, Mirrors: d.Debian.Mirrors,
			Exclude: d.Debian.Exclude, Include: d.Debian.Include}
	}
	for _, u := range d.Users {
		src.Setup.Users = append(src.Setup.Users, image.User(u))
	}
	for _, f := range d.Files {
		src.Setup.Files = append(src.Setup.Files, image.File{Path: f.Path, Mode: f.Mode, Content: f.Content})
	}
	img, err := b.images.Build(ctx, src, func(line string) { progress(template.Progress{Text: line}) })
	if err != nil {
		return template.Built{}, b.buildError(err)
	}
	return built(img), nil
}

// auth returns the credentials of the job for the registry of an image, nil for none.
func (b builder) auth(j template.Job, ref string) *image.Auth {
	c := j.Credentials
	// Without a registry they are for the one image there is.
	if c == nil || c.Registry != "" && !image.AskedOf(ref, c.Registry) {
		return nil
	}
	return &image.Auth{Username: c.Username, Password: c.Password}
}

// built tells of an image in the words of templates.
func built(img image.Image) template.Built {
	env := map[string]string{}
	for _, pair := range img.Config.Env {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return template.Built{Image: img.Digest, Size: img.Size, Source: img.Source, Env: env, User: img.Config.User,
		Workdir: img.Config.Workdir, Entrypoint: img.Config.Entrypoint, Cmd: img.Config.Cmd}
}

// buildError tells a step that failed in the words of templates, and not where on the
// machine things are.
func (b builder) buildError(err error) error {
	var out *template.BuildError
	if step := new(image.StepError); errors.As(err, &step) {
		out = &template.BuildError{Step: step.Step, ExitCode: step.ExitCode, Tail: step.Tail, Message: step.Err.Error()}
	} else if step := new(buildkit.StepError); errors.As(err, &step) {
		out = &template.BuildError{Step: step.Step, ExitCode: step.ExitCode, Tail: step.Tail, Message: step.Err.Error()}
		if step.Line > 0 {
			out.Message = fmt.Sprintf("line %d: %s", step.Line, out.Message)
		}
	} else {
		return err
	}
	out.Message = strings.ReplaceAll(out.Message, b.dir, "…")
	out.Tail = slices.Clone(out.Tail)
	for i, line := range out.Tail {
		out.Tail[i] = strings.ReplaceAll(line, b.dir, "…")
	}
	return out
}

// Check implements template.Builder.
func (b builder) Check(ctx context.Context, digest string) error {
	_, err := b.images.Path(ctx, digest)
	return goneIfUnusable(err)
}

// HasUser implements template.Builder.
func (b builder) HasUser(ctx context.Context, digest, name string) (bool, error) {
	known, err := b.images.HasUser(ctx, digest, name)
	return known, goneIfUnusable(err)
}

// Same implements template.Builder.
func (b builder) Same(ctx context.Context, one, other string) (bool, error) {
	same, err := b.images.Same(ctx, one, other)
	return same, goneIfUnusable(err)
}

// Collect implements template.Builder.
func (b builder) Collect(_ context.Context, keep []string) ([]string, int64, error) {
	return b.images.Collect(keep)
}

func unusable(err error) bool {
	return errors.Is(err, image.ErrMissing) || errors.Is(err, image.ErrCorrupt)
}

// goneIfUnusable adds template.ErrImageGone to the error of an image that cannot be used.
func goneIfUnusable(err error) error {
	if unusable(err) {
		return errors.Join(template.ErrImageGone, err)
	}
	return err
}

// rootFS finds the images of sandboxes. One that cannot be used sets off a look
// at the templates, which build it again.
type rootFS struct {
	images  *image.Store
	recheck func(image string)
}

// Path implements node.Images.
func (r rootFS) Path(ctx context.Context, digest string) (string, error) {
	path, err := r.images.Path(ctx, digest)
	if unusable(err) {
		r.recheck(digest)
		return "", fault.New(fault.Unavailable, "image_unavailable",
			"the template's image cannot be used and is being built again").After(30 * time.Second).Because(err)
	}
	return path, err
}

// openTemplates brings up the templates with the built-in ones registered.
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
	contexts, err := blob.Open(filepath.Join(s.cfg.DataDir, "contexts"), int64(s.cfg.Capacity.MinFreeDiskMB)<<20)
	if err != nil {
		return nil, fmt.Errorf("opening the directory of build contexts: %w", err)
	}
	cfg := template.Config{Builtins: builtins, Prepare: s.cfg.Templates.Prepare, MaxDiskMB: s.cfg.Sandbox.MaxDiskMB,
		MaxTemplates: s.cfg.Templates.MaxPerOrg, ContextLimit: int64(s.cfg.Build.ContextLimitMB) << 20, ContextTotal: int64(s.cfg.Build.ContextsMB) << 20,
		Concurrent: s.cfg.Build.Concurrent, PerOrg: s.cfg.Build.PerOrg, Timeout: time.Duration(s.cfg.Build.Timeout), MaxDisk: int64(s.cfg.Build.DiskMB) << 20, Observe: s.observeBuilds()}
	for _, size := range s.cfg.Sandbox.Sizes {
		cfg.Sizes = append(cfg.Sizes, size.Name)
	}
	templates := template.New(cfg, s.db, s.builder(), contexts, s.db,
		s.log.With(slog.String("room", "template")))
	return templates, templates.Register(ctx)
}

// observeBuilds counts builds of templates.
func (s *server) observeBuilds() func(result string, took time.Duration) {
	builds := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cay_template_build_duration_seconds",
		Help: "Time that builds of templates ran, by result: ready, failed, cancelled.",
		// From one whose result was there already to the time limit and beyond.
		Buckets: []float64{.1, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600}}, []string{"result"})
	s.registry.MustRegister(builds)
	return func(result string, took time.Duration) { builds.WithLabelValues(result).Observe(took.Seconds()) }
}

// builder joins the rooms that templates are built in.
func (s *server) builder() builder {
	c := s.cfg.Build
	return builder{images: s.images, dockerfiles: s.dockerfiles, registry: s.cfg.Images.Registry, dir: s.cfg.DataDir, scratch: s.scratch(),
		limits: buildLimits{disk: int64(c.DiskMB) << 20, memory: int64(c.MemoryMB) << 20, cpus: c.CPUs, context: buildkit.Limits{Bytes: int64(c.ContextLimitMB) << 20}}}
}
