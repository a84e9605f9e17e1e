package template

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Caller identifies the caller of an operation.
type Caller struct {
	OrgID string
	// Operator reports whether the caller operates this machine, and so may have built-in
	// templates rebuilt, which all organizations use.
	Operator bool
}

// Create makes a template and queues its build; it does not wait for the build. It reads source,
// the build context or nil, to its end. Errors: Invalid with the field; Conflict, code
// "template_exists", for a name that is taken, also by a built-in template; Exhausted, code
// "quota_exceeded"; TooLarge, code "context_too_large"; NoSpace, code "disk_full".
func (s *Service) Create(ctx context.Context, c Caller, r Request, source io.Reader) (Template, error) {
	return s.create(ctx, c, r, source, newID(idPrefix), newID("bld_"))
}

// create is Create with the IDs of the template and of its build.
func (s *Service) create(ctx context.Context, c Caller, r Request, source io.Reader, id, build string) (Template,
	error) {
	if err := s.mayBuild(); err != nil {
		return Template{}, err
	}
	if err := r.check(s.cfg, source != nil); err != nil {
		return Template{}, err
	}
	taken := fault.New(fault.Conflict, fault.CodeTemplateExists, "there is a template %q already", r.Name)
	if s.definition(r.Name) != nil {
		return Template{}, taken
	}
	// Check before reading the context, which may be large.
	if _, err := s.store.GetTemplate(ctx, c.OrgID, r.Name); err == nil {
		return Template{}, taken
	} else if !fault.Is(err, fault.NotFound) {
		return Template{}, err
	}
	b := Build{Definition: r.Definition, Private: r.Credentials != nil}
	var err error
	if b.Context, err = s.putContext(ctx, c.OrgID, source, -1); err != nil {
		return Template{}, err
	}
	t := Template{ID: id, OrgID: c.OrgID, Name: r.Name, CreatedAt: now()}
	t.Egress.Mode = sandbox.AllowAll
	if r.Egress != nil {
		t.Egress = *r.Egress
	}
	b.Definition.describe(&t, Built{})
	t.begin(build)
	if err := s.store.InsertTemplate(ctx, t, &b, s.cfg.MaxTemplates); err != nil {
		return Template{}, err
	}
	s.ask(ctx, t, b, r.Credentials)
	return t, nil
}

// ask queues a build that is recorded.
func (s *Service) ask(ctx context.Context, t Template, b Build, secret *Credentials) {
	if secret != nil {
		s.mu.Lock()
		s.secrets[t.BuildID] = *secret
		s.mu.Unlock()
	}
	s.log.Info("template build requested", "template", t.Name, "org", t.OrgID, "build", t.BuildID)
	s.changed(t.ID)
	s.enqueue(context.WithoutCancel(ctx),
		order{template: t.ID, org: t.OrgID, name: t.Name, build: t.BuildID, key: s.key(t.OrgID, t.BuildID, b)})
}

// isGzip reports whether data that begins with head is compressed with gzip.
func isGzip(head []byte) bool { return bytes.HasPrefix(head, []byte("\x1f\x8b")) }

// isTar reports whether a file that begins with head can be a tar, plain or compressed.
func isTar(head []byte) bool {
	if isGzip(head) {
		return true
	}
	if len(head) < 512 {
		return false
	}
	// The header's checksum is computed with spaces in its own place; an empty tar is zeros.
	const at, length = 148, 8
	sum, said := int64(0), int64(0)
	for i, c := range head[:512] {
		switch {
		case i < at || i >= at+length:
			sum += int64(c)
		case c >= '0' && c <= '7':
			said = said*8 + int64(c-'0')
		}
	}
	return sum == 0 || sum+' '*length == said
}

