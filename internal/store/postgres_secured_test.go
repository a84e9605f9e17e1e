package store

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestPostgresSecured works with a PostgreSQL that proves who it is and wants a password, which changes. It refuses one
// that has another certificate.
func TestPostgresSecured(t *testing.T) {
	server, err := caytest.NewPostgresOnLoopback()
	if err != nil {
		caytest.Missing(t, err.Error())
	}
	t.Cleanup(func() {
		if err := server.Remove(); err != nil {
			t.Errorf("removing PostgreSQL: %v", err)
		}
	})
	plain, err := server.Create("secured", "")
	if err != nil {
		t.Fatal(err)
	}
	dir := server.Socket() // which the server can read
	cert := selfSigned(t, dir)
	access := filepath.Join(dir, "access")
	err = os.WriteFile(access, []byte("local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"), 0o644)
	for _, statement := range []string{"CREATE ROLE owner LOGIN PASSWORD 'first'",
		"CREATE ROLE reader LOGIN PASSWORD 'first'", "ALTER DATABASE secured OWNER TO owner",
		"ALTER SYSTEM SET ssl_cert_file = '" + cert + "'", "ALTER SYSTEM SET ssl_key_file = '" + cert + ".key'",
		"ALTER SYSTEM SET ssl = on", "ALTER SYSTEM SET hba_file = '" + access + "'"} {
		err = errors.Join(err, server.Exec("postgres", statement))
	}
	if err := errors.Join(err, server.Stop(syscall.SIGINT), server.Start()); err != nil {
		t.Fatal(err)
	}
	secured := func(root string) string {
		return strings.NewReplacer("cay@", "owner@", "sslmode=disable",
			"sslmode=verify-full&sslrootcert="+root).Replace(plain)
	}
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("first\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		cfg  PostgresConfig
		want string
	}{
		"another certificate": {PostgresConfig{URL: secured(selfSigned(t, t.TempDir())), PasswordFile: password}, "certificate"},
		"another password":    {PostgresConfig{URL: secured(cert), Password: "sesame"}, "password"},
		"no password file":    {PostgresConfig{URL: secured(cert), PasswordFile: password + "s"}, "no such file"},
	} {
		if db, err := OpenPostgres(t.Context(), c.cfg); err == nil {
			t.Errorf("%s: opened, %v", what, db.Close())
		} else if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: %v", what, err)
		}
	}
	reader := PostgresConfig{URL: strings.Replace(secured(cert), "owner@", "reader@", 1), PasswordFile: password}
	_, err = CheckPostgres(t.Context(), reader)
	if err == nil || !strings.Contains(err.Error(), "may not create tables") {
		t.Errorf("a user who may only read: %v", err)
	}
	db, err := OpenPostgres(t.Context(), PostgresConfig{URL: secured(cert), MaxConns: 4, PasswordFile: password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	if _, err := db.StartSession(t.Context(), "aaaaaa", false); err != nil {
		t.Fatal(err)
	}
	checkSecured(t, db)

	// A new connection reads the password again.
	if err := errors.Join(server.Exec("postgres", "ALTER ROLE owner PASSWORD 'second'"),
		os.WriteFile(password, []byte("second"), 0o600)); err != nil {
		t.Fatal(err)
	}
	db.dialect.(*postgresDialect).pool.Reset()
	checkSecured(t, db)
}

// checkSecured checks that a server works, and that all its connections are secured.
func checkSecured(t *testing.T, db *DB) {
	t.Helper()
	if _, _, err := db.Insert(t.Context(), small("org_a", 0), sandbox.Quota{Sandboxes: 5}, sandbox.Once{}); err != nil {
		t.Error(err)
	}
	var all, plain int
	if err := db.reader.QueryRowContext(t.Context(), `SELECT COUNT(*), COUNT(*) FILTER (WHERE NOT s.ssl) FROM pg_stat_ssl s
		JOIN pg_stat_activity a USING (pid) WHERE a.application_name = 'cay'`).Scan(&all, &plain); err != nil ||
		all < 2 || plain > 0 {
		t.Errorf("%d of %d connections are without TLS, %v", plain, all, err)
	}
	conn, err := db.dialect.(*postgresDialect).pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	if shouldPing(t.Context(), pgxpool.ShouldPingParams{Conn: conn.Conn()}) {
		t.Error("a connection that lives is asked first")
	}
}

// selfSigned writes a certificate for the loopback into a directory, and beside it its key, which PostgreSQL can read.
func selfSigned(t *testing.T, dir string) (cert string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "database"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	public, err := x509.CreateCertificate(rand.Reader, about, about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert = filepath.Join(dir, "cert")
	key := cert + ".key"
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: public}), 0o644),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600)); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		return cert
	}
	owner, err := user.Lookup("postgres") // as which the server runs
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(owner.Uid)
	if err == nil {
		err = os.Chown(key, uid, -1)
	}
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
