package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"

	"modernc.org/sqlite"
)

// keptStmts limits the prepared statements that a connection to SQLite keeps. A create runs ten different ones and all
// of this package some 150, of 5 to 20 KiB each. With fewer, frequent statements are prepared again; with more, the
// rare ones only take memory.
const keptStmts = 64

// stmtConnector opens connections to SQLite that keep the statements that they have run. SQLite takes a tenth of a
// millisecond to prepare one, often more than to run it.
type stmtConnector struct{ driver.Connector }

// openSQLite returns a pool of such connections.
func openSQLite(dsn string) (*sql.DB, error) {
	c, err := sqlite.NewConnector(dsn)
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(stmtConnector{c}), nil
}

func (c stmtConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &stmtConn{sqliteConn: conn.(sqliteConn), idle: map[string]sqliteStmt{}}, nil
}

// sqliteConn lists what the driver's connections implement.
type sqliteConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

type sqliteStmt interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// stmtConn is a connection that keeps prepared statements. Like every [driver.Conn] it is used by one goroutine at a
// time.
type stmtConn struct {
	sqliteConn
	idle map[string]sqliteStmt // by query; a statement in use is not in it
}

// Unwrap returns the connection of the driver.
func (c *stmtConn) Unwrap() driver.Conn { return c.sqliteConn }

// ExecContext implements [driver.ExecerContext].
func (c *stmtConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if len(args) == 0 {
		return c.sqliteConn.ExecContext(ctx, query, args) // it may hold several statements, as those of migrations do
	}
	s, err := c.take(ctx, query)
	if err != nil {
		return nil, err
	}
	r, err := s.ExecContext(ctx, args)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return r, c.keep(query, s)
}

// QueryContext implements [driver.QueryerContext].
func (c *stmtConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	s, err := c.take(ctx, query)
	if err != nil {
		return nil, err
	}
	rows, err := s.QueryContext(ctx, args)
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return &stmtRows{Rows: rows, conn: c, query: query, stmt: s}, nil
}

// take returns a statement that is not in use.
func (c *stmtConn) take(ctx context.Context, query string) (sqliteStmt, error) {
	if s, ok := c.idle[query]; ok {
		delete(c.idle, query)
		return s, nil
	}
	s, err := c.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return s.(sqliteStmt), nil
}

// keep takes a statement back after its use.
func (c *stmtConn) keep(query string, s sqliteStmt) error {
	if _, ok := c.idle[query]; ok {
		return s.Close() // two were in use at once
	}
	c.idle[query] = s
	if len(c.idle) <= keptStmts {
		return nil
	}
	for other, old := range c.idle {
		if other != query {
			delete(c.idle, other)
			return old.Close()
		}
	}
	return nil
}

// Close implements [driver.Conn].
func (c *stmtConn) Close() error {
	var errs []error
	for _, s := range c.idle {
		errs = append(errs, s.Close())
	}
	clear(c.idle)
	return errors.Join(append(errs, c.sqliteConn.Close())...)
}

// stmtRows gives its statement back when it is closed.
type stmtRows struct {
	driver.Rows
	conn  *stmtConn
	query string
	stmt  sqliteStmt
}

// Close implements [driver.Rows].
func (r *stmtRows) Close() error {
	if r.stmt == nil {
		return nil
	}
	s := r.stmt
	r.stmt = nil
	if err := r.Rows.Close(); err != nil {
		return errors.Join(err, s.Close())
	}
	return r.conn.keep(r.query, s)
}
