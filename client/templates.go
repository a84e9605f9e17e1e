package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"mime/multipart"
	"net/http"
	"net/textproto"
)

// ListTemplates returns a page of templates, newest first.
func (c *Client) ListTemplates(ctx context.Context, o ListOptions) (*TemplateList, error) {
	var p ListTemplatesParams
	p.Limit, p.Cursor = o.params()
	return decode[TemplateList](c.wire.ListTemplates(ctx, &p))
}

// Templates walks all templates and ends after the first error.
func (c *Client) Templates(ctx context.Context, o ListOptions) iter.Seq2[Template, error] {
	return all(o, func(page ListOptions) ([]Template, *string, error) {
		l, err := c.ListTemplates(ctx, page)
		if err != nil {
			return nil, nil, err
		}
		return l.Templates, l.NextCursor, nil
	})
}

// GetTemplate returns a template by name or id.
func (c *Client) GetTemplate(ctx context.Context, nameOrID string) (*Template, error) {
	return decode[Template](c.wire.GetTemplate(ctx, nameOrID))
}

// TemplateLogs returns the log of a template's newest build, oldest line first.
func (c *Client) TemplateLogs(ctx context.Context, nameOrID string) ([]TemplateLogLine, error) {
	l, err := decode[TemplateLogs](c.wire.GetTemplateLogs(ctx, nameOrID, nil))
	if err != nil {
		return nil, err
	}
	return l.Lines, nil
}

// CreateTemplate has a template built and returns at once. source is the build context,
// a tar, plain or compressed with gzip, that is streamed to the server; nil is none. It
// is not closed.
func (c *Client) CreateTemplate(ctx context.Context, r CreateTemplateRequest, source io.Reader) (*Template, error) {
	if source == nil {
		return decode[Template](c.wire.CreateTemplate(ctx, r))
	}
	contentType, body, err := withContext(r, source)
	if err != nil {
		return nil, err
	}
	return decode[Template](c.wire.CreateTemplateWithBody(ctx, contentType, body, askFirst))
}

// RebuildTemplate has a template built again and returns at once: from the same inputs if
// r is nil or has only credentials, else from those of r and source, as in
// [Client.CreateTemplate].
func (c *Client) RebuildTemplate(ctx context.Context, nameOrID string, r *RebuildTemplateRequest, source io.Reader) (*Template, error) {
	switch {
	case r == nil && source != nil:
		return nil, errors.New("rebuilding from a context: a request must say what to make of it")
	case r == nil:
		return decode[Template](c.wire.RebuildTemplateWithBody(ctx, nameOrID, "application/json", http.NoBody))
	case source == nil:
		return decode[Template](c.wire.RebuildTemplate(ctx, nameOrID, *r))
	}
	contentType, body, err := withContext(r, source)
	if err != nil {
		return nil, err
	}
	return decode[Template](c.wire.RebuildTemplateWithBody(ctx, nameOrID, contentType, body, askFirst))
}

// withContext is a body of two parts.
func withContext(r any, source io.Reader) (contentType string, body io.Reader, err error) {
	var head bytes.Buffer
	w := multipart.NewWriter(&head)
	part, err := w.CreatePart(textproto.MIMEHeader{"Content-Disposition": {`form-data; name="template"`}, "Content-Type": {"application/json"}})
	if err == nil {
		err = json.NewEncoder(part).Encode(r)
	}
	if err == nil {
		_, err = w.CreatePart(textproto.MIMEHeader{"Content-Disposition": {`form-data; name="context"; filename="context.tar"`}, "Content-Type": {"application/x-tar"}})
	}
	if err != nil {
		return "", nil, fmt.Errorf("encoding the request: %w", err)
	}
	// The end of the body is written after what was streamed in between.
	begin := bytes.Clone(head.Bytes())
	head.Reset()
	if err := w.Close(); err != nil {
		return "", nil, fmt.Errorf("encoding the request: %w", err)
	}
	return w.FormDataContentType(), io.MultiReader(bytes.NewReader(begin), source, bytes.NewReader(head.Bytes())), nil
}

// askFirst saves sending a context for a request that is refused.
func askFirst(_ context.Context, r *http.Request) error {
	r.Header.Set("Expect", "100-continue")
	return nil
}

// CancelTemplateBuild ends the build of a template that waits or runs.
func (c *Client) CancelTemplateBuild(ctx context.Context, nameOrID string) (*Template, error) {
	return decode[Template](c.wire.CancelTemplateBuild(ctx, nameOrID))
}

// DeleteTemplate deletes a template; with force also while there are sandboxes of it,
// which go on.
func (c *Client) DeleteTemplate(ctx context.Context, nameOrID string, force bool) error {
	p := DeleteTemplateParams{}
	if force {
		p.Force = &force
	}
	return done(c.wire.DeleteTemplate(ctx, nameOrID, &p))
}

// maxEvent bounds an event of a log, bytes: a line has at most 4000 characters, the
// template at the end an environment of 128 KiB.
const maxEvent = 4 << 20

// FollowTemplate hands the lines of the newest build's log to emit as they are written,
// those that are there first, and returns the template when the build is over. id names a
// line; after is the id of the last one that is not wanted again, "" is all. A stream that
// breaks off is an [io.ErrUnexpectedEOF]: follow again after the last id. An error of emit
// ends it.
func (c *Client) FollowTemplate(ctx context.Context, nameOrID, after string, emit func(id string, line TemplateLogLine) error) (*Template, error) {
	p := GetTemplateLogsParams{}
	if after != "" {
		p.LastEventID = &after
	}
	resp, err := open(c.wire.GetTemplateLogs(ctx, nameOrID, &p, acceptEvents))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	t := new(Template)
	err = readEvents(resp.Body, maxEvent, func(id, event string, data []byte) error {
		switch event {
		case "line":
			var line TemplateLogLine
			if err := json.Unmarshal(data, &line); err != nil {
				return fmt.Errorf("decoding a line of the log: %w", err)
			}
			return emit(id, line)
		case "end":
			if err := json.Unmarshal(data, t); err != nil {
				return fmt.Errorf("decoding the template: %w", err)
			}
			return errLast
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("following the log: %w", err)
	}
	return t, nil
}
