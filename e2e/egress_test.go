package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// setEgress replaces the policy of a sandbox.
func (s *server) setEgress(id string, policy object) {
	s.t.Helper()
	if _, err := s.api().SetEgress(context.Background(), id, requestOf[cay.Egress](s.t, policy)); err != nil {
		s.t.Fatalf("PUT egress: %v", err)
	}
}

// reaches checks which of the targets (host:port) a sandbox reaches.
func (s *server) reaches(id string, want map[string]bool) {
	s.t.Helper()
	for target, open := range want {
		host, port, err := net.SplitHostPort(target)
		if err != nil {
			s.t.Fatal(err)
		}
		number, err := strconv.Atoi(port)
		if err != nil {
			s.t.Fatal(err)
		}
		if got := s.connect(id, host, number); strings.HasPrefix(got, "connected") != open {
			s.t.Errorf("connecting to %s: %q, want it open: %v", target, got, open)
		}
	}
}

// network returns the counters of a sandbox's traffic.
func (s *server) network(id string) cay.NetworkUse {
	s.t.Helper()
	sandbox, err := s.api().GetSandbox(context.Background(), id)
	if err != nil || sandbox.Network == nil {
		s.t.Fatalf("reading the counters: %v, %v", sandbox, err)
	}
	return *sandbox.Network
}

// awaitDenied waits for an event about denied traffic whose detail contains the text.
func (s *server) awaitDenied(id, part string) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // a poll with a deadline
		events := s.events(id)
		for _, e := range events {
			if e.Reason == "egress_denied" && e.From == e.To && strings.Contains(e.Detail, part) {
				return
			}
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("no event says that %q was denied: %+v", part, events)
		}
	}
}

// TestEgressByRange gives one sandbox one policy after the other.
func TestEgressByRange(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	o := newOutside(t)
	other := o.second
	o.listen(t, 8080)
	o.listen(t, 8081)
	one, onePort2, two := o.address+":8080", o.address+":8081", other+":8080"
	id := s.create(object{"egress": object{"mode": "deny_all"}})
	defer s.destroy(id)
	s.reaches(id, map[string]bool{one: false, two: false})
	s.awaitDenied(id, "tcp "+one)
	if use := s.network(id); use.PacketsDenied == 0 || use.BytesDenied == 0 {
		t.Errorf("after a denied connection: %+v", use)
	}
	for name, tt := range map[string]struct {
		policy object
		want   map[string]bool
	}{
		"everything":          {object{"mode": "allow_all"}, map[string]bool{one: true, onePort2: true, two: true}},
		"one address":         {object{"mode": "deny_all", "allow_cidrs": []string{o.address + "/32"}}, map[string]bool{one: true, onePort2: true, two: false}},
		"all but one address": {object{"mode": "deny_all", "allow_cidrs": []string{"0.0.0.0/0"}, "deny_cidrs": []string{other + "/32"}}, map[string]bool{one: true, onePort2: true, two: false}},
		"one port":            {object{"mode": "deny_all", "allow_cidrs": []string{o.block}, "allow_ports": []int{8080}}, map[string]bool{one: true, onePort2: false, two: true}},
	} {
		s.setEgress(id, tt.policy)
		t.Log(name)
		s.reaches(id, tt.want)
	}
	if use := s.network(id); use.PacketsAllowed == 0 || use.BytesAllowed == 0 {
		t.Errorf("after an allowed connection: %+v", use)
	}
}

// echo sends back on every connection what it receives.
func (o *outside) echo(t *testing.T, port int) {
	t.Helper()
	l := inNamespace(t, o.name, func() (net.Listener, error) { return net.Listen("tcp4", fmt.Sprintf(":%d", port)) })
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c) // until the sandbox closes it
			}()
		}
	}()
}

