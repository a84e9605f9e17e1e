// Package egressproxy decides by name what leaves a box, and tells boxes about themselves.
//
// A box is a machine whose traffic somebody else (the kernel's rules) redirects to three
// services here, whatever it meant to reach:
//
//   - the resolver answers questions for allowed names only, and has the addresses of an
//     answer opened before the answer leaves;
//   - the proxy takes connections to those addresses, and lets them on after it saw that
//     they speak to an allowed name, since many names share an address;
//   - the metadata service tells a box what it is.
//
// Who asks is known by the address a packet came from, which the rules hold to the link it
// came by, and never by what a box says. The package knows nothing of the rules: a [Host]
// joins both. What it cannot see is what a server does inside TLS: a server that serves
// other names than the one in the ClientHello (domain fronting, or an encrypted ClientHello
// in one for an allowed name) opens those names to whoever may reach it at all.
package egressproxy

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Sandbox is what the gate must know of a box to decide.
type Sandbox struct {
	// Domains that it may reach: exact names, or "*." and a name for every name below that
	// one, at any depth, without itself. Lower case, no dot at the end.
	Domains []string
	// Nameservers that are asked for it, in order.
	Nameservers []netip.AddrPort
	// Owner is whose box it is: boxes of one owner share limits. "" shares none.
	Owner string
}

// Metadata is what a box is told about itself. Nothing of it may be secret.
type Metadata struct {
	ID, Template, Mode string
	Metadata           map[string]string
	ExpiresAt          time.Time // zero: it does not expire
}

// Host is what the gate is given to do its work. Its methods are called from many
// goroutines at once and for every question, connection and request, so only Metadata may
// be slow. A handle is what the host knows a box by: comparable, and never used again for
// another box.
type Host interface {
	// Find says whose packets come from the address; false refuses them.
	Find(from netip.Addr) (box Sandbox, handle any, ok bool)
	// Metadata is that of a box.
	Metadata(ctx context.Context, handle any) (Metadata, error)
	// Resolved opens addresses for a box, through the proxy only, for ttl from now.
	Resolved(handle any, addrs []netip.Addr, ttl time.Duration) error
	// Permitted is an error if the box may not reach the address whatever its name: the
	// gate's own connections pass none of the rules that the box's packets do.
	Permitted(handle any, a netip.Addr) error
	// Original is where a redirected connection wanted to go.
	Original(c *net.TCPConn) (netip.AddrPort, error)
	// Denied is told of what was refused: protocol "dns" (to without a port, or the zero
	// value if there is no address) or "tcp"; the name may be empty. A box can cause any
	// number of calls.
	Denied(handle any, protocol, name string, to netip.AddrPort)
	// Excess is told, as Denied is, of what would have been allowed and was too much.
	Excess(handle any, protocol, name string, to netip.AddrPort)
}

// Listeners are where the services are served; nil leaves one out. They are closed by
// [Proxy.Serve].
type Listeners struct {
	UDP      *net.UDPConn     // the resolver's, bound to no address
	DNS      *net.TCPListener // the resolver's
	Proxy    *net.TCPListener
	Metadata *net.TCPListener
}

const (
	// sweepInterval is how often idle connections and expired names are looked for.
	sweepInterval = time.Minute
	// idleTime is how long a connection through the proxy may carry nothing.
	idleTime = time.Hour
)

// Limits per box, so that one cannot take what all need, and in all, so that many cannot
// take what the server needs; [limit] has those per owner. A connection through the proxy holds up to six descriptors
// (two sockets and two pipes), anything else one or two.
var (
	queryLimit    = limit{perSandbox: 64, total: 1024}   // questions at once
	dnsConnLimit  = limit{perSandbox: 16, total: 1024}   // connections to the resolver
	proxyLimit    = limit{perSandbox: 1024, total: 8192} // connections through the proxy
	metadataLimit = limit{perSandbox: 16, total: 1024}   // connections to the metadata service
)

// Proxy holds what was resolved for whom, and the connections that pass. It is safe for
// concurrent use.
type Proxy struct {
	host Host
	log  *slog.Logger

	asking        *pace
	queries       *meter
	dnsConns      *meter
	proxied       *meter
	metadataConns *meter
	given         *given
	idle          time.Duration // idleTime but in tests
	hello         time.Duration // helloTime but in tests

	mu sync.Mutex
	// changes counts calls of Recheck.
	// +checklocks:mu
	changes uint64
	// sessions are the connections through the proxy.
	// +checklocks:mu
	sessions map[*session]struct{}
	// closers end what Serve waits for besides sessions.
	// +checklocks:mu
	closers map[io.Closer]struct{}
}

