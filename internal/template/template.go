// Package template is what a template is: a name for a root file system and the
// defaults of the sandboxes made from it, in versions that are built, become
// ready and are replaced.
//
// It owns the build states and the background builds of the built-in templates.
// How an image is made is the image room's business, reached through [Builder];
// rows are kept by a [Store]. A [Service] is safe for concurrent use; builds run
// one at a time. A build that a crash interrupted is started again by the next
// start; a failed one leaves the last ready version in use.
package template

import (
	"context"
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
	Progress   string // what a build is doing now, for people; "" when it is not building
	BuildError string // of the newest build
	// Version counts ready versions up from 1; 0 is none yet. Image and Source
	// belong to it and stay when a later build fails.
	Version   int
	Image     string // content hash (hex SHA-256) of the EROFS file
	ImageSize int64  // bytes
	Source    string // what the image was made from, e.g. "debian:bookworm" or "docker.io/library/python:3.13-slim@sha256:…"
	Inputs    string // names the definition that Image was made from; another one is a reason to build

	Env          map[string]string
	Workdir      string
	User         string
	StartCommand string
	Size         string // "" is the configured default
	DiskMB       int    // 0 is the configured default
	Egress       sandbox.Egress

	CreatedAt time.Time
	UpdatedAt time.Time
	BuiltAt   time.Time // of Version
}

// Builtin reports whether the template belongs to all organizations.
func (t Template) Builtin() bool { return t.OrgID == "" }

// LogLine is one line of the newest build's log.
type LogLine struct {
	At   time.Time
	Text string
}

// Store keeps templates. Every method is atomic and durable when it returns.
type Store interface {
	// PutTemplate inserts or replaces by ID.
	PutTemplate(ctx context.Context, t Template) error
	// GetTemplate finds by ID or by name, the organization's own before the built-in
	// ones; NotFound, code "template_not_found".
	GetTemplate(ctx context.Context, orgID, nameOrID string) (Template, error)
	// ListTemplates pages the organization's and the built-in templates, newest first.
	ListTemplates(ctx context.Context, orgID string, limit int, cursor string) ([]Template, string, error)
	// TemplateImages lists the image of every template version that new
	// sandboxes may be made from.
	TemplateImages(ctx context.Context) ([]string, error)
	// AppendTemplateLog adds lines to a template's build log; with reset it
	// starts the log anew first.
	AppendTemplateLog(ctx context.Context, id string, reset bool, lines []LogLine) error
	// TemplateLog returns the log of the newest build, oldest line first.
	TemplateLog(ctx context.Context, id string) ([]LogLine, error)
}
