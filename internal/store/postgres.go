package store

// This file opens PostgreSQL. postgres_write.go has its transactions, and postgres_events.go numbers its events.

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

// PostgresConfig says which PostgreSQL has the records, and how many connections cay may have to it.
type PostgresConfig struct {
	// URL is postgres://USER@HOST:PORT/DATABASE?PARAMETERS, with the parameters of libpq, such as sslmode
	// and sslrootcert.
	URL string
	// Password is used instead of the one in URL, if it is not empty. PasswordFile names a file with the
	// password, which is read for each new connection, so that it can be changed while cay runs.
	Password, PasswordFile string
	// MaxConns limits the connections of the pool.
	MaxConns int
	// MarkFile is a file of this machine in which cay keeps how far it has seen the records, so that it
	// notices when the database is restored to an older state. "" keeps it in memory alone.
	MarkFile string
	// AcceptRestore makes the present state of the database the newest.
	AcceptRestore bool
}

const (
	// connectTimeout limits the time to make a connection, also to a machine that does not answer at all.
	// With a longer one, calls would wait for a database that is away; with a shorter one, a busy database
	// or a slow network would look as if it were away.
	connectTimeout = 1500 * time.Millisecond
	// connLifetime bounds the age of a connection, so that cay follows a database whose address changes.
	// With a shorter time, more calls would wait for a new connection, some milliseconds each.
	connLifetime = 30 * time.Minute
	// idleInTransaction limits, in milliseconds, the time that the database waits for cay inside a
	// transaction. cay computes for microseconds there: a longer wait means that the network to it is cut,
	// and its locks would keep the next server from working.
	idleInTransaction = "15000"
	// migrationPatience limits the wait for another server that migrates the schema. A shorter time could
	// end a server's start while a large table is rewritten; a longer one would look like a hang.
	migrationPatience = 10 * time.Minute
	// migrationLock is the key of the advisory lock under which servers migrate, one after the other.
	// Never change it: two versions of cay must use the same.
	migrationLock = 0x636179_00
)

// CheckPostgresURL refuses a URL that [OpenPostgres] could not use, and one that would send records and password over a
// network without saying how to protect them.
func CheckPostgresURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return errors.New("must be postgres://USER@HOST:PORT/DATABASE")
	}
	c, err := pgx.ParseConfig(text)
	if err != nil {
		return fmt.Errorf("is not valid: %w", err) // has no password in it
	}
	if u.Query().Get("sslmode") != "" {
		return nil
	}
	for _, host := range hostsOf(c) {
		addr, err := netip.ParseAddr(host)
		if host != "localhost" && !filepath.IsAbs(host) && !(err == nil && addr.IsLoopback()) {
			return fmt.Errorf("must say how the connection to %s is protected: add sslmode=verify-full and sslrootcert=FILE, "+
				"or sslmode=disable on a network that only the database and cay can read", host)
		}
	}
	return nil
}

// Load tells how busy the connections to PostgreSQL are.
type Load struct {
	Used, Open, Most int           // connections: of calls now, all now, and the most that there may be
	Waits            int64         // calls that waited for a connection
	Waited           time.Duration // their waits together
	Retries          int64         // transactions that were run again after a conflict
}

// Load returns the load of the connections to PostgreSQL, and false for SQLite.
func (db *DB) Load() (Load, bool) {
	d, ok := db.dialect.(*postgresDialect)
	if !ok {
		return Load{}, false
	}
	st := d.pool.Stat()
	return Load{Used: int(st.AcquiredConns()), Open: int(st.TotalConns()), Most: int(st.MaxConns()),
		Waits: st.EmptyAcquireCount(), Waited: st.EmptyAcquireWaitTime(), Retries: d.retries.Load()}, true
}

// hostsOf returns the hosts of a connection: names, addresses, and directories of sockets.
func hostsOf(c *pgx.ConnConfig) []string {
	hosts := []string{c.Host}
	for _, f := range c.Fallbacks {
		hosts = append(hosts, f.Host)
	}
	return hosts
}

// LookupIPv4 returns the IPv4 addresses of a host, none if it has only others. Unlike a lookup of all addresses it
// fails if the IPv4 addresses could not be asked for while others were found.
func LookupIPv4(ctx context.Context, host string) ([]netip.Addr, error) {
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", host)
	if err == nil || !hasNone(err) {
		return found, err
	}
	if others, failed := net.DefaultResolver.LookupNetIP(ctx, "ip6", host); failed != nil || len(others) == 0 {
		return nil, err
	}
	return nil, nil
}

// hasNone reports whether the error of a lookup says that the host has no such address.
func hasNone(err error) bool {
	var dns *net.DNSError
	var addr *net.AddrError // of a host that is an address of the other kind
	return errors.As(err, &dns) && dns.IsNotFound || errors.As(err, &addr)
}

