package link

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

// isUnreachable reports whether a call failed because there is no connection to its node.
func isUnreachable(err error) bool {
	f := fault.As(err)
	return f != nil && f.Kind == fault.Unavailable && f.Code == fault.CodeNodeUnreachable && f.RetryAfter > 0
}

// TestNodeKilled kills a node's process under streams of each kind.
func TestNodeKilled(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	check := leftovers(t)
	node := child{Authority: a.Save(t), Node: "n1", Address: address}
	cmd := node.start(t, nil)
	linked(t, hub, "n1")
	streams, _ := openStreams(t, hub, "n1")
	kill(cmd)
	for _, s := range streams {
		s.breaks(t)
	}
	eventually(t, "the link ends", func() bool { all, _ := hub.count("n1"); return all == -1 })
	if err := call(hub, "n1", "x"); !isUnreachable(err) {
		t.Errorf("a call to a node that is gone: %v", err)
	}
	check()
	node.start(t, nil)
	linked(t, hub, "n1")
	if err := call(hub, "n1", "again"); err != nil {
		t.Error(err)
	}
}

// TestReplicaKilled kills a replica's process under streams of each kind.
func TestReplicaKilled(t *testing.T) {
	a := caytest.NewAuthority(t)
	l := listen(t)
	address := l.Addr().String()
	l.Close()
	var active, begun atomic.Int64
	h := nodeHandler()
	check := leftovers(t)
	stop := startNode(t, newNode(t, a, "n1"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		active.Add(1)
		begun.Add(1)
		defer active.Add(-1)
		h.ServeHTTP(w, r)
	}), address)
	replica := child{Authority: a.Save(t), Address: address}
	for range 2 { // the second finds a node that has seen the first one die
		before := begun.Load()
		cmd := replica.start(t, nil)
		eventually(t, "the streams begin", func() bool { return active.Load() == 4 && begun.Load() >= before+4 })
		kill(cmd)
		eventually(t, "the handlers end", func() bool { return active.Load() == 0 })
	}
	stop()
	check()
}

// cutLink is a link between two machines whose network is cut in some ways.
type cutLink struct {
	*caytest.Machines
	name    string
	ways    [][2]string
	hub     *Hub
	streams []*stream
}

func (l *cutLink) cut() {
	for _, way := range l.ways {
		l.Cut(way[0], way[1])
	}
}

func startCutLink(t *testing.T, name string, ways ...[2]string) *cutLink {
	t.Helper()
	a := caytest.NewAuthority(t)
	l := &cutLink{Machines: caytest.StartMachines(t, "api", "n1"), name: name, ways: ways, hub: newHub(t, a, nil)}
	socket := l.Listen("api")
	serve(t, func(ctx context.Context) error { return l.hub.Serve(ctx, socket) })
	child{Authority: a.Save(t), Node: "n1", Address: socket.Addr().String()}.start(t,
		func(ctx context.Context, self string) *exec.Cmd { return l.Command(ctx, "n1", self) })
	linked(t, l.hub, "n1")
	l.streams, _ = openStreams(t, l.hub, "n1")
	return l
}

// TestCut cuts the network between a node and a replica, in both ways and in each. A short cut breaks nothing; a long
// one breaks everything, and the link is back after it.
func TestCut(t *testing.T) {
	out, in := [2]string{"n1", "api"}, [2]string{"api", "n1"}
	links := []*cutLink{startCutLink(t, "both ways", out, in), startCutLink(t, "from the node", out),
		startCutLink(t, "to the node", in)}
	for _, l := range links { // the waiting is for all together
		l.cut()
	}
	time.Sleep(3 * time.Second) // shorter than the silence that ends a link
	for _, l := range links {
		l.Heal()
	}
	for _, l := range links {
		for _, s := range l.streams {
			s.moves(t)
		}
	}
	began := time.Now()
	for _, l := range links {
		l.cut()
	}
	for _, l := range links {
		if err := call(l.hub, "n1", "x"); err == nil {
			t.Errorf("%s: a call passed the cut", l.name)
		}
		for _, s := range l.streams {
			s.breaks(t)
		}
		eventually(t, "the link ends", func() bool { return isUnreachable(call(l.hub, "n1", "x")) })
		t.Logf("%s: unreachable after %.1f s", l.name, time.Since(began).Seconds())
	}
	began = time.Now()
	for _, l := range links {
		l.Heal()
	}
	for _, l := range links {
		eventually(t, "the link is back", func() bool { return call(l.hub, "n1", "back") == nil })
		t.Logf("%s: back after %.1f s", l.name, time.Since(began).Seconds())
	}
}