// TestEgressCutsConnections changes the policy under an established connection.
func TestEgressCutsConnections(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	o := newOutside(t)
	o.echo(t, 7)
	id := s.create(nil)
	defer s.destroy(id)
	s.want(id, fmt.Sprintf(`cat >/tmp/talk.py <<'END'
import os, socket, time
c = socket.create_connection(("%s", 7), timeout=60)
n = 0
while True:
    c.sendall(b"x"); c.recv(1); n += 1
    open("/tmp/n.new", "w").write(str(n)); os.rename("/tmp/n.new", "/tmp/n")
    time.sleep(0.02)
END
nohup python3 /tmp/talk.py >/dev/null 2>&1 &
until [ -s /tmp/n ]; do sleep 0.02; done`, o.address))
	count := func() int {
		n, err := strconv.Atoi(s.want(id, "cat /tmp/n"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	// Half a second has 25 rounds of the program inside.
	moves := func() bool {
		before := count()
		s.want(id, "sleep 0.5")
		return count() > before
	}
	if !moves() {
		t.Fatal("the connection carries no data")
	}
	s.setEgress(id, object{"mode": "deny_all", "allow_cidrs": []string{o.address + "/32"}, "allow_ports": []int{7}})
	if !moves() {
		t.Error("a policy that allows the connection cut it")
	}
	s.setEgress(id, object{"mode": "deny_all"})
	if moves() {
		t.Error("the connection goes on under a policy that forbids it")
	}
}

// TestEgressSurvives checks that the policy holds after a suspend and a wake and after the death of
// the server, and that a change during the sleep holds after the wake.
func TestEgressSurvives(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	o := newOutside(t)
	o.listen(t, 8080)
	o.listen(t, 8081)
	port := func(n int) object {
		return object{"mode": "deny_all", "allow_cidrs": []string{o.address + "/32"}, "allow_ports": []int{n}}
	}
	first, second := map[string]bool{o.address + ":8080": true, o.address + ":8081": false},
		map[string]bool{o.address + ":8080": false, o.address + ":8081": true}
	id := s.persistent(object{"egress": port(8080)})
	s.reaches(id, first)
	s.suspend(id)
	s.wake(id)
	s.reaches(id, first)
	s.stop(syscall.SIGKILL)
	s.start()
	s.reaches(id, first)
	s.suspend(id)
	s.setEgress(id, port(8081))
	if state, _ := s.state(id); state != "suspended" {
		t.Errorf("a change of the policy made it %s", state)
	}
	s.reaches(id, second) // the connection wakes the sandbox
	s.stop(syscall.SIGTERM)
	s.start()
	s.reaches(id, second)
	s.destroy(id)
}

// serveWeb serves HTTPS and HTTP outside. The answer names the host that was asked for.
func (o *outside) serveWeb(t *testing.T) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	like := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"*.example.test"}}
	der, err := x509.CreateCertificate(rand.Reader, like, like, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "this is", r.Host)
	})}
	t.Cleanup(func() { web.Close() })
	for _, port := range []int{80, 443} {
		l := inNamespace(t, o.name, func() (net.Listener, error) { return net.Listen("tcp4", fmt.Sprintf(":%d", port)) })
		if port == 443 {
			l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
		}
		go func() { _ = web.Serve(l) }() // until the listener is closed
	}
}

