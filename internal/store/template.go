package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/template"
)

// templateColumns lists the columns of templateFields, in the same order.
const templateColumns = `id, org_id, name, description, status, progress, build_error, build_id, tries, queued_at,
	version, image, image_size, source, inputs, ready_build, env, workdir, run_as, start, size, disk_mb, egress, created_at, updated_at, built_at`

// templateFields returns t's columns, to scan into or to write.
func templateFields(t *template.Template) []any {
	return []any{&t.ID, &t.OrgID, &t.Name, &t.Description,
		&t.Status, &t.Progress, jsonColumn{&t.BuildError}, &t.BuildID, &t.Tries, timeColumn{&t.QueuedAt},
		&t.Version, &t.Image, &t.ImageSize, &t.Source, &t.Inputs, &t.ReadyBuild,
		jsonColumn{&t.Env}, &t.Workdir, &t.User, jsonColumn{&t.Start}, &t.Size.Name, &t.DiskMB, jsonColumn{&t.Egress},
		timeColumn{&t.CreatedAt}, timeColumn{&t.UpdatedAt}, timeColumn{&t.BuiltAt}}
}

func noTemplate(nameOrID string) error {
	return fault.New(fault.NotFound, fault.CodeTemplateNotFound, "there is no template %q", nameOrID)
}

// InsertTemplate implements [template.Store].
func (db *DB) InsertTemplate(ctx context.Context, t template.Template, b *template.Build, limit int) error {
	defer db.took("insert_template", time.Now())
	org := ""
	if limit > 0 {
		org = t.OrgID
	}
	err := db.recordCounted(ctx, org, func(tx *sql.Tx, out *outbox) error {
		if limit > 0 {
			var n int
			if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM templates WHERE org_id = $1", t.OrgID).Scan(&n); err != nil {
				return fmt.Errorf("counting templates: %w", err)
			}
			if n >= limit {
				return fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
					"the organization has %d templates; it may have %d", n, limit)
			}
		}
		fields := templateFields(&t)
		_, err := tx.ExecContext(ctx,
			"INSERT INTO templates ("+templateColumns+") VALUES ("+placeholders(len(fields))+")", fields...)
		if db.violates(err, false) {
			return fault.New(fault.Conflict, fault.CodeTemplateExists, "there is a template %q already", t.Name).Because(err)
		}
		if err != nil {
			return err
		}
		if err := out.template(ctx, template.Template{}, t); err != nil {
			return err
		}
		return putBuild(ctx, tx, t.ID, b)
	})
	if err != nil {
		return fmt.Errorf("inserting template %s: %w", t.ID, err)
	}
	return nil
}

// template writes the events of a change of a template.
func (o *outbox) template(ctx context.Context, before, after template.Template) error {
	for _, t := range template.Facts(before, after) {
		e := event.Event{OrgID: after.OrgID, At: time.Now(), Type: t,
			About: event.About{TemplateID: after.ID, Name: after.Name, Version: after.Version}}
		if err := o.add(ctx, e); err != nil {
			return err
		}
	}
	return nil
}