// TestDrop ends the connections of a node that is removed, those too whose handshake was under way.
func TestDrop(t *testing.T) {
	a := caytest.NewAuthority(t)
	var removed atomic.Bool
	var gate sync.RWMutex
	asked := make(chan struct{}, 100)
	hub := newHub(t, a, func(c *HubConfig) {
		c.Peer = func(_ context.Context, c *x509.Certificate, _ string) (string, error) {
			if removed.Load() {
				return "", errors.New("removed")
			}
			asked <- struct{}{}
			gate.RLock() // waits while the test holds it
			defer gate.RUnlock()
			return c.Subject.CommonName, nil
		}
	})
	address, _ := startHub(t, hub)
	startNode(t, newNode(t, a, "n1"), nodeHandler(), address)
	linked(t, hub, "n1")
	streams, _ := openStreams(t, hub, "n1")

	// Two more connections are judged before the node is removed, and added afterwards.
	for len(asked) > 0 {
		<-asked
	}
	gate.Lock()
	cfg := must(a.ClientConfig("n1", replicaName))
	late := []net.Conn{dialAs(t, address, cfg, pulseProtocol, "s1"), dialAs(t, address, cfg, dataProtocol, "s1")}
	<-asked
	<-asked
	removed.Store(true)
	hub.Drop("n1", "")
	gate.Unlock()
	for _, s := range streams {
		s.breaks(t)
	}
	for _, c := range late {
		refused(t, "a connection that was judged before the node was removed", c)
	}
	if all, _ := hub.count("n1"); all != -1 {
		t.Errorf("the node has %d connections", all)
	}
	if err := call(hub, "n1", "x"); !isUnreachable(err) {
		t.Errorf("a call to a removed node: %v", err)
	}
	removed.Store(false)
	linked(t, hub, "n1")
	if err := call(hub, "n1", "x"); err != nil {
		t.Error(err)
	}
}

// TestOtherServers has a node dial servers that are no replicas.
func TestOtherServers(t *testing.T) {
	a, other := caytest.NewAuthority(t), caytest.NewAuthority(t)
	hubs := map[string]*Hub{
		"another authority": newHub(t, other, nil),
		"another name":      newHub(t, a, func(c *HubConfig) { c.TLS = caytest.Each(a.ServerConfig("n2")) }),
	}
	for name, hub := range hubs {
		t.Run(name, func(t *testing.T) {
			address, _ := startHub(t, hub)
			r := &replica{node: newNode(t, a, "n1"), address: address, retired: context.Background()}
			c, err := r.dial(context.Background(), pulseProtocol)
			if err == nil {
				abort(c)
				t.Fatal("the node accepts it")
			}
			var authority x509.UnknownAuthorityError
			var host x509.HostnameError
			if !errors.As(err, &authority) && !errors.As(err, &host) {
				t.Error(err)
			}
		})
	}
}

// TestStop stops a node under requests: short ones end, long ones break, and nothing is left.
func TestStop(t *testing.T) {
	check := leftovers(t)
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, stopHub := startHub(t, hub)
	begun, goOn := make(chan struct{}), make(chan struct{})
	h := nodeHandler().(*http.ServeMux)
	h.HandleFunc("/short", func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-goOn
		_, _ = io.WriteString(w, "whole")
	})
	stopNode := startNode(t, newNode(t, a, "n1"), h, address)
	linked(t, hub, "n1")
	streams, _ := openStreams(t, hub, "n1")
	short := make(chan string, 1)
	go func() {
		resp, err := clientOf(hub, "n1").Get("http://node/short")
		if err != nil {
			short <- err.Error()
			return
		}
		defer resp.Body.Close()
		short <- string(must(io.ReadAll(resp.Body)))
	}()
	<-begun
	time.AfterFunc(100*time.Millisecond, func() { close(goOn) })
	stopNode()
	if got := <-short; got != "whole" {
		t.Errorf("the short call got %q", got)
	}
	for _, s := range streams {
		s.breaks(t)
	}
	stopHub()
	check()
}

// TestRetired takes a replica off the list: it keeps what it uses and gets nothing new, and has no link in the end.
func TestRetired(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	var list atomic.Pointer[[]string]
	list.Store(&[]string{address})
	serve(t, func(ctx context.Context) error {
		return newNode(t, a, "n1").Serve(ctx, func() []string { return *list.Load() }, nodeHandler())
	})
	linked(t, hub, "n1")
	streams, stop := openStreams(t, hub, "n1")
	list.Store(&[]string{})
	eventually(t, "only used connections are left", func() bool { _, spare := hub.alive("n1"); return spare == 0 })
	for _, s := range streams {
		s.moves(t)
	}
	stop()
	for _, s := range streams {
		s.breaks(t)
	}
	hub.mu.Lock()
	p := hub.peers["n1"]
	hub.mu.Unlock()
	if p != nil {
		p.transport.CloseIdleConnections() // which otherwise takes 90 s
	}
	eventually(t, "the link ends", func() bool { all, _ := hub.count("n1"); return all == -1 })
	list.Store(&[]string{address})
	linked(t, hub, "n1")
}

