package template

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Tag names a version of a template. Sandboxes can be made from that version as long as the tag is
// there, also after newer versions were built.
type Tag struct {
	Name      string // [a-z0-9][a-z0-9._-]{0,127}
	BuildID   string // ID of the build that gave the version
	CreatedAt time.Time
	Gone      bool // the version's image is missing or damaged
	Version   sandbox.TemplateVersion
}

const (
	// DefaultTag names the version of a template that a reference without a tag means. No tag has the name.
	DefaultTag = "default"
	// LatestTag means the default version too, unless a template has a tag of the name.
	LatestTag = "latest"
)

// MaxTags bounds the tags of a template. Each may keep an image on the disk.
const MaxTags = 50

var tagPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,127}$`)

// checkTags refuses names that no tag may have, and more of them than a template may have.
func checkTags(names []string) error {
	if len(names) > MaxTags {
		return invalid("tags", "has %d names; a template may have %d tags", len(names), MaxTags)
	}
	for i, name := range names {
		if !tagPattern.MatchString(name) {
			return invalid(fmt.Sprintf("tags[%d]", i),
				"must be 1 to 128 of a-z, 0-9, -, _ and ., with a letter or a digit first")
		}
	}
	return nil
}

// version returns what sandboxes of the newest version are made from.
func (t Template) version() sandbox.TemplateVersion {
	return sandbox.TemplateVersion{ID: t.ID, Name: t.Name, Version: t.Version, Builtin: t.Builtin(),
		Shape: t.Shape.Clone()}
}

// tag makes tags of the newest version, which are written with the row.
func (t *Template) tag(names []string) {
	for _, name := range names {
		t.Tagging = append(t.Tagging, t.NewestTag(name))
	}
}

// NewestTag returns a tag of the newest version, made now.
func (t Template) NewestTag(name string) Tag {
	return Tag{Name: name, BuildID: t.ReadyBuild, CreatedAt: now(), Version: t.version()}
}

// nextVersion returns the number of a new version of a template: one that neither its row nor its tags
// have.
func nextVersion(t Template, tags []Tag) int {
	last := t.Version
	for _, tag := range tags {
		last = max(last, tag.Version.Version)
	}
	return last + 1
}

// Find returns the tag that a reference names: by its name, or by the build of its version. It returns
// false for a reference to the default version.
func (t Template) Find(tags []Tag, name string) (tag Tag, found bool, err error) {
	if name == "" || name == DefaultTag {
		return Tag{}, false, nil
	}
	for _, same := range []func(Tag) bool{
		func(tag Tag) bool { return tag.Name == name }, func(tag Tag) bool { return tag.BuildID == name }} {
		if i := slices.IndexFunc(tags, same); i >= 0 {
			return tags[i], true, nil
		}
	}
	if name == LatestTag || name == t.ReadyBuild {
		return Tag{}, false, nil
	}
	return Tag{}, false, NoTag(t.Name, name)
}

// tagged returns the version that a tag of a template names.
func (s *Service) tagged(ctx context.Context, t Template, name string) (sandbox.TemplateVersion, error) {
	tags, err := s.store.Tags(ctx, t.ID)
	if err != nil {
		return sandbox.TemplateVersion{}, fmt.Errorf("reading the tags of template %s: %w", t.Name, err)
	}
	tag, found, err := t.Find(tags, name)
	if err != nil {
		return sandbox.TemplateVersion{}, err
	}
	if !found {
		return s.newest(ctx, t)
	}
	v := tag.Version
	v.Egress = t.Egress // the policy is the template's, whatever the version
	if !tag.Gone {
		return v, nil
	}
	// Its image may have come back, as the result of another build.
	if err := s.builder.Check(ctx, v.Image); err != nil {
		return sandbox.TemplateVersion{}, fault.New(fault.Conflict, fault.CodeTemplateNotReady,
			"the image of template \"%s:%s\" is gone: build that version again with the tag, or move the tag",
			t.Name, name).Because(err)
	}
	return v, s.store.MarkTags(ctx, v.Image, false)
}

// NoTag returns the error for a tag that a template does not have.
func NoTag(template, tag string) error {
	return fault.New(fault.NotFound, fault.CodeTemplateNotFound, "template %q has no tag %q", template, tag)
}

// own returns a template of the organization, and not a built-in one.
func (s *Service) own(ctx context.Context, c Caller, nameOrID string) (Template, error) {
	t, err := s.store.GetTemplate(ctx, c.OrgID, nameOrID)
	if err == nil && t.Builtin() {
		err = readOnly(t)
	}
	return t, err
}

// Tag gives tags to the version of a template that from names (see [Template.Find]). It returns the ID of the build
// that made the version. The tag [DefaultTag] makes it the default version. Errors: Invalid in field "tags"; NotFound,
// code "template_not_found"; Conflict, code "template_not_ready"; Exhausted, code "quota_exceeded"; Denied for a
// built-in template.
func (s *Service) Tag(ctx context.Context, c Caller, nameOrID, from string, names []string) (buildID string,
	err error) {
	if err := s.mayBuild(); err != nil {
		return "", err
	}
	if err := checkTags(names); err != nil {
		return "", err
	}
	t, err := s.own(ctx, c, nameOrID)
	if err != nil {
		return "", err
	}
	tags, err := s.store.Tags(ctx, t.ID)
	if err != nil {
		return "", fmt.Errorf("reading the tags of template %s: %w", t.Name, err)
	}
	source, found, err := t.Find(tags, from)
	if err != nil {
		return "", err
	}
	rest := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == DefaultTag })
	if err := roomFor(t, tags, rest); err != nil {
		return "", err
	}
	if found {
		if len(rest) < len(names) {
			if _, err := s.tagged(ctx, t, source.Name); err != nil {
				return "", err // its image is gone
			}
		}
		return s.store.CopyTag(ctx, t.ID, source.Name, names, now())
	}
	t, err = s.store.UpdateTemplate(ctx, t.ID, nil, func(t *Template) error {
		if !t.usable() {
			return notReady(*t)
		}
		t.tag(rest)
		return nil
	})
	return t.ReadyBuild, err
}

// Promote makes the version of a tag the default version. Its inputs are not known, so that the next
// build of the same does not skip this version.
func (t *Template) Promote(tag Tag, at time.Time) {
	if t.Version == tag.Version.Version {
		return
	}
	egress := t.Egress // the policy is the template's, whatever the version
	t.Shape, t.Version = tag.Version.Shape.Clone(), tag.Version.Version
	t.Egress = egress
	t.ReadyBuild, t.Inputs, t.Source, t.ImageSize = tag.BuildID, "", "the tag "+tag.Name, 0
	t.BuiltAt, t.UpdatedAt = at, at
}

// roomForTags refuses tags beyond those that a template may have.
func (s *Service) roomForTags(ctx context.Context, t Template, names []string) error {
	tags, err := s.store.Tags(ctx, t.ID)
	if err != nil {
		return fmt.Errorf("reading the tags of template %s: %w", t.Name, err)
	}
	return roomFor(t, tags, names)
}

// roomFor is roomForTags for the tags that a template has.
func roomFor(t Template, tags []Tag, names []string) error {
	all := map[string]bool{}
	for _, tag := range tags {
		all[tag.Name] = true
	}
	for _, name := range names {
		all[name] = true
	}
	if len(all) > MaxTags {
		return TooManyTags(t.Name)
	}
	return nil
}

// TooManyTags returns the error for a template that would have more than MaxTags tags.
func TooManyTags(name string) error {
	return fault.New(fault.Exhausted, fault.CodeQuotaExceeded, "template %q may have %d tags", name, MaxTags)
}

// Untag removes tags of a template; those that it does not have are no error.
func (s *Service) Untag(ctx context.Context, c Caller, nameOrID string, names []string) error {
	if err := s.mayBuild(); err != nil {
		return err
	}
	if err := checkTags(names); err != nil {
		return err
	}
	t, err := s.own(ctx, c, nameOrID)
	if err != nil {
		return err
	}
	return s.store.DeleteTags(ctx, t.ID, names)
}

// cutTag splits a reference of a template with a tag; "" is the newest version.
func cutTag(ref string) (nameOrID, tag string) {
	nameOrID, tag, _ = strings.Cut(ref, ":")
	return nameOrID, tag
}

// tagReady gives a version that is ready the tags of a build with the same inputs. If another build
// was requested since the row was read, it returns errSettled.
func (s *Service) tagReady(ctx context.Context, t Template, names []string) (Template, error) {
	if len(names) == 0 {
		return t, nil
	}
	return s.store.UpdateTemplate(ctx, t.ID, nil, func(row *Template) error {
		if row.BuildID != t.BuildID || row.Version != t.Version {
			return errSettled
		}
		row.tag(slices.Clone(names))
		return nil
	})
}
