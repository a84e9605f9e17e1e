// Package template is what a template is: a name for a root file system and the
// defaults of the sandboxes made from it, in versions that are built, become
// ready and are replaced.
//
// It owns the build states, the queue of builds (built-in templates and those of
// organizations in one, fair to all), their logs, and what is kept of their inputs.
// How an image is made is the business of a [Builder]; rows are kept by a [Store],
// build contexts by [Contexts]. A [Service] is safe for concurrent use. A build that a
// crash interrupted is started again by the next start, a few times; a failed one
// leaves the last ready version in use. Registry credentials are in memory alone.
package template

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/sandbox"
)

// Status is where the newest build of a template stands. Part of the contract.
type Status string

// The statuses.
const (
	Pending  Status = "pending"
	Building Status = "building"
	Ready    Status = "ready"
	Failed   Status = "failed"
)

// Template is a template as its row has it.
type Template struct {
	ID          string // "tpl_" and 20 lower-case base32 characters
	OrgID       string // "" for the built-in ones, which belong to all
	Name        string // [a-z0-9][a-z0-9-]{0,62}
	Description string

	Status     Status
	Progress   string      // what a build is doing now, for people; "" when it is not building
	BuildError *BuildError // of the newest build; nil when it did not fail
	BuildID    string      // names the newest build and its log; "" when none was started or asked for
	Tries      int         // how often it was started: a crash may have interrupted it
	QueuedAt   time.Time   // when it was asked for; zero when it is over, or none was

	// Version counts ready versions up from 1; 0 is none yet. Image, Source and what
	// sandboxes get belong to it and stay when a later build fails.
	Version   int
	Image     string // content hash (hex SHA-256) of the EROFS file
	ImageSize int64  // bytes
	Source    string // what the image was made from, e.g. "debian:bookworm" or "docker.io/library/python:3.13-slim@sha256:…"
	Inputs    string // names the definition and context that Image was made from; others are a reason to build

	Env     map[string]string
	Workdir string
	User    string
	Start   sandbox.Start
	Size    string // "" is the configured default
	DiskMB  int    // 0 is the configured default
	Egress  sandbox.Egress

	CreatedAt time.Time
	UpdatedAt time.Time
	BuiltAt   time.Time // of Version
}

// Builtin reports whether the template belongs to all organizations.
func (t Template) Builtin() bool { return t.OrgID == "" }

// Queued reports whether a build of it waits or runs.
func (t Template) Queued() bool { return !t.QueuedAt.IsZero() }

// usable reports whether sandboxes can be made from it.
func (t Template) usable() bool { return t.Version > 0 && t.Image != "" }

// Build is what the newest build of a template is made from. Built-in templates have
// none: theirs is the definition.
type Build struct {
	Definition Definition
	Context    string // name of the context in [Contexts]; "" is none
	Refresh    bool   // inputs that change by themselves (tags, suites) are looked up anew
	Private    bool   // it was given credentials, which are in memory alone
}

// Credentials open a registry. They are never written down.
type Credentials struct {
	Registry string // host and port; "" is that of the definition's image
	Username string
	Password string
}

// BuildError says why a build failed. A [Builder]'s errors are of this type where a
// step failed.
type BuildError struct {
	Step     string   `json:"step,omitempty"` // what was being done
	ExitCode int      `json:"exit_code"`      // of the program that did it; -1 if none, or killed
	Tail     []string `json:"tail,omitempty"` // its last lines
	Message  string   `json:"message"`
}

// Error is the whole story, for people.
func (e *BuildError) Error() string {
	s := e.Message
	if e.Step != "" {
		s = e.Step + ": " + s
	}
	return strings.Join(append([]string{s}, e.Tail...), "\n")
}

// Short is the story without the output, in one line.
func (e *BuildError) Short() string {
	s, _, _ := strings.Cut((&BuildError{Step: e.Step, Message: e.Message}).Error(), "\n")
	return s
}

// LogLine is one line of the newest build's log.
type LogLine struct {
	Seq     int64 // counts up from 1 in each build
	At      time.Time
	Step    int  // which step of the build it belongs to; 0 is none in particular
	Heading bool // it says what the step is
	Text    string
}

// LogChange is what is written to a log at once: first lines are dropped, then others
// written under their numbers, which may be those of dropped ones.
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
	// InsertTemplate adds a template and what its first build is made from, if that is
	// not nil. A name that another template of the organization has is Conflict, code
	// "template_exists"; an organization that has limit templates already, Exhausted,
	// code "quota_exceeded". Limit 0 is none.
	InsertTemplate(ctx context.Context, t Template, b *Build, limit int) error
	// UpdateTemplate reads a template by ID, lets change decide what becomes of it, and
	// writes it, together with b if that is not nil. An error of change is returned as
	// it is and nothing is written. Another BuildID than before starts the log anew.
	// NotFound, code "template_not_found".
	UpdateTemplate(ctx context.Context, id string, b *Build, change func(*Template) error) (Template, error)
	// GetTemplate finds by ID or by name, the organization's own before the built-in
	// ones; NotFound, code "template_not_found".
	GetTemplate(ctx context.Context, orgID, nameOrID string) (Template, error)
	// GetBuild returns what the template's newest build is made from; NotFound, code
	// "template_not_found", also for a template that has none.
	GetBuild(ctx context.Context, id string) (Build, error)
	// DeleteTemplate removes a template, its build and its log. While sandboxes of it
	// are not over it is Conflict, code "template_in_use", unless force. NotFound, code
	// "template_not_found".
	DeleteTemplate(ctx context.Context, id string, force bool) error
	// ListTemplates pages the organization's and the built-in templates, newest first.
	ListTemplates(ctx context.Context, orgID string, limit int, cursor string) ([]Template, string, error)
	// QueuedTemplates lists the templates of which a build waits or runs, the one that
	// was asked for first before the others.
	QueuedTemplates(ctx context.Context) ([]Template, error)
	// TemplatesWithImage lists the templates whose version has the image.
	TemplatesWithImage(ctx context.Context, image string) ([]Template, error)
	// TemplateImages lists the image of every template version that new
	// sandboxes may be made from.
	TemplateImages(ctx context.Context) ([]string, error)
	// TemplateContexts lists the contexts that an organization's builds are made from; "" is
	// those of all.
	TemplateContexts(ctx context.Context, orgID string) ([]string, error)
	// ChangeTemplateLog writes to the log of a template's newest build; NotFound, code
	// "template_not_found".
	ChangeTemplateLog(ctx context.Context, id string, c LogChange) error
	// TemplateLog returns up to limit lines of the newest build's log that come after
	// the number, the first ones first.
	TemplateLog(ctx context.Context, id string, after int64, limit int) ([]LogLine, error)
}

// Contexts keeps build contexts by what is in them.
type Contexts interface {
	// Put stores what r gives, up to limit bytes: TooLarge if it is more, NoSpace if the
	// disk is full. An error of r comes back wrapped.
	Put(ctx context.Context, r io.Reader, limit int64) (hash string, size int64, err error)
	// Path is the file of a context; an error if it is not there.
	Path(hash string) (string, error)
	// Size is how many bytes a context has; an error if it is not there.
	Size(hash string) (int64, error)
	// Collect removes the contexts that are not in keep and were not put lately. It
	// goes on after errors and joins them.
	Collect(keep []string) (removed []string, freed int64, err error)
}
