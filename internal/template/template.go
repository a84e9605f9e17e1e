// Package template manages templates. A template is a name for a root file system and for the
// defaults of the sandboxes made from it, in versions that are built, become ready and are
// replaced.
//
// The package owns the states of builds, the queue of builds (those of built-in templates and of
// organizations together, fair to all), their logs, and their stored inputs. A [Builder] makes
// images, a [Store] keeps rows, and [Contexts] keeps build contexts. A [Service] is safe for
// concurrent use. A build that a crash interrupted is started again by the next server, a few
// times; a failed one leaves the last ready version in use. Registry credentials are kept in
// memory only.
package template

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/sandbox"
)

// Status is the state of a template's newest build. It is part of the contract.
type Status string

// The statuses.
const (
	Pending  Status = "pending"
	Building Status = "building"
	Ready    Status = "ready"
	Failed   Status = "failed"
)

// Template is a template's row.
type Template struct {
	ID          string // "tpl_" and 20 lower-case base32 characters
	OrgID       string // "" for built-in ones, which belong to all
	Name        string // [a-z0-9][a-z0-9_-]{0,62}, and not like an ID
	Description string

	Status     Status
	Progress   string      // what a build is doing now, for people; "" if it is not building
	BuildError *BuildError // of the newest build; nil if it did not fail
	BuildID    string      // ID of the newest build and its log; "" if there was none
	Tries      int         // how often it was started; a crash may have interrupted it
	QueuedAt   time.Time   // when it was requested; zero if it has ended, or there was none

	// Version counts ready versions from 1; 0 is none yet. Shape, ImageSize and Source belong to it, and
	// stay when a later build fails.
	Version int
	// Shape holds the settings of sandboxes. Its Size has only a name. An empty name, and a disk of 0,
	// mean the configured default.
	sandbox.Shape
	ImageSize int64 // bytes
	// What the image was made from, e.g. "debian:bookworm" or
	// "docker.io/library/python:3.13-slim@sha256:…".
	Source string
	Inputs string // hash of the definition and context of Image; a different one is a reason to build
	// ReadyBuild is the ID of the build that gave Version; "" if an older cay did not record it.
	ReadyBuild string

	CreatedAt time.Time
	UpdatedAt time.Time
	BuiltAt   time.Time // of Version

	// Tagging holds tags that are written with the row. It is empty in a row that was read.
	Tagging []Tag
	// Repairs is an image that was gone and that the version takes the place of: the template's tags
	// that name it are given the version, with the row. It is empty in a row that was read.
	Repairs string
}

// Builtin reports whether the template belongs to all organizations.
func (t Template) Builtin() bool { return t.OrgID == "" }

// Queued reports whether a build of the template waits or runs.
func (t Template) Queued() bool { return !t.QueuedAt.IsZero() }

// usable reports whether sandboxes can be created from the template.
func (t Template) usable() bool { return t.Version > 0 && t.Image != "" }

// Build holds the inputs of a template's newest build. Built-in templates have none, since their
// definition is the input.
type Build struct {
	Definition Definition
	Context    string // name of the context in [Contexts]; "" is none
	Refresh    bool   // inputs that change by themselves (tags, suites) are looked up again
	Private    bool   // it needs credentials, which are kept in memory only
	Repairs    string // an image that is gone and was made of the same inputs; "" is none
}

// Credentials give access to a registry. They are never stored.
type Credentials struct {
	Registry string // host and port; "" is the registry of the definition's image
	Username string
	Password string
	// AWSRegion, if set, makes Username and Password an access key of AWS and its secret, for the registry in the region.
	AWSRegion string
}

// BuildError tells why a build failed. A [Builder] returns one if a step failed.
type BuildError struct {
	Step     string   `json:"step,omitempty"` // what was being done
	ExitCode int      `json:"exit_code"`      // of the program that did it; -1 if none, or killed
	Tail     []string `json:"tail,omitempty"` // its last lines
	Message  string   `json:"message"`
	Line     int      `json:"line,omitempty"` // of the Dockerfile, from 1; 0 is none
}

// Error returns the step, the cause and the last lines.
func (e *BuildError) Error() string {
	s := e.Message
	if e.Step != "" {
		s = e.Step + ": " + s
	}
	return strings.Join(append([]string{s}, e.Tail...), "\n")
}

// Short returns the step and the cause in one line.
func (e *BuildError) Short() string {
	s, _, _ := strings.Cut((&BuildError{Step: e.Step, Message: e.Message}).Error(), "\n")
	return s
}

// LogLine is one line of the newest build's log.
type LogLine struct {
	Seq     int64 // counts from 1 in each build
	At      time.Time
	Step    int  // the step that it belongs to; 0 is no particular one
	Heading bool // the line is the heading of the step
	Line    int  // of the Dockerfile, of the step; 0 is unknown
	Text    string
}

