package template

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// draftKept is the time for which an announced build is remembered. With a shorter one a client
	// that uploads for hours loses its build, and the state of a past build cannot be asked for.
	draftKept = 24 * time.Hour
	// maxDrafts bounds the announced builds of one organization and their tags together, which are kept
	// in memory. Beyond, the oldest are forgotten.
	maxDrafts = 1000
)

// Announcement describes a build whose inputs come later.
type Announcement struct {
	Name   string
	Size   string // "" is the configured default
	DiskMB int    // 0 is the configured default
	Tags   []string
	// TagsOnly gives the version nothing but the tags, see [Definition].
	TagsOnly bool
}

// Draft is an announced build. Its IDs are those that the template and the build will have.
type Draft struct {
	Announcement
	TemplateID, BuildID string
}

// BuildState describes one build.
type BuildState struct {
	Status   Status
	Error    *BuildError // if it failed
	Template string      // ID of the template whose log is the build's; "" if the log is gone
}

// drafts remembers announced builds. They are lost with the process: what was queued is in the rows.
type drafts struct {
	mu sync.Mutex
	// +checklocks:mu
	byOrg map[string][]*draft // the oldest first
}

type draft struct {
	Draft
	at      time.Time
	claimed bool
	queued  string      // ID of the build that it became; an earlier one, if that has the same inputs
	outcome *BuildState // of that build, once another has taken its place, or of one that was not queued
}

// findLocked returns a build by its ID, or nil.
//
// +checklocks:d.mu
func (d *drafts) findLocked(org, build string) *draft {
	for _, one := range d.byOrg[org] {
		if one.BuildID == build {
			return one
		}
	}
	return nil
}

// add remembers a build. Builds of one new template that are announced at the same time have the
// same template ID.
func (d *drafts) add(org string, one *draft) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := d.byOrg[org]
	for _, other := range all {
		if one.TemplateID == "" && other.Name == one.Name && other.queued == "" {
			one.TemplateID = other.TemplateID
		}
	}
	if one.TemplateID == "" {
		one.TemplateID = newID(idPrefix)
	}
	all = append(all, one)
	count := 0
	for i, other := range slices.Backward(all) {
		if count += 1 + len(other.Tags); count > maxDrafts {
			all = slices.Delete(all, 0, i+1)
			break
		}
	}
	d.byOrg[org] = all
}

// has returns an error if there is no such build, or if it was started.
func (d *drafts) has(org, template, build string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.waitingLocked(org, template, build)
	return err
}

// waitingLocked returns a build that can be queued.
//
// +checklocks:d.mu
func (d *drafts) waitingLocked(org, template, build string) (*draft, error) {
	one := d.findLocked(org, build)
	switch {
	case one == nil || one.TemplateID != template:
		return nil, noBuild(template, build)
	case one.claimed:
		return nil, fault.New(fault.Conflict, fault.CodeBuildInProgress, "build %s was started before", build)
	}
	return one, nil
}

// claim returns a build that can be queued, and keeps others from queueing it.
func (d *drafts) claim(org, template, build string) (Draft, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	one, err := d.waitingLocked(org, template, build)
	if err != nil {
		return Draft{}, err
	}
	one.claimed = true
	return one.Draft, nil
}

// became records the build that a claimed one became; "" if it could not be queued.
func (d *drafts) became(org, build, queued string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if one := d.findLocked(org, build); one != nil {
		one.queued, one.claimed = queued, queued != ""
	}
}

// failed records why a claimed build cannot be queued.
func (d *drafts) failed(org, build string, cause *BuildError) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if one := d.findLocked(org, build); one != nil {
		one.outcome = &BuildState{Status: Failed, Error: cause}
	}
}

// replaced records how the newest build of a template ended, before another takes its place.
func (d *drafts) replaced(t Template) {
	d.mu.Lock()
	defer d.mu.Unlock()
	state := BuildState{Status: t.Status, Error: t.BuildError}
	for _, one := range d.byOrg[t.OrgID] {
		if one.queued == t.BuildID && one.outcome == nil {
			one.outcome = &state
		}
	}
}

// expire forgets builds that were announced before a time.
func (d *drafts) expire(before time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for org, all := range d.byOrg {
		for len(all) > 0 && all[0].at.Before(before) {
			all = all[1:]
		}
		d.byOrg[org] = all
		if len(all) == 0 {
			delete(d.byOrg, org)
		}
	}
}

func noBuild(template, build string) error {
	return fault.New(fault.NotFound, fault.CodeTemplateNotFound, "template %q has no build %q, or it was forgotten since",
		template, build)
}

// turns lets one caller of each organization in at a time.
type turns struct {
	mu sync.Mutex
	// +checklocks:mu
	taken map[string]chan struct{} // closed when the caller leaves
}

