package e2b

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// maxPage is the largest page, and the default.
const maxPage = 100

// nextHeader holds the cursor of the next page; the last page has none.
const nextHeader = "X-Next-Token"

// list answers GET /v2/sandboxes, and GET /sandboxes with fixed states.
func (s *Handler) list(states []sandbox.State) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		f, err := s.filter(r)
		if err != nil {
			return err
		}
		if states != nil {
			f.States = states
		}
		return answerPage(w, r, f.Limit, f.Cursor, func(limit int, cursor string) ([]sandbox.Sandbox, string, error) {
			f.Limit, f.Cursor = limit, cursor
			return s.Rows.List(r.Context(), f)
		}, listed)
	}
}

// listPage is the number of rows of a listing that are held at once. A row may have an
// environment of 128 KiB, which the answer does not show.
const listPage = 8

// answerPage answers with a page of rows. It keeps the encoded rows until the page is complete,
// since the cursor is in the header.
func answerPage[T, U any](w http.ResponseWriter, r *http.Request, limit int, cursor string,
	rows func(limit int, cursor string) ([]T, string, error), shown func(T) U) error {
	all := []json.RawMessage{}
	for {
		some, next, err := rows(min(limit-len(all), listPage), cursor)
		if err != nil {
			return pageError(err)
		}
		for _, row := range some {
			text, err := json.Marshal(shown(row))
			if err != nil {
				return err
			}
			// Twice, since the answer is assembled from all rows.
			if err := callOf(r).Account.Take(2 * int64(len(text))); err != nil {
				return err
			}
			all = append(all, text)
		}
		if cursor = next; next == "" || len(all) >= limit {
			page(w, r, all, next)
			return nil
		}
	}
}

func page(w http.ResponseWriter, r *http.Request, list any, next string) {
	if next != "" {
		w.Header().Set(nextHeader, next)
	}
	reply(w, r, http.StatusOK, list)
}

// pageError renames the field of a cursor error to this API's.
func pageError(err error) error {
	if f := fault.As(err); f != nil && f.Field == "cursor" {
		return fault.InField(fault.CodeInvalidCursor, "nextToken", "is not a cursor of this listing").Because(err)
	}
	return err
}

// limits parses limit and nextToken.
func limits(q url.Values) (limit int, cursor string, err error) {
	limit = maxPage
	if text := q.Get("limit"); text != "" {
		if limit, err = strconv.Atoi(text); err != nil || limit < 1 || limit > maxPage {
			return 0, "", fault.InvalidField("limit", "must be from 1 to %d", maxPage)
		}
	}
	return limit, q.Get("nextToken"), nil
}

// filter parses the query of a listing.
func (s *Handler) filter(r *http.Request) (f sandbox.Filter, err error) {
	q := r.URL.Query()
	f = sandbox.Filter{OrgID: orgOf(r)}
	if f.Limit, f.Cursor, err = limits(q); err != nil {
		return f, err
	}
	if f.States, err = states(q["state"]); err != nil {
		return f, err
	}
	if f.Metadata, err = metadata(q.Get("metadata")); err != nil {
		return f, err
	}
	if ref := q.Get("template"); ref != "" {
		if f.Template, f.TemplateVersion, err = s.templateFilter(r, ref); err != nil {
			return f, err
		}
	}
	if text := q.Get("startedAfter"); text != "" {
		if f.CreatedFrom, err = time.Parse(time.RFC3339Nano, text); err != nil {
			return f, fault.InField(fault.CodeInvalidStartedAfter, "startedAfter", "must be a time such as 2026-01-02T15:04:05Z")
		}
	}
	switch order := q.Get("order"); order {
	case "", "desc":
	case "asc":
		f.OldestFirst = true
	default:
		return f, fault.InvalidField("order", "must be asc or desc, not %.40q", order)
	}
	return f, nil
}

// templateFilter returns the template that a reference names, and the version that its tag names; 0 is any
// version. A tag that the template does not have finds nothing.
func (s *Handler) templateFilter(r *http.Request, ref string) (name string, version int, err error) {
	name, tag := templateRef(strings.ToLower(ref))
	if tag == "" {
		return name, 0, nil
	}
	t, tags, err := s.TemplateRows.Tags(r.Context(), orgOf(r), name)
	switch {
	case fault.Is(err, fault.NotFound):
		return ref, 0, nil
	case err != nil:
		return "", 0, err
	}
	one, found, err := t.Find(tags, tag)
	switch {
	case err != nil:
		return ref, 0, nil // no sandbox is made of what is not there
	case !found:
		return name, 0, nil
	}
	return t.ID, one.Version.Version, nil
}