// New makes a gate that answers so many questions of a box in a second, 0 is
// [DefaultQuestionsPerSecond]. It does nothing before [Proxy.Serve].
func New(host Host, questionsPerSecond int, log *slog.Logger) *Proxy {
	return &Proxy{
		asking: newPace(cmp.Or(questionsPerSecond, DefaultQuestionsPerSecond)),
		host:   host, log: log, idle: idleTime, hello: helloTime,
		queries: newMeter(queryLimit), dnsConns: newMeter(dnsConnLimit),
		proxied: newMeter(proxyLimit), metadataConns: newMeter(metadataLimit),
		given:    newGiven(),
		sessions: map[*session]struct{}{},
		closers:  map[io.Closer]struct{}{},
	}
}

// Serve serves until ctx ends, or until one of the listeners breaks, which is the error.
// Then it closes the listeners and every connection, and returns when all have ended. It is
// called once.
func (g *Proxy) Serve(ctx context.Context, on Listeners) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	run := func(serve func() error) {
		all.Go(func() {
			if err := serve(); err != nil && ctx.Err() == nil {
				cancel(err)
			}
		})
	}
	if on.UDP != nil {
		g.opened(on.UDP)
		run(func() error { return g.serveUDP(ctx, on.UDP) })
	}
	accept := func(l *net.TCPListener, serve func(context.Context, *net.TCPConn)) {
		if l != nil {
			g.opened(l)
			run(func() error { return g.accept(ctx, l, serve) })
		}
	}
	accept(on.DNS, g.serveDNS)
	accept(on.Proxy, g.serveTCP)
	accept(on.Metadata, g.serveMetadata)
	all.Go(func() { g.sweep(ctx) })

	<-ctx.Done()
	g.closeAll()
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// accept serves each connection in a goroutine of its own, and returns after the last.
func (g *Proxy) accept(ctx context.Context, l *net.TCPListener, serve func(context.Context, *net.TCPConn)) error {
	var all sync.WaitGroup
	defer all.Wait()
	for {
		c, err := l.AcceptTCP()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				reset(c)
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			// Out of descriptors, or a connection that was gone again: neither is the end.
			g.log.Warn("accepting a connection of a sandbox", "error", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		all.Go(func() {
			g.opened(c)
			defer g.closed(c)
			defer g.survive()
			if ctx.Err() == nil {
				serve(ctx, c)
			}
		})
	}
}

// survive keeps a defect met by one box's bytes from ending the server, which carries every
// box; as net/http does.
func (g *Proxy) survive() {
	if v := recover(); v != nil {
		g.log.Error("a defect in the gate", "panic", v)
	}
}

// opened has c closed when Serve ends.
func (g *Proxy) opened(c io.Closer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closers[c] = struct{}{}
}

// closed closes c.
func (g *Proxy) closed(c io.Closer) {
	g.mu.Lock()
	delete(g.closers, c)
	g.mu.Unlock()
	_ = c.Close() // it may be closed already, and nothing can be done otherwise
}

func (g *Proxy) closeAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.closers {
		_ = c.Close()
	}
	for s := range g.sessions {
		s.kill()
	}
}

func (g *Proxy) sweep(ctx context.Context) {
	tick := time.NewTicker(min(sweepInterval, g.idle))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			g.given.expire(now)
			g.asking.expire(now)
			g.endIdle()
		}
	}
}

// Recheck looks at the connections of the box at an address again, and resets those that
// it may not have any more. It is to be called after the policy of a box changed, and after
// a box ended. It calls the host, so no lock may be held that the host takes.
func (g *Proxy) Recheck(from netip.Addr) {
	g.mu.Lock()
	g.changes++
	var theirs []*session
	for s := range g.sessions {
		if s.from == from {
			theirs = append(theirs, s)
		}
	}
	g.mu.Unlock()
	for _, s := range theirs {
		s.recheck()
	}
}

// source is where a connection comes from.
func source(c net.Conn) netip.Addr {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap()
}

// reset ends a connection with RST, which a program sees at once and as an error.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // without it, the end is orderly: no harm
	_ = c.Close()
}
