package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// unfinishedOn counts the sandboxes of a node that are not over.
	unfinishedOn = "SELECT COUNT(*) FROM sandboxes WHERE sandboxes.node_id = nodes.id AND sandboxes.ended_at IS NULL"
	// nodeColumns lists the columns of nodeFields, in the same order.
	nodeColumns = "id, name, about, labels, started_at, cordoned_at, drain_by, joined_at, lost_at, " +
		"COALESCE(session, ''), seen_at, until, " +
		"COALESCE(memory_free_mb, 0), COALESCE(node_leases.sandboxes, 0), COALESCE(starting, 0), " +
		"(" + unfinishedOn + "), (" + unfinishedOn + " AND sandboxes.state <> '" + string(sandbox.Suspended) + "')"
	nodesWithLeases = " FROM nodes LEFT JOIN node_leases ON node_leases.node_id = nodes.id WHERE removed_at IS NULL"
	// theNode finds the id of the node with the id or, if there is none, the name $1.
	theNode = `COALESCE((SELECT id FROM nodes WHERE id = $1),
		(SELECT id FROM nodes WHERE name = $1 AND name <> '' AND removed_at IS NULL))`
	getNode   = "SELECT " + nodeColumns + nodesWithLeases + " AND id = " + theNode
	listNodes = "SELECT " + nodeColumns + nodesWithLeases + " ORDER BY name, id"
)

// nodeFields returns where to scan n's columns to.
func nodeFields(n *fleet.Node) []any {
	return []any{&n.ID, &n.Name, jsonColumn{&n.About}, jsonColumn{&n.Labels}, timeColumn{&n.StartedAt},
		timeColumn{&n.CordonedAt}, timeColumn{&n.DrainBy}, timeColumn{&n.JoinedAt}, timeColumn{&n.LostAt}, &n.Session, timeColumn{&n.SeenAt},
		timeColumn{&n.LeaseUntil}, &n.Load.MemoryFreeMB, &n.Load.Sandboxes, &n.Load.Starting, &n.Sandboxes, &n.Active}
}

func scanNode(row scanner, idOrName string) (fleet.Node, error) {
	var n fleet.Node
	err := row.Scan(nodeFields(&n)...)
	if errors.Is(err, sql.ErrNoRows) {
		return fleet.Node{}, fleet.NotFound(idOrName)
	}
	return n, err
}

// RegisterNode implements [fleet.Store].
func (db *DB) RegisterNode(ctx context.Context, n fleet.Node) (registered fleet.Node, err error) {
	defer db.took("register_node", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE nodes SET name = $1, about = $2, labels = $3 WHERE id = $4",
			n.Name, jsonColumn{&n.About}, jsonColumn{&n.Labels}, n.ID); err != nil {
			return err
		}
		registered, err = scanNode(tx.QueryRowContext(ctx, getNode, n.ID), n.ID)
		return err
	})
	if err != nil {
		return fleet.Node{}, fmt.Errorf("writing node %s: %w", n.ID, db.nodeExists(err, n.Name))
	}
	return registered, nil
}

// nodeExists returns the error for a name that another node has, if err came of writing one, and err otherwise.
func (db *DB) nodeExists(err error, name string) error {
	if db.violates(err, false) {
		return fault.New(fault.Conflict, fault.CodeNodeExists, "another node has the name %q", name)
	}
	return err
}

// GetNode implements [fleet.Store].
func (db *DB) GetNode(ctx context.Context, idOrName string) (fleet.Node, error) {
	defer db.took("get_node", time.Now())
	n, err := scanNode(db.reader.QueryRowContext(ctx, getNode, idOrName), idOrName)
	if err != nil {
		return n, fmt.Errorf("reading a node: %w", err)
	}
	return n, nil
}

// ListNodes implements [fleet.Store].
func (db *DB) ListNodes(ctx context.Context) ([]fleet.Node, error) {
	defer db.took("list_nodes", time.Now())
	all, err := collect(ctx, db.reader, nodeFields, listNodes)
	if err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	return all, nil
}

// SetCordon implements [fleet.Store].
func (db *DB) SetCordon(ctx context.Context, idOrName string, on bool, drain time.Duration) (n fleet.Node, err error) {
	defer db.took("set_cordon", time.Now())
	p := params{idOrName}
	set := "cordoned_at = NULL, drain_by = NULL"
	if on {
		now := db.now(&p, time.Now())
		set = "cordoned_at = COALESCE(cordoned_at, " + now + ")"
		if drain > 0 {
			set += ", drain_by = " + now + " + " + p.add(drain.Microseconds())
		}
	}
	err = db.write(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "UPDATE nodes SET "+set+" WHERE id = "+theNode, p...); err != nil {
			return err
		}
		n, err = scanNode(tx.QueryRowContext(ctx, getNode, idOrName), idOrName)
		return err
	})
	if err != nil {
		return fleet.Node{}, fmt.Errorf("changing a node: %w", err)
	}
	return n, nil
}
