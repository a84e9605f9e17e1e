package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Session identifies a server that works with the records, by its node and fence, and the records that it works with.
type Session struct {
	Holder sandbox.Holder // the node, and the server's fence; zero for a replica, which has no node
	// Cluster identifies the records and never changes. Generation starts at 1 and rises with each accepted restore. A
	// server writes only to the generation with which it started.
	Cluster    string
	Generation int64
}

// StartSession makes db write as the newest server of a node. It takes over the rows of the node, so that an earlier
// server of the node that still runs somewhere can no longer write. Call it once, before reading the node's rows. A DB
// without a session, as in migrations and tests, writes rows that belong to no node, and in PostgreSQL only to records
// with which no session has begun.
func (db *DB) StartSession(ctx context.Context, node string, acceptRestore bool) (Session, error) {
	s, err := db.beginSession(ctx, node, acceptRestore)
	if err != nil {
		return Session{}, fmt.Errorf("starting to work with the records as node %s: %w", node, err)
	}
	return s, nil
}

// JoinSession makes db write as a replica: a server without a node, beside other servers. It can write no row that
// belongs to a node, and cannot add one. Call it once.
func (db *DB) JoinSession(ctx context.Context, acceptRestore bool) (Session, error) {
	s, err := db.beginSession(ctx, "", acceptRestore)
	if err != nil {
		return Session{}, fmt.Errorf("starting to work with the records as a replica: %w", err)
	}
	return s, nil
}

// beginSession begins the session of a node, or of a replica if node is "".
func (db *DB) beginSession(ctx context.Context, node string, acceptRestore bool) (s Session, err error) {
	err = db.begin(ctx, node, func(tx *sql.Tx) error {
		s = Session{}
		// Of two first servers one waits for the other here.
		if _, err := tx.ExecContext(ctx, `INSERT INTO cluster (one, id, generation) VALUES (TRUE, $1, 1)
			ON CONFLICT DO NOTHING`, rand.Text()); err != nil {
			return err
		}
		var more int64
		if acceptRestore {
			more = 1
			// The leases are as old as the records, and no server of the generation before can extend one.
			if _, err := tx.ExecContext(ctx, "DELETE FROM node_leases"); err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, "UPDATE nodes SET lost_at = NULL"); err != nil {
				return err
			}
		}
		if err := tx.QueryRowContext(ctx, "UPDATE cluster SET generation = generation + $1 RETURNING id, generation", more).
			Scan(&s.Cluster, &s.Generation); err != nil {
			return err
		}
		if node == "" {
			return nil
		}
		s.Holder, err = db.takeOver(ctx, tx, node)
		return err
	})
	if err != nil {
		return Session{}, err
	}
	db.began(s)
	db.session.Store(&s)
	return s, nil
}

// startTime is the time in which a server that has taken over the rows of its node begins a session of the node, if it
// is in a fleet. Some seconds are usual. With a longer one, a machine that dies meanwhile is lost later; with a shorter
// one, a slow start loses the node's sandboxes.
const startTime = 2 * time.Minute

// takeOver gives a node the next fence, and its rows too.
func (db *DB) takeOver(ctx context.Context, tx *sql.Tx, node string) (sandbox.Holder, error) {
	h := sandbox.Holder{Node: node}
	p := params{node}
	err := tx.QueryRowContext(ctx, "INSERT INTO nodes (id, fence, started_at) VALUES ($1, 1, "+db.now(&p, time.Now())+
		`) ON CONFLICT (id) DO UPDATE SET fence = nodes.fence + 1, started_at = excluded.started_at, lost_at = NULL
		WHERE nodes.removed_at IS NULL RETURNING fence`, p...).Scan(&h.Fence)
	if errors.Is(err, sql.ErrNoRows) {
		return h, errRemoved
	}
	if err != nil {
		return h, err
	}
	// The session of the node's earlier server is over. This one has some time until it begins another one.
	p = params{node}
	now := db.now(&p, time.Now())
	if _, err := tx.ExecContext(ctx, "UPDATE node_leases SET session = '', seen_at = "+now+", until = "+now+" + "+
		p.add(startTime.Microseconds())+" WHERE node_id = $1", p...); err != nil {
		return h, err
	}
	return h, takeRows(ctx, tx, h)
}

// takeRows gives the rows of a node a fence.
func takeRows(ctx context.Context, tx *sql.Tx, h sandbox.Holder) error {
	for _, rows := range []string{"sandboxes SET fence = $1 WHERE ended_at IS NULL AND", "pool SET fence = $1 WHERE",
		"snapshots SET fence = $1 WHERE"} {
		if _, err := tx.ExecContext(ctx, "UPDATE "+rows+" node_id = $2", h.Fence, h.Node); err != nil {
			return err
		}
	}
	return nil
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

// isReplica reports whether db has the session of a replica.
func (db *DB) isReplica() bool {
	s := db.session.Load()
	return s != nil && s.Holder == (sandbox.Holder{})
}

// change runs a statement in a transaction of its own. A statement without one would change restored records too.
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
	case db.isReplica():
		return fault.New(fault.Unavailable, fault.CodeNotReady, "it belongs to a node, and this server has none")
	case h.Node != me.Node:
		return fault.New(fault.Unavailable, fault.CodeNotReady, "it belongs to another node than this server")
	case h.Fence > me.Fence:
		return errSuperseded
	}
	return nil
}

var (
	// errSuperseded reports that another server of the same node has started since.
	errSuperseded = fault.New(fault.Unavailable, fault.CodeNotReady,
		"another server has taken over the records of this one, and this one can no longer write: end one of the two")
	// errLost reports that the other servers have given the node up as lost.
	errLost = fault.New(fault.Unavailable, fault.CodeNotReady,
		"the other servers count this one as lost, and it can no longer write until it has started again")
	// errRestored reports to a replica that a server has accepted a restore since.
	errRestored = fault.New(fault.Unavailable, fault.CodeNotReady,
		"the records were restored to an older state since this server has started: start it again")
	// errRemoved reports that an operator has removed the node.
	errRemoved = fault.New(fault.Unavailable, fault.CodeNotReady,
		"this node was removed from the cluster and can no longer write: start it with a new data directory")
	// errNoSession reports a write of a process that has not begun a session.
	errNoSession = errors.New("other servers work with the records, and this process has not begun a session")
)

// heldSandbox reads a sandbox after a conditional write has changed no row. It returns an error if db may not write the
// row at all, unless the sandbox is over.
func (db *DB) heldSandbox(ctx context.Context, tx *sql.Tx, id sandbox.ID) (sandbox.Sandbox, error) {
	s, err := getSandbox(ctx, tx, id)
	if err == nil && !s.State.Over() {
		err = db.holds(s.Holder)
	}
	return s, err
}
