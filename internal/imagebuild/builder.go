// Package imagebuild makes the images of templates. It joins the rooms that do it and do not know each other: template
// has definitions and jobs, image makes root file systems from registries, archives and Debian packages, and buildkit
// builds Dockerfiles. It decides which names of a Dockerfile are templates and which are images of a registry, which
// registry gets the job's credentials, and how a failed step is reported to the user.
//
// It does not own the images, which the image room keeps, and not the queue of builds, which the template room has.
// Builds may run at the same time. An error leaves no files but those that the image room caches.
package imagebuild

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/template"
)

// Config has the rooms that a Builder uses and the limits of its builds.
type Config struct {
	Images      *image.Store
	Dockerfiles *buildkit.Builder
	Registry    bool   // OCI images may be pulled from registries
	DataDir     string // directory of the server's data; errors that users see do not contain it
	Scratch     string // directory for the temporary files of builds

	StepMemory int64           // limit of one step's memory, bytes
	StepCPUs   float64         // limit of one step's CPUs; 0 is none
	Context    buildkit.Limits // limits of a build context
	MaxDisk    int64           // limit of the files that a build writes, bytes
}

// Builder makes the images of templates. It implements [template.Builder].
type Builder struct{ cfg Config }

// New returns a Builder.
func New(cfg Config) *Builder { return &Builder{cfg: cfg} }

// errNoRegistry refuses an image that only a registry has, on a server whose operator turned registries off.
var errNoRegistry = errors.New("this server asks no image registry")

// Build implements [template.Builder].
func (b *Builder) Build(ctx context.Context, j template.Job, progress func(template.Progress)) (template.Built, error) {
	d := j.Definition
	if d.Dockerfile != "" {
		return b.dockerfile(ctx, j, progress)
	}
	src := image.Source{Require: d.Require, Setup: image.Setup{Remove: d.Remove}, MaxSize: j.MaxDisk, Fresh: j.Refresh,
		Made: j.Made}
	switch {
	case d.Image != "" && j.Context != "":
		src.Archive, src.Within = j.Context, d.Image
	case d.Image != "" && b.cfg.Registry:
		src.Image, src.Auth = d.Image, b.auth(j, d.Image)
	case d.Image != "" && d.Debian == nil:
		refused := errNoRegistry.Error()
		return template.Built{}, &template.BuildError{Step: "pulling " + d.Image, ExitCode: -1, Message: refused}
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
	img, err := b.cfg.Images.Build(ctx, src, func(line string) { progress(template.Progress{Text: line}) })
	if err != nil {
		return template.Built{}, b.buildError(err)
	}
	return built(img), nil
}

// auth returns the job's credentials for the registry of an image, nil if it has none for it.
func (b *Builder) auth(j template.Job, ref string) *image.Auth {
	c := j.Credentials
	// Credentials without a registry are for the registry of the only image that the job names.
	if c == nil || c.Registry != "" && !image.AskedOf(ref, c.Registry) {
		return nil
	}
	return authOf(*c)
}

// authOf returns the credentials as package image takes them.
func authOf(c template.Credentials) *image.Auth {
	return &image.Auth{Username: c.Username, Password: c.Password, AWSRegion: c.AWSRegion}
}

// built returns the image as the result of a build.
func built(img image.Image) template.Built {
	env := map[string]string{}
	for _, pair := range img.Config.Env {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return template.Built{Image: img.Digest, Size: img.Size, Source: img.Source, Env: env, User: img.Config.User,
		Workdir: img.Config.Workdir, Entrypoint: img.Config.Entrypoint, Cmd: img.Config.Cmd}
}

// buildError turns the error of a failed step into a [template.BuildError], without the path of the data directory.
// It returns other errors unchanged.
func (b *Builder) buildError(err error) error {
	var out *template.BuildError
	if step := new(image.StepError); errors.As(err, &step) {
		out = &template.BuildError{Step: step.Step, ExitCode: step.ExitCode, Tail: step.Tail, Message: step.Err.Error()}
	} else if step := new(buildkit.StepError); errors.As(err, &step) {
		out = &template.BuildError{Step: step.Step, ExitCode: step.ExitCode, Tail: step.Tail, Message: step.Err.Error()}
		if out.Line = step.Line; step.Line > 0 {
			out.Message = fmt.Sprintf("line %d: %s", step.Line, out.Message)
		}
	} else {
		return err
	}
	out.Message = strings.ReplaceAll(out.Message, b.cfg.DataDir, "…")
	out.Tail = slices.Clone(out.Tail)
	for i, line := range out.Tail {
		out.Tail[i] = strings.ReplaceAll(line, b.cfg.DataDir, "…")
	}
	return out
}

// Check implements [template.Builder].
func (b *Builder) Check(ctx context.Context, digest string) error {
	_, err := b.cfg.Images.Path(ctx, digest)
	return goneIfUnusable(err)
}

// HasUser implements [template.Builder].
func (b *Builder) HasUser(ctx context.Context, digest, name string) (bool, error) {
	known, err := b.cfg.Images.HasUser(ctx, digest, name)
	return known, goneIfUnusable(err)
}

// Same implements [template.Builder].
func (b *Builder) Same(ctx context.Context, one, other string) (bool, error) {
	same, err := b.cfg.Images.Same(ctx, one, other)
	return same, goneIfUnusable(err)
}

// Collect implements [template.Builder].
func (b *Builder) Collect(_ context.Context, keep, keepHere []string) ([]string, int64, error) {
	return b.cfg.Images.Collect(keep, keepHere)
}

// unusable reports whether an image is missing or corrupt, so that it must be built again.
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