// TestEgressByName allows names that share their address with other names.
func TestEgressByName(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	o := newOutside(t)
	o.serveWeb(t)
	o.listen(t, 8080)
	queries := inNamespace(t, o.name, func() (net.PacketConn, error) { return net.ListenPacket("udp4", ":53") })
	t.Cleanup(func() { queries.Close() })
	go answerNames(queries, [4]byte(net.ParseIP(o.address).To4()))
	s := newServer(t, "CAY_NETWORK_NAMESERVERS="+o.address)
	s.start()
	s.needTemplate("python")
	id := s.create(object{"egress": object{"mode": "deny_all", "allow_domains": []string{"one.example.test",
		"*.wild.example.test"}}})
	defer s.destroy(id)

	// An address is closed until an allowed name has been resolved to it.
	s.reaches(id, map[string]bool{o.address + ":443": false, o.address + ":8080": false})
	curl := func(args string) string {
		t.Helper()
		return strings.TrimSpace(s.exec(id, "curl -sk --max-time 5 "+args).Stdout)
	}
	for url, want := range map[string]string{
		"https://one.example.test/":      "this is one.example.test",
		"http://one.example.test/":       "this is one.example.test",
		"https://a.b.wild.example.test/": "this is a.b.wild.example.test",
		"https://two.example.test/":      "", // the name is not resolved
		"https://wild.example.test/":     "", // a wildcard covers only names below it
	} {
		if got := curl(url); got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
	// The address is open now, but not for other names.
	for args, why := range map[string]string{
		"--resolve two.example.test:443:" + o.address + " https://two.example.test/": "another name in TLS",
		"--resolve two.example.test:80:" + o.address + " http://two.example.test/":   "another name in HTTP",
		"https://" + o.address + "/":                           "no name in TLS",
		"-H 'Host: two.example.test' http://one.example.test/": "another name in HTTP on an allowed connection",
	} {
		if got := curl(args); got != "" {
			t.Errorf("%s: %q", why, got)
		}
	}
	// Protocols without a host name pass on ports other than 80 and 443.
	s.reaches(id, map[string]bool{o.address + ":8080": true})
	// The egress proxy answers in place of every other resolver.
	for _, name := range []string{"one.example.test", "two.example.test"} {
		got := s.want(id, fmt.Sprintf(`python3 -c '
import socket, struct
q = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"".join(bytes([len(l)]) + l.encode() for l in "%s".split(".")) + b"\0" + struct.pack(">HH", 1, 1)
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5)
u.sendto(q, ("198.51.100.99", 53)); print(struct.unpack(">H", u.recv(512)[6:8])[0])'`, name))
		if allowed := name == "one.example.test"; (got == "1") != allowed {
			t.Errorf("another resolver gives %s answers for %s", got, name)
		}
	}
	s.awaitDenied(id, "two.example.test")
	// Once the name is not allowed any more, its address is closed at once.
	s.setEgress(id, object{"mode": "deny_all", "allow_domains": []string{"*.wild.example.test"}})
	if got := curl("--resolve one.example.test:443:" + o.address + " https://one.example.test/"); got != "" {
		t.Errorf("a name that is not allowed any more: %q", got)
	}
}

// TestMetadata reads the metadata service from inside, under a policy that denies everything.
func TestMetadata(t *testing.T) {
	s := shared(t)
	id := s.create(object{"egress": object{"mode": "deny_all"}, "metadata": object{"team": "red"},
		"env": object{"SECRET": "hidden"}})
	defer s.destroy(id)
	other := s.create(nil)
	defer s.destroy(other)
	read := func(id string) (m map[string]any, whole string) {
		t.Helper()
		whole = s.want(id, "curl -sS --max-time 5 http://169.254.169.254/")
		if err := json.Unmarshal([]byte(whole), &m); err != nil {
			t.Errorf("%v in %q", err, whole)
		}
		return m, whole
	}
	m, whole := read(id)
	if m["id"] != id || m["template"] != "python" || m["mode"] != "ephemeral" || strings.Contains(whole, "hidden") {
		t.Errorf("the sandbox reads %s", whole)
	}
	if m, whole := read(other); m["id"] != other {
		t.Errorf("the other sandbox reads %s", whole)
	}
	if got := s.want(id, "curl -sS --max-time 5 http://169.254.169.254/metadata/team"); got != "red" {
		t.Errorf("the label of the sandbox is %q", got)
	}
	before := m["expires_at"]
	if _, err := s.api().Keepalive(t.Context(), id, 2*time.Hour); err != nil {
		t.Fatalf("keepalive: %v", err)
	}
	if m, whole := read(id); m["expires_at"] == before || m["expires_at"] == nil {
		t.Errorf("after a keepalive the sandbox reads %s", whole)
	}
}
