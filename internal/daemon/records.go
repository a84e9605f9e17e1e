package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/hostfile"
	"github.com/cayhq/cay/internal/store"
)

// instanceFile names the file with the server instance of a data directory whose records are in PostgreSQL. In SQLite
// the instance is a setting in the records.
const instanceFile = "instance"

// instanceOfFleet is the setting instance of records in PostgreSQL that belong to a fleet. No server instance has this
// value, which also keeps out earlier versions.
const instanceOfFleet = "fleet"

// inFleet reports whether the settings make a server one of several with the same records. SQLite has one server.
func inFleet(cfg config.Config) bool { return cfg.Fleet.Listen != "" && cfg.Store.URL != "" }

// markFile names the file that says how far this machine has seen the records in PostgreSQL.
const markFile = "records-seen"

// openRecords opens the records of a server, and returns them with the session in them. The node's id is the server
// instance.
func openRecords(ctx context.Context, cfg config.Config, acceptRestore bool) (*store.DB, store.Session, error) {
	open := openSQLite
	if cfg.Store.URL != "" {
		open = openPostgres
	}
	db, instance, err := open(ctx, cfg, acceptRestore)
	if err != nil {
		return nil, store.Session{}, err
	}
	session, err := db.StartSession(ctx, instance, acceptRestore)
	if err == nil && cfg.Store.URL != "" {
		err = db.Serve(ctx)
	}
	if err == nil {
		err = moveRange(ctx, db, cfg.DataDir)
	}
	if err == nil && inFleet(cfg) {
		// The session keeps out a copy of the data directory. From here on other servers may start with the records.
		err = db.SetSetting(ctx, settingInstance, instanceOfFleet)
	}
	if err != nil {
		return nil, session, errors.Join(err, db.Close())
	}
	return db, session, nil
}

func openPostgres(ctx context.Context, cfg config.Config, acceptRestore bool) (*store.DB, string, error) {
	own, made, err := ownInstance(cfg.DataDir)
	if err != nil {
		return nil, "", err
	}
	c := postgresConfig(cfg.Store)
	c.MarkFile, c.AcceptRestore = filepath.Join(cfg.DataDir, markFile), acceptRestore
	db, err := store.OpenPostgres(ctx, c)
	if err == nil {
		if err = belong(ctx, db, own, inFleet(cfg)); err != nil {
			err = errors.Join(err, db.Close())
		}
	}
	if err != nil {
		if made { // the directory has no records anywhere yet
			err = errors.Join(err, os.Remove(filepath.Join(cfg.DataDir, instanceFile)))
		}
		return nil, "", err
	}
	return db, own, nil
}

// belong returns an error unless a server instance may use the records in PostgreSQL. New ones become those of the
// instance, or of a fleet if the instance is in one. A single server does the work of a whole cluster, such as all
// builds of templates, so that it must be alone.
func belong(ctx context.Context, db *store.DB, instance string, fleet bool) error {
	first := instance
	if fleet {
		first = instanceOfFleet
	}
	switch owner, err := db.FirstSetting(ctx, settingInstance, first); {
	case err != nil:
		return err
	case owner == instanceOfFleet && !fleet:
		return errors.New("the records in store.url belong to a fleet, and this server is not in one: set fleet.listen, or " +
			"give this server a database of its own")
	case owner == instanceOfFleet || owner == instance:
		return nil
	case fleet:
		return fmt.Errorf("the records in store.url belong to the server instance %s alone, and this data directory to %s: "+
			"start that server with fleet.listen first, or give this one another database", owner, instance)
	default:
		return fmt.Errorf("the records in store.url belong to the server instance %s, and this data directory to %s: "+
			"give each server a database of its own", owner, instance)
	}
}

