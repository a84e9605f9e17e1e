package buildkit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/fault"
)

// Base is an image that a build starts from or copies from.
type Base struct {
	Layout   string // directory of an OCI image layout, which must stay until the build ends
	Manifest string // "sha256:…" of the image's manifest or index in it
}

// Request describes a Dockerfile to build.
type Request struct {
	Dockerfile     string // its text, or
	DockerfilePath string // its path in the context; "" for both: "Dockerfile"
	Context        string // path of a tar file, plain or gzip; "": an empty context
	Limits         Limits // of the context

	Args   map[string]string
	Target string // the stage to build; "": the last one
	// Scope, such as an organization, limits sharing: builds of one scope share a cache and the
	// space that they may write to. It must not contain "/".
	Scope   string
	NoCache bool

	MemoryBytes int64   // limit of one RUN step; 0: 2 GiB
	CPUs        float64 // limit of one RUN step; 0: none

	// Base returns an image that the Dockerfile names. It is called once in a build for each
	// name. The name is in its shortest form, with a tag or a digest: "python:3.12",
	// "base:latest", "registry.example.com/a/b@sha256:…". It may be called concurrently. Its
	// error becomes the build's, and the user sees its text.
	Base func(ctx context.Context, name string) (Base, error)
}

// Event is one piece of a build's progress.
type Event = wire.Event

// Kinds of [Event].
const (
	Began = wire.Began // a step has begun
	Log   = wire.Log   // a step has written Text
	Ended = wire.Ended // a step is over
	Note  = wire.Note  // Text is a remark, such as a warning of the front end
	Made  = wire.Made  // all steps are over; the image is written next
)

// Result is a built image.
type Result struct {
	Layout   string // directory of an OCI image layout; its layers are not compressed
	Manifest string // "sha256:…" of the image's manifest

	dir string
}

// Close removes the image's layout.
func (r *Result) Close() error {
	if err := os.RemoveAll(r.dir); err != nil {
		return fmt.Errorf("removing a build's result: %w", err)
	}
	return nil
}

// StepError reports a step that failed, or a Dockerfile that cannot be built.
type StepError struct {
	Step     string   // as written in the Dockerfile, such as "RUN make"
	Line     int      // in the Dockerfile, from 1; 0 if unknown
	ExitCode int      // of the step's program; -1 if there is none, or it was killed
	Tail     []string // the step's last lines
	Err      error
}

// Error returns the step, the line, the cause and the step's last lines.
func (e *StepError) Error() string {
	s := e.Err.Error()
	if e.Line > 0 {
		s = fmt.Sprintf("line %d: %s", e.Line, s)
	}
	if e.Step != "" {
		s = e.Step + ": " + s
	}
	if len(e.Tail) > 0 {
		s += "\n" + strings.Join(e.Tail, "\n")
	}
	return s
}

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }

// Errors in a [StepError] for callers to distinguish.
var (
	ErrMemory    = errors.New("out of memory")
	ErrDisk      = errors.New("too much on disk")
	ErrProcesses = errors.New("too many processes")
)

// Bounds of a request.
const (
	maxScope      = 200      // bytes; it becomes a file name
	maxDockerfile = 1 << 20  // bytes
	maxArgs       = 24 << 10 // bytes of names and values in all; as JSON at most six times as long
)

func (r *Request) check() error {
	switch {
	case r.Base == nil:
		return errors.New("a build request without Base")
	case strings.ContainsAny(r.Scope, "/\x00") || len(r.Scope) > maxScope:
		return fmt.Errorf("a build request with the scope %q", r.Scope)
	case r.Dockerfile != "" && r.DockerfilePath != "":
		return fault.InField(fault.CodeInvalidDockerfile, "dockerfile_path",
			"only one of dockerfile and dockerfile_path may be given")
	case len(r.Dockerfile) > maxDockerfile:
		return fault.InvalidField("dockerfile", "must not be longer than %d bytes", maxDockerfile)
	case r.Dockerfile == "" && r.Context == "":
		return fault.InvalidField("dockerfile", "neither a Dockerfile nor a context that could hold one is given")
	case r.DockerfilePath != "" && !filepath.IsLocal(r.DockerfilePath):
		return fault.InField(fault.CodeInvalidDockerfile, "dockerfile_path", "must be a path in the context, not %q",
			r.DockerfilePath)
	}
	size := len(r.Target) + len(r.Scope)
	for name, value := range r.Args {
		if size += len(name) + len(value); size > maxArgs {
			return fault.InvalidField("args", "must not be longer than %d bytes in all", maxArgs)
		}
		if name == "" || strings.ContainsAny(name, "=\x00") || !utf8.ValidString(name+value) {
			return fault.InvalidField("args", "%q is not the name of a build argument, or its value is not text",
				name)
		}
	}
	return nil
}

// Build builds a Dockerfile and calls progress with its events, from one goroutine. A failed step
// or a wrong Dockerfile gives a *[StepError]; an unusable context gives a *[fault.Error]. When
// ctx ends, Build ends everything of the build and returns the cause of ctx.
func (b *Builder) Build(ctx context.Context, r Request, progress func(Event)) (_ *Result, err error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(b.closed, func() { cancel(ErrClosed) })()
	contexts := b.contexts(r.Scope)
	if err := os.MkdirAll(contexts, 0o700); err != nil {
		return nil, fmt.Errorf("making a build's directory: %w", err)
	}
	dir, err := os.MkdirTemp(contexts, "")
	if err != nil {
		return nil, fmt.Errorf("making a build's directory: %w", err)
	}
	// By then the cache has its content, or the build has failed.
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	request, err := prepare(ctx, dir, &r)
	if err != nil {
		return nil, err
	}
	p, release, err := b.seat(r.Scope).use(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	out, err := b.newOutput()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(out.dir))
		}
	}()
	bases := &bases{find: r.Base}
	done, err := p.talk(ctx, wire.Request{Build: request}, func(conn *wire.Conn, said wire.Report, file *os.File) error {
		switch {
		case said.Base != "":
			bases.answer(ctx, conn, said.Base)
		case said.Blob != nil:
			return bases.blob(conn, *said.Blob)
		case said.Output != "":
			return out.take(ctx, said.Output, file)
		case said.Event != nil && progress != nil:
			progress(*said.Event)
		}
		return nil
	})
	cancel(nil)
	bases.asking.Wait()
	if err == nil && done.Failure != nil {
		err = bases.failure(done.Failure)
	}
	if err == nil {
		err = out.finish(done)
	}
	if err != nil {
		return nil, err
	}
	return &Result{Layout: out.dir, Manifest: done.Manifest, dir: out.dir}, nil
}

