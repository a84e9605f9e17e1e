package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// SetPublicPort implements [sandbox.Store].
func (db *DB) SetPublicPort(ctx context.Context, id sandbox.ID, port int, public bool) error {
	defer db.took("set_public_port", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		if !public {
			r, err := tx.ExecContext(ctx, "DELETE FROM public_ports WHERE sandbox_id = $1 AND port = $2", id, port)
			if err != nil {
				return err
			}
			return out.port(ctx, event.SandboxPortPrivate, id, port, r)
		}
		// The row's lock keeps other calls from counting the same ports.
		if _, err := db.lockSandbox(ctx, tx, id); err != nil {
			return err
		}
		var others int
		if err := tx.QueryRowContext(ctx,
			"SELECT COUNT(*) FROM public_ports WHERE sandbox_id = $1 AND port <> $2", id, port).Scan(&others); err != nil {
			return fmt.Errorf("counting public ports: %w", err)
		}
		if others >= sandbox.MaxPublicPorts {
			return fault.New(fault.Conflict, fault.CodeTooManyPublicPorts,
				"a sandbox may have %d public ports", sandbox.MaxPublicPorts)
		}
		r, err := tx.ExecContext(ctx, `INSERT INTO public_ports (sandbox_id, port) VALUES ($1, $2)
			ON CONFLICT DO NOTHING`, id, port)
		if db.violates(err, true) {
			return fault.New(fault.NotFound, fault.CodeSandboxNotFound, "there is no sandbox %q", string(id))
		}
		if err != nil {
			return err
		}
		return out.port(ctx, event.SandboxPortPublic, id, port, r)
	})
	if err != nil {
		return fmt.Errorf("changing port %d of %s: %w", port, id, err)
	}
	return nil
}

// port writes the event that a port became public or private, if r changed a row.
func (o *outbox) port(ctx context.Context, t event.Type, id sandbox.ID, port int, r sql.Result) error {
	if n, err := r.RowsAffected(); err != nil || n == 0 {
		return err
	}
	e := event.Event{At: time.Now(), Type: t, SandboxID: string(id), About: event.About{Port: port}}
	if err := o.tx.QueryRowContext(ctx, "SELECT org_id FROM sandboxes WHERE id = $1", id).Scan(&e.OrgID); err != nil {
		return fmt.Errorf("reading the organization of %s: %w", id, err)
	}
	return o.add(ctx, e)
}

// PublicPorts implements [sandbox.Store].
func (db *DB) PublicPorts(ctx context.Context, id sandbox.ID) ([]int, error) {
	defer db.took("public_ports", time.Now())
	ports, err := collect(ctx, db.reader, func(port *int) []any { return []any{port} },
		"SELECT port FROM public_ports WHERE sandbox_id = $1 ORDER BY port", id)
	if err != nil {
		return nil, fmt.Errorf("listing public ports of %s: %w", id, err)
	}
	return ports, nil
}
