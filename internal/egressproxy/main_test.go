package egressproxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"codeberg.org/miekg/dns"
)

// deadline bounds every wait of a test. Tests assert nothing about shorter times.
const deadline = 10 * time.Second

// fakeHost has one sandbox at 127.0.0.1. All its proxied connections have the same destination, a
// test's server.
type fakeHost struct {
	mu      sync.Mutex
	sandbox Sandbox
	handle  any
	gone    bool
	to      netip.AddrPort
	meta    Metadata
	banned  []netip.Addr
	opened  map[netip.Addr]time.Duration
	denied  []string // protocol and name
	excess  []string // protocol, name and destination
}

func (h *fakeHost) Find(from netip.Addr) (Sandbox, any, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sandbox, h.handle, !h.gone && from == netip.MustParseAddr("127.0.0.1")
}

func (h *fakeHost) Metadata(context.Context, any) (Metadata, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.meta, nil
}

func (h *fakeHost) Resolved(_ any, addrs []netip.Addr, ttl time.Duration) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range addrs {
		h.opened[a] = ttl
	}
	return nil
}

func (h *fakeHost) Permitted(_ any, a netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if slices.Contains(h.banned, a) {
		return errors.New("never")
	}
	return nil
}

func (h *fakeHost) Original(*net.TCPConn) (netip.AddrPort, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.to, nil
}

func (h *fakeHost) Denied(_ any, protocol, name string, _ netip.AddrPort) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.denied = append(h.denied, protocol+" "+name)
}

func (h *fakeHost) Excess(_ any, protocol, name string, to netip.AddrPort) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if to.IsValid() {
		name += to.String()
	}
	h.excess = append(h.excess, protocol+" "+name)
}

func (h *fakeHost) set(change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change()
}

func (h *fakeHost) denials() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.denied)
}

type rig struct {
	*fakeHost
	*Proxy
	dns, proxy, about string // addresses of the services
}

// newRig serves a Proxy for one sandbox that may reach allowed.example and names below
// wild.example, and that was given 127.0.0.1 for allowed.example.
func newRig(t *testing.T, idle time.Duration) *rig {
	t.Helper()
	h := &fakeHost{handle: 1, opened: map[netip.Addr]time.Duration{},
		sandbox: Sandbox{Domains: []string{"allowed.example", "*.wild.example"}}}
	g := New(h, 0, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if idle > 0 {
		g.idle = idle
	}
	g.hello = time.Second
	local := netip.MustParseAddr("127.0.0.1")
	g.grants.add(1, "allowed.example", []netip.Addr{local}, time.Now().Add(time.Hour))
	on := Listeners{DNS: listen(t), Proxy: listen(t), Metadata: listen(t)}
	var err error
	on.UDP, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(on.DNS.Addr().String())))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- g.Serve(ctx, on) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(deadline):
			t.Error("Serve does not end")
		}
	})
	return &rig{h, g, on.DNS.Addr().String(), on.Proxy.Addr().String(), on.Metadata.Addr().String()}
}

func listen(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(deadline))
	return c.(*net.TCPConn)
}

// upstream starts a name server that answers from zone; its keys are a name, a space and a type.
// Without a zone every answer is a failure.
func upstream(t *testing.T, zone map[string][]string) netip.AddrPort {
	t.Helper()
	l := listen(t)
	at := netip.MustParseAddrPort(l.Addr().String())
	u, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	answer := func(m []byte, udp bool) []byte {
		q := &dns.Msg{Data: m}
		if err := q.Unpack(); err != nil || len(q.Question) != 1 {
			return nil
		}
		a := &dns.Msg{MsgHeader: dns.MsgHeader{ID: q.ID, Response: true}, Question: q.Question}
		records, ok := zone[q.Question[0].Header().Name+" "+dns.TypeToString[dns.RRToType(q.Question[0])]]
		switch {
		case zone == nil:
			a.Rcode = dns.RcodeServerFailure
		case !ok:
			a.Rcode = dns.RcodeNameError
		}
		for _, r := range records {
			if r == "truncate" {
				if a.Truncated = udp; udp {
					break
				}
				continue
			}
			rr, err := dns.New(r)
			if err != nil {
				panic(err)
			}
			a.Answer = append(a.Answer, rr)
		}
		a.Extra = []dns.RR{must(dns.New("elsewhere.example. 60 IN A 198.51.100.99"))}
		if err := a.Pack(); err != nil {
			panic(err)
		}
		return a.Data
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			// Forged answers come first; the resolver must ignore them.
			if good := answer(b[:n], true); good != nil {
				forged := slices.Clone(good)
				forged[0] ^= 1
				_, _ = u.WriteToUDPAddrPort(forged, from)
				_, _ = u.WriteToUDPAddrPort([]byte("nonsense"), from)
				_, _ = u.WriteToUDPAddrPort(good, from)
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if m, err := readMessage(c, 4096); err == nil {
				_ = writeMessage(c, answer(m, false))
			}
			_ = c.Close()
		}
	}()
	return at
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
