package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ipv4 is a packet, or a fragment: at is the offset of its body in bytes, and more reports that
// others follow.
type ipv4 struct {
	src, dst netip.Addr
	protocol byte
	id       uint16
	at       int
	more     bool
	body     []byte
}

func (p ipv4) bytes() []byte {
	b := make([]byte, 20, 20+len(p.body))
	b[0], b[8], b[9] = 0x45, 64, p.protocol
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(p.body)))
	binary.BigEndian.PutUint16(b[4:], p.id)
	offset := uint16(p.at / 8)
	if p.more {
		offset |= 0x2000
	}
	binary.BigEndian.PutUint16(b[6:], offset)
	copy(b[12:], p.src.AsSlice())
	copy(b[16:], p.dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, p.body...)
}

// cut splits the packet into fragments with bodies of size bytes, a multiple of 8.
func (p ipv4) cut(size int) (out [][]byte) {
	for at := 0; at < len(p.body); at += size {
		piece := p
		piece.at, piece.body = at, p.body[at:min(at+size, len(p.body))]
		piece.more = at+size < len(p.body)
		out = append(out, piece.bytes())
	}
	return out
}

// syn returns a TCP segment that opens a connection.
func syn(src, dst netip.AddrPort) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	b[12], b[13] = 5<<4, 2
	binary.BigEndian.PutUint16(b[14:], 65535)
	pseudo := append(append(src.Addr().AsSlice(), dst.Addr().AsSlice()...), 0, unix.IPPROTO_TCP, 0, byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], checksum(append(pseudo, b...)))
	return b
}

// icmp returns an ICMP message with rest after the first 4 bytes of its header.
func icmp(kind, code byte, rest ...byte) []byte {
	b := append([]byte{kind, code, 0, 0}, rest...)
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

// capture counts the packets of a protocol that arrive in a namespace by the text that describe
// returns; "" is not counted.
type capture struct {
	mu sync.Mutex
	// +checklocks:mu
	heard map[string]int
}

func captureIn(t *testing.T, path string, protocol int, describe func(packet []byte) string) *capture {
	t.Helper()
	c := &capture{heard: map[string]int{}}
	var fd int
	if err := enter(path, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval((10 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	stop, ended := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(stop); <-ended; unix.Close(fd) })
	go func() {
		defer close(ended)
		b := make([]byte, 1<<16)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil || n < 28 {
				continue
			}
			if text := describe(b[:n]); text != "" {
				c.mu.Lock()
				c.heard[text]++
				c.mu.Unlock()
			}
		}
	}()
	return c
}

func (c *capture) hears(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heard[text] > 0
}

func (c *capture) all() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Sorted(maps.Keys(c.heard))
}

