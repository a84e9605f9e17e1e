package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

// awayRetry is the time after which callers are told to try again while the database is away. A database that restarts
// or fails over needs seconds; with a shorter time more calls are refused in vain.
const awayRetry = 2 * time.Second

// away returns err as Unavailable if it means that the database cannot be reached, and else err itself.
func away(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || fault.As(err) != nil || !isAway(err) {
		return err
	}
	return fault.New(fault.Unavailable, fault.CodeNotReady, "the server cannot reach its database; try again soon").
		After(awayRetry).Because(err)
}

func isAway(err error) bool {
	var refused *pgconn.ConnectError
	var broken net.Error
	if errors.As(err, &refused) {
		return true
	}
	if code := pgCode(err); code != "" {
		// 08: the connection failed. 57P01 to 57P03: it stops or starts.
		return strings.HasPrefix(code, "08") || code == codeFull || strings.HasPrefix(code, "57P0")
	}
	// SafeToRetry is true for a connection that was closed before it was used.
	return pgconn.SafeToRetry(err) || errors.As(err, &broken) || errors.Is(err, io.EOF) ||
		errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, driver.ErrBadConn)
}

// connector makes connections to PostgreSQL.
type connector struct{ driver.Connector }

// Connect implements [driver.Connector].
func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	made, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, away(ctx, err)
	}
	return conn{made.(*stdlib.Conn)}, nil
}

// conn is a connection that stores all texts, and whose errors say when the database is away. It does not change
// [driver.ErrBadConn], at which database/sql takes another connection.
type conn struct{ *stdlib.Conn }

// queryPatience limits a query without a deadline. Queries take milliseconds; one that waits for a lock waits no longer
// than [idleInTransaction] lets the holder keep it. A shorter limit could end a query that is about to get its lock.
const queryPatience = 30 * time.Second

// detached returns a context that has the values and the deadline of ctx, but goes on if a caller of cay hangs up. A
// query whose context ends costs its connection, so that callers who hang up again and again would leave none to the
// others.
func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	at, limited := ctx.Deadline()
	if !limited {
		at = time.Now().Add(queryPatience)
	}
	return context.WithDeadline(context.WithoutCancel(ctx), at)
}

// ExecContext implements [driver.ExecerContext]. Its only argument may be a list of statements, which it runs one after
// the other, until one fails, with one round trip.
func (c conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if len(args) == 1 {
		if all, ok := args[0].Value.([]statement); ok {
			_, err := c.run(ctx, all)
			return driver.ResultNoRows, err
		}
	}
	args, err := cleanArgs(args)
	if err != nil {
		return nil, err
	}
	on, cancel := detached(ctx)
	defer cancel()
	r, err := c.Conn.ExecContext(on, query, args)
	if err != driver.ErrBadConn {
		err = away(ctx, err)
	}
	return r, err
}

// QueryContext implements [driver.QueryerContext]. It reads the first row, so it has the errors of most queries.
func (c conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	args, err := cleanArgs(args)
	if err != nil {
		return nil, err
	}
	on, cancel := detached(ctx)
	r, err := c.Conn.QueryContext(on, query, args)
	if err == nil {
		return queryRows{r.(*stdlib.Rows), cancel}, nil
	}
	cancel()
	if err != driver.ErrBadConn {
		err = away(ctx, err)
	}
	return nil, err
}

// queryRows are the rows of a query. They end its context.
type queryRows struct {
	*stdlib.Rows
	end context.CancelFunc
}

// Close implements [driver.Rows].
func (r queryRows) Close() error {
	defer r.end()
	return r.Rows.Close()
}

// run runs statements one after the other, until one fails, with one round trip. It returns the number of rows that
// each has read or written.
func (c conn) run(ctx context.Context, all []statement) (rows []int64, err error) {
	var b pgx.Batch
	for _, s := range all {
		args := make([]any, len(s.args))
		for i, v := range s.args {
			if args[i], err = cleanArg(v); err != nil {
				return nil, err
			}
		}
		b.Queue(s.query, args...)
	}
	on, cancel := detached(ctx)
	defer cancel()
	results := c.Conn.Conn().SendBatch(on, &b)
	for range all {
		tag, err := results.Exec()
		if err != nil {
			_ = results.Close() // returns the same error
			return nil, away(ctx, err)
		}
		rows = append(rows, tag.RowsAffected())
	}
	return rows, away(ctx, results.Close())
}

// opening holds the statements with which a transaction begins, and the number of rows that each wrote. [conn.BeginTx]
// finds it in its context.
type opening struct {
	all   []statement
	wrote []int64
}

type openingKey struct{}

// BeginTx implements [driver.ConnBeginTx].
func (c conn) BeginTx(ctx context.Context, opts driver.TxOptions) (tx driver.Tx, err error) {
	if open, ok := ctx.Value(openingKey{}).(*opening); ok {
		begun := transaction{ctx, c.Conn.Conn()}
		if open.wrote, err = c.run(ctx, open.all); err == nil {
			return begun, nil
		}
		if pgconn.SafeToRetry(err) {
			return nil, driver.ErrBadConn
		}
		return nil, errors.Join(err, begun.Rollback())
	}
	tx, err = c.Conn.BeginTx(ctx, opts)
	if err != driver.ErrBadConn {
		err = away(ctx, err)
	}
	return tx, err
}

// transaction is one that began with an opening.
type transaction struct {
	ctx  context.Context // of its beginning
	conn *pgx.Conn
}

// Commit implements [driver.Tx].
func (t transaction) Commit() error {
	ctx, cancel := detached(t.ctx)
	defer cancel()
	tag, err := t.conn.Exec(ctx, "commit")
	switch {
	case err != nil:
		return errors.Join(err, t.end())
	case tag.String() == "ROLLBACK":
		return pgx.ErrTxCommitRollback
	}
	return nil
}

// Rollback implements [driver.Tx].
func (t transaction) Rollback() error {
	if t.conn.IsClosed() || t.conn.PgConn().TxStatus() == 'I' {
		return nil
	}
	ctx, cancel := detached(t.ctx)
	defer cancel()
	if _, err := t.conn.Exec(ctx, "rollback"); err != nil {
		return errors.Join(err, t.end())
	}
	return nil
}

// end closes the connection of a transaction that could not be ended in order. PostgreSQL rolls it back then.
func (t transaction) end() error {
	if t.conn.IsClosed() || t.conn.PgConn().TxStatus() == 'I' {
		return nil
	}
	_ = t.conn.Close(t.ctx) // nothing that is needed is lost
	return nil
}

const (
	// unanswered limits the time for which the machine of the database does not confirm what cay sent. A lost
	// packet is sent again after some 200 ms, so a shorter time would end connections on a network that loses
	// packets; with a longer one, calls hang on a database that is cut off.
	unanswered = 1500 * time.Millisecond
	// keepAlive is the time between signs of life while cay waits for an answer. The kernel ends the connection
	// when they are not confirmed for the time unanswered.
	keepAlive = time.Second
)

// dial connects to PostgreSQL. A connection over TCP ends soon after its other end is cut off.
func dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive, Count: 2}}
	if strings.HasPrefix(network, "tcp") {
		d.Control = func(_, _ string, c syscall.RawConn) error {
			var set error
			err := c.Control(func(fd uintptr) {
				set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unanswered.Milliseconds()))
			})
			return errors.Join(err, set)
		}
	}
	return d.DialContext(ctx, network, address)
}
