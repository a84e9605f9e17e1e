package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// pooledColumns lists the columns of pooledFields, in the same order.
const pooledColumns = `id, run, token, org_id, template, template_id, template_version, image,
	shape, created_at, node_id, fence`

// pooledFields returns m's columns, to scan into or to write.
func pooledFields(m *sandbox.Pooled) []any {
	return []any{&m.ID, &m.Run, &m.Token, &m.OrgID, &m.Template, &m.TemplateID, &m.TemplateVersion, &m.Image,
		jsonColumn{&m.Shape}, timeColumn{&m.CreatedAt}, &m.Holder.Node, &m.Holder.Fence}
}

// AddPooled implements [sandbox.Store].
func (db *DB) AddPooled(ctx context.Context, m sandbox.Pooled) error {
	defer db.took("add_pooled", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		m.Holder = db.holder()
		if err := db.holds(m.Holder); err != nil {
			return err
		}
		fields := pooledFields(&m)
		if _, err := tx.ExecContext(ctx,
			"INSERT INTO pool ("+pooledColumns+") VALUES ("+placeholders(len(fields))+")", fields...); err != nil {
			return err
		}
		var taken int
		if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM sandboxes WHERE id = $1", m.ID).Scan(&taken); err != nil {
			return err
		}
		if taken > 0 {
			return fmt.Errorf("a sandbox with that ID exists")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("adding sandbox %s to the warm pool: %w", m.ID, err)
	}
	return nil
}

// DropPooled implements [sandbox.Store].
func (db *DB) DropPooled(ctx context.Context, id sandbox.ID) error {
	defer db.took("drop_pooled", time.Now())
	p := params{id}
	if err := db.change(ctx, "DELETE FROM pool WHERE id = $1"+db.mine(&p), p...); err != nil {
		return fmt.Errorf("dropping sandbox %s from the warm pool: %w", id, err)
	}
	return nil
}

// ListPooled implements [sandbox.Store].
func (db *DB) ListPooled(ctx context.Context) ([]sandbox.Pooled, error) {
	defer db.took("list_pooled", time.Now())
	all, err := collect(ctx, db.reader, pooledFields, "SELECT "+pooledColumns+
		" FROM pool WHERE node_id = $1 ORDER BY created_at, id", db.holder().Node)
	if err != nil {
		return nil, fmt.Errorf("listing the warm pool: %w", err)
	}
	return all, nil
}

// Admit implements [sandbox.Store].
func (db *DB) Admit(ctx context.Context, s sandbox.Sandbox, q sandbox.Quota,
	once sandbox.Once) (sandbox.Sandbox, bool, error) {
	defer db.took("admit", time.Now())
	prior, found, err := db.admit(ctx, db.reader, s, q, once)
	if err != nil {
		return sandbox.Sandbox{}, false, fmt.Errorf("checking whether sandbox %s may be created: %w", s.ID, err)
	}
	return prior, found, nil
}

// Claim implements [sandbox.Store].
func (db *DB) Claim(ctx context.Context, s sandbox.Sandbox, q sandbox.Quota,
	once sandbox.Once) (prior sandbox.Sandbox, found bool, err error) {
	defer db.took("claim", time.Now())
	if s.State != sandbox.Running {
		return prior, false, fmt.Errorf("claiming sandbox %s in state %q", s.ID, s.State)
	}
	err = db.recordCounted(ctx, counts(s, q, once), func(tx *sql.Tx, out *outbox) error {
		if prior, found, err = db.admit(ctx, tx, s, q, once); err != nil || found {
			return err
		}
		p := params{s.ID}
		r, err := tx.ExecContext(ctx, "DELETE FROM pool WHERE id = $1"+db.mine(&p), p...)
		if err != nil {
			return fmt.Errorf("taking the pooled sandbox: %w", err)
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			if err != nil {
				return fmt.Errorf("taking the pooled sandbox: %w", err)
			}
			return fault.New(fault.Conflict, fault.CodeNoPooled, "the warm pool has no sandbox %s", s.ID)
		}
		return insertSandbox(ctx, tx, out, s, once,
			sandbox.Event{SandboxID: s.ID, At: s.StartedAt, From: sandbox.Creating, To: sandbox.Running})
	})
	if err != nil {
		return sandbox.Sandbox{}, false, fmt.Errorf("claiming sandbox %s: %w", s.ID, err)
	}
	return prior, found, nil
}
