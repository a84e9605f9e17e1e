package egressproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"codeberg.org/miekg/dns"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/time/rate"
)

// lookup asks the resolver, and again over TCP if the answer is truncated.
func lookup(t *testing.T, r *rig, name string, kind uint16, network string) *dns.Msg {
	t.Helper()
	c, err := net.Dial(network+"4", r.dns)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	q := dns.NewMsg(name, kind)
	q.UDPSize = 1232
	if err := q.Pack(); err != nil {
		t.Fatal(err)
	}
	var b []byte
	if network == "tcp" {
		if err := writeMessage(c, q.Data); err != nil {
			t.Fatal(err)
		}
		b, err = readMessage(c, 0xffff)
	} else {
		if _, err := c.Write(q.Data); err != nil {
			t.Fatal(err)
		}
		b = make([]byte, 4096)
		var n int
		n, err = c.Read(b)
		b = b[:n]
	}
	if err != nil {
		t.Fatalf("%s over %s: %v", name, network, err)
	}
	a := &dns.Msg{Data: b}
	if err := a.Unpack(); err != nil {
		t.Fatal(err)
	}
	if a.ID != q.ID || !a.Response {
		t.Fatalf("%s: not an answer: %v", name, a)
	}
	return a
}

// short formats an answer as one line: its code, and its records without TTL.
func short(a *dns.Msg) string {
	s := dns.RcodeToString[a.Rcode]
	for _, rr := range a.Answer {
		f := strings.Fields(rr.String())
		s += " " + f[0] + "/" + f[3] + "/" + f[len(f)-1]
	}
	if a.Truncated {
		s += " cut"
	}
	return s
}

