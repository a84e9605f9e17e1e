package caytest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// postgresPatience limits the time that PostgreSQL has to start or to stop, which it does in a second on an idle
// machine.
const postgresPatience = 60 * time.Second

// Postgres is a PostgreSQL server of a test's own. It has a private directory and a private socket, no network, and
// runs as a user without privileges.
type Postgres struct {
	dir    string // has the data and the socket
	bin    string // has the programs
	owner  *syscall.Credential
	port   string // on the loopback, "" for none
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
}

// NewPostgres makes an empty server and starts it. The caller must call [Postgres.Remove], also in a test that fails.
func NewPostgres() (*Postgres, error) { return newPostgres("") }

// NewPostgresOnLoopback makes a server that is measured: it listens on the loopback, and syncs commits to the disk.
func NewPostgresOnLoopback() (*Postgres, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err := errors.Join(err, l.Close()); err != nil {
		return nil, err
	}
	return newPostgres(port)
}

func newPostgres(port string) (*Postgres, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		return nil, errors.New("PostgreSQL is not installed in /usr/lib/postgresql")
	}
	slices.Sort(found)
	p := &Postgres{bin: filepath.Dir(found[len(found)-1]), port: port}
	if p.dir, err = os.MkdirTemp("", "cay-pg-"); err != nil {
		return nil, err
	}
	if err := p.initialize(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(p.dir))
	}
	if err := p.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(p.dir))
	}
	return p, nil
}

// StartPostgres makes and starts a server for a test, and removes it at the test's end.
func StartPostgres(t testing.TB) *Postgres {
	t.Helper()
	p, err := NewPostgres()
	if err != nil {
		Missing(t, err.Error())
	}
	t.Cleanup(func() {
		if err := p.Remove(); err != nil {
			t.Errorf("removing PostgreSQL: %v", err)
		}
	})
	return p
}

// initialize makes the files of the server, which belong to the user postgres if the test runs as root.
func (p *Postgres) initialize() error {
	if os.Geteuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return err
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return err
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return err
		}
		p.owner = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(p.dir, int(uid), int(gid)); err != nil {
			return err
		}
	}
	cmd := p.command("initdb", "-D", p.data(), "-U", "cay", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync",
		"--no-instructions")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("running initdb: %w: %s", err, out)
	}
	return nil
}

func (p *Postgres) data() string { return filepath.Join(p.dir, "data") }

func (p *Postgres) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.bin, program), args...)
	cmd.Dir = p.dir
	// A test that is killed takes the server with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.owner, Setpgid: true, Pdeathsig: syscall.SIGQUIT}
	return cmd
}

// Start starts the server after [Postgres.Stop], and waits until it answers.
func (p *Postgres) Start() error {
	// Without fsync a test is quick; what is committed survives a crash of PostgreSQL, but not of the machine.
	cmd := p.command("postgres", "-D", p.data(), "-k", p.dir, "-c", "listen_addresses=", "-c", "fsync=off",
		"-c", "max_connections=200", "-c", "autovacuum_naptime=1h")
	if p.port != "" {
		cmd.Args = append(cmd.Args, "-p", p.port, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=on")
	}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }() // its log says how it ended
	p.cmd, p.exited = cmd, exited
	for deadline := time.Now().Add(postgresPatience); ; {
		err := p.Exec("postgres", "SELECT 1")
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("PostgreSQL ended while starting: %s", log.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return errors.Join(err, p.Stop(syscall.SIGQUIT))
		}
	}
}

// Stop signals the server and waits for its end: SIGINT ends it in order, SIGQUIT ends it as a crash does.
func (p *Postgres) Stop(signal syscall.Signal) error {
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.exited:
		return nil
	case <-time.After(postgresPatience):
		return fmt.Errorf("PostgreSQL did not end on %s", signal)
	}
}

// Pause stops the processes of the server without ending them, as a machine that is cut off looks to its clients, and
// lets them run again if run is true.
func (p *Postgres) Pause(run bool) error {
	signal := syscall.SIGSTOP
	if run {
		signal = syscall.SIGCONT
	}
	out, err := exec.Command("pgrep", "-P", strconv.Itoa(p.cmd.Process.Pid)).Output()
	if err != nil {
		return fmt.Errorf("listing PostgreSQL's processes: %w", err)
	}
	pids := []int{p.cmd.Process.Pid}
	for _, field := range strings.Fields(string(out)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return err
		}
		pids = append(pids, pid)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// Standby makes a synchronous standby of the server and starts it. From then on the server acknowledges a commit when
// the standby has it too.
func (p *Postgres) Standby() (*Postgres, error) {
	dir, err := os.MkdirTemp("", "cay-pg-")
	if err != nil {
		return nil, err
	}
	s := &Postgres{dir: dir, bin: p.bin, owner: p.owner}
	if p.owner != nil {
		err = os.Chown(dir, int(p.owner.Uid), int(p.owner.Gid))
	}
	if err == nil {
		out, failed := p.command("pg_basebackup", "-h", p.dir, "-U", "cay", "-D", s.data(), "-R", "-X", "stream",
			"-c", "fast", "--no-sync").CombinedOutput()
		if failed != nil {
			err = fmt.Errorf("running pg_basebackup: %w: %s", failed, out)
		}
	}
	if err == nil {
		err = s.Start()
	}
	if err == nil {
		err = errors.Join(p.Exec("postgres", "ALTER SYSTEM SET synchronous_standby_names = '*'"),
			p.Exec("postgres", "SELECT pg_reload_conf()"))
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

// Promote makes a standby accept writes.
func (p *Postgres) Promote() error { return p.Exec("postgres", "SELECT pg_promote()") }

// Socket returns the directory of the server's socket.
func (p *Postgres) Socket() string { return p.dir }

// Remove ends the server and removes its files.
func (p *Postgres) Remove() error {
	return errors.Join(p.Stop(syscall.SIGQUIT), os.RemoveAll(p.dir))
}

// URL returns the address of a database of the server.
func (p *Postgres) URL(database string) string {
	if p.port != "" {
		return "postgres://cay@127.0.0.1:" + p.port + "/" + database + "?sslmode=disable"
	}
	q := url.Values{"host": {p.dir}, "user": {"cay"}}
	return "postgres:///" + database + "?" + q.Encode()
}

// Exec runs a statement in a database.
func (p *Postgres) Exec(database, statement string) error {
	cmd := p.command("psql", "-X", "-q", "-h", p.dir, "-U", "cay", "-d", database, "-c", statement)
	if p.port != "" {
		cmd.Args = append(cmd.Args, "-p", p.port)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("running %q: %w: %s", statement, err, out)
	}
	return nil
}

// Create makes a database and returns its address. The new one is a copy of the database that template names, or empty.
// Names are lower-case letters, digits and underscores.
func (p *Postgres) Create(name, template string) (string, error) {
	statement := "CREATE DATABASE " + name
	if template != "" {
		statement += " TEMPLATE " + template
	}
	return p.URL(name), p.Exec("postgres", statement)
}