// LogChange is a change of a log. Lines are first dropped, then others written under their
// numbers, which may be those of dropped ones.
type LogChange struct {
	Drop []LogRange
	Add  []LogLine
}

// LogRange is the lines of one step from one number to another, both included.
type LogRange struct {
	Step     int
	From, To int64
}

// Store keeps templates. Every method is atomic and durable when it returns.
type Store interface {
	// InsertTemplate adds a template, and the inputs of its first build if b is not nil. A name
	// that another template of the organization has gives Conflict, code "template_exists". If
	// the organization already has limit templates it gives Exhausted, code "quota_exceeded"; 0
	// is no limit.
	InsertTemplate(ctx context.Context, t Template, b *Build, limit int) error
	// UpdateTemplate reads a template by ID, calls change with it, and writes it, together with b
	// if that is not nil. It returns an error of change unchanged, and writes nothing then.
	// It may call change again, with the template as it is then, after a conflict with another call. A new
	// BuildID starts a new log. Without the template it gives NotFound, code
	// "template_not_found".
	UpdateTemplate(ctx context.Context, id string, b *Build, change func(*Template) error) (Template, error)
	// GetTemplate finds a template by ID or by name, the organization's own before built-in ones,
	// or gives NotFound, code "template_not_found".
	GetTemplate(ctx context.Context, orgID, nameOrID string) (Template, error)
	// GetBuild returns the inputs of a build of a template, which must be the newest one; "" is the
	// newest one, whichever it is. Without a template or inputs, or after another build has taken
	// the build's place, it gives NotFound, code "template_not_found".
	GetBuild(ctx context.Context, id, buildID string) (Build, error)
	// DeleteTemplate removes a template, its build and its log. While sandboxes of it exist that
	// have not ended it gives Conflict, code "template_in_use", unless force is set. Without the
	// template it gives NotFound, code "template_not_found".
	DeleteTemplate(ctx context.Context, id string, force bool) error
	// ListTemplates returns a page of the organization's and the built-in templates, newest
	// first.
	ListTemplates(ctx context.Context, orgID string, limit int, cursor string) ([]Template, string, error)
	// QueuedTemplates returns the templates with a build that waits or runs, the oldest request
	// first.
	QueuedTemplates(ctx context.Context) ([]Template, error)
	// TemplatesWithImage returns the templates whose version has the image.
	TemplatesWithImage(ctx context.Context, image string) ([]Template, error)
	// TemplateImages returns the image of every template version that new sandboxes may be
	// created from, those of tags included.
	TemplateImages(ctx context.Context) ([]string, error)
	// TemplateContexts returns the contexts of an organization's builds; "" means all
	// organizations.
	TemplateContexts(ctx context.Context, orgID string) ([]string, error)
	// Tags returns the tags of a template, by name.
	Tags(ctx context.Context, id string) ([]Tag, error)
	// CopyTag gives tags to the version that the tag from names, made at a time, and returns the ID of
	// that version's build. DefaultTag among them promotes the version instead. Without the tag from it
	// gives NotFound, code "template_not_found"; for more than MaxTags tags [TooManyTags].
	CopyTag(ctx context.Context, id, from string, names []string, at time.Time) (buildID string, err error)
	// MarkTags records of the tags that name an image whether it is gone.
	MarkTags(ctx context.Context, image string, gone bool) error
	// DeleteTags removes tags of a template.
	DeleteTags(ctx context.Context, id string, names []string) error
	// ChangeTemplateLog changes the log of a template's newest build. Without the template it
	// gives NotFound, code "template_not_found".
	ChangeTemplateLog(ctx context.Context, id string, c LogChange) error
	// TemplateLog returns up to limit lines of the newest build's log with numbers above after,
	// in order.
	TemplateLog(ctx context.Context, id string, after int64, limit int) ([]LogLine, error)
	// TemplateLogRest returns up to limit lines of the newest build's log without its first skip
	// lines, in order.
	TemplateLogRest(ctx context.Context, id string, skip, limit int) ([]LogLine, error)
}

// Contexts keeps build contexts by their content.
type Contexts interface {
	// Put stores the content of r, up to limit bytes. More gives TooLarge, a full disk NoSpace;
	// an error of r comes back wrapped.
	Put(ctx context.Context, r io.Reader, limit int64) (hash string, size int64, err error)
	// Path returns the file of a context, which stays until release is called, or fs.ErrNotExist if it is gone.
	// Any other error says that it cannot be had now.
	Path(ctx context.Context, hash string) (path string, release func(), err error)
	// Open returns a reader of a context, which the caller closes, with the errors of Path.
	Open(ctx context.Context, hash string) (io.ReadCloser, error)
	// Size returns the size of a context in bytes, or an error if it is missing.
	Size(hash string) (int64, error)
	// Collect removes the contexts that are in neither list and were not stored recently. Those in
	// keepHere need no copy elsewhere. After an error it goes on, and returns all errors joined.
	Collect(keep, keepHere []string) (removed []string, freed int64, err error)
}
