package noderpc

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/pki"
	"github.com/cayhq/cay/internal/store"
)

// cluster is a replica with its records, its authority and its listener.
type cluster struct {
	t      *testing.T
	db     *store.DB
	tables *sql.DB // to look at all rows
	driver string  // of tables
	signer *pki.Authority
	nodes  *fleet.Service
	url    string
	log    *lines
}

// lines keeps a log.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// newCluster returns a cluster whose records are in SQLite, or in the PostgreSQL that url names.
func newCluster(t *testing.T, url string) *cluster {
	t.Helper()
	c := &cluster{t: t, driver: "pgx", log: &lines{}}
	source := url
	var err error
	if url != "" {
		c.db, err = store.OpenPostgres(t.Context(), store.PostgresConfig{URL: url, MaxConns: 8})
	} else {
		path := filepath.Join(t.TempDir(), "cay.db")
		c.driver, source = "sqlite", "file:"+path+"?mode=ro"
		c.db, err = store.Open(t.Context(), path)
	}
	if err != nil {
		t.Fatal(err)
	}
	if c.tables, err = sql.Open(c.driver, source); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.tables.Close(), c.db.Close()); err != nil {
			t.Error(err)
		}
	})
	session, err := c.db.StartSession(t.Context(), "abcdef", false)
	if err != nil {
		t.Fatal(err)
	}
	if c.signer, err = pki.NewAuthority(session.Cluster, time.Now().Add(-48*time.Hour)); err != nil {
		t.Fatal(err)
	}
	log := c.logger()
	c.nodes = fleet.New(fleet.Config{Self: "abcdef", Now: c.db.Now, Log: log, Obey: func(fleet.Orders) {},
		CA: CA{Signer: c.signer, Trusted: c.signer.Certificate()}}, c.db)
	if err := c.nodes.Register(t.Context(), "first", nil, fleet.About{}); err != nil {
		t.Fatal(err)
	}
	c.url = c.serve(c.keeper(c.signer, pki.Replica, "abcdef", time.Now()), NewHandler(Config{Nodes: c.nodes, Log: log,
		Failed: func(string) error { return nil }}))
	return c
}

// serve serves a handler and returns its address.
func (c *cluster) serve(k *pki.Keeper, h http.Handler) string {
	c.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	srv := &http.Server{Handler: h, TLSConfig: k.ServerConfig("h2"), Protocols: new(http.Protocols),
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	srv.Protocols.SetHTTP2(true)
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(l, "", "") }()
	c.t.Cleanup(func() {
		_ = srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			c.t.Errorf("serving: %v", err)
		}
	})
	return "https://" + l.Addr().String()
}

// keeper returns a Keeper with a certificate that an authority signs at a time.
func (c *cluster) keeper(a *pki.Authority, role pki.Role, id string, at time.Time) *pki.Keeper {
	c.t.Helper()
	return c.keeperOf(newKey(c.t), a, role, id, at)
}

func (c *cluster) keeperOf(key *ecdsa.PrivateKey, a *pki.Authority, role pki.Role, id string,
	at time.Time) *pki.Keeper {
	c.t.Helper()
	chain, _, err := a.Sign(csr(c.t, key), pki.Identity{Cluster: a.Cluster(), Role: role, ID: id}, at)
	if err != nil {
		c.t.Fatal(err)
	}
	k, err := pki.NewKeeper(key, chain, a.Certificate())
	if err != nil {
		c.t.Fatal(err)
	}
	return k
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	request, err := pki.NewRequest(key)
	if err != nil {
		t.Fatal(err)
	}
	return request
}

// token returns a new token.
func (c *cluster) token(rejoin string) string {
	c.t.Helper()
	text, _, err := c.nodes.NewToken(c.t.Context(), "key_a", rejoin, fleet.TokenSettings{}, fleet.MaxTokenTime)
	if err != nil {
		c.t.Fatal(err)
	}
	return text
}

// member is a machine that has joined.
type member struct {
	key *ecdsa.PrivateKey
	id  string
	*pki.Keeper
	*Client
}

// join has a machine join, again if rejoin names a node.
func (c *cluster) join(name, rejoin string) *member {
	c.t.Helper()
	m := &member{key: newKey(c.t)}
	j, err := Join(c.t.Context(), []string{c.url}, c.token(rejoin), m.key, fleet.JoinRequest{Name: name})
	if err != nil {
		c.t.Fatal(err)
	}
	m.id = j.Node
	if m.Keeper, err = pki.NewKeeper(m.key, j.Certificate, j.Authorities); err != nil {
		c.t.Fatal(err)
	}
	m.Client = NewClient(m.Keeper, func() []string { return []string{c.url} })
	c.t.Cleanup(m.Client.Close)
	return m
}

// post makes a call with settings of TLS, and returns the status and the code of the answer.
func (c *cluster) post(config *tls.Config, path, body string) (status int, code string, err error) {
	c.t.Helper()
	client := newHTTP(func() *tls.Config { return config })
	client.Timeout = 90 * time.Second
	defer client.CloseIdleConnections()
	resp, err := client.Post(c.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	var p problem
	if err := json.Unmarshal(text, &p); err != nil && resp.StatusCode < 404 {
		c.t.Errorf("%s answers %d %q", path, resp.StatusCode, text)
	}
	return resp.StatusCode, p.Code, nil
}

// dump returns the rows of all tables, except that of transactions.
func (c *cluster) dump() string {
	c.t.Helper()
	list := "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
	if c.driver == "pgx" {
		list = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public' " +
			"AND table_name <> 'commits'"
	}
	tables := c.rows(list)
	if len(tables) < 20 {
		c.t.Fatalf("found the tables %q", tables)
	}
	var all []string
	for _, table := range tables {
		table = strings.Trim(table, "[]")
		all = append(all, table+":\n"+strings.Join(c.rows("SELECT * FROM "+table), "\n"))
	}
	return strings.Join(all, "\n")
}

// rows returns the rows of a query as texts, sorted.
func (c *cluster) rows(query string) (all []string) {
	c.t.Helper()
	rows, err := c.tables.QueryContext(context.WithoutCancel(c.t.Context()), query)
	if err != nil {
		c.t.Fatal(err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		c.t.Fatal(err)
	}
	for rows.Next() {
		values, into := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			into[i] = &values[i]
		}
		if err := rows.Scan(into...); err != nil {
			c.t.Fatal(err)
		}
		all = append(all, fmt.Sprint(values))
	}
	if err := rows.Err(); err != nil {
		c.t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func jsonOf(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// onBoth runs a test on SQLite and on PostgreSQL.
func onBoth(t *testing.T, run func(c *cluster)) {
	t.Run("sqlite", func(t *testing.T) { run(newCluster(t, "")) })
	t.Run("postgres", func(t *testing.T) {
		pg := caytest.StartPostgres(t)
		url, err := pg.Create("cluster", "")
		if err != nil {
			t.Fatal(err)
		}
		run(newCluster(t, url))
	})
}

// wantFault checks the kind and the code of an error.
func wantFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if e := fault.As(err); e == nil || e.Kind != kind || e.Code != code || e.Detail == "" {
		t.Errorf("the error is %v, want %s, %s", err, kind, code)
	}
}

func (c *cluster) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(c.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
