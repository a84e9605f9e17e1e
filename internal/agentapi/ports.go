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

// DialPort connects to a TCP port inside the sandbox, through the agent: to the program that
// listens there on the loopback address, on all addresses, or on the sandbox's own. ctx bounds
// only the dialling.
//
// The connection has a method CloseWrite, which ends sending and not receiving. Like all of
// the client's connections it breaks when the instance ends (see [Client.Drop]). Errors:
// Upstream "port_closed" when no program listens, Conflict "sandbox_too_old" in a sandbox that
// an older cay started, Exhausted "too_many_connections"; and the errors of all calls.
func (c *Client) DialPort(ctx context.Context, t Target, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fault.InvalidField("port", "must be from 1 to 65535")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.Patience, errSilent)
	defer cancel()
	conn, err := c.dialHost(ctx, "tcp", t.host())
	if err != nil {
		return nil, callError(ctx, err)
	}
	// A deadline in the past ends a read or write that is under way.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	rest, err := upgrade(conn, t, port, c.bearer(t.host()))
	if !stop() && err == nil {
		err = context.Cause(ctx) // the deadline is set, or about to be
	}
	if err != nil {
		_ = conn.Close() // its error changes nothing: no bytes of a caller were sent
		return nil, callError(ctx, err)
	}
	return &portConn{Conn: conn, early: rest}, nil
}

// upgrade requests the tunnel on a new connection, with a token unless that is "", and returns
// the bytes that were read after the answer.
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

// portConn is a connection to a port of a sandbox. Its ReadFrom and WriteTo let io.Copy move
// bytes within the kernel where both ends are TCP.
type portConn struct {
	net.Conn
	early []byte // bytes of the port that were read with the answer
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

// below returns the kernel's connection. Nothing of a handshake is left to send on it: the
// request for the tunnel sent the host's proof.
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

// WriteTo writes to w what comes on the connection, until its end.
func (p *portConn) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(p.early)
	p.early = p.early[n:]
	if err != nil {
		return int64(n), err
	}
	more, err := io.Copy(w, p.below())
	return int64(n) + more, err
}

// ReadFrom sends what is read from r, until its end.
func (p *portConn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(p.below(), r) }

// CloseWrite ends sending; the connection can still be read.
func (p *portConn) CloseWrite() error {
	c, ok := p.below().(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return c.CloseWrite()
}
