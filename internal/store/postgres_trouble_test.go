package store

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// TestPostgresRetries counts the tries of a transaction that the database ends each time.
func TestPostgresRetries(t *testing.T) {
	db := openPostgres(t)
	for code, want := range map[string]int{codeSerialization: maxTries, codeDeadlock: maxTries, "23514": 1, "57014": 1} {
		tries := 0
		err := db.write(t.Context(), func(tx *sql.Tx) error {
			tries++
			_, err := tx.ExecContext(t.Context(), "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '"+code+"'; END $$")
			return err
		})
		if pgCode(err) != code || tries != want {
			t.Errorf("%s: %d tries, want %d, %v", code, tries, want, err)
		}
	}
}

// TestPostgresDeadlock makes transactions wait for each other, so that the database ends one of them. It checks that
// both calls succeed, and that the events of the ended try are not written.
func TestPostgresDeadlock(t *testing.T) {
	db := openURL(t, newDatabase(t, true)+"&deadlock_timeout=10ms")
	ctx := t.Context()
	ids := []sandbox.ID{mustInsert(t, db, small("org_a", 0)).ID, mustInsert(t, db, small("org_a", 1)).ID}
	var tries atomic.Int64
	var both sync.WaitGroup
	both.Add(2)
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			first := true
			err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
				tries.Add(1)
				note := func(id sandbox.ID) error {
					e := sandbox.Event{SandboxID: id, At: start, Reason: "note"}
					_, err := out.note(ctx, event.SandboxForked, e, event.About{})
					return err
				}
				if err := note(ids[i]); err != nil {
					return err
				}
				if first { // each has one row now, and asks for the other's
					first = false
					both.Done()
					both.Wait()
				}
				return note(ids[1-i])
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if load, ok := db.Load(); !ok || load.Retries != tries.Load()-2 || load.Most != poolOfTests {
		t.Errorf("the load is %+v, %v", load, ok)
	}
	if tries.Load() < 3 {
		t.Errorf("%d tries: the database ended none", tries.Load())
	}
	for _, id := range ids {
		if all, _, err := db.Events(ctx, id, 10, ""); err != nil || len(all) != 3 {
			t.Errorf("%d events, %v; want the creation and two notes", len(all), err)
		}
	}
}

// TestPostgresMarkTagsDeadlock makes the marking of tags and another transaction wait for each other, so that the
// database ends the marking, and checks that it succeeds all the same.
func TestPostgresMarkTagsDeadlock(t *testing.T) {
	address := newDatabase(t, true)
	db, other := openURL(t, address+"&deadlock_timeout=300ms"), openURL(t, address+"&deadlock_timeout=10s")
	ctx := t.Context()
	for i, name := range []string{"a", "b"} {
		tpl := aTemplate("org_a", name, i)
		put(t, db, tpl)
		update(t, db, tpl.ID, func(now *template.Template) {
			now.Tagging = []template.Tag{{Name: name, BuildID: "bld", CreatedAt: start,
				Version: sandbox.TemplateVersion{ID: tpl.ID, Name: name, Version: 1, Shape: sandbox.Shape{Image: "i"}}}}
		})
	}
	var marked chan error
	err := other.write(ctx, func(tx *sql.Tx) error {
		lock := func(tag string) error {
			_, err := tx.ExecContext(ctx, "SELECT 1 FROM template_tags WHERE tag = $1 FOR UPDATE", tag)
			return err
		}
		if err := lock("b"); err != nil {
			return err
		}
		if marked == nil {
			marked = make(chan error, 1)
			go func() { marked <- db.MarkTags(ctx, "i", true) }()
		}
		waitsForLock(t, other)
		return lock("a")
	})
	if err != nil {
		t.Error(err)
	}
	if err := <-marked; err != nil {
		t.Errorf("marking the tags: %v", err)
	}
	if mine, _ := db.Load(); mine.Retries == 0 {
		t.Error("the database ended no transaction")
	}
}

// waitsForLock returns when a transaction waits for a lock of another one.
func waitsForLock(t *testing.T, db *DB) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) { // a poll with a deadline
		var waiting int
		if err := db.reader.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM pg_locks WHERE NOT granted").
			Scan(&waiting); err != nil {
			t.Fatal(err)
		}
		if waiting > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no transaction waits")
		}
	}
}

