package cay

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// GetPort returns the URL of a port of a sandbox and whether the port is public. It does not
// wake the sandbox.
func (c *Client) GetPort(ctx context.Context, id string, port int) (*Port, error) {
	return decode[Port](c.wire.GetPort(ctx, id, port))
}

// Ports returns the public ports of a sandbox.
func (c *Client) Ports(ctx context.Context, id string) ([]Port, error) {
	l, err := decode[portList](c.wire.ListPorts(ctx, id))
	if err != nil {
		return nil, err
	}
	return l.Ports, nil
}

// SetPortPublic makes a port public or private. Any client may reach a public port; a private
// one, as each port is at first, needs a key or a signed URL.
func (c *Client) SetPortPublic(ctx context.Context, id string, port int, public bool) (*Port, error) {
	return decode[Port](c.wire.SetPort(ctx, id, port, portSettings{Public: &public}))
}

// PortURL makes a signed URL that lets any holder reach a port, for a time of 1s to 24h; 0
// is the server's default, 1h.
func (c *Client) PortURL(ctx context.Context, id string, port int, expiresIn time.Duration) (*PortURL, error) {
	var r createPortURLRequest
	if expiresIn != 0 {
		r.ExpiresIn = new(expiresIn.String())
	}
	return decode[PortURL](c.wire.CreatePortURL(ctx, id, port, r))
}

// DialPort opens a TCP connection to a port of a sandbox, and wakes the sandbox if it is suspended.
// ctx bounds the connection until its end. The connection has a method CloseWrite, which ends
// sending and not receiving; it supports no deadlines and no addresses.
func (c *Client) DialPort(ctx context.Context, id string, port int) (net.Conn, error) {
	upgrade := func(_ context.Context, r *http.Request) error {
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "tcp")
		return nil
	}
	resp, err := c.wire.OpenTunnel(ctx, id, &openTunnelParams{Port: port}, upgrade)
	if err != nil {
		return nil, err
	}
	stream, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		defer resp.Body.Close()
		return nil, errorOf(resp)
	}
	return &portConn{stream, fmt.Sprintf("%s:%d", id, port)}, nil
}

// portConn is the connection of a request that was upgraded.
type portConn struct {
	io.ReadWriteCloser
	name string
}

// CloseWrite ends sending; the connection can still be read.
func (p *portConn) CloseWrite() error {
	half, ok := p.ReadWriteCloser.(interface{ CloseWrite() error })
	if !ok {
		return http.ErrNotSupported
	}
	return half.CloseWrite()
}

// portAddr names a port of a sandbox.
type portAddr string

// Network returns "cay": only [Client.DialPort] can dial the address.
func (portAddr) Network() string { return "cay" }

// String returns the sandbox's ID and the port.
func (a portAddr) String() string { return string(a) }

func (p *portConn) LocalAddr() net.Addr  { return portAddr("") }
func (p *portConn) RemoteAddr() net.Addr { return portAddr(p.name) }

func (p *portConn) SetDeadline(time.Time) error      { return http.ErrNotSupported }
func (p *portConn) SetReadDeadline(time.Time) error  { return http.ErrNotSupported }
func (p *portConn) SetWriteDeadline(time.Time) error { return http.ErrNotSupported }
