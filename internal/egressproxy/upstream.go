package egressproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"codeberg.org/miekg/dns"
)

// serverTime is the time that one name server may take, over UDP and TCP together. Two of them
// fit into queryTime.
const serverTime = 2 * time.Second

// ask asks the servers in order for a name's records of a type. It returns the first answer with
// the code success or name error, or else the last answer. It caches nothing: the servers do, and
// every new answer is checked again.
func ask(ctx context.Context, servers []netip.AddrPort, name string, kind uint16) (*dns.Msg, error) {
	q := dns.NewMsg(name, kind)
	if q == nil {
		return nil, fmt.Errorf("type %d is not known", kind)
	}
	q.UDPSize = maxUDP
	err := errors.New("there are no name servers")
	var troubled *dns.Msg
	for _, server := range servers {
		var r *dns.Msg
		if r, err = askOne(ctx, server, q); err != nil {
			continue
		}
		if r.Rcode == dns.RcodeSuccess || r.Rcode == dns.RcodeNameError {
			return r, nil
		}
		troubled = r
	}
	if troubled != nil {
		return troubled, nil
	}
	return nil, err
}

func askOne(ctx context.Context, server netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, serverTime)
	defer cancel()
	r, err := askOver(ctx, "udp", server, q)
	if err == nil && r.Truncated {
		r, err = askOver(ctx, "tcp", server, q)
	}
	if err != nil {
		return nil, fmt.Errorf("asking %s: %w", server, err)
	}
	return r, nil
}

// askOver asks over a new socket, so that the kernel gives each question an unpredictable port
// and accepts packets of the server only.
func askOver(ctx context.Context, network string, server netip.AddrPort, q *dns.Msg) (*dns.Msg, error) {
	q.ID, q.Data = dns.ID(), nil
	if err := q.Pack(); err != nil {
		return nil, fmt.Errorf("packing the question: %w", err)
	}
	c, err := new(net.Dialer).DialContext(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp" {
		if err := writeMessage(c, q.Data); err != nil {
			return nil, err
		}
		m, err := readMessage(c, 0xffff)
		if err != nil {
			return nil, err
		}
		return reply(q, m)
	}
	if _, err := c.Write(q.Data); err != nil {
		return nil, err
	}
	buffer := make([]byte, maxUDP)
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return nil, err
		}
		// Another message may be forged; the right answer may still come.
		if r, err := reply(q, append([]byte(nil), buffer[:n]...)); err == nil {
			return r, nil
		}
	}
}

// reply parses the message m as the answer to q.
func reply(q *dns.Msg, m []byte) (*dns.Msg, error) {
	r := &dns.Msg{Data: m}
	if err := r.Unpack(); err != nil && !r.Truncated {
		return nil, fmt.Errorf("parsing an answer: %w", err)
	}
	if r.ID != q.ID || !r.Response || len(r.Question) != 1 {
		return nil, errors.New("not an answer to the question")
	}
	asked, got := q.Question[0], r.Question[0]
	if !strings.EqualFold(asked.Header().Name, got.Header().Name) || dns.RRToType(asked) != dns.RRToType(got) ||
		got.Header().Class != dns.ClassINET {
		return nil, errors.New("an answer to another question")
	}
	return r, nil
}
