package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
)

// postgresDialect implements dialect for PostgreSQL. Many writers work at once; each locks the rows that it decides by.
type postgresDialect struct {
	db   *DB
	pool *pgxpool.Pool

	retries atomic.Int64
	mark    mark
	lines   *lines
	clock   *clock
	// keeper is set by begin, before any call that reads it.
	keeper *keeper

	// numbering is held while events are numbered, so that a process numbers them once and wakes followers in order.
	numbering sync.Mutex
	// unannounced is the seq beyond which events may have got their seqs unannounced, nil if there are none.
	// +checklocks:numbering
	unannounced *event.Seq
	fresh       chan struct{} // has room for one: events wait for their numbers
	stop        context.CancelFunc
	stopped     chan struct{}
}

const (
	// maxTries limits how often a transaction is run that the database has ended to resolve a conflict with
	// another one. Locks are taken in one order, so conflicts are rare, and a second one of the same call
	// hardly occurs. A higher limit would hide an endless conflict for longer.
	maxTries = 6
	// retryDelay bounds the first wait before a transaction is run again; each further wait is up to twice
	// as long. A shorter wait could meet the same conflict again; a longer one would delay the call.
	retryDelay = 5 * time.Millisecond
	// outcomePatience limits the time to learn whether a transaction was committed whose connection broke
	// during the commit. A database that restarts after a crash needs some seconds; a call waits that long.
	outcomePatience = 10 * time.Second
)

// write runs f in a transaction. Rows that f has locked stay the same until it ends.
func (d *postgresDialect) write(ctx context.Context, org string, f func(tx *sql.Tx) error) error {
	if org == "" {
		return d.transact(ctx, nil, f)
	}
	return d.transact(ctx, []statement{orgLock(org)}, f)
}

// transact runs statements that lock, and then f, in a transaction. If the database ended the transaction because of a
// conflict with another one, transact runs them again.
func (d *postgresDialect) transact(ctx context.Context, locks []statement, f func(tx *sql.Tx) error) error {
	return d.transactWith(ctx, d.commitRow, locks, f)
}

// transactWith does what transact does. row returns the statement that writes the row of a transaction.
func (d *postgresDialect) transactWith(ctx context.Context, row func(at, id int64) statement, locks []statement,
	f func(tx *sql.Tx) error) error {
	for try := 1; ; try++ {
		err := away(ctx, d.transactOnce(ctx, row, locks, f))
		if code := pgCode(err); try == maxTries || code != codeSerialization && code != codeDeadlock {
			return err
		}
		d.retries.Add(1)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(rand.N(retryDelay << try)):
		}
	}
}

// The codes of PostgreSQL's errors that decide.
const (
	codeSerialization = "40001"
	codeDeadlock      = "40P01"
	codeForeignKey    = "23503"
	codeUnique        = "23505"
	codeFull          = "53300" // no room for another connection
	codeStarting      = "57P03"
)

func (d *postgresDialect) transactOnce(ctx context.Context, row func(at, id int64) statement, locks []statement,
	f func(tx *sql.Tx) error) error {
	at, id := d.present().UnixMicro(), rand.Int64() // servers with other clocks drop these rows
	open := &opening{all: append([]statement{begin, row(at, id)}, locks...)}
	tx, err := d.db.writer.BeginTx(context.WithValue(ctx, openingKey{}, open), nil)
	if err != nil {
		return fmt.Errorf("beginning transaction: %w", err)
	}
	// Rollback does nothing after a commit. After an error of f, that error is the one to report, and the
	// database rolls back what a broken connection leaves.
	defer func() { _ = tx.Rollback() }()
	if open.wrote[1] == 0 { // no row of the transaction
		return d.refusal(ctx, tx)
	}
	if err := f(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return d.outcome(ctx, at, id, err)
	}
	return nil
}

const (
	insertCommit = "INSERT INTO commits (at, id, aborted) SELECT $1::bigint, $2::bigint, FALSE"
	// insertNodeCommit writes the row of a transaction, if the server's session is the newest of its node, in the present
	// generation of the cluster, and the node is not removed.
	insertNodeCommit = insertCommit + ` WHERE EXISTS (SELECT 1 FROM nodes n, cluster c WHERE n.id = $3 AND n.fence = $4
		AND n.removed_at IS NULL AND c.id = $5 AND c.generation = $6)`
	// insertReplicaCommit does so if the session's generation of the cluster is the present one.
	insertReplicaCommit = insertCommit + " WHERE EXISTS (SELECT 1 FROM cluster WHERE id = $3 AND generation = $4)"
	// insertFreeCommit does so without a session, if none has ever begun.
	insertFreeCommit = insertCommit + " WHERE NOT EXISTS (SELECT 1 FROM cluster)"
	// decideCommit waits for the end of a transaction that is in progress, and keeps one that was not committed
	// from being committed. Repeated, it gives the same answer.
	decideCommit = `INSERT INTO commits AS c (at, id, aborted) VALUES ($1, $2, TRUE)
		ON CONFLICT (at, id) DO UPDATE SET at = c.at RETURNING aborted`
	// commitsKept is the time of the database for which rows of transactions are kept. It must be longer than the longest
	// transaction and outcomePatience together; a longer time takes some 60 bytes for each transaction.
	commitsKept = time.Hour
)

