package template

import (
	"context"
	"fmt"
)

// ReadStore has the part of [Store] that is read in any process.
type ReadStore interface {
	GetTemplate(ctx context.Context, orgID, nameOrID string) (Template, error)
	ListTemplates(ctx context.Context, orgID string, limit int, cursor string) ([]Template, string, error)
	Tags(ctx context.Context, id string) ([]Tag, error)
	TemplateLog(ctx context.Context, id string, after int64, limit int) ([]LogLine, error)
	TemplateLogRest(ctx context.Context, id string, skip, limit int) ([]LogLine, error)
}

// Reader answers what the rows of templates alone can answer, in any process of the cluster. A [Service] is one too.
// Reader is safe for concurrent use.
type Reader struct{ rows ReadStore }

// NewReader returns a Reader.
func NewReader(store ReadStore) *Reader { return &Reader{store} }

// Get returns a template that the organization may use, or NotFound, code "template_not_found".
func (r *Reader) Get(ctx context.Context, orgID, nameOrID string) (Template, error) {
	return r.rows.GetTemplate(ctx, orgID, nameOrID)
}

// List returns a page of the templates that the organization may use, newest first.
func (r *Reader) List(ctx context.Context, orgID string, limit int, cursor string) ([]Template, string, error) {
	return r.rows.ListTemplates(ctx, orgID, limit, cursor)
}

// Tags returns the tags of a template that the organization may use, and the template.
func (r *Reader) Tags(ctx context.Context, orgID, nameOrID string) (Template, []Tag, error) {
	t, err := r.rows.GetTemplate(ctx, orgID, nameOrID)
	if err != nil {
		return Template{}, nil, err
	}
	tags, err := r.rows.Tags(ctx, t.ID)
	return t, tags, err
}

// logPage is the number of lines of a log read at once: one answer of a few hundred KB.
const logPage = 2000

// Log returns the log of a template's newest build, oldest line first.
func (r *Reader) Log(ctx context.Context, orgID, nameOrID string) ([]LogLine, error) {
	t, err := r.rows.GetTemplate(ctx, orgID, nameOrID)
	if err != nil {
		return nil, err
	}
	return r.readLog(ctx, t.ID)
}

// readLog returns the log of a template's newest build.
func (r *Reader) readLog(ctx context.Context, id string) ([]LogLine, error) {
	var all []LogLine
	for after := int64(0); ; after = all[len(all)-1].Seq {
		lines, err := r.rows.TemplateLog(ctx, id, after, logPage)
		if err != nil {
			return nil, fmt.Errorf("reading the log of template %s: %w", id, err)
		}
		if all = append(all, lines...); len(lines) < logPage {
			return all, nil
		}
	}
}

// LogRest returns up to limit lines of the log of a template's newest build, oldest line first,
// without its first skip lines. Lines that were dropped do not count.
func (r *Reader) LogRest(ctx context.Context, templateID string, skip, limit int) ([]LogLine, error) {
	return r.rows.TemplateLogRest(ctx, templateID, max(skip, 0), limit)
}
