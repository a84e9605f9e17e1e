package e2e

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// onPostgres is a server whose records move to a PostgreSQL of the test's own.
type onPostgres struct {
	*server
	pg    *caytest.Postgres
	relay *caytest.Relay // between the server and PostgreSQL
	url   string         // of its database "present"
}

// TestPostgres moves the records of a server to PostgreSQL, takes PostgreSQL away, and restores it to an older state.
func TestPostgres(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	p := &onPostgres{pg: caytest.StartPostgres(t)}
	if _, err := p.pg.Create("present", ""); err != nil {
		t.Fatal(err)
	}
	p.relay = caytest.StartRelay(t, "unix", filepath.Join(p.pg.Socket(), ".s.PGSQL.5432"))
	p.url = "postgres://cay@" + p.relay.Address() + "/present?sslmode=disable"
	p.server = newServer(t, "CAY_STORE_URL=")
	p.start()
	p.needTemplate("python")
	id := p.create(nil)
	p.want(id, "nohup sh -c 'while true; do date +%s%N > /tmp/next; mv /tmp/next /tmp/beat; sleep 0.05; done' "+
		">/dev/null 2>&1 & sleep 0.2")
	p.moves(id)
	p.goesAway(id, func() error { return p.pg.Stop(syscall.SIGINT) }, p.pg.Start)
	thaw := sync.OnceFunc(p.relay.Thaw)
	t.Cleanup(thaw)
	p.goesAway(id, func() error { p.relay.Freeze(); return nil }, func() error { thaw(); return nil })
	p.isRestored()
}

// beats looks at a sandbox, and returns a function that checks that it is the same sandbox and has gone on.
func (p *onPostgres) beats(id string) (after func()) {
	p.t.Helper()
	const look = "sleep 0.2; cat /tmp/beat; cat /proc/sys/kernel/random/boot_id"
	before := strings.Fields(p.want(id, look))
	return func() {
		p.t.Helper()
		if now := strings.Fields(p.want(id, look)); len(before) != 2 || len(now) != 2 || now[1] != before[1] ||
			now[0] == before[0] {
			p.t.Errorf("before %q, after %q", before, now)
		}
	}
}

// refused checks that a server does not start, and says why.
func (p *onPostgres) refused(what, want, dataDir string, env ...string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.binary, "server", "--data-dir", dataDir, "--listen", freeAddress(p.t))
	cmd.Env = append(slices.Clone(p.env), env...)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), want) {
		p.t.Errorf("%s: %v, %s", what, err, out)
	}
}

// moves moves the records of the stopped server, and checks that the next server adopts the sandbox that runs. It
// checks that a data directory and a database that do not belong together are refused.
func (p *onPostgres) moves(id string) {
	move := func() (string, error) {
		cmd := exec.Command(p.binary, "server", "migrate", "--from", "sqlite:"+p.dataDir, "--to", p.url)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	goesOn := p.beats(id)
	if out, err := move(); err == nil {
		p.t.Errorf("moved the records of a running server: %s", out)
	}
	p.stop(syscall.SIGTERM)
	p.refused("a database that has none of the records", "cay.db", p.dataDir, "CAY_STORE_URL="+p.url)
	for range 2 {
		if out, err := move(); err != nil || !strings.Contains(out, "1 rows of sandboxes") {
			p.t.Fatalf("moving: %v, %s", err, out)
		}
	}
	p.refused("records that have moved", "store.url", p.dataDir)
	p.env = append(p.env, "CAY_STORE_URL="+p.url)
	p.start()
	goesOn()
	if out, err := move(); err == nil {
		p.t.Errorf("replaced the records of a running server: %s", out)
	}
	p.refused("a second server with the same records", "belong to the server instance", newServer(p.t).dataDir)
	for _, c := range []struct{ url, want string }{
		{p.url, "ok     records: PostgreSQL"},
		{strings.Replace(p.url, "present", "none", 1), "WRONG  records: "},
	} {
		p.env = append(p.env, "CAY_STORE_URL="+c.url)
		if out, _, _ := p.cli("", "doctor"); !strings.Contains(out, c.want) {
			p.t.Errorf("doctor says %q, want %q", out, c.want)
		}
	}
	p.env = append(p.env, "CAY_STORE_URL="+p.url)
	if n := p.metric(`cay_store_connections{state="limit"}`); n != 16 {
		p.t.Errorf("the limit of connections is %d", n)
	}
	if n := p.metric(`cay_store_call_seconds_count{call="get"}`); n == 0 {
		p.t.Error("no call to the records was measured")
	}
}

// goesAway takes PostgreSQL away. Calls are refused meanwhile, sandboxes go on, and one whose time is up ends when
// PostgreSQL is back.
func (p *onPostgres) goesAway(long string, away, back func() error) {
	short := p.create(object{"timeout": "5s"})
	end := orZero(p.get(short).ExpiresAt)
	goesOn := p.beats(long)
	if err := away(); err != nil {
		p.t.Fatal(err)
	}
	for time.Now().Before(end.Add(time.Second)) {
		for _, path := range []string{"/readyz", "/v1/sandboxes/" + long, "/v1/sandboxes"} {
			if status, retry, body := p.answer(path); status != http.StatusServiceUnavailable || retry == "" ||
				text([]byte(body), "code") != "not_ready" {
				p.t.Fatalf("%s while PostgreSQL is away: %d, Retry-After %q, %s", path, status, retry, body)
			}
		}
		time.Sleep(100 * time.Millisecond) // until the end of the sandbox
	}
	if err := back(); err != nil {
		p.t.Fatal(err)
	}
	p.waitReady()
	goesOn()
	if reason := p.waitState(short, "destroyed"); reason != "expired" {
		p.t.Errorf("the sandbox whose time was up was destroyed with reason %q", reason)
	}
}

// answer returns the answer to a GET.
func (p *onPostgres) answer(path string) (status int, retryAfter, body string) {
	p.t.Helper()
	req, err := http.NewRequest("GET", p.server.url+path, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+p.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("Retry-After"), string(text)
}

// isRestored restores the database under the running server to the state before a sandbox was created. The sandbox
// stays on the machine until the restore is accepted.
func (p *onPostgres) isRestored() {
	p.stop(syscall.SIGTERM)
	if _, err := p.pg.Create("backup", "present"); err != nil {
		p.t.Fatal(err)
	}
	p.start()
	id := p.create(nil)
	sentry := p.sentry(id)
	if err := errors.Join(p.pg.Exec("postgres", "DROP DATABASE present WITH (FORCE)"),
		p.pg.Exec("postgres", "CREATE DATABASE present TEMPLATE backup")); err != nil {
		p.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) { // a poll with a deadline
		if _, _, body := p.answer("/readyz"); strings.Contains(body, "--accept-restore") {
			break
		}
		if time.Now().After(deadline) {
			p.t.Fatal("the server does not notice the restore")
		}
	}
	p.stop(syscall.SIGTERM)
	p.refused("restored records", "--accept-restore", p.dataDir)
	if err := syscall.Kill(sentry, 0); err != nil {
		p.t.Errorf("the sandbox is gone before the restore was accepted: %v", err)
	}
	p.args = []string{"--accept-restore"}
	p.start()
	if _, err := p.api().GetSandbox(context.Background(), id); !isRefused(err, http.StatusNotFound, "sandbox_not_found") {
		p.t.Errorf("after the restore the sandbox answers %v", err)
	}
	for deadline := time.Now().Add(patience); syscall.Kill(sentry, 0) == nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatal("the sandbox without a row is still there")
		}
	}
}