// PostgresAddresses returns the IPv4 addresses of the machines that a URL names, without those of this machine's
// loopback. Sandboxes have no IPv6. It returns none for an empty URL.
func PostgresAddresses(ctx context.Context, text string) ([]netip.Addr, error) {
	if text == "" {
		return nil, nil
	}
	c, err := pgx.ParseConfig(text)
	if err != nil {
		return nil, err
	}
	hosts := hostsOf(c)
	slices.Sort(hosts)
	var all []netip.Addr
	for _, host := range slices.Compact(hosts) {
		if filepath.IsAbs(host) {
			continue
		}
		found, err := LookupIPv4(ctx, host)
		if err != nil {
			return nil, fmt.Errorf("looking up the database: %w", err)
		}
		for _, a := range found {
			if a = a.Unmap(); a.Is4() && !a.IsLoopback() && !slices.Contains(all, a) {
				all = append(all, a)
			}
		}
	}
	return all, nil
}

// OpenPostgres connects to PostgreSQL and migrates the schema of cay's database to the present version, while other
// servers that do the same wait. It refuses a database that a newer cay has migrated, and one that acknowledges commits
// before they are on a disk.
func OpenPostgres(ctx context.Context, cfg PostgresConfig) (*DB, error) {
	if err := CheckPostgresURL(cfg.URL); err != nil {
		return nil, fmt.Errorf("opening PostgreSQL: its URL %w", err)
	}
	all, now := &lines{}, &clock{}
	pool, err := newPool(ctx, cfg, all, now)
	if err != nil {
		return nil, fmt.Errorf("opening PostgreSQL: %w", err)
	}
	pg := openPool(pool)
	db := &DB{writer: pg, reader: pg}
	d := &postgresDialect{db: db, pool: pool, lines: all, clock: now, mark: mark{path: cfg.MarkFile}}
	db.dialect = d
	err = d.prepare(ctx)
	if err == nil {
		err = d.mark.open(cfg.AcceptRestore)
	}
	if err != nil {
		err = fmt.Errorf("opening PostgreSQL at %s: %w", pool.Config().ConnConfig.Host, err)
		return nil, errors.Join(err, d.closePool())
	}
	d.startNumbering()
	return db, nil
}

// newPool returns a pool of connections with the settings that cay needs. Each new connection reads the clock now.
func newPool(ctx context.Context, cfg PostgresConfig, all *lines, now *clock) (*pgxpool.Pool, error) {
	c, err := pgxpool.ParseConfig(cfg.URL)
	if err != nil {
		return nil, err
	}
	c.BeforeConnect = func(_ context.Context, conn *pgx.ConnConfig) error {
		if cfg.Password != "" {
			conn.Password = cfg.Password
		}
		if cfg.PasswordFile == "" {
			return nil
		}
		text, err := os.ReadFile(cfg.PasswordFile)
		if err != nil {
			return fmt.Errorf("reading the password: %w", err)
		}
		conn.Password = strings.TrimSuffix(string(text), "\n")
		return nil
	}
	// Migrations use one connection for the lock and one for the work.
	c.MaxConns = int32(max(cfg.MaxConns, 2))
	c.MaxConnLifetime, c.MaxConnLifetimeJitter = connLifetime, connLifetime/10
	c.ShouldPing, c.AfterConnect = shouldPing, now.read
	c.ConnConfig.ConnectTimeout, c.ConnConfig.DialFunc = connectTimeout, all.dialGated
	for name, value := range map[string]string{
		"application_name": "cay", "idle_in_transaction_session_timeout": idleInTransaction,
	} {
		if c.ConnConfig.RuntimeParams[name] == "" {
			c.ConnConfig.RuntimeParams[name] = value
		}
	}
	return pgxpool.NewWithConfig(ctx, c)
}

// openPool returns the pool as a *sql.DB, which keeps no connections of its own.
func openPool(pool *pgxpool.Pool) *sql.DB {
	db := sql.OpenDB(connector{stdlib.GetPoolConnector(pool)})
	db.SetMaxIdleConns(0)
	return db
}

// leastVersion is the oldest major version of PostgreSQL that its makers still mend, and that cay is tested with. Older
// ones lack functions that cay calls.
const leastVersion = 14

// prepare checks and migrates the database.
func (d *postgresDialect) prepare(ctx context.Context) error {
	if err := d.awaitServer(ctx); err != nil {
		return err
	}
	return migratePostgres(ctx, d.db.writer)
}

// awaitServer checks the server, and waits up to lockPatience for one that is there but does not answer yet: it starts,
// has no free connection, or is too busy.
func (d *postgresDialect) awaitServer(ctx context.Context) error {
	for began := time.Now(); ; {
		_, err := checkServer(ctx, d.db.reader)
		var broken net.Error
		slow := errors.As(err, &broken) && broken.Timeout()
		if code := pgCode(err); !slow && code != codeStarting && code != codeFull || time.Since(began) > lockPatience {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(lockRetry):
		}
	}
}

