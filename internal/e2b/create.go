package e2b

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// createBody is E2B's NewSandbox.
type createBody struct {
	TemplateID          string            `json:"templateID"`
	Metadata            map[string]string `json:"metadata"`
	EnvVars             map[string]string `json:"envVars"`
	Timeout             *int64            `json:"timeout"` // seconds
	Secure              *bool             `json:"secure"`
	AllowInternetAccess *bool             `json:"allow_internet_access"`
	Network             *networkBody      `json:"network"`
	AutoPause           *bool             `json:"autoPause"`
	AutoPauseMemory     *bool             `json:"autoPauseMemory"`
	AutoResume          *struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
	// MCP is for E2B's gateway, which the client starts itself once the sandbox runs.
	MCP          json.RawMessage   `json:"mcp"`
	IAM          json.RawMessage   `json:"iam"`
	VolumeMounts []json.RawMessage `json:"volumeMounts"`
}

// version holds the defaults of one of the two create paths.
type version struct {
	timeout time.Duration
	secure  bool
}

var (
	createV1 = version{timeout: 15 * time.Second}
	createV2 = version{timeout: 5 * time.Minute, secure: true}
)

// defaultTemplate is used when a create names no template.
const defaultTemplate = "base"

// aliases maps E2B's names of templates to cay's.
var aliases = map[string]string{"code-interpreter-v1": "code-interpreter"}

// createTimeout bounds a create. The client waits 60 s for an answer; a longer create would leave
// a sandbox that no client knows.
const createTimeout = 58 * time.Second

// create answers POST /sandboxes.
func (s *Handler) create(v version) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		var in createBody
		if err := read(w, r, &in); err != nil {
			return err
		}
		request, err := requestOf(in, v)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(r.Context(), createTimeout)
		defer cancel()
		sb, err := s.make(ctx, caller(r), request)
		if err != nil {
			return createError(err)
		}
		callOf(r).names(sb.ID)
		s.Samples.Follow(sb.ID, sb.OrgID)
		reply(w, r, http.StatusCreated, s.sandboxOf(sb))
		return nil
	}
}

// createError renames the fields of the core's errors to this API's.
func createError(err error) error {
	f := fault.As(err)
	if f == nil || f.Field == "" {
		return err
	}
	named := f.Because(err)
	if rest, ok := strings.CutPrefix(f.Field, "env"); ok {
		named.Field = "envVars" + rest
	}
	return named
}

// make makes a sandbox from a template, or else from the snapshot of the name: in this API snapshots
// are templates too.
func (s *Handler) make(ctx context.Context, c sandbox.Caller, request sandbox.Request) (sandbox.Sandbox, error) {
	name := request.Template
	request.Template = strings.ToLower(name) // as in E2B; names of snapshots may have capitals
	sb, err := s.Sandboxes.Create(ctx, c, request, sandbox.Once{}, true)
	if f := fault.As(err); f == nil || f.Code != fault.CodeTemplateNotFound {
		return sb, err
	}
	request.Snapshot, request.Template = name, ""
	sb, noSnapshot := s.Sandboxes.Create(ctx, c, request, sandbox.Once{}, true)
	if f := fault.As(noSnapshot); f != nil && f.Code == fault.CodeSnapshotNotFound {
		return sb, err
	}
	return sb, noSnapshot
}

// requestOf translates a create for the core.
func requestOf(in createBody, v version) (sandbox.Request, error) {
	out := sandbox.Request{Metadata: in.Metadata, Env: in.EnvVars}
	if err := refuse(in); err != nil {
		return out, err
	}
	timeout := v.timeout
	if in.Timeout != nil {
		timeout = seconds(*in.Timeout)
	}
	if err := tooLong(timeout); err != nil {
		return out, err
	}
	if timeout < sandbox.MinTimeout {
		return out, fault.InvalidField("timeout", "must be at least %d second", sandbox.MinTimeout/time.Second)
	}
	out.Timeout = &timeout
	if in.AutoPause != nil && *in.AutoPause {
		out.AtEnd = sandbox.EndSuspends
		if in.AutoPauseMemory != nil && !*in.AutoPauseMemory {
			out.AtEnd = sandbox.EndSuspendsFiles
		}
	}
	opts := options{Made: true, Secure: v.secure, Internet: in.AllowInternetAccess, Network: in.Network}
	if in.Secure != nil {
		opts.Secure = *in.Secure
	}
	opts.AutoWake = in.AutoResume != nil && in.AutoResume.Enabled
	var err error
	if out.Egress, err = egress(in.AllowInternetAccess, in.Network); err != nil {
		return out, err
	}
	out.FrontData = opts.String()
	name, tag := templateRef(in.TemplateID)
	if out.Template = name; tag != "" {
		out.Template += ":" + tag
	}
	out.BuiltinUser = defaultUser
	return out, nil
}

// defaultUser is the user that commands run as in E2B's templates, as its clients expect. All
// built-in templates have it; those that an organization brought may have none of that name.
const defaultUser = "user"

// getTemplate returns a template by its name or id. Case does not matter, as in E2B.
func (s *Handler) getTemplate(ctx context.Context, org, nameOrID string) (template.Template, error) {
	return s.TemplateRows.Get(ctx, org, strings.ToLower(nameOrID))
}

// templateRef returns the core's name or id for a reference of this API, and its tag; "" is the default
// version.
func templateRef(ref string) (name, tag string) {
	if ref == "" {
		ref = defaultTemplate
	}
	name, tag, _ = strings.Cut(ref, ":")
	if tag == template.DefaultTag {
		tag = ""
	}
	if alias, ok := aliases[name]; ok {
		name = alias
	}
	return name, tag
}

// templateName returns the core's name or id for a reference where a tag means nothing.
func templateName(ref string) (string, error) {
	name, tag := templateRef(ref)
	if tag != "" && tag != template.LatestTag {
		return "", fault.New(fault.NotFound, fault.CodeTemplateNotFound,
			"template %q was not found: it cannot have a tag here",
			ref)
	}
	return name, nil
}

// refuse returns an error if a request asks for something that this server does not have.
func refuse(in createBody) error {
	switch {
	case len(in.IAM) > 0 && string(in.IAM) != "null":
		return fault.InField(fault.CodeUnsupported, "iam", "this server issues no identity tokens")
	case len(in.VolumeMounts) > 0:
		return fault.InField(fault.CodeUnsupported, "volumeMounts", "this server has no volumes")
	case in.AutoPauseMemory != nil && !*in.AutoPauseMemory && in.AutoResume != nil && in.AutoResume.Enabled:
		return fault.InvalidField("autoResume", "cannot be enabled with autoPauseMemory false: traffic wakes no sandbox "+
			"that was paused without memory")
	}
	return nil
}
