package cay

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
	var p listTemplatesParams
	p.Limit, p.Cursor = o.params()
	return decode[TemplateList](c.wire.ListTemplates(ctx, &p))
}

// Templates returns an iterator over all templates, which ends after the first error.
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
	l, err := decode[templateLogs](c.wire.GetTemplateLogs(ctx, nameOrID, nil))
	if err != nil {
		return nil, err
	}
	return l.Lines, nil
}

// CreateTemplate makes the server build a template, and returns once the server has taken the
// request. source is the build context, a tar archive, plain or compressed with gzip, that is
// streamed to the server; nil is none. CreateTemplate does not close it.
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

// RebuildTemplate makes the server build a template again, and returns once the server has taken
// the request. The build has the same inputs if r is nil or has only credentials, else those of r
// and source, as in [Client.CreateTemplate].
func (c *Client) RebuildTemplate(ctx context.Context, nameOrID string, r *RebuildTemplateRequest,
	source io.Reader) (*Template, error) {
	switch {
	case r == nil && source != nil:
		return nil, errors.New("rebuilding from a context: a request must say how to build it")
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

// withContext returns a multipart body of a request and its build context.
func withContext(r any, source io.Reader) (contentType string, body io.Reader, err error) {
	var head bytes.Buffer
	w := multipart.NewWriter(&head)
	part, err := w.CreatePart(textproto.MIMEHeader{
		"Content-Disposition": {`form-data; name="template"`},
		"Content-Type":        {"application/json"},
	})
	if err == nil {
		err = json.NewEncoder(part).Encode(r)
	}
	if err == nil {
		_, err = w.CreatePart(textproto.MIMEHeader{
			"Content-Disposition": {`form-data; name="context"; filename="context.tar"`},
			"Content-Type":        {"application/x-tar"},
		})
	}
	if err != nil {
		return "", nil, fmt.Errorf("encoding the request: %w", err)
	}
	// head then holds the end of the body, which follows the streamed context.
	begin := bytes.Clone(head.Bytes())
	head.Reset()
	if err := w.Close(); err != nil {
		return "", nil, fmt.Errorf("encoding the request: %w", err)
	}
	body = io.MultiReader(bytes.NewReader(begin), source, bytes.NewReader(head.Bytes()))
	return w.FormDataContentType(), body, nil
}

// askFirst makes a request ask the server before it sends its body, so that no context is sent
// for a request that is refused.
func askFirst(_ context.Context, r *http.Request) error {
	r.Header.Set("Expect", "100-continue")
	return nil
}

// CancelTemplateBuild ends the waiting or running build of a template.
func (c *Client) CancelTemplateBuild(ctx context.Context, nameOrID string) (*Template, error) {
	return decode[Template](c.wire.CancelTemplateBuild(ctx, nameOrID))
}

// DeleteTemplate deletes a template. With force it also deletes one that has sandboxes; they
// go on.
func (c *Client) DeleteTemplate(ctx context.Context, nameOrID string, force bool) error {
	p := deleteTemplateParams{}
	if force {
		p.Force = &force
	}
	return done(c.wire.DeleteTemplate(ctx, nameOrID, &p))
}

// maxEvent limits an event of a log, bytes. A line has at most 4000 characters, and the
// template at the end an environment of 128 KiB; a lower limit might refuse that.
const maxEvent = 4 << 20

// FollowTemplate calls emit with the lines of the newest build's log, first with those that are
// there, then as they are written, and returns the template when the build is over. id names a
// line. after is the id of the line after which to begin, "" for all. If the stream breaks off,
// FollowTemplate returns [io.ErrUnexpectedEOF]; a call with the last id as after then continues. An
// error of emit ends FollowTemplate.
func (c *Client) FollowTemplate(ctx context.Context, nameOrID, after string,
	emit func(id string, line TemplateLogLine) error) (*Template, error) {
	p := getTemplateLogsParams{}
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