// TestPostgresFloodOfOneOrganization lets another server hold the lock of an organization while the organization makes
// more calls than there are connections. Calls of other organizations must not wait.
func TestPostgresFloodOfOneOrganization(t *testing.T) {
	address := newDatabase(t, true)
	db, other := openURL(t, address), openURL(t, address)
	ctx := t.Context()
	release := make(chan struct{})
	var holds, flood sync.WaitGroup
	locked := make(chan struct{})
	holds.Go(func() {
		err := other.write(ctx, func(tx *sql.Tx) error {
			err := other.lockOrg(ctx, tx, "org_a")
			close(locked)
			<-release
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	<-locked
	var began atomic.Int64
	asleep := mustInsert(t, db, small("org_a", 0))
	mustMove(t, db, asleep.ID, sandbox.Creating, sandbox.Suspended, start)
	quota := sandbox.Quota{Sandboxes: 100}
	for i := range 2 * poolOfTests {
		flood.Go(func() {
			began.Add(1)
			if _, _, err := db.Insert(ctx, small("org_a", i+1), quota, sandbox.Once{}); err != nil {
				t.Errorf("a call of the flood: %v", err)
			}
		})
		flood.Go(func() {
			began.Add(1)
			snapshot := sandbox.Snapshot{ID: sandbox.NewSnapshotID(), Name: fmt.Sprint(i), OrgID: "org_a", CreatedAt: start}
			if err := db.AddSnapshot(ctx, snapshot, 100); err != nil {
				t.Errorf("a call of the flood: %v", err)
			}
		})
	}
	gaveUp, giveUp := context.WithCancel(ctx)
	flood.Go(func() {
		began.Add(1)
		_, err := db.Transition(gaveUp, sandbox.Change{ID: asleep.ID, From: []sandbox.State{sandbox.Suspended},
			To: sandbox.Waking, At: start, Quota: &quota, OrgID: "org_a"})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("a call that was given up: %v", err)
		}
	})
	waitsForLock(t, other)
	for i := 0; i < 100 || began.Load() < 4*poolOfTests+1; i++ {
		soon, cancel := context.WithTimeout(ctx, 10*time.Second)
		if _, _, err := db.Insert(soon, small("org_b", i), sandbox.Quota{Sandboxes: 10_000}, sandbox.Once{}); err != nil {
			t.Errorf("another organization's create: %v", err)
		}
		cancel()
		if t.Failed() {
			break
		}
	}
	giveUp()
	close(release)
	flood.Wait()
	holds.Wait()
	db.turns.mu.Lock()
	defer db.turns.mu.Unlock()
	if len(db.orgs) != 0 {
		t.Errorf("turns are left of calls that are over: %v", db.orgs)
	}
}

// cutter stands between cay and PostgreSQL, and cuts a connection at a commit.
type cutter struct {
	server string       // the socket of PostgreSQL
	cut    atomic.Int32 // what to do with the next commit
}

const (
	cutNothing int32 = iota
	cutBefore        // the commit does not reach the server
	cutAfter         // the answer to the commit does not reach cay
)

// serve carries connections until the listener is closed.
func (c *cutter) serve(l net.Listener) {
	var all sync.WaitGroup
	defer all.Wait()
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		all.Go(func() { c.carry(client) })
	}
}

func (c *cutter) carry(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("unix", c.server)
	if err != nil {
		return
	}
	defer server.Close()
	var silent atomic.Bool // no answer reaches cay any more
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		buffer := make([]byte, 64<<10)
		for {
			n, err := server.Read(buffer)
			if err != nil || silent.Load() {
				client.Close() // ends the other direction
				return
			}
			if _, err := client.Write(buffer[:n]); err != nil {
				return
			}
		}
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := client.Read(buffer)
		if err != nil {
			break
		}
		if bytes.Contains(buffer[:n], []byte("commit\x00")) {
			switch what := c.cut.Swap(cutNothing); what {
			case cutBefore:
				server.Close()
			case cutAfter:
				silent.Store(true)
			}
		}
		if _, err := server.Write(buffer[:n]); err != nil {
			break
		}
	}
	server.Close()
	<-answered
}

// TestPostgresCommitUnknown breaks connections during commits. A call whose commit reached the database succeeds,
// and one whose commit did not fails and has written nothing.
func TestPostgresCommitUnknown(t *testing.T) {
	address, err := url.Parse(newDatabase(t, true))
	if err != nil {
		t.Fatal(err)
	}
	const socket = ".s.PGSQL.5432"
	c := &cutter{server: filepath.Join(address.Query().Get("host"), socket)}
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, socket))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); c.serve(l) }()
	t.Cleanup(func() { l.Close(); <-done })
	q := address.Query()
	q.Set("host", dir)
	address.RawQuery = q.Encode()
	db := openURL(t, address.String())
	for range 10 {
		for _, cut := range []int32{cutAfter, cutBefore} {
			s := small("org_a", 0)
			c.cut.Store(cut)
			// The goroutine that numbers events commits too, so it must not take the cut.
			d := db.dialect.(*postgresDialect)
			d.numbering.Lock()
			_, _, err := db.Insert(t.Context(), s, sandbox.Quota{Sandboxes: 100}, sandbox.Once{Key: string(s.ID), Hash: "h"})
			d.numbering.Unlock()
			_, found := db.Get(t.Context(), s.ID)
			if (err == nil) != (cut == cutAfter) || (found == nil) != (cut == cutAfter) {
				t.Errorf("cut %d: the call returned %v, the row %v", cut, err, found)
			}
			if c.cut.Load() != cutNothing {
				t.Error("no connection was cut")
			}
			settle(t, db)
		}
	}
}