func openSQLite(ctx context.Context, cfg config.Config, _ bool) (*store.DB, string, error) {
	dataDir := cfg.DataDir
	if _, err := os.Stat(filepath.Join(dataDir, instanceFile)); err == nil {
		return nil, "", fmt.Errorf("the records of %s are in PostgreSQL: set store.url", dataDir)
	}
	db, err := store.Open(ctx, filepath.Join(dataDir, databaseFile))
	if err != nil {
		return nil, "", err
	}
	instance, err := db.FirstSetting(ctx, settingInstance, newInstance())
	if err != nil {
		return nil, "", errors.Join(err, db.Close())
	}
	return db, instance, nil
}

func postgresConfig(s config.Store) store.PostgresConfig {
	return store.PostgresConfig{URL: string(s.URL), Password: string(s.Password),
		PasswordFile: s.PasswordFile, MaxConns: s.MaxConns}
}

// ownInstance returns the server instance of a data directory whose records are in PostgreSQL. It makes one for a new
// directory, and returns made true then.
func ownInstance(dataDir string) (instance string, made bool, err error) {
	path := filepath.Join(dataDir, instanceFile)
	if instance, err = readID(path); !errors.Is(err, fs.ErrNotExist) {
		return instance, false, err
	}
	if _, err := os.Stat(filepath.Join(dataDir, databaseFile)); err == nil {
		return "", false, fmt.Errorf("the records of %s are in its %s: unset store.url, or use a new data directory", dataDir,
			databaseFile)
	}
	instance = newInstance()
	return instance, true, writeID(path, instance)
}

// rangeFile names the file with the range of addresses that the server used last.
const rangeFile = "network-range"

// moveRange moves the range from the records, in which earlier versions kept it, to its file. It must come before
// another server can have the records.
func moveRange(ctx context.Context, db *store.DB, dataDir string) error {
	last, found, err := db.Setting(ctx, settingRange)
	if err != nil || !found {
		return err
	}
	if err := writeID(filepath.Join(dataDir, rangeFile), last); err != nil {
		return err
	}
	return db.DropSetting(ctx, settingRange)
}

// lastRange returns the range of addresses that the server used last, the zero one if there is none.
func lastRange(dataDir string) (netip.Prefix, error) {
	text, err := readID(filepath.Join(dataDir, rangeFile))
	if errors.Is(err, fs.ErrNotExist) {
		return netip.Prefix{}, nil
	}
	var last netip.Prefix
	if err == nil {
		last, err = netip.ParsePrefix(text)
	}
	if err != nil {
		return last, fmt.Errorf("reading the last range of addresses from %s: %w", rangeFile, err)
	}
	return last, nil
}

// directoryFile names the file with the id of a data directory whose files have copies in a bucket. The id is not in
// the records, so that a copy of the records in another directory does not have it.
const directoryFile = "directory-id"

