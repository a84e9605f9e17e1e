package e2e

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/cayhq/cay/internal/caytest"
)

// outside is a host in a network namespace of the test, with an address for documentation. It
// greets every connection with the address that it comes from.
type outside struct {
	name    string
	address string // of the host outside
	second  string // another address of it
	block   string // the range of both addresses
	gateway string // this machine's address on that network
}

// outsides is held while a host outside gets its addresses, so that no two take the same.
var outsides sync.Mutex

func newOutside(t *testing.T) *outside {
	t.Helper()
	ip := caytest.RequireProgram(t, "ip")
	outsides.Lock()
	defer outsides.Unlock()
	// The block of eight addresses must have no route of another test, also of another run on the
	// machine.
	first := 8 * rand.IntN(32)
	at := func(n int) string { return fmt.Sprintf("198.51.100.%d", first+n) }
	for range 32 {
		taken, err := exec.Command(ip, "-4", "route", "show", "root", at(0)+"/29").CombinedOutput()
		if err != nil {
			t.Fatalf("ip route: %v: %s", err, taken)
		}
		if len(taken) == 0 {
			break
		}
		t.Logf("the block of %s is in use: %s", at(0), taken)
		first = (first + 8) % 256
	}
	o := &outside{name: "out" + caytest.Instance(), block: at(0) + "/29", gateway: at(1), address: at(2), second: at(3)}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(ip, args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	run("netns", "add", o.name)
	// The link is removed first, by its own name: if something still holds the namespace, its route is
	// gone for the next test.
	t.Cleanup(func() { run("link", "del", o.name); run("netns", "del", o.name) })
	run("link", "add", o.name, "type", "veth", "peer", "name", "eth0", "netns", o.name)
	run("addr", "add", o.gateway+"/29", "dev", o.name)
	run("link", "set", o.name, "up")
	for _, address := range []string{o.address, o.second} {
		run("-n", o.name, "addr", "add", address+"/29", "dev", "eth0")
	}
	run("-n", o.name, "link", "set", "eth0", "up")
	run("-n", o.name, "link", "set", "lo", "up")
	return o
}

// listen greets on a TCP port in the namespace.
func (o *outside) listen(t *testing.T, port int) {
	t.Helper()
	l := inNamespace(t, o.name, func() (net.Listener, error) { return net.Listen("tcp4", fmt.Sprintf(":%d", port)) })
	greet(t, l)
	for _, address := range []string{o.address, o.second} {
		c, err := net.DialTimeout("tcp4", fmt.Sprintf("%s:%d", address, port), patience)
		if err != nil {
			t.Fatalf("the host does not reach the outside: %v", err)
		}
		if from, err := io.ReadAll(c); err != nil || string(from) != "hello "+o.gateway+"\n" {
			t.Fatalf("another host answers at %s: %q, %v", address, from, err)
		}
		c.Close()
	}
}

func greet(t *testing.T, l net.Listener) {
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprintf(c, "hello %s\n", host)
			c.Close()
		}
	}()
}

// inNamespace makes a socket in a namespace. The thread returns to its own namespace before another
// goroutine gets it: it may be the process's main thread, which cannot end and would keep the
// namespace.
func inNamespace[T any](t *testing.T, name string, f func() (T, error)) T {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("in namespace %s: %v", name, err)
		}
	}
	home, err := netns.Get()
	must(err)
	defer home.Close()
	there, err := netns.GetFromName(name)
	must(err)
	defer there.Close()
	must(netns.Set(there))
	result, err := f()
	must(netns.Set(home))
	must(err)
	return result
}

// connect tries a TCP connection from inside and returns the greeting.
func (s *server) connect(id, host string, port int) string {
	s.t.Helper()
	r := s.exec(id, fmt.Sprintf(`python3 -c '
import socket
try:
    c = socket.create_connection(("%s", %d), timeout=1.5)
    c.settimeout(1.5)
    print("connected", c.recv(100).decode().strip())
except Exception as e:
    print("failed", type(e).__name__)'`, host, port))
	if r.ExitCode != 0 || r.Stdout == "" {
		s.t.Errorf("connecting to %s:%d: %+v", host, port, r)
	}
	return strings.TrimSpace(r.Stdout)
}

func TestReachesTheOutside(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	o := newOutside(t)
	o.listen(t, 8080)
	// The host outside sees this machine's address, because of NAT.
	if got, want := s.connect(id, o.address, 8080), "connected hello "+o.gateway; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	dns := inNamespace(t, o.name, func() (net.PacketConn, error) { return net.ListenPacket("udp4", ":5353") })
	t.Cleanup(func() { dns.Close() })
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := dns.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = dns.WriteTo(buf[:n], from) // the sandbox notices if the packet is lost
		}
	}()
	got := s.want(id, fmt.Sprintf(`python3 -c '
import socket
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(3)
u.sendto(b"ping", ("%s", 5353)); print(u.recv(10).decode())'`, o.address))
	if got != "ping" {
		t.Errorf("UDP: got %q", got)
	}
}

