package egressproxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"codeberg.org/miekg/dns"
	"golang.org/x/sys/unix"
)

const (
	// maxUDP is the longest message over UDP, to and from us, in bytes: what passes
	// everywhere in one piece (DNS flag day 2020).
	maxUDP = 1232
	// maxQuery is the longest question over TCP, bytes; real ones are below 512.
	maxQuery = 4096
	// queryTime is for all of one question, and below the 5 s after which resolver
	// libraries ask again.
	queryTime = 4500 * time.Millisecond
	// dnsIdle is how long a connection to the resolver may be without a whole question.
	dnsIdle = 10 * time.Second
)

const (
	// maxTTL bounds how long an answer counts: an address that a name has left is open for
	// at most so long (and grace).
	maxTTL = time.Hour
	// maxAddresses is how many addresses of one answer are passed on. Names with many have
	// some 30, a few 100; with more, one answer could fill what a box may have open.
	maxAddresses = 128
	// grace is how long an address stays open after its answer's time to live is over,
	// because programs connect a while after they asked, and try addresses in turn.
	grace = time.Minute
)

// serveUDP answers questions until the socket is closed.
func (g *Proxy) serveUDP(ctx context.Context, c *net.UDPConn) error {
	defer g.closed(c)
	// The kernel tells to which of the host's addresses a question came, in the form in
	// which it is told to send the answer from there.
	if err := withPacketInfo(c); err != nil {
		return err
	}
	var all sync.WaitGroup
	defer all.Wait()
	message, control := make([]byte, maxUDP), make([]byte, unix.CmsgSpace(unix.SizeofInet4Pktinfo))
	for {
		n, oobn, flags, from, err := c.ReadMsgUDPAddrPort(message, control)
		if err != nil {
			return fmt.Errorf("receiving questions: %w", err)
		}
		source := from.Addr().Unmap()
		box, handle, ok := g.host.Find(source)
		if !ok || flags&unix.MSG_TRUNC != 0 {
			continue
		}
		w := who{handle, box.Owner}
		if !g.asking.step(w, time.Now()) || !g.queries.enter(w) {
			if a := g.refuse(handle, message[:n]); a != nil {
				_, _, _ = c.WriteMsgUDPAddrPort(a, control[:oobn], from) // as below
			}
			continue
		}
		question, info := append([]byte(nil), message[:n]...), append([]byte(nil), control[:oobn]...)
		all.Go(func() {
			defer g.queries.leave(w)
			defer g.survive()
			if a := g.answer(ctx, box, handle, question, true); a != nil {
				// Nobody to tell: the asker tries again.
				_, _, _ = c.WriteMsgUDPAddrPort(a, info, from)
			}
		})
	}
}

func withPacketInfo(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("reaching the resolver's socket: %w", err)
	}
	if cerr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	}); cerr != nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("asking for the addresses of questions: %w", err)
	}
	return nil
}

// serveDNS answers the questions of one connection, one after the other.
func (g *Proxy) serveDNS(ctx context.Context, c *net.TCPConn) {
	from := source(c)
	box, handle, ok := g.host.Find(from)
	w := who{handle, box.Owner}
	if !ok || !g.dnsConns.enter(w) {
		reset(c)
		return
	}
	defer g.dnsConns.leave(w)
	for {
		_ = c.SetDeadline(time.Now().Add(dnsIdle)) // fails only if closed, as the read then does
		question, err := readMessage(c, maxQuery)
		if err != nil {
			return
		}
		box, now, ok := g.host.Find(from)
		if !ok || now != handle {
			reset(c)
			return
		}
		var answer []byte
		if g.asking.step(w, time.Now()) && g.queries.enter(w) {
			answer = g.answer(ctx, box, handle, question, false)
			g.queries.leave(w)
		} else {
			answer = g.refuse(handle, question)
		}
		if answer == nil || writeMessage(c, answer) != nil {
			return
		}
	}
}

// readMessage reads a message with its length before it, as over TCP.
func readMessage(r io.Reader, most int) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > most {
		return nil, fmt.Errorf("a message of %d bytes is over %d", n, most)
	}
	m := make([]byte, n)
	_, err := io.ReadFull(r, m)
	return m, err
}

func writeMessage(w io.Writer, m []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
	return err
}

// refuse answers a question that comes too soon, or while too many others are asked: a
// resolver library then tries another server, and tells its program that it may try again.
func (g *Proxy) refuse(handle any, message []byte) []byte {
	q := &dns.Msg{Data: bytes.Clone(message)} // names may be parts of it
	if err := q.Unpack(); err != nil || q.Response || len(q.Question) != 1 {
		return nil
	}
	g.host.Excess(handle, "dns", q.Question[0].Header().Name, netip.AddrPort{})
	a := &dns.Msg{MsgHeader: dns.MsgHeader{ID: q.ID, Opcode: q.Opcode, Response: true, Rcode: dns.RcodeRefused,
		RecursionDesired: q.RecursionDesired, RecursionAvailable: true}, Question: q.Question}
	if err := a.Pack(); err != nil {
		return nil
	}
	return a.Data
}