// directoryID returns the id of a data directory, and makes it the first time.
func directoryID(dataDir string) (string, error) {
	path := filepath.Join(dataDir, directoryFile)
	id, err := readID(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	id = rand.Text()
	return id, writeID(path, id)
}

// readID returns what [writeID] wrote, or an error that is [fs.ErrNotExist] if there is no file.
func readID(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("reading a file of the data directory: %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// writeID writes the file of a server instance, of the id of a data directory, or of a range, whole or not at all.
// Without the file the next start would not find the sandboxes of this one, or its files in the bucket.
func writeID(path, id string) error {
	if err := hostfile.ReplaceSynced(path, []byte(id+"\n"), 0o600); err != nil {
		return fmt.Errorf("writing a file of the data directory: %w", err)
	}
	return nil
}

// instanceOf returns the server instance of a data directory, "" if no server was ever started there. It needs no
// PostgreSQL.
func instanceOf(ctx context.Context, dataDir string) (string, error) {
	if instance, err := readID(filepath.Join(dataDir, instanceFile)); err == nil {
		return instance, nil
	}
	path := filepath.Join(dataDir, databaseFile)
	if _, err := os.Stat(path); err != nil {
		return "", nil
	}
	db, err := store.Open(ctx, path)
	if err != nil {
		return "", err
	}
	instance, _, err := db.Setting(ctx, settingInstance)
	return instance, errors.Join(err, db.Close())
}

// MoveRecords copies the records of a stopped server from SQLite, in its data directory, to PostgreSQL, and notes in
// the directory that they are there. It leaves the file of SQLite as it is. It can be repeated until a server has
// started with the copy.
func MoveRecords(ctx context.Context, dataDir string, to config.Store) ([]store.Copied, error) {
	path := filepath.Join(dataDir, databaseFile)
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("there are no records in %s: %w", dataDir, err)
	}
	lock, err := lockDir(dataDir, lockPatience)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	from, err := store.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	instance, found, err := from.Setting(ctx, settingInstance)
	if err != nil || !found {
		return nil, errors.Join(err, errors.New("no server was ever started there"))
	}
	db, err := store.OpenPostgres(ctx, postgresConfig(to))
	if err != nil {
		return nil, err
	}
	defer db.Close()
	copied, err := store.CopyToPostgres(ctx, from, db)
	if err != nil {
		return nil, err
	}
	// A mark of other records says nothing about these.
	if err := os.Remove(filepath.Join(dataDir, markFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return copied, writeID(filepath.Join(dataDir, instanceFile), instance)
}

// observeRecords registers the metrics of the records.
func observeRecords(db *store.DB, registry *prometheus.Registry) {
	calls := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "cay_store_call_seconds",
		Help: "Time that calls to the records took, by name, with their waits for a connection.",
		// From a read of SQLite to the time after which a PostgreSQL that does not answer is noticed.
		Buckets: []float64{.0001, .0005, .001, .0025, .005, .01, .025, .1, .5, 2}}, []string{"call"})
	registry.MustRegister(calls)
	db.OnCall(func(call string, took time.Duration) { calls.WithLabelValues(call).Observe(took.Seconds()) })
	if _, remote := db.Load(); remote {
		registry.MustRegister(recordsMetrics{db})
	}
}

// recordsMetrics collects the load of the connections to PostgreSQL.
type recordsMetrics struct{ db *store.DB }

var (
	recordsConns = prometheus.NewDesc("cay_store_connections",
		"Connections to PostgreSQL: used by calls now, open now, and the limit.", []string{"state"}, nil)
	recordsWaits = prometheus.NewDesc("cay_store_waits_total",
		"Calls that waited for a connection to PostgreSQL.", nil, nil)
	recordsWaited = prometheus.NewDesc("cay_store_waited_seconds_total",
		"Time that calls waited for a connection to PostgreSQL.", nil, nil)
	recordsRetries = prometheus.NewDesc("cay_store_retries_total",
		"Transactions in PostgreSQL that were run again after a conflict with another one.", nil, nil)
)

// Describe implements [prometheus.Collector].
func (m recordsMetrics) Describe(c chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, c) }

// Collect implements [prometheus.Collector].
func (m recordsMetrics) Collect(c chan<- prometheus.Metric) {
	load, _ := m.db.Load()
	for state, n := range map[string]int{"used": load.Used, "open": load.Open, "limit": load.Most} {
		c <- prometheus.MustNewConstMetric(recordsConns, prometheus.GaugeValue, float64(n), state)
	}
	c <- prometheus.MustNewConstMetric(recordsWaits, prometheus.CounterValue, float64(load.Waits))
	c <- prometheus.MustNewConstMetric(recordsWaited, prometheus.CounterValue, load.Waited.Seconds())
	c <- prometheus.MustNewConstMetric(recordsRetries, prometheus.CounterValue, float64(load.Retries))
}

// CheckRecords checks whether the records can be where the settings say.
func CheckRecords(ctx context.Context, s config.Store) Finding {
	f := Finding{Check: "records", Fix: "see docs/postgresql.md"}
	if s.URL == "" {
		f.OK, f.Detail = true, "SQLite, in the data directory"
		return f
	}
	what, err := store.CheckPostgres(ctx, postgresConfig(s))
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK, f.Detail = true, what
	return f
}
