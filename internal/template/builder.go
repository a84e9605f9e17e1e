package template

import (
	"context"
	"errors"
	"time"
)

// ErrImageGone says that an image is not there any more, or not what it was.
var ErrImageGone = errors.New("the template's image is gone")

// Job is one build.
type Job struct {
	ID         string // of this run
	OrgID      string // "" for a built-in template
	Definition Definition
	// Context is the path of the context, a tar, plain or gzip; "" is none. With one,
	// Definition.Dockerfile or .Image is a path in it, without one the Dockerfile's text
	// or a reference. An Image of "." is the context itself.
	Context     string
	Credentials *Credentials // nil asks registries anonymously
	// Refresh looks up anew what changes by itself, a tag or a suite, and uses no result
	// that was made of what it was before.
	Refresh bool
	// Base finds what a FROM names among the templates of the organization and the
	// built-in ones: false if none has that name. A template that is not ready is an
	// error, after which Build should end; it is called again when that one is ready.
	Base func(ctx context.Context, name string) (Base, bool, error)
	// Timeout is when ctx ends; given so that it can be told to whatever does the work.
	Timeout time.Duration
	MaxDisk int64 // what the build may write and its result have, bytes; 0 is the builder's own limit
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

// Progress is news of a build: that a step begins, with Name, or a line of what it
// says, with Text.
type Progress struct {
	Step   int    // which step, from 1; 0 is none in particular
	Steps  int    // how many there are; 0 is not known
	Name   string // of the step that begins, such as "RUN npm ci"
	Cached bool   // the step's result was there already
	Text   string // a line
}

// Built is what a build made.
type Built struct {
	Image  string // content hash
	Size   int64  // bytes
	Source string // what it was made from

	// What the image itself says; the definition goes over it.
	Env        map[string]string
	User       string
	Workdir    string
	Entrypoint []string
	Cmd        []string
}

// Builder makes images.
type Builder interface {
	// Build makes the image of a job; nothing is done when the same was done before,
	// but for what Refresh says. It calls progress from one goroutine at a time and not
	// after it has returned. Builds may run at the same time, see [Config]. A step that
	// failed is a [*BuildError]; any other error's text is shown to users too. It ends
	// soon after ctx does, with nothing of the build left running.
	Build(ctx context.Context, j Job, progress func(Progress)) (Built, error)
	// Check reports whether an image can be used: ErrImageGone if it must be
	// built again, another error if nobody can tell.
	Check(ctx context.Context, image string) error
	// HasUser reports whether an image knows a user by this name. It has the errors of Check.
	HasUser(ctx context.Context, image, name string) (bool, error)
	// Collect removes the images that are not in keep and have not been asked
	// for lately. It goes on after errors and joins them.
	Collect(ctx context.Context, keep []string) (removed []string, freed int64, err error)
}

// Users says which images are in use beside those of the templates; the
// sandboxes' Store does.
type Users interface {
	// Images lists the images that sandboxes which are not over need.
	Images(ctx context.Context) ([]string, error)
}
