package noderpc

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/pki"
)

const session1, session2 = "session1session1", "session2session2"

// inHandshake is the status of a call whose connection TLS refuses.
const inHandshake = 0

// attempt is a call of a machine that may not make it.
type attempt struct {
	who    string
	config *tls.Config
	path   string
	body   string
	status int
	code   string
}

// TestIdentityMatrix makes each call with each identity that may not make it. Each is refused, and changes no row.
func TestIdentityMatrix(t *testing.T) {
	onBoth(t, func(c *cluster) {
		t := c.t
		one, gone, again := c.join("one", ""), c.join("gone", ""), c.join("again", "")
		if _, err := one.Begin(t.Context(), session1); err != nil {
			t.Fatal(err)
		}
		if err := c.nodes.Remove(t.Context(), "gone"); err != nil {
			t.Fatal(err)
		}
		if now := c.join("ignored", again.id); now.id != again.id {
			t.Fatalf("joined again as %s, was %s", now.id, again.id)
		}
		over := c.join("over", "") // its second session has begun, and the lease of that is over
		for _, session := range []string{session1, session2} {
			if _, err := c.db.BeginLease(t.Context(), over.id, over.Identity().KeySum, session, time.Microsecond); err != nil {
				t.Fatal(err)
			}
		}
		for _, a := range c.attempts(one, gone, again, over) {
			before := c.dump()
			status, code, err := c.post(a.config, a.path, a.body)
			if (err != nil) != (a.status == inHandshake) || status != a.status || code != a.code {
				t.Errorf("%s at %s: %d %s, %v, want %d %s", a.who, a.path, status, code, err, a.status, a.code)
			}
			if after := c.dump(); after != before {
				t.Errorf("%s at %s changed rows, from\n%s\nto\n%s", a.who, a.path, before, after)
			}
		}
		// What the first node may do still works: nothing above has harmed it.
		if _, err := one.Beat(t.Context(), session1, fleet.Load{}); err != nil {
			t.Errorf("a beat after all of this: %v", err)
		}
	})
}

// attempts returns all calls that must be refused. one has a session, gone was removed, and again has joined again with
// another key. The second session of over is the newest, and over.
func (c *cluster) attempts(one, gone, again, over *member) (all []attempt) {
	now := time.Now()
	foreign, err := pki.NewAuthority(c.signer.Cluster(), now.Add(-48*time.Hour))
	if err != nil {
		c.t.Fatal(err)
	}
	bodies := map[string]string{
		pathRenew:   jsonOf(renewRequest{Session: session1, CSR: string(csr(c.t, one.key))}),
		pathSession: jsonOf(sessionRequest{Session: session2}), pathBeat: jsonOf(sessionRequest{Session: session2}),
		pathLeave: jsonOf(sessionRequest{Session: session2}),
	}
	bare := one.ClientConfig("h2")
	bare.Certificates = nil
	trusting := func(k *pki.Keeper) *tls.Config { // it presents k and trusts the replica
		config := one.ClientConfig("h2")
		config.Certificates = k.ClientConfig().Certificates
		return config
	}
	ofOne := func(a *pki.Authority, at time.Time) *tls.Config {
		return trusting(c.keeperOf(one.key, a, pki.Node, one.id, at))
	}
	signed := func(role pki.Role, id string) *tls.Config { return trusting(c.keeper(c.signer, role, id, now)) }
	mine := one.ClientConfig("h2")
	late := now.Add(-pki.Lifetime - time.Second)
	for path, body := range bodies {
		all = append(all,
			attempt{"nothing", bare, path, body, 401, "unauthenticated"},
			attempt{"a certificate that is over", ofOne(c.signer, late), path, body, inHandshake, ""},
			attempt{"a certificate that is not yet valid", ofOne(c.signer, now.Add(2*time.Hour)), path, body, inHandshake, ""},
			attempt{"another authority of the same name", ofOne(foreign, now), path, body, inHandshake, ""},
			attempt{"a replica", signed(pki.Replica, "abcdef"), path, body, inHandshake, ""},
			attempt{"an unknown node", signed(pki.Node, "zzzzzz"), path, body, 403, "node_refused"},
			attempt{"the first server, which never joined", signed(pki.Node, "abcdef"), path, body, 403, "node_refused"},
			attempt{"another key of the same node", signed(pki.Node, one.id), path, body, 403, "node_refused"},
			attempt{"the key of before it joined again", again.ClientConfig("h2"), path, body, 403, "node_refused"},
			attempt{"a removed node", gone.ClientConfig("h2"), path, body, 403, "node_refused"},
			attempt{"a body that is no object", mine, path, "[]", 400, "invalid_json"},
			attempt{"a body that is too large", mine, path, strings.Repeat(" ", maxBody+1), 413, "body_too_large"},
			attempt{"a path that is none", mine, path + "/x", body, 404, ""},
		)
	}
	renewal := func(m *member, session string, key *ecdsa.PrivateKey) attempt {
		body := jsonOf(renewRequest{Session: session, CSR: string(csr(c.t, key))})
		return attempt{"a renewal of " + m.id + " by " + session, m.ClientConfig("h2"), pathRenew, body, 403, "node_refused"}
	}
	nobody := renewal(one, "", one.key)
	nobody.status, nobody.code = 400, "invalid_session"
	all = append(all,
		attempt{"a second session", mine, pathSession, bodies[pathSession], 409, "node_in_use"},
		attempt{"another session's beat", mine, pathBeat, bodies[pathBeat], 403, "node_refused"},
		attempt{"another session's end", mine, pathLeave, bodies[pathLeave], 403, "node_refused"},
		attempt{"a session without a name", mine, pathSession, "{}", 400, "invalid_session"},
		attempt{"a name that is no session's", mine, pathBeat, `{"session":"a b c d e f g h i"}`, 400, "invalid_session"},
		renewal(one, session1, newKey(c.t)), // for another key
		renewal(one, session2, one.key),     // beside the session that is alive
		renewal(over, session1, over.key),   // after the session that has followed
		renewal(over, "session3session3", over.key),
		nobody,
		attempt{"a renewal without a request", mine, pathRenew, jsonOf(sessionRequest{session1}), 400, "invalid_csr"},
	)
	return append(all, c.badJoins(one, bare)...)
}

