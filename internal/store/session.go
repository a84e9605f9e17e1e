package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Session identifies a server that works with the records, by its node and fence, and the records that it works with.
type Session struct {
	Holder sandbox.Holder // the node, and the server's fence
	// Cluster identifies the records and never changes. Generation starts at 1 and rises with each accepted restore. A
	// server writes only to the generation with which it started.
	Cluster    string
	Generation int64
}

// StartSession makes db write as the newest server of a node. It takes over the rows of the node, so that an earlier
// server of the node that still runs somewhere can no longer write. Call it once, before reading the node's rows. A DB
// without a session, as in migrations and tests of this package, writes rows that belong to no node.
func (db *DB) StartSession(ctx context.Context, node string, acceptRestore bool) (Session, error) {
	s, err := db.startSession(ctx, node, acceptRestore)
	if err != nil {
		return Session{}, fmt.Errorf("starting to work with the records as node %s: %w", node, err)
	}
	db.session.Store(&s)
	return s, nil
}

func (db *DB) startSession(ctx context.Context, node string, acceptRestore bool) (s Session, err error) {
	if err := db.begin(ctx, node); err != nil {
		return s, err
	}
	err = db.write(ctx, func(tx *sql.Tx) error {
		s = Session{Holder: sandbox.Holder{Node: node}}
		// Of two first servers one waits for the other here.
		if _, err := tx.ExecContext(ctx, `INSERT INTO cluster (one, id, generation) VALUES (TRUE, $1, 1)
			ON CONFLICT DO NOTHING`, rand.Text()); err != nil {
			return err
		}
		var more int64
		if acceptRestore {
			more = 1
		}
		if err := tx.QueryRowContext(ctx, "UPDATE cluster SET generation = generation + $1 RETURNING id, generation", more).
			Scan(&s.Cluster, &s.Generation); err != nil {
			return err
		}
		p := params{node}
		if err := tx.QueryRowContext(ctx, "INSERT INTO nodes (id, fence, started_at) VALUES ($1, 1, "+db.now(&p, time.Now())+
			`) ON CONFLICT (id) DO UPDATE SET fence = nodes.fence + 1, started_at = excluded.started_at RETURNING fence`,
			p...).Scan(&s.Holder.Fence); err != nil {
			return err
		}
		for _, rows := range []string{"sandboxes SET fence = $1 WHERE ended_at IS NULL AND", "pool SET fence = $1 WHERE",
			"snapshots SET fence = $1 WHERE"} {
			if _, err := tx.ExecContext(ctx, "UPDATE "+rows+" node_id = $2", s.Holder.Fence, node); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		db.began(s)
	}
	return s, err
}

// holder returns the holder of the rows that db writes.
func (db *DB) holder() sandbox.Holder {
	if s := db.session.Load(); s != nil {
		return s.Holder
	}
	return sandbox.Holder{}
}

// mine returns a condition, to append to a WHERE clause, that is true of the rows that db may write. An earlier server
// inserted a row with a lower fence while this one took over.
func (db *DB) mine(p *params) string {
	me := db.holder()
	return " AND node_id = " + p.add(me.Node) + " AND fence <= " + p.add(me.Fence)
}

// change runs a statement that writes rows of the node in a transaction of its own. A statement without one would
// change restored records too.
func (db *DB) change(ctx context.Context, query string, args ...any) error {
	return db.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	})
}

// holds returns an error if db may not write a row with the holder h. The error is never NotFound, since callers remove
// a sandbox that has no row.
func (db *DB) holds(h sandbox.Holder) error {
	switch me := db.holder(); {
	case h.Node != me.Node:
		return fault.New(fault.Unavailable, fault.CodeNotReady, "it belongs to another node than this server")
	case h.Fence > me.Fence:
		return errSuperseded
	}
	return nil
}

// errSuperseded reports that another server of the same node has started since.
var errSuperseded = fault.New(fault.Unavailable, fault.CodeNotReady,
	"another server has taken over the records of this one, and this one can no longer write: end one of the two")

// heldSandbox reads a sandbox after a conditional write has changed no row. It returns an error if db may not write the
// row at all.
func (db *DB) heldSandbox(ctx context.Context, tx *sql.Tx, id sandbox.ID) (sandbox.Sandbox, error) {
	s, err := getSandbox(ctx, tx, id)
	if err == nil {
		err = db.holds(s.Holder)
	}
	return s, err
}
