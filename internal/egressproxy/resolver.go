package egressproxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
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
	// maxUDP is the longest message over UDP, in bytes, in both directions. Messages of that size
	// pass everywhere in one piece (DNS flag day 2020).
	maxUDP = 1232
	// maxQuery is the longest question over TCP, in bytes. Real ones are below 512.
	maxQuery = 4096
	// queryTime is the time for one question in all. It is below the 5 s after which resolver
	// libraries ask again.
	queryTime = 4500 * time.Millisecond
	// dnsIdle is the time after which a connection to the resolver ends if no whole question
	// came.
	dnsIdle = 10 * time.Second
)

const (
	// maxTTL bounds the time to live of an answer, and so the time for which an address stays
	// open that the name no longer has.
	maxTTL = time.Hour
	// maxAddresses is the number of addresses of one answer that are passed on. Names with many
	// have some 30, a few have 100; with more, one answer could fill what a sandbox may have
	// open.
	maxAddresses = 128
	// grace is the time for which an address stays open after its answer has expired, because
	// programs connect a while after they asked, and try addresses in turn.
	grace = time.Minute
)

// serveUDP answers questions until the socket is closed.
func (p *Proxy) serveUDP(ctx context.Context, c *net.UDPConn) error {
	defer p.closed(c)
	// The kernel reports to which of the host's addresses a question came, in the form that
	// sending from that address takes.
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
		sandbox, handle, ok := p.host.Find(source)
		if !ok || flags&unix.MSG_TRUNC != 0 {
			continue
		}
		w := subject{handle, sandbox.Owner}
		if !p.asking.step(w, time.Now()) || !p.queries.enter(w) {
			if a := p.refuse(handle, message[:n]); a != nil {
				_, _, _ = c.WriteMsgUDPAddrPort(a, control[:oobn], from) // the sandbox asks again
			}
			continue
		}
		question, info := append([]byte(nil), message[:n]...), append([]byte(nil), control[:oobn]...)
		all.Go(func() {
			defer p.queries.leave(w)
			defer p.survive()
			if a := p.answer(ctx, sandbox, handle, question, true); a != nil {
				// If this fails the sandbox asks again.
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

// serveDNS answers the questions of one connection in order.
func (p *Proxy) serveDNS(ctx context.Context, c *net.TCPConn) {
	from := source(c)
	sandbox, handle, ok := p.host.Find(from)
	w := subject{handle, sandbox.Owner}
	if !ok {
		reset(c)
		return
	}
	if !p.dnsConns.enter(w) {
		p.turnAway(handle, c)
		return
	}
	defer p.dnsConns.leave(w)
	for {
		_ = c.SetDeadline(time.Now().Add(dnsIdle)) // fails only if c is closed; then the read fails too
		question, err := readMessage(c, maxQuery)
		if errors.Is(err, errLongMessage) {
			p.turnAway(handle, c)
		}
		if err != nil {
			return
		}
		sandbox, now, ok := p.host.Find(from)
		if !ok || now != handle {
			reset(c)
			return
		}
		var answer []byte
		if p.asking.step(w, time.Now()) && p.queries.enter(w) {
			answer = p.answer(ctx, sandbox, handle, question, false)
			p.queries.leave(w)
		} else {
			answer = p.refuse(handle, question)
		}
		if answer == nil || writeMessage(c, answer) != nil {
			return
		}
	}
}

// errLongMessage reports a message that is longer than is read.
var errLongMessage = errors.New("the message is too long")

// readMessage reads a message with a length before it, as TCP has them.
func readMessage(r io.Reader, most int) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > most {
		return nil, fmt.Errorf("%w: %d bytes are over %d", errLongMessage, n, most)
	}
	m := make([]byte, n)
	_, err := io.ReadFull(r, m)
	return m, err
}

func writeMessage(w io.Writer, m []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
	return err
}

// refuse answers a question that comes too soon or while too many others are asked. A resolver
// library then tries another server, and tells its program to try again.
func (p *Proxy) refuse(handle any, message []byte) []byte {
	q := &dns.Msg{Data: bytes.Clone(message)} // names may share its memory
	if err := q.Unpack(); err != nil || q.Response || len(q.Question) != 1 {
		return nil
	}
	p.host.Excess(handle, "dns", q.Question[0].Header().Name, netip.AddrPort{})
	a := &dns.Msg{MsgHeader: dns.MsgHeader{ID: q.ID, Opcode: q.Opcode, Response: true, Rcode: dns.RcodeRefused,
		RecursionDesired: q.RecursionDesired, RecursionAvailable: true}, Question: q.Question}
	if err := a.Pack(); err != nil {
		return nil
	}
	return a.Data
}

// answer returns the answer to a message, or nil if it deserves none. An answer that is too long
// for UDP is sent empty and marked as truncated, and opens nothing.
func (p *Proxy) answer(ctx context.Context, sandbox Sandbox, handle any, message []byte, udp bool) []byte {
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
	case len(q.Question) != 1:
		a.Rcode = dns.RcodeRefused
	case q.Question[0].Header().Class != dns.ClassINET:
		p.refuseKind(handle, a)
	default:
		ctx, cancel := context.WithTimeout(ctx, queryTime)
		defer cancel()
		p.resolve(ctx, sandbox, handle, a, room)
	}
	if err := a.Pack(); err != nil || len(a.Data) > room {
		return nil
	}
	return a.Data
}

// refuseKind refuses a question of a class or type that cay never forwards, and reports it.
func (p *Proxy) refuseKind(handle any, a *dns.Msg) {
	a.Rcode = dns.RcodeRefused
	p.host.Denied(handle, "dns", a.Question[0].Header().Name, netip.AddrPort{})
}

// resolve fills the answer a to its question, in at most room bytes.
func (p *Proxy) resolve(ctx context.Context, sandbox Sandbox, handle any, a *dns.Msg, room int) {
	kind := dns.RRToType(a.Question[0])
	name, ok := canonical(a.Question[0].Header().Name)
	if !ok || !sandbox.allows(name) {
		// This is not REFUSED: C libraries take that for a broken server, and try the next one or
		// wait, while this ends the look-up at once. Resolvers do not cache it, since it has no
		// SOA.
		a.Rcode = dns.RcodeNameError
		if a.UDPSize > 0 {
			a.Pseudo = []dns.RR{&dns.EDE{InfoCode: dns.ExtendedErrorBlocked}}
		}
		// Programs ask for IPv4 and IPv6 at once; report one refusal, not two.
		if kind != dns.TypeAAAA {
			p.host.Denied(handle, "dns", a.Question[0].Header().Name, netip.AddrPort{})
		}
		return
	}
	switch {
	case kind == dns.TypeAAAA, kind == dns.TypeHTTPS, kind == dns.TypeSVCB:
		return // there is no IPv6, and hints with addresses and keys would circumvent the checks
	case kind == dns.TypeNone, kind == dns.TypeOPT, kind >= 128 && kind <= 255:
		p.refuseKind(handle, a) // transfers, ANY and other types that no record has
		return
	}
	r, err := ask(ctx, sandbox.Nameservers, a.Question[0].Header().Name, kind)
	if err != nil {
		p.log.Debug("asking name servers for a sandbox", "name", name, "error", err)
		a.Rcode = dns.RcodeServerFailure
		return
	}
	a.Rcode = r.Rcode
	p.fill(a, r, handle, name, kind)
	// Compression may make the message shorter than this; at worst the margin costs a second
	// question over TCP.
	if a.Len() > room {
		a.Answer, a.Ns, a.Truncated = nil, nil, true
		return
	}
	if err := p.open(a, handle, name); err != nil {
		p.log.Warn("opening addresses for a sandbox", "name", name, "error", err)
		a.Answer, a.Ns, a.Rcode = nil, nil, dns.RcodeServerFailure
	}
}

// fill copies from r what answers the question: records of its type and the aliases that lead to
// them, or the SOA if there are none. It never copies other addresses, which are not opened.
func (p *Proxy) fill(a, r *dns.Msg, handle any, name string, kind uint16) {
	addresses := 0
	for _, rr := range r.Answer {
		h := rr.Header()
		h.TTL = min(h.TTL, uint32(maxTTL/time.Second))
		if address, ok := rr.(*dns.A); ok && kind == dns.TypeA {
			if err := p.host.Permitted(handle, address.Addr); err != nil {
				p.host.Denied(handle, "dns", name, netip.AddrPortFrom(address.Addr, 0))
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

// open opens the addresses of an answer before it is sent.
func (p *Proxy) open(a *dns.Msg, handle any, name string) error {
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
	// The grant comes first, so that the proxy knows the name once the rules lead to it.
	p.grants.add(handle, name, addrs, time.Now().Add(ttl+grace))
	return p.host.Resolved(handle, addrs, ttl+grace)
}