// facts holds what a server says about itself.
type facts struct {
	version               int
	text                  string // of the version
	encoding, synchronous string
	clock                 time.Time
}

// checkServer returns an error if the server cannot have cay's records.
func checkServer(ctx context.Context, db *sql.DB) (f facts, err error) {
	err = db.QueryRowContext(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_version'),
		current_setting('server_encoding'), current_setting('synchronous_commit'),
		`+databaseNow).
		Scan(&f.version, &f.text, &f.encoding, &f.synchronous, timeColumn{&f.clock})
	switch {
	case err != nil:
		return f, err
	case f.version < leastVersion*10000:
		return f, fmt.Errorf("it is PostgreSQL %s: cay needs version %d or newer", f.text, leastVersion)
	case f.encoding != "UTF8":
		return f, fmt.Errorf("its encoding is %s: create the database with ENCODING 'UTF8'", f.encoding)
	case f.synchronous == "off":
		return f, errors.New("its setting synchronous_commit is off: what cay has acknowledged could be lost")
	}
	return f, nil
}

// maxClockSkew is the difference between the clocks of this machine and of the database from which [CheckPostgres]
// warns. A call to the database takes milliseconds. With a larger difference, the numbers of events and the times of
// sandboxes tell different stories.
const maxClockSkew = 5 * time.Second

// CheckPostgres checks whether the records can be in a PostgreSQL, without changing it, and returns what it is.
func CheckPostgres(ctx context.Context, cfg PostgresConfig) (what string, err error) {
	if err := CheckPostgresURL(cfg.URL); err != nil {
		return "", fmt.Errorf("store.url %w", err)
	}
	pool, err := newPool(ctx, cfg, &lines{}, &clock{})
	if err != nil {
		return "", err
	}
	defer pool.Close()
	db := openPool(pool)
	defer db.Close()
	f, err := checkServer(ctx, db)
	if err != nil {
		return "", err
	}
	var rights bool
	err = db.QueryRowContext(ctx, `SELECT has_schema_privilege(current_schema(), 'CREATE')
		AND NOT pg_is_in_recovery()`).Scan(&rights)
	if err != nil {
		return "", err
	}
	skew := time.Since(f.clock).Abs()
	switch {
	case !rights:
		return "", errors.New("its user may not create tables there: give the user a database of its own on the primary")
	case skew > maxClockSkew:
		return "", fmt.Errorf("its clock and this machine's differ by %s", skew.Round(time.Second))
	}
	return "PostgreSQL " + f.text, nil
}

// migratePostgres migrates the schema under a lock, so that of servers that start at the same time one migrates and the
// others find the work done.
func migratePostgres(ctx context.Context, db *sql.DB) (err error) {
	ctx, cancel := context.WithTimeout(ctx, migrationPatience)
	defer cancel()
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	// Closing gives the connection back to the pool; an error means that it is broken, and its lock free.
	defer func() { _ = conn.Close() }()
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock($1)", migrationLock); err != nil {
		return fmt.Errorf("waiting for other servers that migrate: %w", err)
	}
	defer func() {
		_, unlock := conn.ExecContext(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", migrationLock)
		err = errors.Join(err, unlock)
	}()
	return migrate(ctx, db, goose.DialectPostgres, "migrations/postgres")
}

// cleanArgs makes the texts among the parameters of a statement such that PostgreSQL can store and compare them. It
// returns other values as they are.
func cleanArgs(args []driver.NamedValue) ([]driver.NamedValue, error) {
	cleaned := slices.Clone(args) // database/sql uses args again with another connection
	for i := range cleaned {
		var err error
		if cleaned[i].Value, err = cleanArg(args[i].Value); err != nil {
			return nil, err
		}
	}
	return cleaned, nil
}

func cleanArg(v any) (any, error) {
	if valuer, ok := v.(driver.Valuer); ok {
		var err error
		if v, err = valuer.Value(); err != nil {
			return nil, err
		}
	}
	r := reflect.ValueOf(v)
	if r.Kind() == reflect.Pointer && !r.IsNil() {
		r = r.Elem()
	}
	if r.Kind() == reflect.String {
		return clean(r.String()), nil
	}
	return v, nil
}

// clean returns s as PostgreSQL can store it: without NUL bytes, and with U+FFFD for bytes that are not UTF-8. Texts of
// processes, logs and callers may have both. Names that differ only in these are the same name there.
func clean(s string) string {
	return strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", ""), "\uFFFD")
}

// pgCode returns the code of an error of PostgreSQL, "" if err is another error.
func pgCode(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}