func TestResolver(t *testing.T) {
	big := []string{"truncate"}
	for i := range 100 {
		big = append(big, fmt.Sprintf("big.wild.example. 60 IN A 198.51.100.%d", 100+i))
	}
	server := upstream(t, map[string][]string{
		"allowed.example. A":      {"allowed.example. 300 IN A 198.51.100.1"},
		"allowed.example. TXT":    {`allowed.example. 300 IN TXT "words"`},
		"allowed.example. MX":     {"allowed.example. 300 IN MX 10 mail.elsewhere.example."},
		"a.b.wild.example. A":     {"a.b.wild.example. 60 IN CNAME cdn.elsewhere.example.", "cdn.elsewhere.example. 999999 IN A 198.51.100.2"},
		"mixed.wild.example. A":   {"mixed.wild.example. 60 IN A 127.0.0.1", "mixed.wild.example. 60 IN A 198.51.100.3"},
		"rebound.wild.example. A": {"rebound.wild.example. 60 IN A 127.0.0.1"},
		"extra.wild.example. A":   {"extra.wild.example. 60 IN AAAA 2001:db8::1", "extra.wild.example. 60 IN A 198.51.100.4"},
		"big.wild.example. A":     big,
		"other.example. A":        {"other.example. 60 IN A 198.51.100.9"},
		"wild.example. A":         {"wild.example. 60 IN A 198.51.100.9"},
	})
	failing := upstream(t, nil)
	r := newRig(t, 0)
	// The discard port has no server; the kernel reports so at once.
	r.set(func() {
		r.sandbox.Nameservers = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9"), failing, server}
		r.banned = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	})
	for _, tc := range []struct {
		name string
		kind uint16
		want string
	}{
		{"allowed.example.", dns.TypeA, "NOERROR allowed.example./A/198.51.100.1"},
		{"ALLOWED.Example.", dns.TypeAAAA, "NOERROR"},
		{"allowed.example.", dns.TypeHTTPS, "NOERROR"},
		{"allowed.example.", dns.TypeSVCB, "NOERROR"},
		{"allowed.example.", dns.TypeTXT, `NOERROR allowed.example./TXT/"words"`},
		{"allowed.example.", dns.TypeMX, "NOERROR allowed.example./MX/mail.elsewhere.example."},
		{"allowed.example.", dns.TypeANY, "REFUSED"},
		{"allowed.example.", dns.TypeAXFR, "REFUSED"},
		{"a.b.wild.example.", dns.TypeA, "NOERROR a.b.wild.example./CNAME/cdn.elsewhere.example. cdn.elsewhere.example./A/198.51.100.2"},
		{"mixed.wild.example.", dns.TypeA, "NOERROR mixed.wild.example./A/198.51.100.3"},
		{"rebound.wild.example.", dns.TypeA, "NOERROR"},
		{"extra.wild.example.", dns.TypeA, "NOERROR extra.wild.example./A/198.51.100.4"},
		{"missing.wild.example.", dns.TypeA, "NXDOMAIN"},
		{"wild.example.", dns.TypeA, "NXDOMAIN"},
		{"other.example.", dns.TypeA, "NXDOMAIN"},
		{"other.example.", dns.TypeAAAA, "NXDOMAIN"},
		{"sub.allowed.example.", dns.TypeA, "NXDOMAIN"},
		{"notallowed.example.", dns.TypeA, "NXDOMAIN"},
		{`evil\.wild.example.`, dns.TypeA, "NXDOMAIN"},
		{".", dns.TypeNS, "NXDOMAIN"},
	} {
		for _, network := range []string{"udp", "tcp"} {
			a := lookup(t, r, tc.name, tc.kind, network)
			if got := short(a); got != tc.want {
				t.Errorf("%s %s over %s: %s, want %s", tc.name, dns.TypeToString[tc.kind], network, got, tc.want)
			}
			if len(a.Extra) > 0 {
				t.Errorf("%s: additional records got through: %v", tc.name, a.Extra)
			}
		}
	}
	if got := short(lookup(t, r, "big.wild.example.", dns.TypeA, "udp")); got != "NOERROR cut" {
		t.Errorf("a big answer over UDP: %s", got)
	}
	if got := lookup(t, r, "big.wild.example.", dns.TypeA, "tcp"); len(got.Answer) != 100 {
		t.Errorf("a big answer over TCP has %d records", len(got.Answer))
	}

	a := netip.MustParseAddr
	r.set(func() {
		for addr, want := range map[netip.Addr]time.Duration{
			a("198.51.100.1"): 300*time.Second + grace, a("198.51.100.2"): maxTTL + grace, a("198.51.100.3"): time.Minute + grace,
			a("127.0.0.1"): 0, a("198.51.100.9"): 0, a("198.51.100.99"): 0,
		} {
			if got := r.fakeHost.opened[addr]; got != want {
				t.Errorf("%s is open for %s, want %s", addr, got, want)
			}
		}
	})
	if got := r.grants.names(1, a("198.51.100.2"), time.Now()); !slices.Equal(got, []string{"a.b.wild.example"}) {
		t.Errorf("198.51.100.2 was given for %v", got)
	}
	for _, want := range []string{"dns other.example.", "dns rebound.wild.example", "dns allowed.example."} {
		if !slices.Contains(r.denials(), want) {
			t.Errorf("%q was not reported: %v", want, r.denials())
		}
	}
}

// TestAnswerTTL checks that an answer never lives longer than its address is open.
func TestAnswerTTL(t *testing.T) {
	r := newRig(t, 0)
	server := upstream(t, map[string][]string{"allowed.example. A": {"allowed.example. 999999 IN A 198.51.100.1"}})
	r.set(func() { r.sandbox.Nameservers = []netip.AddrPort{server} })
	a := lookup(t, r, "allowed.example.", dns.TypeA, "udp")
	if got := a.Answer[0].Header().TTL; got != 3600 {
		t.Errorf("the answer lives for %d s", got)
	}
}