func TestNeverReachable(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id, other := s.create(nil), s.create(nil)
	defer s.destroy(id)
	defer s.destroy(other)
	o := newOutside(t)
	// The outside can be reached in general, so failures below have another reason.
	o.listen(t, 8080)
	if got := s.connect(id, o.address, 8080); !strings.HasPrefix(got, "connected") {
		t.Fatalf("the outside is not reachable: %q", got)
	}

	l, err := net.Listen("tcp4", "0.0.0.0:0") // on all addresses of this host
	if err != nil {
		t.Fatal(err)
	}
	greet(t, l)
	port := l.Addr().(*net.TCPAddr).Port
	apiPort := netip.MustParseAddrPort(strings.TrimPrefix(s.url, "http://")).Port()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	type target struct {
		host string
		port int
		who  string
	}
	var targets []target
	for _, a := range addresses {
		if ip := a.(*net.IPNet).IP.To4(); ip != nil && !ip.IsLoopback() { // inside, 127.0.0.1 is the sandbox itself
			targets = append(targets, target{ip.String(), port, "the host"}, target{ip.String(), int(apiPort), "the API"})
		}
	}
	otherIP := s.want(other, `python3 -c '
import socket
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(("198.51.100.9", 1)); print(u.getsockname()[0])'`)
	s.want(other, "nohup python3 -m http.server 8000 >/dev/null 2>&1 & sleep 1; "+
		"curl -sf http://127.0.0.1:8000/ >/dev/null")
	targets = append(targets, target{otherIP, 8000, "another sandbox"}, target{otherIP, 49983, "another's agent"})
	for _, address := range []string{"169.254.1.1", "224.0.0.1", "255.255.255.255", "fe80::1%eth0"} {
		targets = append(targets, target{address, 80, "a reserved address"})
	}
	// On this address only cay's own metadata service answers.
	targets = append(targets, target{"169.254.169.254", 443, "a cloud's metadata"})
	var wg sync.WaitGroup
	for _, to := range targets {
		wg.Go(func() {
			if got := s.connect(id, to.host, to.port); !strings.HasPrefix(got, "failed") {
				t.Errorf("the sandbox reaches %s at %s:%d: %q", to.who, to.host, to.port, got)
			}
		})
	}
	wg.Wait()
	if got := s.want(id, "cat /proc/net/if_inet6 2>/dev/null | grep -v ' lo$' || true"); got != "" {
		t.Errorf("the sandbox has IPv6: %s", got)
	}
}

// TestAgentIsNotForTheInside connects to the agent from inside its own sandbox. Without the token
// it answers nothing of value.
func TestAgentIsNotForTheInside(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	for _, path := range []string{"/files?path=/etc/passwd", "/envs", "/metrics"} {
		if got := s.want(id, "curl -s -o /dev/null -w '%{http_code}' 'http://127.0.0.1:49983"+path+"'"); got != "401" {
			t.Errorf("%s answers %s", path, got)
		}
	}
	for _, path := range []string{"/init", "/process.Process/List", "/memory/relieve"} {
		if got := s.want(id,
			"curl -s -o /dev/null -w '%{http_code}' -H 'Content-Type: application/json' -d '{}' "+
				"'http://127.0.0.1:49983"+path+"'"); got != "401" {
			t.Errorf("%s answers %s", path, got)
		}
	}
}

// TestNameResolution resolves names through the test's own name server, which the server's
// configuration names.
func TestNameResolution(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	o := newOutside(t)
	queries := inNamespace(t, o.name, func() (net.PacketConn, error) { return net.ListenPacket("udp4", ":53") })
	t.Cleanup(func() { queries.Close() })
	go answerNames(queries, [4]byte{198, 51, 100, 77})
	s := newServer(t, "CAY_NETWORK_NAMESERVERS="+o.address)
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	defer s.destroy(id)
	if got := s.want(id, "cat /etc/resolv.conf"); !strings.Contains(got, "nameserver "+o.address) {
		t.Errorf("resolv.conf is %q", got)
	}
	for name, want := range map[string]string{"www.example.test": "198.51.100.77", "localhost": "127.0.0.1"} {
		if got := s.want(id, "getent ahostsv4 "+name+" | head -1 | cut -d' ' -f1"); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if got := s.want(id, "getent hosts $(hostname) | head -1"); got == "" {
		t.Error("the sandbox does not know its own name")
	}
}

// answerNames serves a name server that resolves every name to one address.
func answerNames(c net.PacketConn, address [4]byte) {
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) == 0 {
			continue
		}
		m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
		if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
			m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60},
				Body: &dnsmessage.AResource{A: address}}}
		}
		if answer, err := m.Pack(); err == nil {
			_, _ = c.WriteTo(answer, from) // the client notices if the packet is lost
		}
	}
}