func putBuild(ctx context.Context, tx *sql.Tx, id string, b *template.Build) error {
	if b == nil {
		return nil
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO template_builds (template_id, definition, context, refresh, private, repairs)
		VALUES ($1, $2, $3, $4, $5, $6)
		ON CONFLICT (template_id) DO UPDATE SET definition = excluded.definition, context = excluded.context,
		refresh = excluded.refresh, private = excluded.private, repairs = excluded.repairs`,
		id, jsonColumn{&b.Definition}, b.Context, b.Refresh, b.Private, b.Repairs)
	if err != nil {
		return fmt.Errorf("writing its build: %w", err)
	}
	return nil
}

// UpdateTemplate implements [template.Store].
func (db *DB) UpdateTemplate(ctx context.Context, id string, b *template.Build,
	change func(*template.Template) error) (template.Template, error) {
	defer db.took("update_template", time.Now())
	var t template.Template
	var refused error
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		var err error
		if t, err = db.readTemplate(ctx, tx, id); err != nil {
			return err
		}
		before := t
		if refused = change(&t); refused != nil {
			return refused
		}
		if t.BuildID != before.BuildID {
			if _, err := tx.ExecContext(ctx, "DELETE FROM template_logs WHERE template_id = $1", id); err != nil {
				return fmt.Errorf("dropping the log: %w", err)
			}
		}
		if err := writeTemplate(ctx, tx, &t); err != nil {
			return err
		}
		if err := out.template(ctx, before, t); err != nil {
			return err
		}
		if err := putTags(ctx, tx, &t); err != nil {
			return err
		}
		return putBuild(ctx, tx, id, b)
	})
	if refused != nil {
		return template.Template{}, refused
	}
	if err != nil {
		return template.Template{}, fmt.Errorf("updating template %s: %w", id, err)
	}
	return t, nil
}

// readTemplate reads a template by ID, which others cannot change until the transaction ends.
func (db *DB) readTemplate(ctx context.Context, tx *sql.Tx, id string) (template.Template, error) {
	var t template.Template
	err := tx.QueryRowContext(ctx, "SELECT "+templateColumns+" FROM templates WHERE id = $1"+db.forUpdate(), id).
		Scan(templateFields(&t)...)
	if errors.Is(err, sql.ErrNoRows) {
		return t, noTemplate(id)
	}
	return t, err
}

// writeTemplate writes a template that was read.
func writeTemplate(ctx context.Context, tx *sql.Tx, t *template.Template) error {
	fields := templateFields(t)
	_, err := tx.ExecContext(ctx, "UPDATE templates SET ("+templateColumns+") = ("+placeholders(len(fields))+
		") WHERE id = "+fmt.Sprintf("$%d", len(fields)+1), append(fields, t.ID)...)
	return err
}

// putTags writes the tags that a template's row is written with.
func putTags(ctx context.Context, tx *sql.Tx, t *template.Template) error {
	if t.Repairs != "" {
		repaired := t.NewestTag("")
		if _, err := tx.ExecContext(ctx, `UPDATE template_tags SET build_id = $1, image = $2, version = $3, gone = FALSE
			WHERE template_id = $4 AND image = $5`, repaired.BuildID, repaired.Version.Image, jsonColumn{&repaired.Version},
			t.ID, t.Repairs); err != nil {
			return fmt.Errorf("repairing tags: %w", err)
		}
	}
	for _, tag := range t.Tagging {
		if err := putTag(ctx, tx, t.ID, tag); err != nil {
			return err
		}
	}
	if len(t.Tagging) > 0 {
		if err := countTags(ctx, tx, t.ID, t.Name); err != nil {
			return err
		}
	}
	t.Tagging, t.Repairs = nil, ""
	return nil
}

func putTag(ctx context.Context, tx *sql.Tx, id string, tag template.Tag) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO template_tags (template_id, tag, build_id, image, version, created_at, gone)
		VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (template_id, tag) DO UPDATE SET build_id = excluded.build_id,
		image = excluded.image, version = excluded.version, created_at = excluded.created_at, gone = excluded.gone`,
		id, tag.Name, tag.BuildID, tag.Version.Image, jsonColumn{&tag.Version}, at(tag.CreatedAt), tag.Gone)
	if err != nil {
		return fmt.Errorf("writing tag %s: %w", tag.Name, err)
	}
	return nil
}

// countTags refuses more tags than a template may have.
func countTags(ctx context.Context, tx *sql.Tx, id, name string) error {
	var has int
	if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM template_tags WHERE template_id = $1", id).
		Scan(&has); err != nil {
		return fmt.Errorf("counting the tags of template %s: %w", name, err)
	}
	if has > template.MaxTags {
		return template.TooManyTags(name)
	}
	return nil
}

// CopyTag implements [template.Store].
func (db *DB) CopyTag(ctx context.Context, id, from string, names []string, when time.Time) (string, error) {
	defer db.took("copy_tag", time.Now())
	var source template.Tag
	err := db.write(ctx, func(tx *sql.Tx) error {
		source = template.Tag{} // a transaction that is run again must not add to what the first run read
		// Others that add tags wait, so that the count below is right.
		t, err := db.readTemplate(ctx, tx, id)
		if err != nil {
			return err
		}
		err = tx.QueryRowContext(ctx,
			"SELECT build_id, version, gone FROM template_tags WHERE template_id = $1 AND tag = $2", id, from).
			Scan(&source.BuildID, jsonColumn{&source.Version}, &source.Gone)
		if errors.Is(err, sql.ErrNoRows) {
			return template.NoTag(t.Name, from)
		}
		if err != nil {
			return err
		}
		for _, to := range names {
			if to == template.DefaultTag {
				source.Name = from
				t.Promote(source, when)
				if err := writeTemplate(ctx, tx, &t); err != nil {
					return err
				}
				continue
			}
			source.Name, source.CreatedAt = to, when
			if err := putTag(ctx, tx, id, source); err != nil {
				return err
			}
		}
		return countTags(ctx, tx, id, t.Name)
	})
	if err != nil {
		return "", fmt.Errorf("copying tag %s of template %s: %w", from, id, err)
	}
	return source.BuildID, nil
}

