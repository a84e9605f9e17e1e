package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
)

// tokensKept is the time for which a token is kept after its own, so that a machine that uses it is told why it is
// refused.
const tokensKept = 24 * time.Hour

// AddToken implements [fleet.Store].
func (db *DB) AddToken(ctx context.Context, t fleet.Token, valid time.Duration) (expires time.Time, err error) {
	defer db.took("add_token", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		if t.Rejoin != "" {
			if _, err := scanNode(tx.QueryRowContext(ctx, getNode, t.Rejoin), t.Rejoin); err != nil {
				return err
			}
		}
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		old := at(now.Add(-tokensKept))
		if _, err := tx.ExecContext(ctx, "DELETE FROM node_tokens WHERE expires_at < $1", old); err != nil {
			return err
		}
		expires = now.Add(valid)
		_, err = tx.ExecContext(ctx, `INSERT INTO node_tokens (hash, node_id, settings, created_by, created_at, expires_at,
			used_by, used_key) VALUES ($1, $2, $3, $4, $5, $6, '', '')`,
			t.Hash, t.Rejoin, jsonColumn{&t.Settings}, t.CreatedBy, at(now), at(expires))
		return err
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("adding a token: %w", err)
	}
	return expires, nil
}

// nowIn returns the time of the records' clock, exactly.
func (db *DB) nowIn(ctx context.Context, tx *sql.Tx) (now time.Time, err error) {
	var p params
	err = tx.QueryRowContext(ctx, "SELECT "+db.now(&p, time.Now()), p...).Scan(timeColumn{&now})
	return now, err
}

