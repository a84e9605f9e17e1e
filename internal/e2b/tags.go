package e2b

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/template"
)

// tagsOf returns the tags of a request in order and once each.
func tagsOf(in []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(in)))
}

// assignTags answers POST /templates/tags.
func (s *Handler) assignTags(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Target string   `json:"target"`
		Tags   []string `json:"tags"`
	}
	if err := read(w, r, &in); err != nil {
		return err
	}
	tags := tagsOf(in.Tags)
	if in.Target == "" || len(tags) == 0 {
		return fault.InvalidField("tags", "the target and at least one tag are needed")
	}
	name, from := templateRef(strings.ToLower(in.Target))
	build, err := s.Templates.Tag(r.Context(), builderOf(r), name, from, tags)
	if err != nil {
		return err
	}
	reply(w, r, http.StatusCreated, map[string]any{"buildID": build, "tags": tags})
	return nil
}

// removeTags answers DELETE /templates/tags.
func (s *Handler) removeTags(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}
	if err := read(w, r, &in); err != nil {
		return err
	}
	tags := tagsOf(in.Tags)
	if in.Name == "" || slices.Contains(tags, template.DefaultTag) {
		return fault.InvalidField("tags", "the name is needed, and the tag %s cannot be removed", template.DefaultTag)
	}
	name, err := templateName(strings.ToLower(in.Name))
	if err != nil {
		return err
	}
	if err := s.Templates.Untag(r.Context(), builderOf(r), name, tags); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// tagBody is E2B's TemplateTag.
type tagBody struct {
	Tag       string    `json:"tag"`
	BuildID   string    `json:"buildID"`
	CreatedAt time.Time `json:"createdAt"`
}

// listTags answers GET /templates/{ref}/tags. Its pattern has a wildcard for the last part, since it would
// conflict with that of aliases otherwise.
func (s *Handler) listTags(w http.ResponseWriter, r *http.Request) error {
	if r.PathValue("what") != "tags" {
		return unsupported(olderBuilds)
	}
	name, err := templateName(r.PathValue("ref"))
	if err != nil {
		return err
	}
	t, tags, err := s.TemplateRows.Tags(r.Context(), orgOf(r), strings.ToLower(name))
	if err != nil {
		return err
	}
	out := []tagBody{}
	if t.Version > 0 {
		out = append(out, tagBody{template.DefaultTag, t.ReadyBuild, t.BuiltAt.UTC()})
	}
	for _, tag := range tags {
		out = append(out, tagBody{tag.Name, tag.BuildID, tag.CreatedAt.UTC()})
	}
	reply(w, r, http.StatusOK, out)
	return nil
}
