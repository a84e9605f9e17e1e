package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/pki"
)

// records say which session of a node is its newest, as the rows of a cluster do.
type records struct {
	newest atomic.Pointer[string]
	all    atomic.Bool  // lets in all sessions
	gate   sync.RWMutex // Peer waits while a test holds it, after it has looked for the session "one"

	mu sync.Mutex
	// +checklocks:mu
	asked []string // the sessions, each time that Peer looked
}

func newRecords(session string) *records {
	r := &records{}
	r.begin(session)
	return r
}

func (r *records) begin(session string) { r.newest.Store(&session) }

func (r *records) peer(_ context.Context, c *x509.Certificate, session string) (string, error) {
	newest := *r.newest.Load()
	r.mu.Lock()
	r.asked = append(r.asked, session)
	r.mu.Unlock()
	if session == "one" {
		r.gate.RLock()
		defer r.gate.RUnlock()
	}
	if session != newest && !r.all.Load() {
		return "", errors.New("another session has begun")
	}
	return c.Subject.CommonName, nil
}

// times returns how often Peer was asked about a session.
func (r *records) times(session string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.asked {
		if s == session {
			n++
		}
	}
	return n
}

// servedBy returns the session of the process that answers a call to the node n1.
func servedBy(h *Hub) (string, error) {
	resp, err := clientOf(h, "n1").Get("http://node/session")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// TestSessions runs two processes of one identity. As soon as the second one is linked, each call reaches it, whatever
// the first one tries, and what the first one was answering breaks.
func TestSessions(t *testing.T) {
	a := caytest.NewAuthority(t)
	rows := newRecords("one")
	hub := newHub(t, a, func(c *HubConfig) { c.Peer = rows.peer })
	address, _ := startHub(t, hub)
	process := func(session string) *exec.Cmd {
		return child{Authority: a.Save(t), Node: "n1", Session: session, Address: address}.start(t, nil)
	}
	first := process("one")
	linked(t, hub, "n1")
	if got, err := servedBy(hub); got != "one" || err != nil {
		t.Fatalf("served by %q, %v", got, err)
	}
	streams, _ := openStreams(t, hub, "n1")
	process("two") // has not begun: it is refused
	eventually(t, "the second process is refused", func() bool { return rows.times("two") >= 3 })
	for _, s := range streams {
		s.moves(t)
	}
	if got, err := servedBy(hub); got != "one" || err != nil {
		t.Fatalf("served by %q, %v", got, err)
	}
	// The first process is stopped, so that it cannot end its link itself, and goes on beside the second one.
	if err := first.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	rows.begin("two")
	eventually(t, "the second process is linked", func() bool {
		got, err := servedBy(hub)
		return err == nil && got == "two"
	})
	for _, s := range streams {
		s.breaks(t)
	}
	if err := first.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	before := rows.times("one")
	for calls := 0; calls < 500 || rows.times("one") < before+5; calls++ {
		if got, err := servedBy(hub); got != "two" || err != nil {
			t.Fatalf("call %d is served by %q, %v", calls, got, err)
		}
	}
	// Another replica would hear of a session that has not dialled it yet from the rows.
	hub.Drop("n1", "two")
	if got, err := servedBy(hub); got != "two" || err != nil {
		t.Errorf("the connections of the session that stays are dropped: %q, %v", got, err)
	}
	rows.begin("three")
	hub.Drop("n1", "three")
	if got, err := servedBy(hub); !isUnreachable(err) {
		t.Errorf("served by %q, %v, after a third session has begun", got, err)
	}
}

// TestSessionsRace lets connections of a session in that was the newest when the Hub asked, after another session has
// its pulse.
func TestSessionsRace(t *testing.T) {
	a := caytest.NewAuthority(t)
	rows := newRecords("one")
	hub := newHub(t, a, func(c *HubConfig) { c.Peer = rows.peer })
	address, _ := startHub(t, hub)
	cfg := must(a.ClientConfig("n1", replicaName))
	took := func(what string, c *tls.Conn) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatalf("%s is not taken: %v", what, err)
		}
	}
	took("the first pulse", dialAs(t, address, cfg, pulseProtocol, "one"))
	rows.gate.Lock()
	late := []*tls.Conn{dialAs(t, address, cfg, pulseProtocol, "one"), dialAs(t, address, cfg, dataProtocol, "one")}
	eventually(t, "the Hub asks", func() bool { return rows.times("one") == 3 })
	rows.begin("two")
	took("the second pulse", dialAs(t, address, cfg, pulseProtocol, "two"))
	rows.gate.Unlock()
	for _, c := range late {
		refused(t, "a connection of the first session that was judged before", c)
	}
	// They are refused too if the second pulse has ended meanwhile.
	rows.begin("one")
	rows.gate.Lock()
	asked := rows.times("one")
	ended := dialAs(t, address, cfg, pulseProtocol, "one")
	eventually(t, "the Hub asks", func() bool { return rows.times("one") == asked+1 })
	rows.begin("two")
	pulse := dialAs(t, address, cfg, pulseProtocol, "two")
	took("another pulse of the second session", pulse)
	abort(pulse)
	eventually(t, "it ends", func() bool { return hub.peer("n1") == nil })
	rows.gate.Unlock()
	refused(t, "a connection of the first session, with no other one there", ended)

	// A data connection goes to the pulse of its own session alone, also if Peer lets in both.
	rows.all.Store(true)
	took("a pulse", dialAs(t, address, cfg, pulseProtocol, "two"))
	refused(t, "a data connection of another session", dialAs(t, address, cfg, dataProtocol, "one"))
	mine := dialAs(t, address, cfg, dataProtocol, "two")
	eventually(t, "it has one", func() bool { _, spare := hub.count("n1"); return spare == 1 })
	// A client that began with a session gets no connection of the next one.
	before := hub.peer("n1")
	took("the pulse of a third session", dialAs(t, address, cfg, pulseProtocol, "three"))
	dialAs(t, address, cfg, dataProtocol, "three")
	eventually(t, "the third has one", func() bool { _, spare := hub.count("n1"); return spare == 1 })
	if c, err := hub.dial(t.Context(), before); !isUnreachable(err) {
		t.Errorf("a connection of another session: %v, %v", c, err)
	}
	refused(t, "a connection of the session before", mine)
}