// enter waits until the organization's caller before has left, or ctx ends.
func (t *turns) enter(ctx context.Context, org string) error {
	for {
		t.mu.Lock()
		before := t.taken[org]
		if before == nil {
			t.taken[org] = make(chan struct{})
			t.mu.Unlock()
			return nil
		}
		t.mu.Unlock()
		select {
		case <-before:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (t *turns) leave(org string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(t.taken[org])
	delete(t.taken, org)
}

// Announce prepares a build of a new or an existing template of the organization. It reserves
// nothing: the inputs come with BuildDraft. Errors: Invalid with the field; Conflict, code
// fault.CodeTemplateExists, for the name of a built-in template.
func (s *Service) Announce(ctx context.Context, c Caller, a Announcement) (Draft, error) {
	if err := s.mayBuild(); err != nil {
		return Draft{}, err
	}
	if err := checkName(a.Name); err != nil {
		return Draft{}, err
	}
	if err := checkSize(s.cfg, a.Size, a.DiskMB); err != nil {
		return Draft{}, err
	}
	if err := checkTags(a.Tags); err != nil {
		return Draft{}, err
	}
	one := &draft{Draft: Draft{Announcement: a, BuildID: newID("bld_")}, at: time.Now()}
	t, err := s.store.GetTemplate(ctx, c.OrgID, a.Name)
	switch {
	case err == nil && t.Builtin():
		return Draft{}, fault.New(fault.Conflict, fault.CodeTemplateExists, "there is a built-in template %q", a.Name)
	case err == nil:
		one.TemplateID = t.ID
		if err := s.roomForTags(ctx, t, a.Tags); err != nil {
			return Draft{}, err
		}
	case !fault.Is(err, fault.NotFound):
		return Draft{}, err
	}
	s.drafts.add(c.OrgID, one)
	return one.Draft, nil
}

// HasDraft returns an error if the organization has no such announced build, or if it was started. Ask
// before work for a build that may not be there. Errors are those of BuildDraft.
func (s *Service) HasDraft(org, templateID, buildID string) error {
	return s.drafts.has(org, templateID, buildID)
}

// BuildDraft queues an announced build, once, of a Dockerfile and parts of uploads. r gives the rest;
// name, size, disk, tags and Dockerfile of r are not used. Another build of the template that waits or runs
// is cancelled. Errors are those of Create, NotFound, code "template_not_found", and [PartError].
func (s *Service) BuildDraft(ctx context.Context, c Caller, templateID, buildID string, r Request, dockerfile string,
	parts []Part) (_ Template, err error) {
	if err := s.mayBuild(); err != nil {
		return Template{}, err
	}
	d, err := s.drafts.claim(c.OrgID, templateID, buildID)
	if err != nil {
		return Template{}, err
	}
	queued := ""
	defer func() { s.drafts.became(c.OrgID, buildID, queued) }()
	r.Name, r.Size, r.DiskMB, r.Dockerfile, r.Tags, r.TagsOnly = d.Name, d.Size, d.DiskMB, "Dockerfile", d.Tags, d.TagsOnly
	// One at a time: a few bytes of an upload may become a whole context on the disk.
	if err := s.assembling.enter(ctx, c.OrgID); err != nil {
		return Template{}, err
	}
	defer s.assembling.leave(c.OrgID)
	source := s.assemble(ctx, c.OrgID, dockerfile, parts)
	defer source.Close() // it returns no error
	t, err := s.store.GetTemplate(ctx, c.OrgID, d.Name)
	switch {
	case fault.Is(err, fault.NotFound):
		t, err = s.create(ctx, c, r, source, templateID, buildID)
	case err != nil:
	case t.Builtin():
		err = readOnly(t)
	default:
		var b Build
		var secret *Credentials
		if b, secret, err = s.newBuild(ctx, t, &r, source); err == nil {
			t, err = s.replace(ctx, c, t, b, secret, buildID)
		}
	}
	if err != nil {
		return Template{}, err
	}
	queued = t.BuildID
	return t, nil
}

// FailDraft ends an announced build whose inputs cannot be built, so that its state tells why. Errors are
// those of HasDraft.
func (s *Service) FailDraft(org, templateID, buildID string, cause *BuildError) error {
	_, err := s.drafts.claim(org, templateID, buildID)
	if err == nil {
		s.drafts.failed(org, buildID, cause)
	}
	return err
}

// replace queues a build in the place of one that waits or runs.
func (s *Service) replace(ctx context.Context, c Caller, t Template, b Build, secret *Credentials,
	id string) (Template, error) {
	out, err := s.renew(ctx, t, b, secret, id)
	if f := fault.As(err); f == nil || f.Code != fault.CodeBuildInProgress {
		return out, err
	}
	_, err = s.cancel(ctx, c, t.ID, "a newer build of the template replaced it")
	if f := fault.As(err); err != nil && (f == nil || f.Code != fault.CodeNoBuild) {
		return Template{}, err
	}
	return s.renew(ctx, t, b, secret, id)
}

// BuildState returns the state of a build of the organization's template: the newest one, or one that
// was announced since the server started. Other ones give NotFound, code "template_not_found".
func (s *Service) BuildState(ctx context.Context, org, templateID, buildID string) (BuildState, error) {
	s.drafts.mu.Lock()
	var known draft
	if one := s.drafts.findLocked(org, buildID); one != nil && one.TemplateID == templateID {
		known = *one
	}
	s.drafts.mu.Unlock()
	switch {
	case known.outcome != nil:
		return *known.outcome, nil
	case known.BuildID != "" && known.queued == "":
		return BuildState{Status: Pending}, nil
	}
	name, newest := templateID, buildID
	if known.queued != "" {
		name, newest = known.Name, known.queued
	}
	t, err := s.store.GetTemplate(ctx, org, name)
	if err != nil {
		return BuildState{}, err
	}
	if t.BuildID == newest && !t.Builtin() {
		return BuildState{Status: t.Status, Error: t.BuildError, Template: t.ID}, nil
	}
	if known.queued != "" {
		return BuildState{Status: Failed, Error: &BuildError{ExitCode: -1,
			Message: "another build of the template took its place; its own state was not kept"}}, nil
	}
	return BuildState{}, noBuild(templateID, buildID)
}