// load makes changes from many callers at once and notes those that are acknowledged.
type load struct {
	db       *DB
	stop     context.CancelFunc
	callers  sync.WaitGroup
	mu       sync.Mutex
	promised map[sandbox.ID]sandbox.State
	failed   atomic.Int64
}

// startLoad starts the callers and returns when they have made some changes.
func startLoad(t *testing.T, db *DB) *load {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	l := &load{db: db, stop: stop, promised: map[sandbox.ID]sandbox.State{}}
	enough := make(chan struct{})
	var acknowledged atomic.Int64
	for w := range poolOfTests {
		l.callers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if err := l.create(ctx, w*100_000+i); err != nil {
					l.failed.Add(1)
					return
				}
				if acknowledged.Add(1) == 200 {
					close(enough)
				}
			}
		})
	}
	<-enough
	return l
}

// create creates a sandbox and makes it running.
func (l *load) create(ctx context.Context, i int) error {
	s := small("org_crash", i)
	promise := func(state sandbox.State) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.promised[s.ID] = state
	}
	_, _, err := l.db.Insert(ctx, s, sandbox.Quota{}, sandbox.Once{Key: string(s.ID), Hash: "h"})
	if err != nil {
		return err
	}
	promise(sandbox.Creating)
	_, err = l.db.Transition(ctx, sandbox.Change{ID: s.ID, From: []sandbox.State{sandbox.Creating},
		To: sandbox.Running, At: start})
	if err == nil {
		promise(sandbox.Running)
	}
	return err
}

// check ends the callers and checks that no acknowledged change is lost.
func (l *load) check(t *testing.T) {
	t.Helper()
	l.stop()
	l.callers.Wait()
	settle(t, l.db)
	checkFeed(t, l.db, l.promised)
	for id, state := range l.promised {
		// A commit of which nothing is known may have been made.
		if s, err := l.db.Get(t.Context(), id); err != nil || s.State != state && s.State != sandbox.Running {
			t.Errorf("%s is %s, promised %s, %v", id, s.State, state, err)
		}
	}
	if _, err := l.db.Get(t.Context(), sandbox.NewID()); !fault.Is(err, fault.NotFound) {
		t.Errorf("reading a sandbox that does not exist: %v", err)
	}
	t.Logf("%d sandboxes acknowledged, %d calls failed", len(l.promised), l.failed.Load())
}

// TestPostgresCrash ends PostgreSQL as a crash does while many calls commit, and checks that no acknowledged change is
// lost, and that cay works on when PostgreSQL is back.
func TestPostgresCrash(t *testing.T) {
	server := sharedPostgres(t)
	l := startLoad(t, openPostgres(t))
	if err := server.Stop(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	l.check(t)
}

// TestPostgresFailover ends PostgreSQL as a crash does while many calls commit, and promotes its synchronous standby.
// It checks that no acknowledged change is lost, and that cay works on with the standby.
func TestPostgresFailover(t *testing.T) {
	primary := caytest.StartPostgres(t)
	if _, err := primary.Create("cay", ""); err != nil {
		t.Fatal(err)
	}
	standby, err := primary.Standby()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Remove(); err != nil {
			t.Error(err)
		}
	})
	q := url.Values{"host": {primary.Socket() + "," + standby.Socket()}, "user": {"cay"},
		"target_session_attrs": {"read-write"}}
	l := startLoad(t, openURL(t, "postgres:///cay?"+q.Encode()))
	if err := primary.Stop(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(); err != nil {
		t.Fatal(err)
	}
	l.check(t)
}