// TestFragments checks that the rules decide about the reassembled packet, and that no other one
// leaves, whatever order, size and overlap its fragments have.
func TestFragments(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	setPolicy(t, n, s, Policy{Allow: prefixes("203.0.113.0/24"), Ports: []uint16{7001}})
	heard := captureIn(t, outsidePath, unix.IPPROTO_TCP, func(b []byte) string {
		return fmt.Sprintf("%d to %d", binary.BigEndian.Uint16(b[20:]), binary.BigEndian.Uint16(b[22:]))
	})
	id := uint16(100)
	// The source port identifies the packet that arrives.
	packet := func(from, to uint16) ipv4 {
		id++
		return ipv4{src: s.Addr, dst: farAddr, protocol: unix.IPPROTO_TCP, id: id,
			body: syn(netip.AddrPortFrom(s.Addr, from), netip.AddrPortFrom(farAddr, to))}
	}
	piece := func(p ipv4, at, end int, more bool) []byte {
		p.at, p.more, p.body = at, more, p.body[at:end]
		return p.bytes()
	}
	good, bad := packet(2001, 7001), packet(2001, 7002)
	bad.id = good.id
	overlaps := map[string][][]byte{
		"ports again, same place":    {piece(good, 0, 8, true), piece(bad, 0, 8, true), piece(good, 8, 20, false)},
		"ports again, longer":        {piece(good, 0, 8, true), piece(bad, 0, 16, true), piece(good, 16, 20, false)},
		"ports again, at the end":    {piece(good, 8, 20, false), piece(good, 0, 8, true), piece(bad, 0, 8, true)},
		"ports first, then others":   {piece(bad, 0, 8, true), piece(good, 0, 16, true), piece(bad, 8, 20, false)},
		"whole after a first":        {piece(good, 0, 8, true), piece(bad, 0, 20, false)},
		"rest before a denied first": {piece(good, 8, 20, false), piece(bad, 0, 8, true)},
	}
	eventually(t, func() error { // the first packets of a link are lost
		allowed := packet(2000, 7001)
		if err := sendPackets(s, allowed.cut(8)...); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
		if !heard.hears("2000 to 7001") {
			return errors.New("what is allowed does not arrive in fragments of 8 bytes")
		}
		return nil
	})
	denied := packet(2002, 7002)
	if err := sendPackets(s, denied.cut(8)...); err != nil {
		t.Fatal(err)
	}
	for _, pieces := range overlaps {
		if err := sendPackets(s, pieces...); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	time.Sleep(grace)
	for _, from := range []uint16{2001, 2002} {
		if text := fmt.Sprintf("%d to 7002", from); heard.hears(text) {
			t.Errorf("%s: arrived", text)
		}
	}
	// Without rules the denied packet arrives, so it is a correct packet.
	withoutRules(t, n, func() {
		eventually(t, func() error {
			again := packet(2002, 7002)
			again.src, again.body = s.Addr, denied.body
			if err := sendPackets(s, again.cut(8)...); err != nil {
				return err
			}
			time.Sleep(time.Millisecond)
			if !heard.hears("2002 to 7002") {
				return errors.New("it does not arrive without the rules either: the try proves nothing")
			}
			return nil
		})
	})
}

// TestFragmentFlood checks that incomplete packets of a slot do not fill the memory in which the
// host reassembles fragments.
func TestFragmentFlood(t *testing.T) {
	n := open(t, newConfig())
	s, other := acquire(t, n), acquire(t, n)
	udpRoundTrip(t, s)
	var packets [][]byte
	for i := range 6000 {
		packets = append(packets, ipv4{src: s.Addr, dst: farAddr, protocol: unix.IPPROTO_UDP, id: uint16(i), more: true,
			body: make([]byte, 1024)}.bytes())
	}
	started := time.Now()
	if err := sendPackets(s, packets...); err != nil {
		t.Fatal(err)
	}
	most := fragmentsBurst + int(fragmentsPerSecond*time.Since(started).Seconds()) + 2
	stat, err := os.ReadFile("/proc/self/net/sockstat")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(stat), "FRAG: inuse ")
	var count int
	if _, err := fmt.Sscan(line, &count); err != nil {
		t.Fatalf("%v in %s", err, stat)
	}
	if count > most || count == 0 {
		t.Errorf("%d packets of the slot wait for the rest of them, want at most %d", count, most)
	}
	hear := &receivers{heard: map[string]netip.Addr{}}
	hear.listen(t, outsidePath, probePort)
	eventually(t, func() error {
		f := frame{src: netip.AddrPortFrom(other.Addr, 5555), dst: netip.AddrPortFrom(farAddr, probePort), pieces: true,
			payload: "another's"}
		if err := inNamespace(other.Namespace, f.send); err != nil {
			return err
		}
		if !hear.hears("another's") {
			return errors.New("another slot's fragments do not arrive")
		}
		return nil
	})
}