// Rebuild queues a new build of a template; it does not wait for it. The last ready version is
// used until the new one is ready, and after a failure. Without a request (nil, or one with
// credentials only) it uses the same inputs, and looks up again those that change by themselves.
// With a request it uses the request's inputs, and does nothing if they are those of the ready
// version. It does not change what sandboxes may reach by default.
//
// Errors are those of Create, and: Conflict, code "build_in_progress", while another build of the
// template waits or runs; Denied, code "template_builtin", for a built-in template. Without a
// request, though, any caller may request the first build of a built-in template, and the
// operator any build.
func (s *Service) Rebuild(ctx context.Context, c Caller, nameOrID string, r *Request,
	source io.Reader) (Template, error) {
	if err := s.mayBuild(); err != nil {
		return Template{}, err
	}
	t, err := s.store.GetTemplate(ctx, c.OrgID, nameOrID)
	if err != nil {
		return Template{}, err
	}
	if t.Builtin() {
		if r != nil || source != nil || t.Version > 0 && !c.Operator {
			return Template{}, readOnly(t)
		}
		return s.rebuildBuiltin(ctx, t)
	}
	b, secret, err := s.newBuild(ctx, t, r, source)
	if err != nil {
		return Template{}, err
	}
	return s.renew(ctx, t, b, secret, newID("bld_"))
}

// renew queues a build of a template under an ID, unless the ready version or the waiting build has
// the same inputs.
func (s *Service) renew(ctx context.Context, t Template, b Build, secret *Credentials, id string) (Template, error) {
	for range renewals {
		out, err := s.renewOnce(ctx, t, b, secret, id)
		if !errors.Is(err, errSettled) {
			return out, err
		}
		// Another build was requested since t was read; which one decides what becomes of this.
		if t, err = s.store.GetTemplate(ctx, t.OrgID, t.ID); err != nil {
			return Template{}, err
		}
	}
	return Template{}, fault.New(fault.Conflict, fault.CodeBuildInProgress,
		"other builds of template %q are requested at the same moment: try again", t.Name)
}

// renewals is the number of times that a request for a build looks again at a template for which other
// builds are requested at the same moment. With fewer, a request could be refused that has no other in
// its way; more only serve clients that race against themselves.
const renewals = 8

// buildInProgress refuses a build because of another one that waits or runs.
func buildInProgress(t Template) error {
	return fault.New(fault.Conflict, fault.CodeBuildInProgress,
		"a build of template %q is %s: wait for it or cancel it", t.Name, t.Status)
}

// renewOnce is renew for the row as it was read. It returns errSettled if it has changed in a way that
// matters.
func (s *Service) renewOnce(ctx context.Context, t Template, b Build, secret *Credentials, id string) (Template,
	error) {
	if t.Queued() {
		prior, err := s.store.GetBuild(ctx, t.ID, t.BuildID)
		if fault.Is(err, fault.NotFound) {
			return Template{}, errSettled // or deleted, which the next look finds
		}
		if err != nil {
			return Template{}, err
		}
		if prior.sameRequest(b) && secret == nil {
			return t, nil // the waiting build is enough
		}
	} else if !b.Refresh && t.Status == Ready && t.Inputs == b.Definition.inputs(b.Context) {
		return s.tagReady(ctx, t, b.Definition.Tags)
	}
	t, err := s.store.UpdateTemplate(ctx, t.ID, &b, func(t *Template) error {
		if t.Queued() {
			return buildInProgress(*t)
		}
		s.drafts.replaced(*t)
		t.begin(id)
		return nil
	})
	if err != nil {
		return Template{}, err
	}
	s.ask(ctx, t, b, secret)
	return t, nil
}

func readOnly(t Template) error {
	return fault.New(fault.Denied, fault.CodeTemplateBuiltin,
		"template %q is built in and read-only; copy its definition to make one of your own", t.Name)
}