func TestResolverIsNotOpen(t *testing.T) {
	r := newRig(t, 0)
	r.set(func() { r.gone = true })
	c, err := net.Dial("tcp4", r.dns)
	if err != nil {
		return // reset before it was connected
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	q := dns.NewMsg("allowed.example.", dns.TypeA)
	if err := q.Pack(); err != nil {
		t.Fatal(err)
	}
	_ = writeMessage(c, q.Data)
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stranger was not reset: %v", err)
	}
}

func TestNoNameServers(t *testing.T) {
	r := newRig(t, 0)
	if got := short(lookup(t, r, "allowed.example.", dns.TypeA, "udp")); got != "SERVFAIL" {
		t.Errorf("got %s", got)
	}
}

func TestNames(t *testing.T) {
	sandbox := Sandbox{Domains: []string{"one.example", "*.two.example"}}
	for name, want := range map[string]bool{
		"one.example": true, "ONE.example": true, "one.example.": true, "a.one.example": false,
		"two.example": false, "a.two.example": true, "a.b.two.example": true, "atwo.example": false,
		".two.example": false, "a..two.example": false, "one.example..": false, "": false, ".": false,
		"a/b.two.example": false, "a b.two.example": false, "a\x00.two.example": false, `a\.two.example`: false,
		"\u212a.two.example": false, strings.Repeat("a", 63) + ".two.example": true, strings.Repeat("a", 64) + ".two.example": false,
		strings.Repeat("a.", 125) + "two.example": false, "_srv._tcp.two.example": true, "127.0.0.1": false,
	} {
		c, ok := canonical(name)
		if got := ok && sandbox.allows(c); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}

func TestMeter(t *testing.T) {
	m := newMeter(limit{perSandbox: 2, total: 3})
	a, b, c := subject{handle: "a"}, subject{handle: "b"}, subject{handle: "c"}
	got := []bool{m.enter(a), m.enter(a), m.enter(a), m.enter(b), m.enter(c)}
	m.leave(a)
	got = append(got, m.enter(c), m.enter(a))
	if d := cmp.Diff([]bool{true, true, false, true, false, true, false}, got); d != "" {
		t.Error(d)
	}
}

// TestMeterOfAnOwner checks that one owner leaves a quarter to the others, however many sandboxes
// it has.
func TestMeterOfAnOwner(t *testing.T) {
	m := newMeter(limit{perSandbox: 2, total: 8})
	count := 0
	for i := range 20 {
		if m.enter(subject{i, "greedy"}) {
			count++
		}
	}
	if count != 6 || !m.enter(subject{"x", "modest"}) || !m.enter(subject{"y", ""}) || m.enter(subject{"z", "modest"}) {
		t.Errorf("one owner has %d of 8", count)
	}
	for i := range count {
		m.leave(subject{i, "greedy"})
	}
	m.leave(subject{"x", "modest"})
	m.leave(subject{"y", ""})
	if m.total != 0 || len(m.sandboxes) != 0 || len(m.owners) != 0 {
		t.Errorf("left: %d %v %v", m.total, m.sandboxes, m.owners)
	}
}

func TestPace(t *testing.T) {
	now := time.Now()
	p := newPace(10)
	steps := func(owner string, sandboxes, tries int, at time.Time) (count int) {
		for n := range sandboxes {
			for range tries {
				if p.step(subject{fmt.Sprint(owner, n), owner}, at) {
					count++
				}
			}
		}
		return count
	}
	if got := steps("a", 1, 1000, now); got != 40 {
		t.Errorf("one sandbox asks %d at once, want 40", got)
	}
	if got := steps("a", 1, 1000, now.Add(time.Second)); got != 10 {
		t.Errorf("a second later it asks %d, want 10", got)
	}
	now = now.Add(time.Minute)
	if got := steps("a", 100, 100, now); got != 10*questionsOwner*questionsBurst {
		t.Errorf("one owner asks %d at once, want %d", got, 10*questionsOwner*questionsBurst)
	}
	if got := steps("b", 1, 1000, now); got != 40 {
		t.Errorf("the sandbox of another owner asks %d, want 40", got)
	}
	p.expire(now.Add(time.Minute))
	if len(p.sandboxes)+len(p.owners) != 0 {
		t.Errorf("%d sandboxes and %d owners are remembered", len(p.sandboxes), len(p.owners))
	}
}

// TestTooManyQuestions checks that questions beyond the rate are refused and reported, and reach
// no name server, and that an answer opens maxAddresses addresses at most.
func TestTooManyQuestions(t *testing.T) {
	all := []string{"truncate"}
	for i := range maxAddresses + 50 {
		all = append(all, fmt.Sprintf("allowed.example. 60 IN A 198.51.100.%d", i+1))
	}
	r := newRig(t, 0)
	r.set(func() {
		r.sandbox.Nameservers = []netip.AddrPort{upstream(t, map[string][]string{"allowed.example. A": all})}
	})
	if a := lookup(t, r, "allowed.example.", dns.TypeA, "tcp"); len(a.Answer) != maxAddresses ||
		len(r.fakeHost.opened) != maxAddresses {
		t.Errorf("an answer has %d addresses and opens %d, want %d", len(a.Answer), len(r.fakeHost.opened), maxAddresses)
	}
	for _, network := range []string{"udp", "tcp"} {
		r.asking.mu.Lock()
		r.asking.sandboxes[1] = rate.NewLimiter(rate.Every(time.Hour), 2)
		r.asking.mu.Unlock()
		var got []string
		for range 4 {
			got = append(got, short(lookup(t, r, "other.example.", dns.TypeA, network)))
		}
		if d := cmp.Diff([]string{"NXDOMAIN", "NXDOMAIN", "REFUSED", "REFUSED"}, got); d != "" {
			t.Errorf("over %s (-want +got):\n%s", network, d)
		}
	}
	r.set(func() {
		if d := cmp.Diff([]string{"dns other.example.", "dns other.example.", "dns other.example.", "dns other.example."},
			r.excess); d != "" {
			t.Errorf("told (-want +got):\n%s", d)
		}
	})
}

// TestTooMuchIsReported checks that connections to the resolver and the metadata service beyond their
// limits, and a question that is too long, are reset and reported.
func TestTooMuchIsReported(t *testing.T) {
	r := newRig(t, 0)
	for _, tc := range []struct {
		address string
		meter   *meter
		to      string
	}{{r.dns, r.dnsConns, "198.51.100.53:53"}, {r.about, r.metadataConns, "169.254.169.254:80"}} {
		r.set(func() { r.to, r.excess = netip.MustParseAddrPort(tc.to), nil })
		count := func(change int) (n int) {
			tc.meter.mu.Lock()
			defer tc.meter.mu.Unlock()
			tc.meter.sandboxes[1] += change
			return tc.meter.sandboxes[1]
		}
		count(tc.meter.limit.perSandbox - 1)
		last := dial(t, tc.address)
		eventually(t, "the last connection is served", func() bool { return count(0) == tc.meter.limit.perSandbox })
		if c, err := net.Dial("tcp4", tc.address); err == nil { // otherwise it was reset at once
			_ = c.SetDeadline(time.Now().Add(deadline))
			refused(t, c)
			_ = c.Close()
		}
		eventually(t, "it is reported", func() (is bool) { r.set(func() { is = len(r.excess) > 0 }); return is })
		want := []string{"tcp " + tc.to}
		if tc.address == r.dns {
			if _, err := last.Write([]byte{0xff, 0xff}); err != nil {
				t.Fatal(err)
			}
			refused(t, last)
			want = append(want, "tcp "+tc.to)
		}
		r.set(func() {
			if d := cmp.Diff(want, r.excess); d != "" {
				t.Errorf("%s (-want +got):\n%s", tc.to, d)
			}
		})
	}
}

func TestGrantsAreBounded(t *testing.T) {
	g := newGrants()
	now := time.Now()
	addr := netip.MustParseAddr("198.51.100.1")
	for i := range 3 * maxGrants {
		g.add("a", fmt.Sprintf("n%d.example", i), []netip.Addr{addr}, now.Add(time.Duration(i+1)*time.Second))
	}
	names := g.names("a", addr, now)
	if len(names) > maxGrants || !slices.Contains(names, fmt.Sprintf("n%d.example", 3*maxGrants-1)) {
		t.Errorf("%d names are remembered, or not the last", len(names))
	}
	if n := len(g.names("b", addr, now)); n != 0 {
		t.Errorf("another sandbox has %d names", n)
	}
	g.expire(now.Add(4 * maxGrants * time.Second))
	if n := len(g.names("a", addr, now)); n != 0 {
		t.Errorf("%d names are left after they expired", n)
	}
}

// FuzzAnswer sends the resolver any bytes a sandbox may send. It must not panic, and every answer
// must be a message. No name server is asked.
func FuzzAnswer(f *testing.F) {
	for _, name := range []string{"allowed.example.", "other.example.", "a.wild.example."} {
		q := dns.NewMsg(name, dns.TypeA)
		q.UDPSize = 1232
		if err := q.Pack(); err != nil {
			f.Fatal(err)
		}
		f.Add(q.Data)
	}
	h := &fakeHost{handle: 1, opened: map[netip.Addr]time.Duration{}}
	g := New(h, 0, slog.New(slog.NewTextHandler(io.Discard, nil)))
	sandbox := Sandbox{Domains: []string{"allowed.example", "*.wild.example"}}
	f.Fuzz(func(t *testing.T, b []byte) {
		h.denied = nil
		for _, udp := range []bool{true, false} {
			a := g.answer(context.Background(), sandbox, 1, slices.Clone(b), udp)
			if a == nil {
				continue
			}
			m := &dns.Msg{Data: a}
			if err := m.Unpack(); err != nil {
				t.Fatalf("the answer to %x is no message: %v: %x", b, err, a)
			}
			if !m.Response || len(m.Answer) > 0 || udp && len(a) > maxUDP {
				t.Fatalf("the answer to %x is %v", b, m)
			}
		}
	})
}

// FuzzReply sends the resolver any bytes that a name server may send.
func FuzzReply(f *testing.F) {
	q := dns.NewMsg("a.wild.example.", dns.TypeA)
	a := &dns.Msg{MsgHeader: dns.MsgHeader{ID: q.ID, Response: true}, Question: q.Question,
		Answer: []dns.RR{must(dns.New("a.wild.example. 60 IN A 198.51.100.1")), must(dns.New("a.wild.example. 60 IN CNAME b.example."))}}
	if err := a.Pack(); err != nil {
		f.Fatal(err)
	}
	f.Add(a.Data[2:])
	h := &fakeHost{handle: 1, opened: map[netip.Addr]time.Duration{}}
	g := New(h, 0, slog.New(slog.NewTextHandler(io.Discard, nil)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := reply(q, append([]byte{byte(q.ID >> 8), byte(q.ID)}, b...))
		if err != nil {
			return
		}
		m := &dns.Msg{MsgHeader: dns.MsgHeader{ID: q.ID, Response: true}, Question: q.Question}
		g.fill(m, r, 1, "a.wild.example", dns.TypeA)
		if err := g.open(m, 1, "a.wild.example"); err != nil {
			t.Fatal(err)
		}
		if err := m.Pack(); err != nil {
			return // such an answer is not sent
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, rr := range m.Answer {
			switch rr := rr.(type) {
			case *dns.A:
				if _, ok := h.opened[rr.Addr]; !ok {
					t.Fatalf("%s is in an answer and not open", rr.Addr)
				}
			case *dns.AAAA, *dns.HTTPS, *dns.SVCB:
				t.Fatalf("%v got through", rr)
			}
		}
		clear(h.opened)
		h.denied = nil
		g.grants.expire(time.Now().Add(2 * maxTTL))
	})
}