// badJoins returns joins that must be refused. bare are settings of TLS without a certificate.
func (c *cluster) badJoins(one *member, bare *tls.Config) (all []attempt) {
	c.t.Helper()
	used, free := c.token(""), c.token("")
	if _, err := Join(c.t.Context(), []string{c.url}, used, newKey(c.t), fleet.JoinRequest{Name: "used"}); err != nil {
		c.t.Fatal(err)
	}
	ends, _, err := c.nodes.NewToken(c.t.Context(), "key_a", "", fleet.TokenSettings{}, time.Second)
	if err != nil {
		c.t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // it has expired
	good := string(csr(c.t, newKey(c.t)))
	small, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		c.t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, small)
	if err != nil {
		c.t.Fatal(err)
	}
	ofRSA := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	der, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"api.x"}},
		newKey(c.t))
	if err != nil {
		c.t.Fatal(err)
	}
	named := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	secret, _, _ := strings.Cut(free, ".")
	unknown := "cayn_" + strings.Repeat("a", 26) + free[strings.IndexByte(free, '.'):]
	for _, r := range []struct {
		who, token, csr, name string
		status                int
		code                  string
	}{
		{"no token", "", good, "n", 400, "invalid_token"},
		{"half a token", secret, good, "n", 400, "invalid_token"},
		{"an unknown token", unknown, good, "n", 401, "unauthenticated"},
		{"a token of another cluster", secret + "." + strings.Repeat("A", 43), good, "n", 401, "unauthenticated"},
		{"a token that has expired", ends, good, "n", 401, "token_expired"},
		{"a token that another machine has used", used, good, "n", 409, "token_used"},
		{"a name that is taken", free, good, "one", 409, "node_exists"},
		{"no name", free, good, "", 400, "invalid_name"},
		{"a name of another form", free, good, "../n", 400, "invalid_name"},
		{"no request", free, "", "n", 400, "invalid_csr"},
		{"a request with RSA", free, ofRSA, "n", 400, "invalid_csr"},
		{"a request with names", free, named, "n", 400, "invalid_csr"},
		{"a request of 20 KiB", free, good + strings.Repeat("\n", 20<<10), "n", 400, "invalid_csr"},
	} {
		body := jsonOf(joinRequest{Token: r.token, CSR: r.csr, Name: r.name})
		all = append(all, attempt{r.who, bare, pathJoin, body, r.status, r.code})
	}
	long := jsonOf(joinRequest{Token: free, CSR: good, Name: "n", Version: strings.Repeat("v", 1000)})
	negative := jsonOf(joinRequest{Token: free, CSR: good, Name: "n", VCPUs: -1})
	return append(all,
		attempt{"a long version", bare, pathJoin, long, 400, "invalid_version"},
		attempt{"a negative number", bare, pathJoin, negative, 400, "invalid_vcpus"},
		attempt{"nothing", bare, pathJoin, "{}", 400, "invalid_token"},
		attempt{"a megabyte", bare, pathJoin, strings.Repeat("a", 1<<20), 413, "body_too_large"})
}

