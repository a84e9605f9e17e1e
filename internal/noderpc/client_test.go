package noderpc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/pki"
)

// TestJoinTrustsOneCluster checks that a machine sends its token to no server that is not of the token's cluster.
func TestJoinTrustsOneCluster(t *testing.T) {
	c, other := newCluster(t, ""), newCluster(t, "")
	asked := false
	spy := c.serve(other.keeper(other.signer, pki.Replica, "abcdef", time.Now()),
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	node := c.serve(c.keeper(c.signer, pki.Node, "aaaaaa", time.Now()),
		http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer plain.Close()
	for name, url := range map[string]string{"another cluster's replica": spy, "a node": node, "no TLS": plain.URL} {
		_, err := Join(t.Context(), []string{url}, c.token(""), newKey(t), fleet.JoinRequest{Name: "n"})
		if err == nil || asked {
			t.Errorf("joined at %s: %v, asked: %t", name, err, asked)
		}
	}
}

// TestHostileReplica checks what a client makes of answers that no replica gives.
func TestHostileReplica(t *testing.T) {
	c := newCluster(t, "")
	m := c.join("one", "")
	for name, answer := range map[string]http.HandlerFunc{
		"endless": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(strings.Repeat("a", 10<<20))) },
		"no JSON": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) },
		"redirected": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, c.url+pathBeat, http.StatusTemporaryRedirect)
		},
		"an error": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) },
		"cut off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(200)
		},
		"huge header": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("a", 1<<20)) },
	} {
		url := c.serve(c.keeper(c.signer, pki.Replica, "abcdef", time.Now()), answer)
		client := NewClient(m.Keeper, func() []string { return []string{url} })
		if lease, err := client.Beat(t.Context(), session1, fleet.Load{}); err == nil {
			t.Errorf("%s: %+v", name, lease)
		}
		client.Close()
	}
	none := NewClient(m.Keeper, func() []string { return nil })
	if _, err := none.Beat(t.Context(), session1, fleet.Load{}); err == nil {
		t.Error("a beat without a replica")
	}
}

// TestJoinsAreLimited asks to join again and again with tokens that there are not. One address does not keep machines
// from joining, and all addresses together make no more calls than the limit.
func TestJoinsAreLimited(t *testing.T) {
	c := newCluster(t, "")
	calls := map[string]int{}
	h := NewHandler(Config{Nodes: c.nodes, Log: c.logger(), Failed: func(address string) error {
		if calls[address]++; calls[address] > 3 {
			return fault.New(fault.Exhausted, fault.CodeTooManyAttempts, "too many").After(time.Minute)
		}
		return nil
	}})
	token := c.token("")
	join := func(address, token string) (code string) {
		t.Helper()
		body := jsonOf(joinRequest{Token: token, CSR: string(csr(t, newKey(t))), Name: "n"})
		r := httptest.NewRequest(http.MethodPost, pathJoin, strings.NewReader(body))
		r.RemoteAddr = address
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var p problem
		if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
			t.Fatal(err)
		}
		if w.Code == http.StatusTooManyRequests && p.RetryAfterMs == 0 {
			t.Errorf("%s has no time to wait", p.Code)
		}
		return p.Code
	}
	unknown := "cayn_" + strings.Repeat("a", 26) + token[strings.IndexByte(token, '.'):]
	codes := map[string]int{}
	for range 100 { // far more than joinBurst
		codes[join("192.0.2.1:1", unknown)]++
	}
	if codes["unauthenticated"] != 3 || codes["too_many_attempts"] != 97 {
		t.Errorf("one address was refused with %v", codes)
	}
	if code := join("192.0.2.2:1", token); code != "" {
		t.Errorf("beside it a machine was refused with %s", code)
	}
	clear(codes)
	for i := range 400 { // far more than the limit, in any time that they can take
		codes[join(fmt.Sprintf("192.0.2.%d:%d", 3+i%200, i), unknown)]++
	}
	if codes["rate_limited"] == 0 {
		t.Errorf("many addresses were refused with %v", codes)
	}
}

// TestFiles checks that a node finds its identity after a restart, also when it ends while it joins.
func TestFiles(t *testing.T) {
	c := newCluster(t, "")
	f := Files{Dir: filepath.Join(t.TempDir(), "node")}
	if _, err := f.Keeper(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a node that has not joined: %v", err)
	}
	key, err := f.Key()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := f.Key(); err != nil || !again.Equal(key) {
		t.Errorf("the key after a restart is another one, %v", err)
	}
	j, err := Join(t.Context(), []string{c.url}, c.token(""), key, fleet.JoinRequest{Name: "n"})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Save(j.Certificate, j.Authorities); err != nil {
		t.Fatal(err)
	}
	k, err := f.Keeper()
	if err != nil || k.Identity().ID != j.Node {
		t.Fatalf("the identity is %+v, %v", k, err)
	}
	entries, err := os.ReadDir(f.Dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("the directory has %v, %v", entries, err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has the mode %s, %v", e.Name(), info.Mode(), err)
		}
	}
	if err := os.WriteFile(filepath.Join(f.Dir, fileKey), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Key(); err == nil {
		t.Error("replaced a key that cannot be read")
	}
}