// TestICMPErrors checks that a slot can send errors about its own connections, but not about
// those of other slots or of the host, and no redirects, and that no ICMP reaches the host.
func TestICMPErrors(t *testing.T) {
	n := open(t, newConfig())
	a, b := acquire(t, n), acquire(t, n)
	// An error quotes the server's packet to the host's address.
	server := map[*Slot]netip.AddrPort{}
	var conn net.PacketConn
	if err := inNamespace(outsidePath, func() (err error) {
		conn, err = net.ListenPacket("udp4", netip.AddrPortFrom(farAddr, probePort).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, s := range []*Slot{a, b} {
		buffer := make([]byte, 64)
		eventually(t, func() error {
			f := frame{src: netip.AddrPortFrom(s.Addr, 5555), dst: netip.AddrPortFrom(farAddr, probePort), payload: "hello"}
			if err := inNamespace(s.Namespace, f.send); err != nil {
				return err
			}
			if err := conn.SetReadDeadline(time.Now().Add(grace)); err != nil {
				return err
			}
			_, from, err := conn.ReadFrom(buffer)
			if err == nil {
				server[s] = from.(*net.UDPAddr).AddrPort()
			}
			return err
		})
	}
	describe := func(b []byte) string {
		if kind := b[20]; kind != icmpUnreachable && kind != icmpRedirect || len(b) < 56 {
			return ""
		}
		inner := b[28:]
		if netip.AddrFrom4([4]byte(inner[12:])) != farAddr {
			return "" // of another program on this host
		}
		return fmt.Sprintf("type %d about port %d", b[20], binary.BigEndian.Uint16(inner[22:]))
	}
	outside, host := captureIn(t, outsidePath, unix.IPPROTO_ICMP, describe), captureIn(t, "", unix.IPPROTO_ICMP, describe)
	quote := func(src, dst netip.AddrPort) []byte {
		return frame{src: src, dst: dst, payload: "x"}.packet()
	}
	far := netip.AddrPortFrom(farAddr, probePort)
	// An error about its own connection quotes a packet that came to the slot.
	own := icmp(icmpUnreachable, 3, append(make([]byte, 4), quote(far, netip.AddrPortFrom(a.Addr, 5555))...)...)
	redirect := icmp(icmpRedirect, 1, append(a.Addr.AsSlice(), quote(far, netip.AddrPortFrom(a.Addr, 5555))...)...)
	foreign := icmp(icmpUnreachable, 3, append(make([]byte, 4), quote(far, server[b])...)...)
	foreignInside := icmp(icmpUnreachable, 3, append(make([]byte, 4), quote(far, netip.AddrPortFrom(b.Addr, 5555))...)...)
	send := func(to netip.Addr, body []byte) error {
		return sendPackets(a, ipv4{src: a.Addr, dst: to, protocol: unix.IPPROTO_ICMP, body: body}.bytes())
	}
	aboutOwn := fmt.Sprintf("type %d about port %d", icmpUnreachable, server[a].Port())
	eventually(t, func() error {
		if err := send(farAddr, own); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
		if !outside.hears(aboutOwn) {
			return fmt.Errorf("an error about its own connection does not arrive, but %q", outside.all())
		}
		return nil
	})
	if server[a].Port() == server[b].Port() {
		t.Fatal("both slots have the same port outside: the test proves nothing")
	}
	for _, body := range [][]byte{redirect, foreign, foreignInside} {
		for _, to := range []netip.Addr{farAddr, a.Gateway, hostAddr} {
			if err := send(to, body); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, to := range []netip.Addr{a.Gateway, hostAddr} {
		if err := send(to, own); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(grace)
	if got := outside.all(); len(got) != 1 || got[0] != aboutOwn {
		t.Errorf("outside came %q, want %q only", got, aboutOwn)
	}
	if got := host.all(); len(got) > 0 {
		t.Errorf("the host got %q", got)
	}
}

// TestBigEcho checks that an echo longer than the longest packet is dropped without harm, and
// that a long one is answered.
func TestBigEcho(t *testing.T) {
	n := open(t, newConfig())
	s, other := acquire(t, n), acquire(t, n)
	udpRoundTrip(t, s)
	p := hearPings(t, s)
	echo := func(id uint16, size int) [][]byte {
		body := icmp(icmpEchoRequest, 0, append([]byte{0, byte(id), 0, 1}, make([]byte, size)...)...)
		return ipv4{src: s.Addr, dst: farAddr, protocol: unix.IPPROTO_ICMP, id: id, body: body}.cut(1376)
	}
	// The last fragment ends after the longest possible packet.
	dead := echo(7, 65504-8)
	last := ipv4{src: s.Addr, dst: farAddr, protocol: unix.IPPROTO_ICMP, id: 7, at: 65504, body: make([]byte, 1000)}
	if err := sendPackets(s, append(dead[:len(dead)-1], last.bytes())...); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := sendPackets(s, echo(8, 4000)...); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
		if !p.hears(8, 1) {
			return errors.New("a long echo is not answered")
		}
		return nil
	})
	if p.hears(7, 1) {
		t.Error("an echo that is too long was answered")
	}
	udpRoundTrip(t, other)
}