// answer answers one message; nil: it deserves none. An answer that is too long for UDP
// says so and is empty, and nothing is opened for it.
func (g *Proxy) answer(ctx context.Context, box Sandbox, handle any, message []byte, udp bool) []byte {
	q := &dns.Msg{Data: message}
	if err := q.Unpack(); err != nil || q.Response {
		return nil
	}
	a := &dns.Msg{MsgHeader: dns.MsgHeader{ID: q.ID, Opcode: q.Opcode, Response: true,
		RecursionDesired: q.RecursionDesired, RecursionAvailable: true}}
	if len(q.Question) == 1 {
		a.Question = q.Question
	}
	room := 0xffff
	if udp {
		room = min(max(int(q.UDPSize), dns.MinMsgSize), maxUDP)
	}
	if q.UDPSize > 0 {
		a.UDPSize = maxUDP
	}
	switch {
	case q.Opcode != dns.OpcodeQuery:
		a.Rcode = dns.RcodeNotImplemented
	case len(q.Question) != 1 || q.Question[0].Header().Class != dns.ClassINET:
		a.Rcode = dns.RcodeRefused
	default:
		ctx, cancel := context.WithTimeout(ctx, queryTime)
		defer cancel()
		g.resolve(ctx, box, handle, a, room)
	}
	if err := a.Pack(); err != nil || len(a.Data) > room {
		return nil
	}
	return a.Data
}

// resolve fills in the answer a to its question, for room bytes.
func (g *Proxy) resolve(ctx context.Context, box Sandbox, handle any, a *dns.Msg, room int) {
	kind := dns.RRToType(a.Question[0])
	name, ok := canonical(a.Question[0].Header().Name)
	if !ok || !box.allows(name) {
		// Not REFUSED, although that is what it is: C libraries take REFUSED for a broken
		// server and try the next one or wait, while this ends the look-up at once. Nobody
		// may remember it, since no SOA is with it.
		a.Rcode = dns.RcodeNameError
		if a.UDPSize > 0 {
			a.Pseudo = []dns.RR{&dns.EDE{InfoCode: dns.ExtendedErrorBlocked}}
		}
		// Programs ask for IPv6 beside IPv4: one refusal, not two.
		if kind != dns.TypeAAAA {
			g.host.Denied(handle, "dns", a.Question[0].Header().Name, netip.AddrPort{})
		}
		return
	}
	switch {
	case kind == dns.TypeAAAA, kind == dns.TypeHTTPS, kind == dns.TypeSVCB:
		return // there is no IPv6, and hints of addresses and keys would go past the checks
	case kind == dns.TypeNone, kind == dns.TypeOPT, kind >= 128 && kind <= 255:
		a.Rcode = dns.RcodeRefused // transfers, ANY and whatever else is no type of a record
		return
	}
	r, err := ask(ctx, box.Nameservers, a.Question[0].Header().Name, kind)
	if err != nil {
		g.log.Debug("asking name servers for a sandbox", "name", name, "error", err)
		a.Rcode = dns.RcodeServerFailure
		return
	}
	a.Rcode = r.Rcode
	g.fill(a, r, handle, name, kind)
	// What the packing saves by compression is not known before; the margin costs a second
	// question over TCP at worst.
	if a.Len() > room {
		a.Answer, a.Ns, a.Truncated = nil, nil, true
		return
	}
	if err := g.open(a, handle, name); err != nil {
		g.log.Warn("opening addresses for a sandbox", "name", name, "error", err)
		a.Answer, a.Ns, a.Rcode = nil, nil, dns.RcodeServerFailure
	}
}

// fill takes over from r what answers the question: records of its type and the way to
// them, and what says that there are none. Never other addresses, which nobody opened.
func (g *Proxy) fill(a, r *dns.Msg, handle any, name string, kind uint16) {
	addresses := 0
	for _, rr := range r.Answer {
		h := rr.Header()
		h.TTL = min(h.TTL, uint32(maxTTL/time.Second))
		if address, ok := rr.(*dns.A); ok && kind == dns.TypeA {
			if err := g.host.Permitted(handle, address.Addr); err != nil {
				g.host.Denied(handle, "dns", name, netip.AddrPortFrom(address.Addr, 0))
				continue
			}
			if addresses++; addresses > maxAddresses {
				continue
			}
		}
		switch t := dns.RRToType(rr); t {
		case kind, dns.TypeCNAME, dns.TypeDNAME:
			a.Answer = append(a.Answer, rr)
		}
	}
	for _, rr := range r.Ns {
		if _, ok := rr.(*dns.SOA); ok && len(a.Answer) == 0 {
			a.Ns = append(a.Ns, rr)
		}
	}
}

// open opens the addresses of an answer before it leaves.
func (g *Proxy) open(a *dns.Msg, handle any, name string) error {
	var addrs []netip.Addr
	var ttl time.Duration
	for _, rr := range a.Answer {
		if address, ok := rr.(*dns.A); ok {
			addrs = append(addrs, address.Addr)
			ttl = max(ttl, time.Duration(rr.Header().TTL)*time.Second)
		}
	}
	if len(addrs) == 0 {
		return nil
	}
	// First what lets the proxy understand, then the rules that lead to the proxy.
	g.given.add(handle, name, addrs, time.Now().Add(ttl+grace))
	return g.host.Resolved(handle, addrs, ttl+grace)
}
