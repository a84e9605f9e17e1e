package link

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestStrangers connects to a Hub without the right to.
func TestStrangers(t *testing.T) {
	a, other := caytest.NewAuthority(t), caytest.NewAuthority(t)
	hub := newHub(t, a, func(c *HubConfig) {
		c.Peer = func(_ context.Context, c *x509.Certificate, _ string) (string, error) {
			if c.Subject.CommonName == "evil" {
				return "", errors.New("removed")
			}
			return c.Subject.CommonName, nil
		}
	})
	address, _ := startHub(t, hub)
	check := leftovers(t)
	trusting := func(a2 *caytest.Authority, name string) *x509.CertPool { return must(a.ClientConfig(name, "")).RootCAs }
	for name, peer := range map[string]string{"another authority": "n1", "no certificate": "", "a removed node": "evil"} {
		for _, protocol := range []string{dataProtocol, pulseProtocol} {
			t.Run(name+" "+protocol, func(t *testing.T) {
				cfg := must(a.ClientConfig(peer, replicaName))
				switch name {
				case "another authority":
					cfg = must(other.ClientConfig(peer, replicaName))
					cfg.RootCAs = trusting(a, peer)
				case "no certificate":
					cfg.Certificates = nil
				}
				c := dialTLS(t, address, cfg, protocol)
				_ = sendSession(c, "s1") // fails if it was refused already
				refused(t, name, c)
				if all, _ := hub.count(peer); all != -1 {
					t.Errorf("it has %d connections", all)
				}
			})
		}
	}
	t.Run("no data connection without a pulse", func(t *testing.T) {
		refused(t, "data", dialAs(t, address, must(a.ClientConfig("n1", replicaName)), dataProtocol, "s1"))
	})
	for name, text := range map[string]string{"an empty name": "\x00", "a long name": "\xff" + strings.Repeat("a", 255)} {
		t.Run(name, func(t *testing.T) {
			c := dialTLS(t, address, must(a.ClientConfig("n1", replicaName)), pulseProtocol)
			_, _ = io.WriteString(c, text) // fails if it was refused already
			refused(t, name, c)
		})
	}
	check()
}

// TestSilentStrangers opens many connections that never begin TLS. Only some are held, and nodes at the same address
// get in when these are gone.
func TestSilentStrangers(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	var open atomic.Int64
	var all []net.Conn
	for range 3 * maxHandshakesOfOrigin {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		all = append(all, c)
		open.Add(1)
		go func() {
			_, _ = c.Read(make([]byte, 1))
			open.Add(-1)
		}()
	}
	eventually(t, "the rest is closed", func() bool { return open.Load() <= maxHandshakesOfOrigin })
	for _, c := range all {
		c.Close()
	}
	startNode(t, newNode(t, a, "n1"), nodeHandler(), address)
	linked(t, hub, "n1")
}

// from is a connection of an address.
type from struct {
	net.Conn
	remote string
}

func (f from) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f.remote))
}

// TestHandshakesOfOrigin has one subscriber of IPv6 begin connections from many of its addresses.
func TestHandshakesOfOrigin(t *testing.T) {
	hub := newHub(t, caytest.NewAuthority(t), nil)
	mine := func(i int) net.Conn { return from{nil, fmt.Sprintf("[2001:db8::%x]:%d", i+1, 1000+i)} }
	for i := range maxHandshakesOfOrigin {
		if !hub.beginHandshake(mine(i)) {
			t.Fatalf("connection %d is refused", i)
		}
	}
	if hub.beginHandshake(mine(maxHandshakesOfOrigin)) {
		t.Error("one more connection of the same network is taken")
	}
	for _, other := range []string{"[2001:db8:0:1::1]:1", "192.0.2.1:1", "192.0.2.2:1"} {
		if !hub.beginHandshake(from{nil, other}) {
			t.Errorf("%s is refused", other)
		}
		hub.endHandshake(from{nil, other})
	}
	hub.endHandshake(mine(0))
	if !hub.beginHandshake(mine(maxHandshakesOfOrigin)) {
		t.Error("a connection is refused after another one has ended")
	}
	for i := range maxHandshakesOfOrigin {
		hub.endHandshake(mine(i + 1))
	}
	if len(hub.handshakes) != 0 || hub.handshaking != 0 {
		t.Errorf("%d handshakes are left, %v", hub.handshaking, hub.handshakes)
	}
}

// TestControlIsBounded opens many connections for requests with a certificate and, from several addresses, without one.
func TestControlIsBounded(t *testing.T) {
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, func(c *HubConfig) { c.Control = http.NotFoundHandler() })
	address, _ := startHub(t, hub)
	cfg := must(a.ClientConfig("n1", replicaName))
	unknown := cfg.Clone()
	unknown.Certificates, unknown.NextProtos = nil, []string{controlProtocol}
	controls := func() (all, strangers int) {
		hub.mu.Lock()
		defer hub.mu.Unlock()
		for _, n := range hub.controls {
			all += n
		}
		return all, hub.unknown
	}
	var open []net.Conn
	// dial makes one connection more than fit from an address, and returns how many are taken: the Hub speaks on those.
	dial := func(cfg *tls.Config, last byte, most int) (taken int) {
		from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, last)}}
		var all []net.Conn
		for range most + 1 {
			c, err := tls.DialWithDialer(from, "tcp", address, cfg)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { abort(c) })
			all = append(all, c)
		}
		for _, c := range all {
			_ = c.SetReadDeadline(time.Now().Add(patience))
			if n, err := c.Read(make([]byte, 1)); n > 0 {
				taken++
			} else if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a connection is neither taken nor refused")
			}
		}
		open = append(open, all...)
		return taken
	}
	addresses := byte(maxUnknownControl / maxUnknownControlOfOrigin)
	for i := range addresses {
		if n := dial(unknown, 2+i, maxUnknownControlOfOrigin); n != maxUnknownControlOfOrigin {
			t.Errorf("%d connections of one address are taken, want %d", n, maxUnknownControlOfOrigin)
		}
	}
	if n := dial(unknown, 2+addresses, 0); n != 0 {
		t.Errorf("%d connections more than fit are taken", n)
	}
	known := cfg.Clone()
	known.NextProtos = unknown.NextProtos
	if n := dial(known, 1, maxControl); n != maxControl {
		t.Errorf("%d connections of one key are taken, want %d", n, maxControl)
	}
	if all, strangers := controls(); all != maxUnknownControl+maxControl || strangers != maxUnknownControl {
		t.Errorf("%d connections are counted, %d of strangers", all, strangers)
	}
	for _, c := range open {
		c.Close()
	}
	eventually(t, "none is counted any more", func() bool { all, strangers := controls(); return all+strangers == 0 })
}