// begin begins a transaction. The operator's default could be another level, at which a statement does not see what the
// transaction waited for.
var begin = statement{query: "begin isolation level read committed"}

// commitRow returns the statement that writes the row of a transaction. It writes none if the server may not write.
func (d *postgresDialect) commitRow(at, id int64) statement {
	switch s := d.db.session.Load(); {
	case s == nil:
		return statement{insertFreeCommit, []any{at, id}}
	case d.db.isReplica():
		return statement{insertReplicaCommit, []any{at, id, s.Cluster, s.Generation}}
	default:
		return statement{insertNodeCommit, []any{at, id, s.Holder.Node, s.Holder.Fence, s.Cluster, s.Generation}}
	}
}

// refusal returns the reason for which the statement of commitRow has written no row.
func (d *postgresDialect) refusal(ctx context.Context, tx *sql.Tx) error {
	if err := d.currentIn(ctx, tx); err != nil {
		return err
	}
	switch {
	case d.db.session.Load() == nil:
		return errNoSession
	case d.db.isReplica():
		return errRestored
	}
	var removed, lost bool
	err := tx.QueryRowContext(ctx, "SELECT removed_at IS NOT NULL, lost_at IS NOT NULL FROM nodes WHERE id = $1",
		d.db.holder().Node).Scan(&removed, &lost)
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return fmt.Errorf("reading the node: %w", err)
	case removed:
		return errRemoved
	case lost:
		return errLost
	}
	return errSuperseded
}

// execute implements dialect; see [conn.ExecContext].
func (d *postgresDialect) execute(ctx context.Context, tx *sql.Tx, all []statement) error {
	_, err := tx.ExecContext(ctx, "", all)
	return err
}

// outcome returns nil if a transaction was committed, although its commit returned the error cause.
func (d *postgresDialect) outcome(ctx context.Context, at, id int64, cause error) error {
	// The database said that it ended the transaction: a conflict or a violated key.
	if code := pgCode(cause); strings.HasPrefix(code, "40") || strings.HasPrefix(code, "23") ||
		errors.Is(cause, pgx.ErrTxCommitRollback) {
		return fmt.Errorf("committing: %w", cause)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomePatience)
	defer cancel()
	for {
		var aborted bool
		err := d.db.writer.QueryRowContext(ctx, decideCommit, at, id).Scan(&aborted)
		switch {
		case err == nil && aborted:
			return fmt.Errorf("committing: %w", cause)
		case err == nil:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("committing: %w; whether it was committed is not known: %w", cause, err)
		case <-time.After(20 * time.Millisecond): // the database is away
		}
	}
}

// dropCommits drops the rows of transactions whose outcome no call asks for any more.
func (d *postgresDialect) dropCommits(ctx context.Context) error {
	_, err := d.db.writer.ExecContext(ctx, "DELETE FROM commits WHERE at < "+databaseNow+" - $1",
		commitsKept.Microseconds())
	return err
}

func (d *postgresDialect) violates(err error, foreign bool) bool {
	if foreign {
		return pgCode(err) == codeForeignKey
	}
	return pgCode(err) == codeUnique
}

// forUpdate locks rows against changes. It leaves room for the checks of foreign keys that name them.
func (d *postgresDialect) forUpdate() string { return " FOR NO KEY UPDATE" }

// The classes of advisory locks. Never change one.
const (
	lockClassOrg       = 1 // ends with its transaction
	lockClassNumbering = 2 // the same
	lockClassNode      = 3 // ends with its connection
	lockClassAlone     = 4 // the same
)

// aloneCheck is the time between two looks at whether the connection that has a lock still lives. A longer one lets two
// servers do the same for that long after a connection broke; a shorter one asks more often.
const aloneCheck = 2 * time.Second

