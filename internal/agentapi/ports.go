package agentapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// DialPort connects to a TCP port inside the sandbox, through the agent: to whatever
// listens there on the loopback, on all addresses, or on the sandbox's own. ctx bounds the
// dialling alone.
//
// The connection has a CloseWrite, which ends its half without the other, and breaks
// with the sandbox's life, as all of the client's (see [Client.Drop]). Errors: Upstream
// "port_closed" when nothing listens, Conflict "sandbox_too_old" in a sandbox that an older
// cay started, Exhausted "too_many_connections"; and those of all calls.
func (c *Client) DialPort(ctx context.Context, t Target, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fault.InField("invalid_port", "port", "must be from 1 to 65535")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.Patience, errSilent)
	defer cancel()
	conn, err := c.dialHost(ctx, "tcp", t.host())
	if err != nil {
		return nil, callError(ctx, err)
	}
	// A deadline in the past ends whatever read or write is under way.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	rest, err := upgrade(conn, t, port, c.bearer(t.host()))
	if !stop() && err == nil {
		err = context.Cause(ctx) // the deadline is set, or about to be
	}
	if err != nil {
		_ = conn.Close() // nothing was sent that anybody waits for
		return nil, callError(ctx, err)
	}
	return &portConn{Conn: conn, early: rest}, nil
}

// upgrade asks for the tunnel on a new connection, with a token if one is needed, and returns
// what came after the answer.
func upgrade(conn net.Conn, t Target, port int, token string) (rest []byte, err error) {
	req, err := http.NewRequest(http.MethodGet, t.url("/tunnel", url.Values{"port": {strconv.Itoa(port)}}), nil)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", TunnelProtocol)
	if token != "" {
		req.Header.Set(TokenHeader, token)
	}
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	in := bufio.NewReaderSize(io.LimitReader(conn, maxReplyHeader), 4<<10)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return nil, unusable(err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return in.Peek(in.Buffered())
	}
	defer resp.Body.Close()
	return nil, olderAgent(replyError(resp))
}

// portConn is a connection to a port. Its ReadFrom and WriteTo let io.Copy move bytes
// within the kernel where both ends are TCP.
type portConn struct {
	net.Conn
	early []byte // read with the answer already
}

func (p *portConn) Read(b []byte) (int, error) {
	if len(p.early) > 0 {
		n := copy(b, p.early)
		p.early = p.early[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

func (p *portConn) expectHead() {
	if t, ok := p.Conn.(*trackedConn); ok {
		t.expectHead()
	}
}

// below is the connection of the kernel's. The request for the tunnel has sent what a
// handshake kept back.
func (p *portConn) below() net.Conn {
	c := p.Conn
	if t, ok := c.(*trackedConn); ok {
		c = t.Conn
	}
	if h, ok := c.(*provenConn); ok {
		c = h.Conn
	}
	return c
}

// WriteTo writes what comes to w until the end.
func (p *portConn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(p.early)
	p.early = p.early[n:]
	if err != nil {
		return int64(n), err
	}
	more, err := io.Copy(w, p.below())
	return int64(n) + more, err
}

// ReadFrom sends what r has until the end.
func (p *portConn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(p.below(), r) }

// CloseWrite ends what is sent; what comes can still be read.
func (p *portConn) CloseWrite() error {
	c, ok := p.below().(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return c.CloseWrite()
}
