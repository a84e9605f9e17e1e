package store

import (
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"testing"
)

// oneConn is a pool of one connection to SQLite, with a table n of the numbers 0, 1 and 2.
type oneConn struct {
	*sql.DB
	t *testing.T
}

func newOneConn(t *testing.T) oneConn {
	db, err := openSQLite(dsn(filepath.Join(t.TempDir(), "db"), url.Values{}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	db.SetMaxOpenConns(1)
	c := oneConn{db, t}
	c.exec("CREATE TABLE n (n INTEGER PRIMARY KEY); INSERT INTO n VALUES (0), (1), (2)")
	return c
}

func (c oneConn) exec(query string, args ...any) {
	c.t.Helper()
	if _, err := c.ExecContext(c.t.Context(), query, args...); err != nil {
		c.t.Fatal(err)
	}
}

// kept returns how many statements the connection keeps.
func (c oneConn) kept() (n int) {
	c.t.Helper()
	conn, err := c.Conn(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.Raw(func(c any) error { n = len(c.(*stmtConn).idle); return nil }); err != nil {
		c.t.Fatal(err)
	}
	return n
}

// TestStatementsAreKept runs a statement several times, one that fails, and a query inside itself.
func TestStatementsAreKept(t *testing.T) {
	ctx, db := t.Context(), newOneConn(t)
	for i := range 3 {
		db.exec("INSERT INTO n VALUES ($1)", 3+i)
	}
	if got := db.kept(); got != 1 {
		t.Errorf("of a statement that ran three times, %d are kept, want 1", got)
	}
	if _, err := db.ExecContext(ctx, "INSERT INTO n VALUES ($1)", 0); err == nil {
		t.Error("a key was written twice")
	}
	if got := db.kept(); got != 0 {
		t.Errorf("after a statement that failed, %d are kept, want 0", got)
	}

	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	const above = "SELECT n FROM n WHERE n >= $1 ORDER BY n"
	outer, err := tx.QueryContext(ctx, above, 3)
	if err != nil {
		t.Fatal(err)
	}
	var pairs []int
	for outer.Next() {
		var a, b int
		if err := outer.Scan(&a); err != nil {
			t.Fatal(err)
		}
		if err := tx.QueryRowContext(ctx, above, a).Scan(&b); err != nil {
			t.Fatal(err)
		}
		pairs = append(pairs, a, b)
	}
	if got := fmt.Sprint(pairs); outer.Err() != nil || got != "[3 3 4 4 5 5]" {
		t.Errorf("a query inside itself returned %s, %v", got, outer.Err())
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := db.kept(); got != 1 {
		t.Errorf("of a query that ran inside itself, %d are kept, want 1", got)
	}
	var n int
	if err := db.QueryRowContext(ctx, above, 7).Scan(&n); !errors.Is(err, sql.ErrNoRows) {
		t.Errorf("a query that finds nothing: %v", err)
	}
}

// TestStatementsAreBounded runs more statements than a connection keeps.
func TestStatementsAreBounded(t *testing.T) {
	db := newOneConn(t)
	for i := range keptStmts + 5 {
		db.exec(fmt.Sprintf("INSERT INTO n VALUES ($1 + %d)", i), 3)
	}
	if got := db.kept(); got != keptStmts {
		t.Errorf("%d statements are kept, want %d", got, keptStmts)
	}
}

// TestKeptStatementsSeeTheSchema runs a statement before and after its table gets a column.
func TestKeptStatementsSeeTheSchema(t *testing.T) {
	db := newOneConn(t)
	columns := func() string {
		t.Helper()
		rows, err := db.QueryContext(t.Context(), "SELECT * FROM n WHERE n = $1", 1)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		names, err := rows.Columns()
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(names)
	}
	before := columns()
	db.exec("ALTER TABLE n ADD COLUMN more INTEGER")
	if after := columns(); before != "[n]" || after != "[n more]" {
		t.Errorf("the statement returned %s before and %s after", before, after)
	}
}
