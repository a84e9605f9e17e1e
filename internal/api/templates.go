package api

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// ListTemplates answers GET /v1/templates.
func (s *server) ListTemplates(w http.ResponseWriter, r *http.Request, params ListTemplatesParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	answerList(s, w, r, "templates", limit, cursor, func(limit int, cursor string) ([]template.Template, string, error) {
		return s.TemplateRows.List(r.Context(), callOf(r).Who.Org.ID, limit, cursor)
	}, templateOf)
}

// GetTemplate answers GET /v1/templates/{template}.
func (s *server) GetTemplate(w http.ResponseWriter, r *http.Request, ref TemplateRef) {
	t, err := s.TemplateRows.Get(r.Context(), callOf(r).Who.Org.ID, ref)
	s.answerTemplate(w, r, http.StatusOK, t, err)
}

func (s *server) answerTemplate(w http.ResponseWriter, r *http.Request, status int, t template.Template, err error) {
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, status, templateOf(t))
}

// builderOf returns the caller of a request as the template room represents it.
func builderOf(r *http.Request) template.Caller {
	who := callOf(r).Who
	return template.Caller{OrgID: who.Org.ID, Operator: who.Org.Name == auth.OperatorOrg && who.May(auth.Admin)}
}

// CreateTemplate answers POST /v1/templates.
func (s *server) CreateTemplate(w http.ResponseWriter, r *http.Request) {
	var in CreateTemplateRequest
	source, _, err := readParts(w, r, true, &in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	request, err := templateRequestOf(in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	t, err := s.Templates.Create(r.Context(), builderOf(r), request, source)
	if err == nil {
		w.Header().Set("Location", "/v1/templates/"+t.ID)
	}
	s.answerTemplate(w, r, http.StatusAccepted, t, err)
}

// RebuildTemplate answers POST /v1/templates/{template}/rebuild.
func (s *server) RebuildTemplate(w http.ResponseWriter, r *http.Request, ref TemplateRef) {
	var in RebuildTemplateRequest
	source, given, err := readParts(w, r, false, &in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	var request *template.Request
	if given {
		parsed, err := templateRequestOf(CreateTemplateRequest{
			Description: in.Description, Image: in.Image, Dockerfile: in.Dockerfile, Debian: in.Debian,
			BuildArgs: in.BuildArgs, Target: in.Target, Credentials: in.Credentials,
			Env: in.Env, Workdir: in.Workdir, User: in.User, StartCommand: in.StartCommand,
			Ready: in.Ready, Size: in.Size, DiskSizeMB: in.DiskSizeMB,
		})
		if err != nil {
			s.fail(w, r, err)
			return
		}
		request = &parsed
	}
	t, err := s.Templates.Rebuild(r.Context(), builderOf(r), ref, request, source)
	s.answerTemplate(w, r, http.StatusAccepted, t, err)
}

// CancelTemplateBuild answers POST /v1/templates/{template}/cancel.
func (s *server) CancelTemplateBuild(w http.ResponseWriter, r *http.Request, ref TemplateRef) {
	if _, err := read(w, r, maxBody, false, &nothing{}); err != nil {
		s.fail(w, r, err)
		return
	}
	t, err := s.Templates.Cancel(r.Context(), builderOf(r), ref)
	s.answerTemplate(w, r, http.StatusOK, t, err)
}

// DeleteTemplate answers DELETE /v1/templates/{template}.
func (s *server) DeleteTemplate(w http.ResponseWriter, r *http.Request, ref TemplateRef, params DeleteTemplateParams) {
	force := params.Force != nil && *params.Force
	if err := s.Templates.Delete(r.Context(), builderOf(r), ref, force); err != nil {
		s.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// readParts decodes the JSON of a template into dst, from the body or from its part "template". It
// returns the part "context", or nil if there is none. given reports whether the JSON was present
// and not an empty object.
func readParts(w http.ResponseWriter, r *http.Request, required bool,
	dst any) (source io.Reader, given bool, err error) {
	media, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || media != "multipart/form-data" {
		b, err := read(w, r, maxBody, required, dst)
		return nil, len(strings.Trim(string(b), "{} \t\r\n")) > 0, err
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return nil, false, errNotJSON{"the body is encoded; send it as it is"}
	}
	if params["boundary"] == "" {
		return nil, false, errNotJSON{"multipart/form-data needs a boundary"}
	}
	callOf(r).Body.Piecewise(callOf(r).Patience.Stall)
	parts := multipart.NewReader(r.Body, params["boundary"])
	part, err := nextPart(parts, "template")
	if err != nil {
		return nil, false, err
	}
	if part == nil {
		return nil, false, fault.InvalidField("template", "must be the first part")
	}
	b, err := io.ReadAll(io.LimitReader(part, maxBody+1))
	if err != nil {
		return nil, false, partError(err)
	}
	if len(b) > maxBody {
		return nil, false, httpserver.TooLarge(maxBody)
	}
	if err := decode(b, dst); err != nil {
		return nil, false, err
	}
	part, err = nextPart(parts, "context")
	if part == nil || err != nil {
		return nil, true, err
	}
	return &contextPart{part: part, parts: parts}, true, nil
}

// nextPart returns the next part, or nil after the last one. It refuses a part with another name.
func nextPart(parts *multipart.Reader, name string) (*multipart.Part, error) {
	part, err := parts.NextRawPart()
	switch {
	case err == io.EOF:
		return nil, nil
	case err != nil:
		return nil, partError(err)
	case part.FormName() != name:
		return nil, fault.InField(fault.CodeUnknownField, part.FormName(),
			"is not expected here: the parts are template, then context")
	}
	return part, nil
}

// partError turns an error of reading a multipart body into a fault.
func partError(err error) error {
	if fault.As(err) != nil {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return httpserver.Incomplete(err)
	}
	return fault.New(fault.Invalid, fault.CodeInvalidMultipart, "the body is not valid multipart/form-data").Because(err)
}

// contextPart reads the last part and refuses any part after it.
type contextPart struct {
	part  *multipart.Part
	parts *multipart.Reader
}

func (c *contextPart) Read(p []byte) (int, error) {
	n, err := c.part.Read(p)
	switch {
	case err == io.EOF:
		if next, after := nextPart(c.parts, ""); after != nil {
			err = after
		} else if next != nil {
			err = fault.New(fault.Invalid, fault.CodeInvalidMultipart, "there is a part after the context")
		}
	case err != nil:
		err = partError(err)
	}
	return n, err
}

func templateRequestOf(in CreateTemplateRequest) (template.Request, error) {
	text := func(p *string) string {
		if p == nil {
			return ""
		}
		return *p
	}
	out := template.Request{Definition: template.Definition{
		Name: in.Name, Description: text(in.Description), Env: in.Env, Workdir: text(in.Workdir), User: text(in.User), StartCommand: in.StartCommand,
		Size: text(in.Size), Image: text(in.Image), Dockerfile: text(in.Dockerfile), BuildArgs: in.BuildArgs, Target: text(in.Target)}}
	if in.Size != nil && *in.Size == "" {
		return out, fault.InvalidField("size", "must be one of the sizes in GET /v1/sizes, not empty")
	}
	if in.DiskSizeMB != nil {
		if out.DiskMB = *in.DiskSizeMB; out.DiskMB == 0 {
			out.DiskMB = -1 // the core takes 0 as absent
		}
	}
	if in.Debian != nil {
		out.Debian = &template.Debian{Suite: text(in.Debian.Suite), Packages: in.Debian.Packages}
	}
	if c := in.Credentials; c != nil {
		out.Credentials = &template.Credentials{Registry: text(c.Registry), Username: c.Username, Password: c.Password}
	}
	if in.Ready != nil {
		timeout, err := duration("timeout", in.Ready.Timeout)
		if err != nil {
			return out, fault.InvalidField("ready.timeout", "%s", fault.As(err).Detail)
		}
		out.Ready = &sandbox.Ready{Command: text(in.Ready.Command)}
		if in.Ready.Port != nil {
			out.Ready.Port = *in.Ready.Port
		}
		if in.Ready.HTTP != nil {
			out.Ready.HTTP = &sandbox.ReadyHTTP{Port: in.Ready.HTTP.Port, Path: in.Ready.HTTP.Path}
		}
		if timeout != nil {
			if out.Ready.Timeout = *timeout; *timeout == 0 {
				out.Ready.Timeout = -1 // the core takes 0 as absent
			}
		}
	}
	if in.Egress != nil {
		e, err := policyOf(*in.Egress)
		if err != nil {
			return out, err
		}
		out.Egress = &e
	}
	return out, nil
}

// GetTemplateLogs answers GET /v1/templates/{template}/logs.
func (s *server) GetTemplateLogs(w http.ResponseWriter, r *http.Request, ref TemplateRef,
	params GetTemplateLogsParams) {
	if httpserver.WantsEvents(r) {
		s.followTemplate(w, r, ref, params.LastEventID)
		return
	}
	lines, err := s.TemplateRows.Log(r.Context(), callOf(r).Who.Org.ID, ref)
	if err == nil {
		err = callOf(r).Account.Take(sizeOfLines(lines))
	}
	reply := newListReply(w, "lines")
	for i := 0; err == nil && i < len(lines); i++ {
		var item []byte
		if item, err = encode(logLineOf(lines[i])); err == nil {
			err = reply.add(item)
		}
	}
	if err == nil {
		err = reply.end("")
	}
	if err != nil {
		s.broken(reply, w, r, err)
	}
}

// sizeOfLines returns the approximate memory that lines of a log take, in bytes.
func sizeOfLines(lines []template.LogLine) int64 {
	const lineCost = 128
	size := int64(0)
	for _, l := range lines {
		size += lineCost + int64(len(l.Text))
	}
	return size
}

// followTemplate streams the log of a build while it is written.
func (s *server) followTemplate(w http.ResponseWriter, r *http.Request, ref TemplateRef, last *string) {
	build, seq, err := parseEventID(last)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	org := callOf(r).Who.Org.ID
	if _, err := s.TemplateRows.Get(r.Context(), org, ref); err != nil {
		s.fail(w, r, err) // a status can still be sent
		return
	}
	events := httpserver.NewEventStream(w, r)
	events.Begin()
	defer events.Close()
	account := &callOf(r).Account
	t, err := s.Templates.Follow(r.Context(), org, ref, build, seq, func(build string, lines []template.LogLine) error {
		held := sizeOfLines(lines)
		if err := account.Take(held); err != nil {
			return err
		}
		defer account.Give(held)
		var b strings.Builder
		for i, l := range lines {
			if err := httpserver.WriteEvent(&b, fmt.Sprintf("%s.%d", build, l.Seq), "line", logLineOf(l)); err != nil {
				return err
			}
			if b.Len() < piece && i < len(lines)-1 {
				continue
			}
			if err := events.Send(b.String()); err != nil {
				return err
			}
			b.Reset()
		}
		return nil
	})
	if err == nil {
		var b strings.Builder
		if err = httpserver.WriteEvent(&b, "", "end", templateOf(t)); err == nil {
			err = events.Send(b.String())
		}
	}
	if err != nil && r.Context().Err() != nil {
		callOf(r).Gone = true
	} else if err != nil && fault.As(err) == nil {
		callOf(r).Err = fmt.Errorf("following a build: %w", err)
	}
}

// parseEventID parses the id of an event: the build and the number of the line.
func parseEventID(text *string) (build string, seq int64, err error) {
	if text == nil || *text == "" {
		return "", 0, nil
	}
	const field = "Last-Event-ID"
	build, number, ok := strings.Cut(*text, ".")
	if seq, err = strconv.ParseInt(number, 10, 64); err != nil || !ok || seq < 0 || len(build) > 64 {
		return "", 0, fault.InvalidField(field, "is not the id of an event of this stream")
	}
	return build, seq, nil
}
