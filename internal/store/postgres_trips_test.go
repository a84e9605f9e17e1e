package store

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cayhq/cay/internal/sandbox"
)

// TestPostgresIdleConnections checks that a call uses an idle connection without asking whether it lives, and takes
// another one if PostgreSQL has ended it.
func TestPostgresIdleConnections(t *testing.T) {
	ctx := t.Context()
	pool, err := newPool(ctx, PostgresConfig{URL: newDatabase(t, false), MaxConns: 2}, &lines{}, &clock{})
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

// TestStirredWhileRead checks that a connection is looked at without waiting while it is read, as pgx does in the
// background.
func TestStirredWhileRead(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	all := &lines{}
	c, err := all.dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = c.Read(make([]byte, 1)) // ends with the connection
	}()
	for deadline := time.Now().Add(10 * time.Second); !all.waiting(0); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the connection is not read")
		}
	}
	if c.(*line).stirred() {
		t.Error("nothing came, but the connection is said to have something")
	}
	other.Close()
	<-read
	if !c.(*line).stirred() {
		t.Error("a connection that was closed is taken for one that lives")
	}
	c.Close()
	if !c.(*line).stirred() {
		t.Error("a connection that this side closed is taken for one that lives")
	}
}

// TestPostgresRoundTrips counts how often calls wait for PostgreSQL. Each wait delays the call, and a wait in a
// transaction delays those that need its locks too.
func TestPostgresRoundTrips(t *testing.T) {
	db := openPostgres(t)
	ctx := t.Context()
	org, key := mustPutOrg(t, db, "a", 0)
	quota := sandbox.Quota{Sandboxes: 1000}
	d := db.dialect.(*postgresDialect)
	d.numbering.Lock() // the goroutine that numbers events waits here, and asks nothing
	defer d.numbering.Unlock()
	fewest := map[string]int64{}
	count := func(call string, f func() error) {
		t.Helper()
		before := d.lines.heard.Load()
		if err := f(); err != nil {
			t.Fatalf("%s: %v", call, err)
		}
		took := d.lines.heard.Load() - before
		if least, ok := fewest[call]; !ok || took < least {
			fewest[call] = took
		}
	}
	for i := range 5 { // the first calls prepare statements on each connection
		s := fullSandbox(org.ID, i)
		count("insert", func() error {
			_, _, err := db.Insert(ctx, s, quota, sandbox.Once{})
			return err
		})
		count("transition", func() error {
			_, err := db.Transition(ctx, sandbox.Change{ID: s.ID, From: []sandbox.State{sandbox.Creating}, To: sandbox.Running,
				At: start})
			return err
		})
		count("set expiry", func() error {
			_, err := db.SetExpiry(ctx, s.ID, start, time.Minute, false)
			return err
		})
		count("key and sandbox", func() error {
			ctx := db.Expect(ctx, s.ID)
			_, _, err := db.KeyByHash(ctx, key.Hash)
			if err == nil {
				_, err = db.Get(ctx, s.ID)
			}
			return err
		})
		warm := fullSandbox(org.ID, i)
		warm.State = sandbox.Running
		count("add pooled", func() error {
			return db.AddPooled(ctx, sandbox.Pooled{ID: warm.ID, Run: warm.Run, CreatedAt: start})
		})
		count("claim", func() error {
			_, _, err := db.Claim(ctx, warm, quota, sandbox.Once{Key: string(warm.ID), Hash: "h"})
			return err
		})
	}
	want := map[string]int64{
		"key and sandbox": 1,
		"set expiry":      3, // beginning, row, commit
		"insert":          4, // beginning with the organization's lock, quota, rows, commit
		"transition":      5, // beginning, row as it was, row, event, commit
		"add pooled":      4,
		"claim":           6, // beginning with the organization's lock, key, quota, pooled sandbox, rows, commit
	}
	if diff := cmp.Diff(want, fewest); diff != "" {
		t.Errorf("round trips (-want +got):\n%s", diff)
	}
}