// TestPostgresAway checks what calls return while PostgreSQL is stopped and while it does not answer, and that they
// succeed when it is back.
func TestPostgresAway(t *testing.T) {
	server := sharedPostgres(t)
	db := openPostgres(t)
	ctx := t.Context()
	s := mustInsert(t, db, small("org_a", 0))
	if err := server.Stop(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for what, call := range map[string]func() error{
		"read":  func() error { _, err := db.Get(ctx, s.ID); return err },
		"list":  func() error { _, err := db.Unfinished(ctx); return err },
		"write": func() error { return db.TouchKey(ctx, "key_a", start) },
		"transaction": func() error {
			_, err := db.SetExpiry(ctx, s.ID, start, 1, false)
			return err
		},
		"ping": func() error { return db.Ping(ctx) },
	} {
		for range 2 * poolOfTests { // each connection meets its end once
			if err := call(); !fault.Is(err, fault.Unavailable) || fault.As(err).RetryAfter != awayRetry {
				t.Errorf("%s: %v", what, err)
				break
			}
		}
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	if got, err := db.Get(ctx, s.ID); err != nil || got.ID != s.ID {
		t.Errorf("when it is back: %v", err)
	}
	mustMove(t, db, s.ID, sandbox.Creating, sandbox.Running, start)
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := db.Get(canceled, s.ID); !errors.Is(err, context.Canceled) || fault.As(err) != nil {
		t.Errorf("a canceled call: %v", err)
	}
}

// TestPostgresClosedConnection uses a connection that a cut of the network has closed meanwhile.
func TestPostgresClosedConnection(t *testing.T) {
	conn, err := pgx.Connect(t.Context(), newDatabase(t, true))
	if err == nil {
		err = conn.Close(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = conn.Exec(t.Context(), "SELECT 1")
	if got := away(t.Context(), err); !fault.Is(got, fault.Unavailable) {
		t.Errorf("the database is not away: %v", got)
	}
}

// TestPostgresAddresses checks which addresses are kept from sandboxes.
func TestPostgresAddresses(t *testing.T) {
	for text, want := range map[string]string{
		"":                          "[]",
		"postgres:///cay?host=/run": "[]",
		"postgres://cay@127.0.0.1/cay?sslmode=disable":                         "[]",
		"postgres://cay@192.0.2.7:5433/cay?sslmode=prefer":                     "[192.0.2.7]",
		"postgres://cay@192.0.2.8,192.0.2.7,[2001:db8::1]/cay?sslmode=require": "[192.0.2.7 192.0.2.8]",
	} {
		if got, err := PostgresAddresses(t.Context(), text); err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v, want %s", text, got, err, want)
		}
	}
}

// TestPostgresNumbersLeftEvents leaves events without numbers, as a process does that is killed after a commit. It
// checks that another process numbers them.
func TestPostgresNumbersLeftEvents(t *testing.T) {
	url := newDatabase(t, true)
	db := openURL(t, url)
	d := db.dialect.(*postgresDialect)
	d.stop()
	<-d.stopped
	putOrg(t, db, "org_a")
	if last, err := db.LastEvent(t.Context(), "org_a"); err != nil || last != 0 {
		t.Fatalf("the last event is %d, %v", last, err)
	}
	other := openURL(t, url)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) { // a poll with a deadline
		last, err := other.LastEvent(t.Context(), "org_a")
		if err != nil {
			t.Fatal(err)
		}
		if last != 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no process numbers the events")
		}
	}
}

// TestPostgresNumbersInOrder numbers events whose rows are in another order on the disk than they were written in.
func TestPostgresNumbersInOrder(t *testing.T) {
	db := openURL(t, newDatabase(t, true)+"&enable_mergejoin=off&enable_nestloop=off")
	d := db.dialect.(*postgresDialect)
	d.stop()
	<-d.stopped
	for round := range 20 {
		for _, statement := range []string{
			`INSERT INTO events (org_id, at, type, sandbox_id, from_state, to_state, reason, detail, about)
				SELECT 'org_a', 0, 'org.created', '', '', '', '', '', '{}' FROM GENERATE_SERIES(1, 200)`,
			"UPDATE events SET detail = 'moved' WHERE seq IS NULL AND written % 3 = 0",
		} {
			if _, err := db.writer.Exec(statement); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.number(t.Context()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	wrong, err := texts(t.Context(), db.reader, `SELECT written::text FROM (SELECT written, seq,
		LAG(seq) OVER (ORDER BY written) AS before FROM events) AS pairs WHERE seq <= before`)
	if err != nil || len(wrong) > 0 {
		t.Errorf("events %v do not come after those written before, %v", wrong, err)
	}
}