// Join implements [fleet.Store].
func (db *DB) Join(ctx context.Context, tokenHash string, n fleet.Node, keySum string) (joined fleet.Node, err error) {
	defer db.took("join", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		var t fleet.Token
		// Of two machines with one token, one waits here for the other.
		err = tx.QueryRowContext(ctx, `UPDATE node_tokens SET used_at = $1,
			used_by = CASE node_id WHEN '' THEN $2 ELSE node_id END, used_key = $3
			WHERE hash = $4 AND used_at IS NULL AND expires_at > $1 RETURNING node_id, settings`,
			at(now), n.ID, keySum, tokenHash).Scan(&t.Rejoin, jsonColumn{&t.Settings})
		switch {
		case errors.Is(err, sql.ErrNoRows):
			joined, err = usedToken(ctx, tx, tokenHash, keySum, now)
			return err
		case err != nil:
			return fmt.Errorf("using a token: %w", err)
		case t.Rejoin != "":
			joined, err = rejoin(ctx, tx, t.Rejoin, n.About, keySum, now)
			return err
		}
		if t.Settings.Name != "" {
			n.Name = t.Settings.Name
		}
		n.Labels = t.Settings.Labels
		var ids int
		if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM nodes WHERE id = $1", n.Name).Scan(&ids); err != nil {
			return err
		}
		if ids > 0 { // calls find nodes by both
			return fault.New(fault.Conflict, fault.CodeNodeExists, "another node has the id %q", n.Name)
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO nodes (id, fence, started_at, name, about, labels, key_sum, joined_at)
			VALUES ($1, 0, $2, $3, $4, $5, $6, $2)`,
			n.ID, at(now), n.Name, jsonColumn{&n.About}, jsonColumn{&n.Labels}, keySum); err != nil {
			return err
		}
		joined, err = scanNode(tx.QueryRowContext(ctx, getNode, n.ID), n.ID)
		return err
	})
	if err != nil {
		return fleet.Node{}, fmt.Errorf("joining: %w", db.nodeExists(err, n.Name))
	}
	return joined, nil
}

// usedToken returns the node that has used a token with the same key before, or says why the token cannot be used.
func usedToken(ctx context.Context, tx *sql.Tx, hash, keySum string, now time.Time) (fleet.Node, error) {
	var used, expires time.Time
	var by, key string
	err := tx.QueryRowContext(ctx, "SELECT used_at, expires_at, used_by, used_key FROM node_tokens WHERE hash = $1", hash).
		Scan(timeColumn{&used}, timeColumn{&expires}, &by, &key)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return fleet.Node{}, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated, "there is no such token")
	case err != nil:
		return fleet.Node{}, err
	case !used.IsZero() && key != keySum:
		return fleet.Node{}, fault.New(fault.Conflict, fault.CodeTokenUsed, "the token was used by another machine")
	case !expires.After(now):
		return fleet.Node{}, fault.New(fault.Unauthenticated, fault.CodeTokenExpired, "the token has expired")
	}
	if _, err := checkNode(ctx, tx, by, keySum, ""); err != nil {
		return fleet.Node{}, err
	}
	return scanNode(tx.QueryRowContext(ctx, getNode, by), by)
}

// rejoin gives a node another key, ends its session, and writes what is known about it.
func rejoin(ctx context.Context, tx *sql.Tx, id fleet.ID, about fleet.About, keySum string,
	now time.Time) (fleet.Node, error) {
	if err := enroll(ctx, tx, id, keySum, now); err != nil {
		return fleet.Node{}, err
	}
	if _, err := tx.ExecContext(ctx, "UPDATE nodes SET about = $1 WHERE id = $2", jsonColumn{&about}, id); err != nil {
		return fleet.Node{}, err
	}
	return scanNode(tx.QueryRowContext(ctx, getNode, id), id)
}

// enroll gives a node another key and ends its session.
func enroll(ctx context.Context, tx *sql.Tx, id fleet.ID, keySum string, now time.Time) error {
	r, err := tx.ExecContext(ctx, "UPDATE nodes SET key_sum = $1, joined_at = $2 WHERE id = $3 AND removed_at IS NULL",
		keySum, at(now), id)
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); err != nil || n == 0 {
		return errors.Join(err, fleet.Refused("it was removed"))
	}
	_, err = tx.ExecContext(ctx, "DELETE FROM node_leases WHERE node_id = $1", id)
	return err
}

// EnrollNode implements [fleet.Store].
func (db *DB) EnrollNode(ctx context.Context, id fleet.ID, keySum string) error {
	defer db.took("enroll_node", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		return enroll(ctx, tx, id, keySum, now)
	})
	if err != nil {
		return fmt.Errorf("giving node %s a key: %w", id, err)
	}
	return nil
}

// checkNode returns an error unless the node exists, is not removed and has the key, and otherwise its newest session.
// lock is the end of a SELECT.
func checkNode(ctx context.Context, q rower, id fleet.ID, keySum, lock string) (session string, err error) {
	var key string
	var removed time.Time
	err = q.QueryRowContext(ctx, `SELECT key_sum, removed_at, COALESCE((SELECT session FROM node_leases
		WHERE node_id = nodes.id), '') FROM nodes WHERE id = $1`+lock, id).Scan(&key, timeColumn{&removed}, &session)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", fleet.Refused("there is no such node")
	case err != nil:
		return "", fmt.Errorf("reading node %s: %w", id, err)
	case !removed.IsZero():
		return "", fleet.Refused("it was removed")
	case key == "" || key != keySum:
		return "", fleet.Refused("it has joined again with another key")
	}
	return session, nil
}

// rower reads a row. *sql.DB and *sql.Tx implement it.
type rower interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// CheckNode implements [fleet.Store].
func (db *DB) CheckNode(ctx context.Context, id fleet.ID, keySum string) (session string, err error) {
	defer db.took("check_node", time.Now())
	return checkNode(ctx, db.reader, id, keySum, "")
}

// onLease runs f, which writes the lease of a node, if CheckNode holds. It returns refused if f wrote no row.
func (db *DB) onLease(ctx context.Context, id fleet.ID, keySum string, refused error,
	f func(tx *sql.Tx, now time.Time) (sql.Result, error)) (n fleet.Node, err error) {
	err = db.write(ctx, func(tx *sql.Tx) error {
		// The lock keeps a removal and a rejoin from coming in between.
		if _, err := checkNode(ctx, tx, id, keySum, db.forUpdate()); err != nil {
			return err
		}
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		r, err := f(tx, now)
		if err != nil {
			return err
		}
		if written, err := r.RowsAffected(); err != nil || written == 0 {
			return errors.Join(err, refused)
		}
		n, err = scanNode(tx.QueryRowContext(ctx, getNode, id), id)
		return err
	})
	if err != nil {
		return fleet.Node{}, fmt.Errorf("writing the lease of node %s: %w", id, err)
	}
	return n, nil
}

// BeginLease implements [fleet.Store].
func (db *DB) BeginLease(ctx context.Context, id fleet.ID, keySum, session string,
	lease time.Duration) (fleet.Node, error) {
	defer db.took("begin_lease", time.Now())
	used := fault.New(fault.Conflict, fault.CodeNodeInUse,
		"another server of this node is running: end it, or wait %s after it has died", lease)
	return db.onLease(ctx, id, keySum, used, func(tx *sql.Tx, now time.Time) (sql.Result, error) {
		return tx.ExecContext(ctx, `INSERT INTO node_leases (node_id, session, began_at, seen_at, until)
			VALUES ($1, $2, $3, $3, $4) ON CONFLICT (node_id) DO UPDATE SET session = excluded.session,
			began_at = excluded.began_at, seen_at = excluded.seen_at, until = excluded.until,
			memory_free_mb = 0, sandboxes = 0, starting = 0
			WHERE node_leases.until <= excluded.seen_at OR node_leases.session = excluded.session`,
			id, session, at(now), at(now.Add(lease)))
	})
}

// ExtendLease implements [fleet.Store].
func (db *DB) ExtendLease(ctx context.Context, id fleet.ID, keySum, session string, lease time.Duration,
	load fleet.Load) (fleet.Node, error) {
	defer db.took("extend_lease", time.Now())
	return db.onLease(ctx, id, keySum, fleet.ErrAnotherSession, func(tx *sql.Tx, now time.Time) (sql.Result, error) {
		return tx.ExecContext(ctx, `UPDATE node_leases SET seen_at = $1, until = $2, memory_free_mb = $3, sandboxes = $4,
			starting = $5 WHERE node_id = $6 AND session = $7`,
			at(now), at(now.Add(lease)), load.MemoryFreeMB, load.Sandboxes, load.Starting, id, session)
	})
}

// EndLease implements [fleet.Store].
func (db *DB) EndLease(ctx context.Context, id fleet.ID, keySum, session string) error {
	defer db.took("end_lease", time.Now())
	_, err := db.onLease(ctx, id, keySum, fleet.ErrAnotherSession, func(tx *sql.Tx, _ time.Time) (sql.Result, error) {
		return tx.ExecContext(ctx, "DELETE FROM node_leases WHERE node_id = $1 AND session = $2", id, session)
	})
	return err
}

// RemoveNode implements [fleet.Store].
func (db *DB) RemoveNode(ctx context.Context, idOrName string) error {
	defer db.took("remove_node", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		n, err := scanNode(tx.QueryRowContext(ctx, getNode, idOrName), idOrName)
		if err != nil {
			return err
		}
		var snapshots int
		if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM snapshots WHERE node_id = $1", n.ID).
			Scan(&snapshots); err != nil {
			return err
		}
		if n.Sandboxes > 0 || snapshots > 0 {
			return fault.New(fault.Conflict, fault.CodeNodeInUse, "node %s has %d sandboxes and %d snapshots", n.Name,
				n.Sandboxes, snapshots)
		}
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE nodes SET removed_at = $1 WHERE id = $2", at(now), n.ID); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM node_leases WHERE node_id = $1", n.ID)
		return err
	})
	if err != nil {
		return fmt.Errorf("removing a node: %w", err)
	}
	return nil
}

// Authority holds an authority as the records have it: its certificate, and its key in a form that the records cannot
// open.
type Authority struct {
	ID          string
	Certificate string // PEM
	Sealed      string
}

const listAuthorities = "SELECT id, certificate, sealed FROM authorities ORDER BY created_at DESC, id"

// Authorities returns the authorities of the cluster, newest first.
func (db *DB) Authorities(ctx context.Context) ([]Authority, error) {
	defer db.took("authorities", time.Now())
	all, err := collect(ctx, db.reader, func(a *Authority) []any { return []any{&a.ID, &a.Certificate, &a.Sealed} },
		listAuthorities)
	if err != nil {
		return nil, fmt.Errorf("reading the authorities: %w", err)
	}
	return all, nil
}

// FirstAuthority adds an authority if there is none, and returns the one that there is then. Of several calls at once,
// one adds, and all return what it added.
func (db *DB) FirstAuthority(ctx context.Context, a Authority) (first Authority, err error) {
	defer db.took("first_authority", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		// The row of the cluster is locked, so that of two first servers one waits for the other.
		if _, err := tx.ExecContext(ctx, "UPDATE cluster SET generation = generation"); err != nil {
			return err
		}
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO authorities (id, certificate, sealed, created_at)
			SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT 1 FROM authorities)`,
			a.ID, a.Certificate, a.Sealed, at(now)); err != nil {
			return err
		}
		return tx.QueryRowContext(ctx, listAuthorities+" LIMIT 1").
			Scan(&first.ID, &first.Certificate, &first.Sealed)
	})
	if err != nil {
		return Authority{}, fmt.Errorf("writing the authority: %w", err)
	}
	return first, nil
}