// aloneSilence is the time after which PostgreSQL ends a connection that has a lock and asks nothing, as that of a
// process that was stopped or of a machine that is cut off. With a longer one, the work of such a server rests for
// longer; with a shorter one, a server that is slow for a moment loses its lock.
const aloneSilence = 15 * time.Second

// alone holds a lock on a connection of its own. When the connection is lost, another server may take the lock.
func (d *postgresDialect) alone(ctx context.Context, name string, f func(ctx context.Context) error) error {
	conn, err := d.connect(ctx) // calls need those of the pool
	if err != nil {
		return fmt.Errorf("locking %s: %w", name, err)
	}
	defer closeSoon(ctx, conn)
	held, err := lockAlone(ctx, conn, name)
	if err != nil {
		return fmt.Errorf("locking %s: %w", name, err)
	}
	if !held {
		return nil
	}
	holding, stop := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for holding.Err() == nil {
			select {
			case <-time.After(aloneCheck):
				ping, cancel := context.WithTimeout(holding, connectTimeout)
				err := conn.Ping(ping)
				cancel()
				if err != nil {
					stop(fmt.Errorf("holding the lock of %s: %w", name, err))
				}
			case <-holding.Done():
			}
		}
	}()
	err = f(holding)
	stop(nil)
	<-watched
	return err
}

// lockAlone tries once to lock a name for conn, which must ask something every aloneSilence from then on.
func lockAlone(ctx context.Context, conn *pgx.Conn, name string) (held bool, err error) {
	if held, err = tryLock(ctx, conn, lockClassAlone, name); err != nil || !held {
		return held, err
	}
	silence := fmt.Sprint(aloneSilence.Milliseconds())
	_, err = conn.Exec(ctx, "SELECT set_config('idle_session_timeout', $1, FALSE)", silence)
	return err == nil, err
}

// orgLock returns the statement that locks an organization, with an advisory lock. A lock of the organization's row
// would write the row each time, and would lock nothing without a row.
func orgLock(org string) statement {
	return statement{"SELECT pg_advisory_xact_lock($1::int, hashtext($2::text))", []any{lockClassOrg, org}}
}

func (d *postgresDialect) lockOrg(ctx context.Context, tx *sql.Tx, org string) error {
	if err := d.execute(ctx, tx, []statement{orgLock(org)}); err != nil {
		return fmt.Errorf("locking the organization: %w", err)
	}
	return nil
}

func (d *postgresDialect) lockNoted(ctx context.Context, tx *sql.Tx, events []sandbox.Event) error {
	if len(events) < 2 {
		return nil // the note itself locks its sandbox
	}
	ids := make([]string, 0, len(events))
	for _, e := range events {
		ids = append(ids, string(e.SandboxID))
	}
	_, err := tx.ExecContext(ctx, "SELECT id FROM sandboxes WHERE id = ANY($1) ORDER BY id"+d.forUpdate(), ids)
	if err != nil {
		return fmt.Errorf("locking sandboxes: %w", err)
	}
	return nil
}

// databaseNow is the present time of the database, in microseconds since 1970.
const databaseNow = "(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint"

func (d *postgresDialect) now(*params, time.Time) string { return databaseNow }

// setLast writes all activities with one statement, which locks the rows in the order of their ids.
const setLast = `WITH late AS (
		SELECT s.id, u.at FROM sandboxes s JOIN UNNEST($1::text[], $2::bigint[]) AS u (id, at) ON s.id = u.id COLLATE "C"
		WHERE s.ended_at IS NULL AND (s.last_activity_at IS NULL OR s.last_activity_at < u.at)
		AND s.node_id = $3 AND s.fence <= $4
		ORDER BY s.id FOR NO KEY UPDATE OF s)
	UPDATE sandboxes SET last_activity_at = late.at FROM late WHERE sandboxes.id = late.id`

func (d *postgresDialect) setActivity(ctx context.Context, tx *sql.Tx, last map[sandbox.ID]time.Time) error {
	ids := make([]string, 0, len(last))
	times := make([]int64, 0, len(last))
	for _, id := range slices.Sorted(maps.Keys(last)) {
		ids, times = append(ids, string(id)), append(times, last[id].UnixMicro())
	}
	me := d.db.holder()
	_, err := tx.ExecContext(ctx, setLast, ids, times, me.Node, me.Fence)
	return err
}

func (d *postgresDialect) close() error {
	d.stop()
	<-d.stopped
	if d.keeper != nil {
		d.keeper.end()
	}
	return errors.Join(d.mark.save(), d.closePool())
}

func (d *postgresDialect) closePool() error {
	err := d.db.writer.Close()
	d.pool.Close()
	return err
}