// TestSettledIsForgotten checks that the Hub does not remember for ever when nodes were dropped.
func TestSettledIsForgotten(t *testing.T) {
	hub := newHub(t, caytest.NewAuthority(t), nil)
	for i := range 1000 {
		hub.Drop(fmt.Sprint("n", i), "")
	}
	now := time.Now()
	who := caller{"n1", "s1", now.Add(-handshakeTime - time.Second)}
	hub.surplus(now.Add(2*handshakeTime + time.Second))
	if len(hub.settled) != 0 {
		t.Errorf("%d nodes are remembered", len(hub.settled))
	}
	if hub.mu.Lock(); hub.holdsLocked(who) {
		t.Error("an old answer of Peer holds, of a node that is forgotten")
	}
	hub.mu.Unlock()
}

// keeperOf returns a Keeper with a certificate of an authority.
func keeperOf(t *testing.T, a *pki.Authority, role pki.Role, id string) *pki.Keeper {
	t.Helper()
	key := must(pki.NewKey())
	chain, _, err := a.Sign(must(pki.NewRequest(key)), pki.Identity{Cluster: a.Cluster(), Role: role, ID: id}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return must(pki.NewKeeper(key, chain, a.Certificate()))
}

// renew gives a Keeper a certificate of an authority, and authorities to trust.
func renew(t *testing.T, k *pki.Keeper, by *pki.Authority, trusted ...*pki.Authority) {
	t.Helper()
	chain, _, err := by.Sign(must(k.Request()), k.Identity(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, a := range trusted {
		text += a.Certificate()
	}
	if err := k.Replace(chain, text); err != nil {
		t.Fatal(err)
	}
}

// cluster is a Hub and a node that have Keepers of one authority.
type cluster struct {
	*testing.T
	hub           *Hub
	address       string
	replica, node *pki.Keeper

	mu sync.Mutex
	// +checklocks:mu
	seen []string // key ids of the authorities of nodes' certificates, each time that the Hub asked
}

func newCluster(t *testing.T, a *pki.Authority) *cluster {
	t.Helper()
	c := &cluster{T: t, replica: keeperOf(t, a, pki.Replica, "bbbbbb"), node: keeperOf(t, a, pki.Node, "aaaaaa")}
	c.hub = NewHub(HubConfig{TLS: c.replica.ServerConfig, MaxConns: 2000, Log: quiet(), Origin: auth.Address,
		Peer: func(_ context.Context, cert *x509.Certificate, _ string) (string, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.seen = append(c.seen, string(cert.AuthorityKeyId))
			id, err := pki.IdentityOf(cert)
			return id.ID, err
		}})
	c.address, _ = startHub(t, c.hub)
	h := nodeHandler().(*http.ServeMux)
	h.HandleFunc("/authority", func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(r.TLS.PeerCertificates[0].AuthorityKeyId)
	})
	node := NewNode(NodeConfig{TLS: c.node.ClientConfig, Session: "s1", MaxConns: 2000, Log: quiet()})
	startNode(t, node, h, c.address)
	linked(t, c.hub, "aaaaaa")
	return c
}

// begin makes calls over new connections, and returns the key ids of the authorities of both ends.
func (c *cluster) begin() (ofReplica, ofNode []string) {
	c.Helper()
	p := c.hub.peer("aaaaaa")
	c.hub.mu.Lock()
	spare := p.spare
	p.spare = nil
	c.hub.mu.Unlock()
	for _, s := range spare {
		s.abort()
	}
	c.mu.Lock()
	c.seen = nil
	c.mu.Unlock()
	for range 5 {
		p.transport.CloseIdleConnections()
		resp, err := clientOf(c.hub, "aaaaaa").Get("http://node/authority")
		if err != nil {
			c.Fatal(err)
		}
		ofReplica = append(ofReplica, string(must(io.ReadAll(resp.Body))))
		resp.Body.Close()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Compact(ofReplica), slices.Compact(slices.Clone(c.seen))
}

// keyIDOf returns the key id of an authority, as certificates name it.
func keyIDOf(t *testing.T, a *pki.Authority) []string {
	t.Helper()
	block, _ := pem.Decode([]byte(a.Certificate()))
	return []string{string(must(x509.ParseCertificate(block.Bytes)).SubjectKeyId)}
}

// TestRenewedAuthority replaces the authority of a cluster while connections live: those go on, and new ones have the
// certificates and trust the authorities of the moment, at both ends.
func TestRenewedAuthority(t *testing.T) {
	began := time.Now().Add(-48 * time.Hour)
	old, next := must(pki.NewAuthority("ABC", began)), must(pki.NewAuthority("ABC", began))
	c := newCluster(t, old)
	streams, _ := openSome(t, c.hub, "aaaaaa", "/ticks") // those at full speed would take the CPUs
	for _, step := range []struct {
		what              string
		do                func()
		ofReplica, ofNode *pki.Authority
	}{
		{"before", func() {}, old, old},
		{"both trust the next authority", func() {
			renew(t, c.replica, old, old, next)
			renew(t, c.node, old, old, next)
		}, old, old},
		{"the node has its certificate", func() { renew(t, c.node, next, old, next) }, old, next},
		{"the replica has its certificate", func() { renew(t, c.replica, next, old, next) }, next, next},
		{"the old authority is trusted no more", func() {
			renew(t, c.replica, next, next)
			renew(t, c.node, next, next)
		}, next, next},
	} {
		step.do()
		eventually(t, "both ends use what they have: "+step.what, func() bool { // handshakes of before end
			ofReplica, ofNode := c.begin()
			return slices.Equal(ofReplica, keyIDOf(t, step.ofReplica)) && slices.Equal(ofNode, keyIDOf(t, step.ofNode))
		})
		for _, s := range streams {
			s.moves(t)
		}
	}
	// A node that kept its certificate of the old authority gets in no more, nor does the node trust such a replica.
	late := keeperOf(t, old, pki.Node, "cccccc").ClientConfig(pulseProtocol)
	late.RootCAs = c.node.ClientConfig().RootCAs
	conn := dialTLS(t, c.address, late, pulseProtocol)
	_ = sendSession(conn, "s1") // fails if it was refused already
	refused(t, "a node of the old authority", conn)
	impostor := newHub(t, caytest.NewAuthority(t), func(h *HubConfig) {
		h.TLS = keeperOf(t, old, pki.Replica, "dddddd").ServerConfig
	})
	address, _ := startHub(t, impostor)
	r := &replica{node: NewNode(NodeConfig{TLS: c.node.ClientConfig, Session: "s1"}), address: address,
		retired: context.Background()}
	var unknown x509.UnknownAuthorityError
	if conn, err := r.dial(t.Context(), pulseProtocol); !errors.As(err, &unknown) {
		t.Errorf("a replica of the old authority: %v, %v", conn, err)
	}
}