// states parses states as clients write them: joined by commas, or in several values.
func states(values []string) ([]sandbox.State, error) {
	var out []sandbox.State
	for word := range strings.SplitSeq(strings.Join(values, ","), ",") {
		switch word {
		case "":
		case stateRunning, statePaused:
			out = append(out, listedAs(word)...)
		default:
			return nil, fault.InvalidField("state", "must be running or paused, not %.40q", word)
		}
	}
	if len(out) == 0 {
		out = slices.Concat(listedAs(stateRunning), listedAs(statePaused))
	}
	return out, nil
}

// metadata parses a filter that clients encode three times: each name and value, then all pairs
// as a query, then that as a value of the URL's query, which is decoded already.
func metadata(text string) (map[string]string, error) {
	wrong := fault.InvalidField("metadata",
		"must be NAME=VALUE pairs joined by &, each name and value percent-encoded before they are joined")
	pairs, err := url.ParseQuery(text)
	if err != nil {
		return nil, wrong
	}
	out := map[string]string{}
	for name, values := range pairs {
		n, err1 := url.QueryUnescape(name)
		v, err2 := url.QueryUnescape(values[0])
		if err1 != nil || err2 != nil || len(values) > 1 {
			return nil, wrong
		}
		out[n] = v
	}
	return out, nil
}

// templateBody is E2B's Template, as far as clients read it.
type templateBody struct {
	TemplateID  string    `json:"templateID"`
	BuildID     string    `json:"buildID"`
	Public      bool      `json:"public"`
	Aliases     []string  `json:"aliases"`
	Names       []string  `json:"names"`
	CPUCount    int       `json:"cpuCount"`
	MemoryMB    int       `json:"memoryMB"`
	DiskSizeMB  int       `json:"diskSizeMB"`
	BuildStatus string    `json:"buildStatus"`
	BuildCount  int       `json:"buildCount"`
	CreatedAt   time.Time `json:"createdAt"`
	UpdatedAt   time.Time `json:"updatedAt"`
	EnvdVersion string    `json:"envdVersion"`
	// The Python client reads no template without these. The server knows none of them.
	CreatedBy     *struct{}  `json:"createdBy"`
	LastSpawnedAt *time.Time `json:"lastSpawnedAt"`
	SpawnCount    int        `json:"spawnCount"`
}

// listTemplates answers GET /templates.
func (s *Handler) listTemplates(w http.ResponseWriter, r *http.Request) error {
	limit, cursor, err := limits(r.URL.Query())
	if err != nil {
		return err
	}
	return answerPage(w, r, limit, cursor, func(limit int, cursor string) ([]template.Template, string, error) {
		return s.TemplateRows.List(r.Context(), orgOf(r), limit, cursor)
	}, s.templateOf)
}

func (s *Handler) templateOf(t template.Template) templateBody {
	updated := t.UpdatedAt
	if updated.IsZero() {
		updated = t.CreatedAt
	}
	size, disk := s.Rows.SizeOf(t.Size.Name, t.DiskMB)
	return templateBody{TemplateID: t.ID, BuildID: t.BuildID, Public: t.Builtin(), Aliases: []string{t.Name},
		Names:    []string{t.Name},
		CPUCount: size.VCPUs, MemoryMB: size.MemoryMB, DiskSizeMB: disk, BuildStatus: statusOf(t.Status), BuildCount: t.Version,
		CreatedAt: t.CreatedAt.UTC(), UpdatedAt: updated.UTC(), EnvdVersion: envdVersion}
}

// statusError is the status of a build that failed.
const statusError = "error"

func statusOf(s template.Status) string {
	switch s {
	case template.Ready, template.Building:
		return string(s)
	case template.Failed:
		return statusError
	}
	return "waiting"
}

// templateAlias answers GET /templates/aliases/{alias}.
func (s *Handler) templateAlias(w http.ResponseWriter, r *http.Request) error {
	name, tag := templateRef(r.PathValue("alias"))
	t, tags, err := s.TemplateRows.Tags(r.Context(), orgOf(r), strings.ToLower(name))
	if err != nil {
		return err
	}
	if _, _, err := t.Find(tags, tag); err != nil {
		return err
	}
	reply(w, r, http.StatusOK, map[string]any{"templateID": t.ID, "public": t.Builtin()})
	return nil
}
