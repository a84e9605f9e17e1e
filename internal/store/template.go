package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/template"
)

// templateColumns lists what templateFields reads and writes, in its order.
const templateColumns = `id, org_id, name, description, status, progress, build_error, version, image, image_size, source, inputs,
	env, workdir, run_as, start_command, size, disk_mb, egress, created_at, updated_at, built_at`

// templateFields are t's columns, to scan into or to write.
func templateFields(t *template.Template) []any {
	return []any{&t.ID, &t.OrgID, &t.Name, &t.Description, &t.Status, &t.Progress, &t.BuildError, &t.Version, &t.Image, &t.ImageSize, &t.Source, &t.Inputs,
		jsonColumn{&t.Env}, &t.Workdir, &t.User, &t.StartCommand, &t.Size, &t.DiskMB, jsonColumn{&t.Egress},
		timeColumn{&t.CreatedAt}, timeColumn{&t.UpdatedAt}, timeColumn{&t.BuiltAt}}
}

func noTemplate(nameOrID string) error {
	return fault.New(fault.NotFound, "template_not_found", "there is no template %q", nameOrID)
}

// PutTemplate implements [template.Store]. A name that another template of the
// organization has is Conflict, code "template_exists".
func (db *DB) PutTemplate(ctx context.Context, t template.Template) error {
	fields := templateFields(&t)
	_, err := db.writer.ExecContext(ctx, "INSERT INTO templates ("+templateColumns+") VALUES ("+placeholders(len(fields))+`)
		ON CONFLICT (id) DO UPDATE SET org_id = excluded.org_id, name = excluded.name, description = excluded.description,
		status = excluded.status, progress = excluded.progress, build_error = excluded.build_error, version = excluded.version,
		image = excluded.image, image_size = excluded.image_size, source = excluded.source, inputs = excluded.inputs, env = excluded.env,
		workdir = excluded.workdir, run_as = excluded.run_as, start_command = excluded.start_command, size = excluded.size,
		disk_mb = excluded.disk_mb, egress = excluded.egress, created_at = excluded.created_at,
		updated_at = excluded.updated_at, built_at = excluded.built_at`, fields...)
	if violates(err, false) {
		return fault.New(fault.Conflict, "template_exists", "there is a template %q already", t.Name).Because(err)
	}
	if err != nil {
		return fmt.Errorf("writing template %s: %w", t.ID, err)
	}
	return nil
}

// GetTemplate implements [template.Store].
func (db *DB) GetTemplate(ctx context.Context, orgID, nameOrID string) (template.Template, error) {
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
func (db *DB) ListTemplates(ctx context.Context, orgID string, limit int, after string) ([]template.Template, string, error) {
	var p params
	q := "SELECT " + templateColumns + " FROM templates WHERE org_id IN (" + p.add(orgID) + ", '')"
	end, err := page(listTemplates, limit, after, &p)
	if err != nil {
		return nil, "", err
	}
	rows, err := db.reader.QueryContext(ctx, q+end, p...)
	if err != nil {
		return nil, "", fmt.Errorf("listing templates: %w", err)
	}
	defer rows.Close()
	var all []template.Template
	for rows.Next() {
		var t template.Template
		if err := rows.Scan(templateFields(&t)...); err != nil {
			return nil, "", fmt.Errorf("listing templates: %w", err)
		}
		all = append(all, t)
	}
	if err := rows.Err(); err != nil {
		return nil, "", fmt.Errorf("listing templates: %w", err)
	}
	all, next := cut(listTemplates, all, limit, func(t template.Template) (time.Time, string) { return t.CreatedAt, t.ID })
	return all, next, nil
}

// TemplateImages implements [template.Store].
func (db *DB) TemplateImages(ctx context.Context) ([]string, error) {
	return db.texts(ctx, "listing images of templates", "SELECT DISTINCT image FROM templates WHERE version > 0 AND image <> '' ORDER BY image")
}

// AppendTemplateLog implements [template.Store]. No such template is NotFound.
func (db *DB) AppendTemplateLog(ctx context.Context, id string, reset bool, lines []template.LogLine) error {
	err := db.write(ctx, func(tx *sql.Tx) error {
		if err := tx.QueryRowContext(ctx, "SELECT id FROM templates WHERE id = $1", id).Scan(new(string)); err != nil {
			if errors.Is(err, sql.ErrNoRows) {
				return noTemplate(id)
			}
			return fmt.Errorf("reading template: %w", err)
		}
		if reset {
			if _, err := tx.ExecContext(ctx, "DELETE FROM template_logs WHERE template_id = $1", id); err != nil {
				return fmt.Errorf("dropping the log: %w", err)
			}
		}
		var last int64
		if err := tx.QueryRowContext(ctx, "SELECT COALESCE(MAX(seq), 0) FROM template_logs WHERE template_id = $1", id).Scan(&last); err != nil {
			return fmt.Errorf("reading the log's length: %w", err)
		}
		for i, line := range lines {
			if _, err := tx.ExecContext(ctx, "INSERT INTO template_logs (template_id, seq, at, line) VALUES ($1, $2, $3, $4)",
				id, last+int64(i)+1, at(line.At), line.Text); err != nil {
				return fmt.Errorf("writing a line: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("appending to the log of template %s: %w", id, err)
	}
	return nil
}

// TemplateLog implements [template.Store]. A template that is not there has no log.
func (db *DB) TemplateLog(ctx context.Context, id string) ([]template.LogLine, error) {
	rows, err := db.reader.QueryContext(ctx, "SELECT at, line FROM template_logs WHERE template_id = $1 ORDER BY seq", id)
	if err != nil {
		return nil, fmt.Errorf("reading the log of template %s: %w", id, err)
	}
	defer rows.Close()
	var all []template.LogLine
	for rows.Next() {
		var l template.LogLine
		if err := rows.Scan(timeColumn{&l.At}, &l.Text); err != nil {
			return nil, fmt.Errorf("reading the log of template %s: %w", id, err)
		}
		all = append(all, l)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading the log of template %s: %w", id, err)
	}
	return all, nil
}
