package template

import (
	"context"
	"errors"
)

// ErrImageGone reports that an image is missing or damaged.
var ErrImageGone = errors.New("the template's image is gone")

// Job describes one build.
type Job struct {
	ID         string // ID of this run
	OrgID      string // "" for a built-in template
	Definition Definition
	// Context is the path of the context, a tar, plain or gzip; "" is none. With a context,
	// Definition.Dockerfile or .Image is a path in it; without, it is the Dockerfile's text or a
	// reference. The Image "." is the context itself.
	Context     string
	Credentials *Credentials // nil: registries are used anonymously
	// Refresh looks up inputs again that change by themselves, a tag or a suite, and uses no
	// result of their earlier values.
	Refresh bool
	// Base returns the template that a FROM names, of the organization or built-in, or false if
	// there is none. A template that is not ready is an error, after which Build should end;
	// Build is called again when the template is ready.
	Base func(ctx context.Context, name string) (Base, bool, error)
	// Made reports that everything which can take long is done, such as the steps of a Dockerfile, and
	// that the image is written next. Build calls it; ctx then gets a time of its own for the rest, so
	// that finished work is not lost.
	Made    func()
	MaxDisk int64 // bytes that the build may write and its result may have; 0 is the builder's own limit
}

// Base is a template that another one is made from.
type Base struct {
	Image      string // content hash
	Env        map[string]string
	User       string
	Workdir    string
	Entrypoint []string
	Cmd        []string
}

// Progress reports that a step begins, with Name, or a line of its output, with Text.
type Progress struct {
	Step   int    // number of the step, from 1; 0 is no particular one
	Steps  int    // number of steps; 0 is unknown
	Name   string // of the step that begins, such as "RUN npm ci"
	Line   int    // of the Dockerfile, of the step that begins; 0 is unknown
	Cached bool   // the step's result was in the cache
	Text   string // a line
}

// Built is the result of a build.
type Built struct {
	Image  string // content hash
	Size   int64  // bytes
	Source string // what it was made from

	// The image's own settings; those of the definition override them.
	Env        map[string]string
	User       string
	Workdir    string
	Entrypoint []string
	Cmd        []string
}

// Builder makes images.
type Builder interface {
	// Build makes the image of a job. It uses the result of an earlier job with the same inputs,
	// unless Refresh forbids it. It calls progress from one goroutine at a time and not after it
	// has returned. Builds may run at the same time, see [Config]. A failed step is a
	// [*BuildError]; users see the text of any other error too. It ends soon after ctx does, and
	// leaves nothing of the build running.
	Build(ctx context.Context, j Job, progress func(Progress)) (Built, error)
	// Check reports whether an image can be used: nil, ErrImageGone if it must be built again, or
	// another error if that is unknown. It may take as long as the image takes to be fetched.
	Check(ctx context.Context, image string) error
	// HasUser reports whether an image has a user of the name. It has the errors of Check.
	HasUser(ctx context.Context, image, name string) (bool, error)
	// Same reports whether two images differ in the times of their files at most. It has the errors
	// of Check.
	Same(ctx context.Context, a, b string) (bool, error)
	// Collect removes the images that are in neither list and were not used recently. Those in keepHere
	// stay on this machine, even if there are copies elsewhere: a build may not make the same image again.
	// After an error it goes on, and returns all errors joined.
	Collect(ctx context.Context, keep, keepHere []string) (removed []string, freed int64, err error)
}

// Users returns the images in use besides those of templates. The sandboxes' Store implements it.
type Users interface {
	// Images returns the images that sandboxes need, except ended ones.
	Images(ctx context.Context) ([]string, error)
}