// newBuild returns the inputs of a rebuild.
func (s *Service) newBuild(ctx context.Context, t Template, r *Request, source io.Reader) (Build, *Credentials, error) {
	again := r == nil || r.onlyCredentials() && source == nil
	if again {
		b, err := s.store.GetBuild(ctx, t.ID, "")
		if err != nil {
			return Build{}, nil, err
		}
		b.Refresh, b.Private = true, r != nil && r.Credentials != nil
		if b.Repairs = ""; !b.Definition.TagsOnly {
			b.Definition.Tags = nil // they may name another version since
		}
		if !b.Private {
			return b, nil, nil
		}
		whole := Request{Definition: b.Definition, Credentials: r.Credentials}
		return b, r.Credentials, whole.checkCredentials()
	}
	if r.Egress != nil {
		return Build{}, nil, fault.InvalidField("egress", "is not changed by a rebuild: leave it out")
	}
	r.Name = t.Name
	if err := r.check(s.cfg, source != nil); err != nil {
		return Build{}, nil, err
	}
	hash, err := s.putContext(ctx, t.OrgID, source, -1)
	return Build{Definition: r.Definition, Context: hash, Private: r.Credentials != nil}, r.Credentials, err
}

// rebuildBuiltin queues a build of a built-in template.
func (s *Service) rebuildBuiltin(ctx context.Context, t Template) (Template, error) {
	if s.definition(t.Name) == nil {
		return Template{}, readOnly(t) // an older cay had it
	}
	t, err := s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
		if t.Status != Building {
			t.begin(t.BuildID)
		}
		return nil
	})
	if err != nil {
		return Template{}, err
	}
	s.mu.Lock()
	delete(s.retry.due, t.ID) // do not wait for the retry
	s.mu.Unlock()
	s.enqueue(ctx, builtinOrder(t))
	return t, nil
}

// Cancel ends the build of a template that waits or runs. The template has failed then, and its
// last ready version stays in use. A run that other templates share continues for them. If there
// is no build it gives Conflict, code "no_build"; for a built-in template Denied, code
// "template_builtin".
func (s *Service) Cancel(ctx context.Context, c Caller, nameOrID string) (Template, error) {
	return s.cancel(ctx, c, nameOrID, "it was cancelled")
}

// cancel is Cancel with a reason.
func (s *Service) cancel(ctx context.Context, c Caller, nameOrID, why string) (Template, error) {
	if err := s.mayBuild(); err != nil {
		return Template{}, err
	}
	t, err := s.store.GetTemplate(ctx, c.OrgID, nameOrID)
	if err != nil {
		return Template{}, err
	}
	if t.Builtin() {
		return Template{}, readOnly(t)
	}
	build := ""
	t, err = s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
		if !t.Queued() {
			return fault.New(fault.Conflict, fault.CodeNoBuild, "no build of template %q waits or runs", t.Name)
		}
		build = t.BuildID
		t.end(Failed, &BuildError{ExitCode: -1, Message: why})
		return nil
	})
	if err != nil {
		return Template{}, err
	}
	s.log.Info("template build cancelled", "template", t.Name, "org", t.OrgID)
	s.withdraw(t.ID, build)
	return t, nil
}

// withdraw removes a build from the queue, the waiting ones or its run.
func (s *Service) withdraw(template, build string) {
	s.mu.Lock()
	s.queue.remove(template, build)
	s.retry.over(template) // only built-in templates are tried again
	if s.parked[template].order.build == build {
		delete(s.parked, template)
	}
	delete(s.secrets, build)
	var in *run
	var as *member
	for _, r := range s.runs {
		if m := r.member(template, build); m != nil {
			in, as = r, m
		}
	}
	s.unparkLocked(template)
	s.mu.Unlock()
	if in != nil {
		s.drop(in, as, errCancelled)
	}
	s.changed(template)
}

// Delete removes a template and ends its build. While sandboxes of it exist that have not ended,
// it gives Conflict, code "template_in_use", unless force is set; they continue with their image.
// For a built-in template it gives Denied, code "template_builtin".
func (s *Service) Delete(ctx context.Context, c Caller, nameOrID string, force bool) error {
	if err := s.mayBuild(); err != nil {
		return err
	}
	t, err := s.store.GetTemplate(ctx, c.OrgID, nameOrID)
	if err != nil {
		return err
	}
	if t.Builtin() {
		return readOnly(t)
	}
	if err := s.store.DeleteTemplate(ctx, t.ID, force); err != nil {
		return err
	}
	s.log.Info("template deleted", "template", t.Name, "org", t.OrgID)
	s.withdraw(t.ID, t.BuildID)
	return nil
}