// TestLifeOfANode joins, loses answers, works in sessions, renews and leaves.
func TestLifeOfANode(t *testing.T) {
	onBoth(t, func(c *cluster) {
		ctx, t := c.t.Context(), c.t
		token, key := c.token(""), newKey(t)
		about := fleet.JoinRequest{Name: "one", About: fleet.About{Version: "v1", VCPUs: 2, MemoryMB: 3, MaxSandboxes: 4}}
		j, err := Join(ctx, []string{"https://127.0.0.1:1", c.url}, token, key, about)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Join(ctx, []string{c.url}, token, key, about) // the answer was lost
		if err != nil || again.Node != j.Node || again.Cluster != c.signer.Cluster() || again.Certificate == j.Certificate {
			t.Errorf("joined again as %+v, %v", again, err)
		}
		n, err := c.nodes.Get(ctx, "one")
		if err != nil || n.ID != j.Node || n.About != about.About || n.Status != fleet.Unreachable {
			t.Errorf("the node is %+v, %v", n, err)
		}
		k, err := pki.NewKeeper(key, j.Certificate, j.Authorities)
		if err != nil {
			t.Fatal(err)
		}
		client := NewClient(k, func() []string { return []string{c.url + "/"} })
		defer client.Close()
		lease, err := client.Begin(ctx, session1)
		if err != nil || lease.For != fleet.LeaseTime || lease.Orders != (fleet.Orders{}) {
			t.Errorf("began with %+v, %v", lease, err)
		}
		if n, err := c.nodes.Drain(ctx, "one", time.Hour); err != nil || n.Status != fleet.Drained { // it has no sandbox
			t.Errorf("drained: %+v, %v", n, err)
		}
		load := fleet.Load{MemoryFreeMB: 5, Sandboxes: 6, Starting: 7}
		lease, err = client.Beat(ctx, session1, load)
		if n, err := c.nodes.Get(ctx, "one"); err != nil || n.Load != load {
			t.Errorf("the node's load is %+v, %v", n.Load, err)
		}
		if err != nil || !lease.Orders.Cordoned || lease.Orders.Drain <= 0 || lease.Orders.Drain > 61*time.Minute {
			t.Errorf("beat: %+v, %v", lease, err)
		}

		before := k.Identity()
		chain, authorities, err := client.Renewal(session1)(ctx, csr(t, key))
		if err != nil {
			t.Fatal(err)
		}
		err = k.Replace(chain, authorities)
		if after := k.Identity(); err != nil || after.Serial == before.Serial || after.ID != before.ID {
			t.Errorf("renewed to %+v, %v", after, err)
		}
		if _, err := client.Beat(ctx, session1, fleet.Load{}); err != nil { // with the new certificate
			t.Errorf("beat: %v", err)
		}
		_, err = client.Begin(ctx, session2)
		wantFault(t, err, fault.Conflict, "node_in_use")
		if err := client.Leave(ctx, session1); err != nil {
			t.Error(err)
		}
		if _, _, err := client.Renewal(session2)(ctx, csr(t, key)); err != nil { // without a session
			t.Errorf("renewed after the end of a session: %v", err)
		}
		if _, err := client.Begin(ctx, session2); err != nil {
			t.Errorf("the session after one that has left: %v", err)
		}
		_, err = client.Beat(ctx, session1, fleet.Load{})
		wantFault(t, err, fault.Denied, "node_refused")

		gone, leave := context.WithCancel(ctx)
		leave()
		if _, err := client.Beat(gone, session2, fleet.Load{}); err == nil {
			t.Error("a call whose caller has left succeeded")
		}
		secret, _, _ := strings.Cut(token, ".")
		if text := c.dump() + c.log.String(); strings.Contains(text, secret) || strings.Contains(text, "PRIVATE") {
			t.Error("a token or a key is in the records or the log")
		}
	})
}

// TestTokenIsUsedOnce has two machines join with one token at once, many times.
func TestTokenIsUsedOnce(t *testing.T) {
	onBoth(t, func(c *cluster) {
		for round := range 20 {
			token := c.token("")
			var joined, used atomic.Int64
			var wg sync.WaitGroup
			for i := range 2 {
				wg.Go(func() {
					secret, _, _ := fleet.ParseToken(token)
					_, err := c.nodes.Join(c.t.Context(), fleet.JoinRequest{Token: token, CSR: string(csr(c.t, newKey(c.t))),
						Name: fmt.Sprintf("n%d-%d", round, i)})
					if e := fault.As(err); err == nil {
						joined.Add(1)
					} else if e != nil && e.Code == "token_used" {
						used.Add(1)
					} else {
						c.t.Errorf("%s: %v", secret[:5], err)
					}
				})
			}
			wg.Wait()
			if joined.Load() != 1 || used.Load() != 1 {
				c.t.Fatalf("round %d: %d joined, %d were refused", round, joined.Load(), used.Load())
			}
		}
	})
}
