package store

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// TestPostgresIdleConnections checks that a call uses an idle connection without asking whether it lives, and takes
// another one if PostgreSQL has ended it.
func TestPostgresIdleConnections(t *testing.T) {
	ctx := t.Context()
	pool, err := newPool(ctx, PostgresConfig{URL: newDatabase(t, false), MaxConns: 2}, &lines{})
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	conn, err := pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	idle := pgxpool.ShouldPingParams{Conn: conn.Conn(), IdleDuration: time.Hour}
	pid := conn.Conn().PgConn().PID()
	conn.Release()
	if pool.Config().ShouldPing(ctx, idle) {
		t.Error("a connection that lives is asked first")
	}

	if err := sharedPostgres(t).Exec("postgres", fmt.Sprintf("SELECT pg_terminate_backend(%d)", pid)); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); !pool.Config().ShouldPing(ctx, idle); {
		if time.Now().After(deadline) {
			t.Fatal("a connection that PostgreSQL has ended is taken for one that lives")
		}
		time.Sleep(5 * time.Millisecond)
	}
	var next uint32
	if err := pool.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&next); err != nil || next == pid {
		t.Errorf("the next call used the connection of process %d after %d, %v", next, pid, err)
	}
}