// Names in a build's directory.
const (
	contextDir    = "context"
	dockerfileDir = "dockerfile"
)

// prepare fills the build's directory and returns the request for the program.
func prepare(ctx context.Context, dir string, r *Request) (*wire.Build, error) {
	id := filepath.Base(dir)
	w := &wire.Build{Context: filepath.Join(id, contextDir), Args: r.Args, Target: r.Target, MemoryBytes: r.MemoryBytes,
		CPUs: r.CPUs, NoCache: r.NoCache}
	w.Dockerfile, w.Filename = w.Context, r.DockerfilePath
	from := filepath.Join(dir, contextDir)
	if err := os.Mkdir(from, 0o700); err != nil {
		return nil, fmt.Errorf("making a build's directory: %w", err)
	}
	if r.Context != "" {
		if err := unpackFile(ctx, r.Context, from, r.Limits); err != nil {
			return nil, err
		}
	}
	if w.Filename == "" {
		w.Filename = "Dockerfile"
	}
	file := from
	if r.Dockerfile != "" {
		w.Dockerfile, file = filepath.Join(id, dockerfileDir), filepath.Join(dir, dockerfileDir)
		err := os.Mkdir(file, 0o700)
		if err == nil {
			err = os.WriteFile(filepath.Join(file, w.Filename), []byte(r.Dockerfile), 0o600)
		}
		if err != nil {
			return nil, fmt.Errorf("writing the Dockerfile: %w", err)
		}
	}
	return w, checkSizes(from, file, w.Filename)
}

// checkSizes refuses files that the program would read as a whole and that are too long for it.
func checkSizes(from, dockerfile, filename string) error {
	for _, file := range []struct{ dir, name string }{{dockerfile, filename}, {dockerfile, filename + ".dockerignore"},
		{from, ".dockerignore"}} {
		root, err := os.OpenRoot(file.dir)
		if err != nil {
			return fmt.Errorf("opening the build's directory: %w", err)
		}
		info, err := root.Stat(file.name)
		root.Close()
		// The front end reports a file that is missing or outside.
		if err == nil && info.Size() > maxDockerfile {
			return refused(file.name, "must not be longer than %d bytes", maxDockerfile)
		}
	}
	return nil
}

// bases answers the program's requests for images.
type bases struct {
	find   func(context.Context, string) (Base, error)
	asking sync.WaitGroup

	mu sync.Mutex
	// +checklocks:mu
	failed error // the first error
	// +checklocks:mu
	layouts []string // directories of the images found
}

func (b *bases) answer(ctx context.Context, conn *wire.Conn, name string) {
	b.asking.Go(func() {
		base, err := b.find(ctx, name)
		a := wire.Answer{Name: name, Manifest: base.Manifest}
		b.mu.Lock()
		if err == nil {
			b.layouts = append(b.layouts, base.Layout)
		} else {
			a.Error = wire.Short(err.Error())
			if b.failed == nil {
				b.failed = err
			}
		}
		b.mu.Unlock()
		// An error means that the connection has ended; the receiver notices.
		_ = conn.Send(a, nil)
	})
}

// blob sends a blob of the build's images.
func (b *bases) blob(conn *wire.Conn, ask wire.BlobAsk) error {
	a := wire.Answer{Blob: ask.ID}
	f, err := b.open(ask.Digest)
	if err != nil {
		a.Error = wire.Short(err.Error())
	} else {
		defer f.Close()
	}
	// An error means that the connection has ended; the receiver notices.
	_ = conn.Send(a, f)
	return nil
}

func (b *bases) open(digest string) (*os.File, error) {
	path, err := blobPath(digest)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	layouts := b.layouts[:len(b.layouts):len(b.layouts)]
	b.mu.Unlock()
	for _, dir := range layouts {
		f, err := os.OpenInRoot(dir, path)
		if err != nil {
			continue
		}
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			return f, nil
		}
		f.Close()
	}
	return nil, errors.New("no image of this build has it")
}

// failure returns the error for a build that failed.
func (b *bases) failure(f *wire.Failure) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := &StepError{Step: f.Step, Line: f.Line, ExitCode: f.ExitCode, Tail: f.Tail}
	switch {
	case f.Kind == wire.Internal:
		return fmt.Errorf("building: %s", f.Message)
	case f.Kind == wire.Base && b.failed != nil:
		e.Err = b.failed
	case f.Kind == wire.Memory:
		e.Err = fmt.Errorf("%w: %s", ErrMemory, f.Message)
	case f.Kind == wire.Disk:
		e.Err = fmt.Errorf("%w: %s", ErrDisk, f.Message)
	case f.Kind == wire.Processes:
		e.Err = fmt.Errorf("%w: %s", ErrProcesses, f.Message)
	default:
		e.Err = errors.New(f.Message)
	}
	return e
}
