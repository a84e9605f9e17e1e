package store

import (
	"context"
	"database/sql"
	"errors"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestPostgresHangUps lets callers hang up in the middle of queries and transactions. None may cost a connection, so
// that callers who do it all the time do not keep cay connecting. A deadline still ends a query.
func TestPostgresHangUps(t *testing.T) {
	db := openPostgres(t)
	lost := func() int64 { // connections
		st := db.dialect.(*postgresDialect).pool.Stat()
		return st.NewConnsCount() - int64(st.TotalConns())
	}
	const slowly = "SELECT pg_sleep(0.3)"
	for name, call := range map[string]func(context.Context) error{
		"query": func(ctx context.Context) error {
			var nothing any
			return db.reader.QueryRowContext(ctx, slowly).Scan(&nothing)
		},
		"statement": func(ctx context.Context) error {
			_, err := db.writer.ExecContext(ctx, slowly)
			return err
		},
		"batch": func(ctx context.Context) error {
			return db.write(ctx, func(tx *sql.Tx) error { return db.execute(ctx, tx, []statement{{slowly, nil}}) })
		},
		"transaction": func(ctx context.Context) error {
			return db.write(ctx, func(tx *sql.Tx) error {
				_, err := tx.ExecContext(ctx, slowly)
				return err
			})
		},
	} {
		if err := call(t.Context()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		before, hungUp := lost(), 0
		for range poolOfTests {
			ctx, hangUp := context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, hangUp)
			_ = call(ctx) // it may have ended before, or say that the caller left
			if ctx.Err() != nil {
				hungUp++
			}
			hangUp()
		}
		if n := lost() - before; n > 0 || hungUp == 0 {
			t.Errorf("%s: %d callers hung up, which cost %d connections", name, hungUp, n)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := db.writer.ExecContext(ctx, "SELECT pg_sleep(60)"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a query with a deadline: %v", err)
	}
}

// TestPostgresAwaited opens the records while the server does not answer, as one that is too busy, and lets it answer
// after a connection has been given up.
func TestPostgresAwaited(t *testing.T) {
	server := caytest.StartPostgres(t)
	if err := server.Exec("postgres", "CREATE DATABASE awaited ENCODING 'UTF8' TEMPLATE template0"); err != nil {
		t.Fatal(err)
	}
	if err := server.Pause(false); err != nil {
		t.Fatal(err)
	}
	again := time.AfterFunc(2*connectTimeout, func() {
		if err := server.Pause(true); err != nil {
			t.Error(err)
		}
	})
	defer again.Stop()
	db, err := OpenPostgres(t.Context(), PostgresConfig{URL: server.URL("awaited"), MaxConns: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
}
