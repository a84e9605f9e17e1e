package client

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// GetPort says where a port of a sandbox is reached and who may. It wakes nobody.
func (c *Client) GetPort(ctx context.Context, id string, port int) (*Port, error) {
	return decode[Port](c.wire.GetPort(ctx, id, port))
}

// Ports lists the public ports of a sandbox.
func (c *Client) Ports(ctx context.Context, id string) ([]Port, error) {
	l, err := decode[PortList](c.wire.ListPorts(ctx, id))
	if err != nil {
		return nil, err
	}
	return l.Ports, nil
}

// SetPortPublic makes a port one that anybody may reach, or that needs a key or a signed
// URL, as it is in the beginning.
func (c *Client) SetPortPublic(ctx context.Context, id string, port int, public bool) (*Port, error) {
	return decode[Port](c.wire.SetPort(ctx, id, port, PortSettings{Public: &public}))
}

// PortURL makes a URL that opens a port to whoever has it, for a time of 1s to 24h; 0 is
// the server's default, 1h.
func (c *Client) PortURL(ctx context.Context, id string, port int, expiresIn time.Duration) (*PortURL, error) {
	var r CreatePortURLRequest
	if expiresIn != 0 {
		r.ExpiresIn = new(expiresIn.String())
	}
	return decode[PortURL](c.wire.CreatePortURL(ctx, id, port, r))
}

// DialPort opens a TCP connection to a port of a sandbox, waking it if it is suspended.
// ctx bounds the connection's whole life. It has a CloseWrite, which ends what is sent and not
// what comes; its deadlines and addresses are not supported.
func (c *Client) DialPort(ctx context.Context, id string, port int) (net.Conn, error) {
	resp, err := c.wire.OpenTunnel(ctx, id, &OpenTunnelParams{Port: port}, func(_ context.Context, r *http.Request) error {
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "tcp")
		return nil
	})
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

// CloseWrite ends what is sent.
func (p *portConn) CloseWrite() error {
	half, ok := p.ReadWriteCloser.(interface{ CloseWrite() error })
	if !ok {
		return http.ErrNotSupported
	}
	return half.CloseWrite()
}

// portAddr is a port of a sandbox.
type portAddr string

// Network is "cay": it can be dialled with [Client.DialPort] alone.
func (portAddr) Network() string { return "cay" }

// String is the sandbox's ID and the port.
func (a portAddr) String() string { return string(a) }

func (p *portConn) LocalAddr() net.Addr  { return portAddr("") }
func (p *portConn) RemoteAddr() net.Addr { return portAddr(p.name) }

func (p *portConn) SetDeadline(time.Time) error      { return http.ErrNotSupported }
func (p *portConn) SetReadDeadline(time.Time) error  { return http.ErrNotSupported }
func (p *portConn) SetWriteDeadline(time.Time) error { return http.ErrNotSupported }