// alive counts as count does, without the spare connections that the node has closed.
func (h *Hub) alive(node string) (all, spare int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.peers[node]
	if p == nil {
		return -1, -1
	}
	for _, s := range p.spare {
		if !s.stirred() {
			spare++
		}
	}
	return len(p.all), spare
}

// TestSpareThatEnded calls a node whose spare connections have ended unseen.
func TestSpareThatEnded(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	cfg := must(a.ClientConfig("n1", replicaName))
	dialAs(t, address, cfg, pulseProtocol, "s1")
	eventually(t, "the pulse is taken", func() bool { all, _ := hub.count("n1"); return all == 0 })
	last := dialAs(t, address, cfg, dataProtocol, "s1")
	eventually(t, "one waits", func() bool { _, spare := hub.count("n1"); return spare == 1 })
	for range 3 {
		dialAs(t, address, cfg, dataProtocol, "s1").Close()
	}
	eventually(t, "the others have ended", func() bool { all, alive := hub.alive("n1"); return all == 4 && alive == 1 })
	c, err := hub.Dial(t.Context(), "n1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(last, make([]byte, 1)); err != nil {
		t.Errorf("another connection was taken: %v", err)
	}
	if all, _ := hub.count("n1"); all != 1 {
		t.Errorf("the hub has %d connections, want 1", all)
	}
}

// TestDialEnds waits for a connection that does not come.
func TestDialEnds(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	cfg := must(a.ClientConfig("n1", replicaName))
	pulse := dialAs(t, address, cfg, pulseProtocol, "s1")
	eventually(t, "the pulse is taken", func() bool { all, _ := hub.count("n1"); return all == 0 })
	ctx, cancel := context.WithCancel(t.Context())
	waits := func() bool {
		hub.mu.Lock()
		defer hub.mu.Unlock()
		return len(hub.peers["n1"].waiting) == 1
	}
	failed := make(chan error, 1)
	dial := func() {
		_, err := hub.Dial(ctx, "n1")
		failed <- err
	}
	go dial()
	eventually(t, "a dial waits", waits)
	cancel()
	if err := <-failed; !isUnreachable(err) || !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	ctx = t.Context()
	go dial()
	eventually(t, "a dial waits", waits)
	abort(pulse)
	if err := <-failed; !isUnreachable(err) {
		t.Error(err)
	}
}

// TestSurplus closes spare connections that are too many and old.
func TestSurplus(t *testing.T) {
	hub := newHub(t, caytest.NewAuthority(t), nil)
	now := time.Now()
	p := &peer{all: map[*conn]struct{}{}}
	for i := range 6 {
		c := &conn{}
		p.all[c] = struct{}{}
		age := surplusAge + time.Second
		if i == 3 {
			age = 0 // and so are those after it
		}
		if i < 5 {
			p.spare = append(p.spare, spare{c, now.Add(-age)})
		}
	}
	hub.peers["n1"] = p
	first := p.spare[0].conn
	if got := hub.surplus(now); len(got) != 3 || got[0] != first || len(p.spare) != 2 {
		t.Errorf("%d are closed and %d stay", len(got), len(p.spare))
	}
	if got := hub.surplus(now.Add(time.Hour)); len(got) != 0 {
		t.Errorf("%d of %d are closed", len(got), minSpare)
	}
}

// TestControl makes a node's own request.
func TestControl(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, func(c *HubConfig) {
		c.Control = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, r.Proto+" "+r.TLS.PeerCertificates[0].Subject.CommonName+" "+
				r.TLS.VerifiedChains[0][1].Subject.CommonName)
		})
	})
	address, stop := startHub(t, hub)
	transport := &http.Transport{TLSClientConfig: must(a.ClientConfig("n1", replicaName)), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("https://" + address + "/beat")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "HTTP/2.0 n1 authority" {
		t.Errorf("%q, %v", b, err)
	}
	stop()
	if resp, err := (&http.Client{Transport: transport}).Get("https://" + address + "/beat"); err == nil {
		resp.Body.Close()
		t.Error("the hub still answers")
	} else if strings.Contains(err.Error(), "certificate") {
		t.Error(err)
	}
}

// TestHandlerSeesReplica finds the certificate of the replica in a request.
func TestHandlerSeesReplica(t *testing.T) {
	hub := pair(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.TLS.VerifiedChains[0][0].Subject.CommonName)
	}))
	resp, err := clientOf(hub, "n1").Get("http://node/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != replicaName {
		t.Errorf("%q, %v", b, err)
	}
}
