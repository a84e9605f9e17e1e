package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/template"
)

// builder makes templates' images in the image room. The two rooms do not know
// each other: one speaks of templates, the other of file systems.
type builder struct {
	images   *image.Store
	registry bool // whether OCI images may be tried
}

// Build implements template.Builder.
func (b builder) Build(ctx context.Context, d template.Definition, progress func(string)) (template.Built, error) {
	src := image.Source{Require: d.Require, Setup: image.Setup{Remove: d.Remove}}
	if b.registry || d.Debian == nil {
		src.Image = d.Image
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
	img, err := b.images.Build(ctx, src, progress)
	if err != nil {
		return template.Built{}, err
	}
	env := map[string]string{}
	for _, pair := range img.Config.Env {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return template.Built{Image: img.Digest, Size: img.Size, Source: img.Source, Env: env,
		User: img.Config.User, Workdir: img.Config.Workdir}, nil
}

// Check implements template.Builder.
func (b builder) Check(ctx context.Context, digest string) error {
	_, err := b.images.Path(ctx, digest)
	if unusable(err) {
		return errors.Join(template.ErrImageGone, err)
	}
	return err
}

// Collect implements template.Builder.
func (b builder) Collect(_ context.Context, keep []string) ([]string, int64, error) {
	return b.images.Collect(keep)
}

func unusable(err error) bool {
	return errors.Is(err, image.ErrMissing) || errors.Is(err, image.ErrCorrupt)
}

// rootFS finds the images of sandboxes. One that cannot be used sets off a look
// at the templates, which build it again.
type rootFS struct {
	images  *image.Store
	recheck func()
}

// Path implements node.Images.
func (r rootFS) Path(ctx context.Context, digest string) (string, error) {
	path, err := r.images.Path(ctx, digest)
	if unusable(err) {
		r.recheck()
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
	templates := template.New(template.Config{Builtins: builtins}, s.db,
		builder{images: s.images, registry: s.cfg.Images.Registry}, s.db, s.log.With(slog.String("room", "template")))
	return templates, templates.Register(ctx)
}