// MarkTags implements [template.Store].
func (db *DB) MarkTags(ctx context.Context, image string, gone bool) error {
	defer db.took("mark_tags", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "UPDATE template_tags SET gone = $1 WHERE image = $2", gone, image)
		return err
	})
	if err != nil {
		return fmt.Errorf("marking the tags of image %s: %w", image, err)
	}
	return nil
}

// Tags implements [template.Store].
func (db *DB) Tags(ctx context.Context, id string) ([]template.Tag, error) {
	defer db.took("tags", time.Now())
	all, err := collect(ctx, db.reader, func(t *template.Tag) []any {
		return []any{&t.Name, &t.BuildID, jsonColumn{&t.Version}, timeColumn{&t.CreatedAt}, &t.Gone}
	}, "SELECT tag, build_id, version, created_at, gone FROM template_tags WHERE template_id = $1 ORDER BY tag", id)
	if err != nil {
		return nil, fmt.Errorf("listing tags of template %s: %w", id, err)
	}
	return all, nil
}

// DeleteTags implements [template.Store].
func (db *DB) DeleteTags(ctx context.Context, id string, names []string) error {
	defer db.took("delete_tags", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		for _, name := range names {
			if _, err := tx.ExecContext(ctx, "DELETE FROM template_tags WHERE template_id = $1 AND tag = $2", id,
				name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("deleting tags of template %s: %w", id, err)
	}
	return nil
}

// GetBuild implements [template.Store].
func (db *DB) GetBuild(ctx context.Context, id, buildID string) (template.Build, error) {
	defer db.took("get_build", time.Now())
	var b template.Build
	// One statement sees the row of the template and the inputs as they were written together.
	err := db.reader.QueryRowContext(ctx, `SELECT b.definition, b.context, b.refresh, b.private, b.repairs
		FROM template_builds b JOIN templates t ON t.id = b.template_id
		WHERE b.template_id = $1 AND ($2 = '' OR t.build_id = $2)`, id, buildID).
		Scan(jsonColumn{&b.Definition}, &b.Context, &b.Refresh, &b.Private, &b.Repairs)
	if errors.Is(err, sql.ErrNoRows) {
		return template.Build{}, noTemplate(id)
	}
	if err != nil {
		return template.Build{}, fmt.Errorf("reading the build of template %s: %w", id, err)
	}
	return b, nil
}

// DeleteTemplate implements [template.Store].
func (db *DB) DeleteTemplate(ctx context.Context, id string, force bool) error {
	defer db.took("delete_template", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		if !force {
			var n int
			if err := tx.QueryRowContext(ctx,
				"SELECT COUNT(*) FROM sandboxes WHERE template_id = $1 AND ended_at IS NULL", id).Scan(&n); err != nil {
				return fmt.Errorf("counting its sandboxes: %w", err)
			}
			if n > 0 {
				return fault.New(fault.Conflict, fault.CodeTemplateInUse,
					"%d sandboxes of it are not destroyed; with force they go on without it", n)
			}
		}
		gone := event.Event{At: time.Now(), Type: event.TemplateDeleted, About: event.About{TemplateID: id}}
		err := tx.QueryRowContext(ctx, "DELETE FROM templates WHERE id = $1 RETURNING org_id, name", id).
			Scan(&gone.OrgID, &gone.Name)
		if errors.Is(err, sql.ErrNoRows) {
			return noTemplate(id)
		}
		if err != nil {
			return err
		}
		return out.add(ctx, gone)
	})
	if err != nil {
		return fmt.Errorf("deleting template %s: %w", id, err)
	}
	return nil
}

// GetTemplate implements [template.Store].
func (db *DB) GetTemplate(ctx context.Context, orgID, nameOrID string) (template.Template, error) {
	defer db.took("get_template", time.Now())
	var t template.Template
	err := db.reader.QueryRowContext(ctx, "SELECT "+templateColumns+` FROM templates
		WHERE org_id IN ($1, '') AND (id = $2 OR name = $2) ORDER BY org_id DESC LIMIT 1`, orgID, nameOrID).Scan(templateFields(&t)...)
	if errors.Is(err, sql.ErrNoRows) {
		return template.Template{}, noTemplate(nameOrID)
	}
	if err != nil {
		return template.Template{}, fmt.Errorf("reading template %q: %w", nameOrID, err)
	}
	return t, nil
}

// ListTemplates implements [template.Store].
func (db *DB) ListTemplates(ctx context.Context, orgID string, limit int,
	after string) ([]template.Template, string, error) {
	defer db.took("list_templates", time.Now())
	var p params
	q := "org_id IN (" + p.add(orgID) + ", '')"
	end, err := page(listTemplates, limit, after, &p)
	if err != nil {
		return nil, "", err
	}
	all, err := db.templates(ctx, q+end, p...)
	if err != nil {
		return nil, "", err
	}
	all, next := cut(listTemplates, all, limit, func(t template.Template) (time.Time, string) { return t.CreatedAt, t.ID })
	return all, next, nil
}

// templates returns the templates that the end of a query, from WHERE on, selects.
func (db *DB) templates(ctx context.Context, where string, args ...any) ([]template.Template, error) {
	all, err := collect(ctx, db.reader, templateFields, "SELECT "+templateColumns+" FROM templates WHERE "+where, args...)
	if err != nil {
		return nil, fmt.Errorf("listing templates: %w", err)
	}
	return all, nil
}

// QueuedTemplates implements [template.Store].
func (db *DB) QueuedTemplates(ctx context.Context) ([]template.Template, error) {
	defer db.took("queued_templates", time.Now())
	return db.templates(ctx, "queued_at IS NOT NULL ORDER BY queued_at, id")
}

// TemplatesWithImage implements [template.Store].
func (db *DB) TemplatesWithImage(ctx context.Context, image string) ([]template.Template, error) {
	defer db.took("templates_with_image", time.Now())
	return db.templates(ctx, "image = $1 AND version > 0 ORDER BY id", image)
}

// TemplateImages implements [template.Store].
func (db *DB) TemplateImages(ctx context.Context) ([]string, error) {
	defer db.took("template_images", time.Now())
	return db.texts(ctx, "listing images of templates",
		"SELECT image FROM templates WHERE version > 0 AND image <> '' UNION SELECT image FROM template_tags ORDER BY image")
}

// TemplateContexts implements [template.Store].
func (db *DB) TemplateContexts(ctx context.Context, orgID string) ([]string, error) {
	defer db.took("template_contexts", time.Now())
	const doing = "listing contexts of templates"
	if orgID == "" {
		return db.texts(ctx, doing, "SELECT DISTINCT context FROM template_builds WHERE context <> '' ORDER BY context")
	}
	return db.texts(ctx, doing, "SELECT DISTINCT b.context FROM templates t "+
		"JOIN template_builds b ON b.template_id = t.id WHERE t.org_id = $1 AND b.context <> '' ORDER BY b.context", orgID)
}

// ChangeTemplateLog implements [template.Store].
func (db *DB) ChangeTemplateLog(ctx context.Context, id string, c template.LogChange) error {
	defer db.took("change_template_log", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		for _, d := range c.Drop {
			if _, err := tx.ExecContext(ctx,
				"DELETE FROM template_logs WHERE template_id = $1 AND step = $2 AND seq BETWEEN $3 AND $4",
				id, d.Step, d.From, d.To); err != nil {
				return fmt.Errorf("dropping lines: %w", err)
			}
		}
		for _, l := range c.Add {
			_, err := tx.ExecContext(ctx,
				"INSERT INTO template_logs (template_id, seq, at, step, heading, dockerfile_line, line) "+
					"VALUES ($1, $2, $3, $4, $5, $6, $7)", id, l.Seq, at(l.At), l.Step, l.Heading, l.Line, l.Text)
			if db.violates(err, true) {
				return noTemplate(id)
			}
			if err != nil {
				return fmt.Errorf("writing a line: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("writing to the log of template %s: %w", id, err)
	}
	return nil
}

// TemplateLog implements [template.Store]. It returns no lines if the template does not exist.
func (db *DB) TemplateLog(ctx context.Context, id string, after int64, limit int) ([]template.LogLine, error) {
	defer db.took("template_log", time.Now())
	return db.logLines(ctx, id, "AND seq > $2 ORDER BY seq LIMIT $3", after, limit)
}

// TemplateLogRest implements [template.Store]. It returns no lines if the template does not exist.
func (db *DB) TemplateLogRest(ctx context.Context, id string, skip, limit int) ([]template.LogLine, error) {
	defer db.took("template_log_rest", time.Now())
	return db.logLines(ctx, id, "ORDER BY seq LIMIT $3 OFFSET $2", int64(skip), limit)
}

// logLines reads lines of a template's log; rest is the end of the query with two parameters.
func (db *DB) logLines(ctx context.Context, id, rest string, from int64, limit int) ([]template.LogLine, error) {
	all, err := collect(ctx, db.reader, func(l *template.LogLine) []any {
		return []any{&l.Seq, timeColumn{&l.At}, &l.Step, &l.Heading, &l.Line, &l.Text}
	}, "SELECT seq, at, step, heading, dockerfile_line, line FROM template_logs WHERE template_id = $1 "+rest,
		id, from, limit)
	if err != nil {
		return nil, fmt.Errorf("reading the log of template %s: %w", id, err)
	}
	return all, nil
}
