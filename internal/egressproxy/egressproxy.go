// Package egressproxy decides by name what leaves a sandbox, and tells sandboxes about
// themselves.
//
// The kernel's rules redirect traffic of a sandbox to three services here, whatever its
// destination:
//
//   - The resolver answers questions for allowed names only. It has the addresses of an answer
//     opened before it sends the answer.
//   - The proxy accepts connections to those addresses, and passes them on once it saw that they
//     speak to an allowed name, since many names share an address.
//   - The metadata service tells a sandbox its id, template, mode and metadata.
//
// The source address of a packet identifies the sandbox. The rules bind the address to the
// sandbox's link, so nothing that a sandbox says about itself counts. The package knows nothing
// of the rules; a [Host] joins both.
//
// Only a sandbox whose policy has names uses the resolver and the proxy, and the proxy does not carry
// what the ranges of the policy allow. The proxy writes requests of HTTP anew, and changes nothing
// else that it carries.
//
// The package cannot see inside TLS. A server that serves other names than the one in the
// ClientHello (by domain fronting, or by an encrypted ClientHello inside one for an allowed name)
// opens those names to every sandbox that may reach it at all.
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

// Sandbox holds what the proxy must know of a sandbox to decide.
type Sandbox struct {
	// Domains are the names that the sandbox may reach: exact names, or "*." and a name, which
	// allows every name below that one, at any depth, but not the name itself. Lower case, no dot
	// at the end.
	Domains []string
	// Nameservers are asked for the sandbox, in order.
	Nameservers []netip.AddrPort
	// Owner identifies the sandbox's owner; sandboxes of one owner share limits. With "" the
	// sandbox shares none.
	Owner string
}

// Metadata holds what a sandbox is told about itself. It must hold no secret.
type Metadata struct {
	ID, Template, Mode string
	Metadata           map[string]string
	ExpiresAt          time.Time // zero: the sandbox does not expire
}

// Host connects the proxy to the rules and the sandboxes. Its methods are called by many
// goroutines at once, and for every question, connection and request, so only Metadata may be
// slow. A handle is the host's identity of a sandbox: comparable, and never used again for
// another one.
type Host interface {
	// Find returns the sandbox that has the address. Its packets are refused if there is none.
	Find(from netip.Addr) (sandbox Sandbox, handle any, ok bool)
	// Metadata returns a sandbox's metadata.
	Metadata(ctx context.Context, handle any) (Metadata, error)
	// Resolved opens addresses to a sandbox, through the proxy only, for ttl from now.
	Resolved(handle any, addrs []netip.Addr, ttl time.Duration) error
	// Permitted returns an error if the sandbox may not reach the address under any name. The
	// proxy's own connections do not pass the rules for the sandbox's packets, so it asks here.
	Permitted(handle any, a netip.Addr) error
	// Original returns the destination of a redirected connection.
	Original(c *net.TCPConn) (netip.AddrPort, error)
	// Denied records a refusal: protocol "dns" (to has no port, or is the zero value if there is
	// no address) or "tcp". The name may be empty. A sandbox can cause any number of calls.
	Denied(handle any, protocol, name string, to netip.AddrPort)
	// Excess records, as Denied does, something allowed that was refused because it was too much.
	Excess(handle any, protocol, name string, to netip.AddrPort)
}

// Listeners are the sockets of the services; nil leaves a service out. [Proxy.Serve] closes them.
type Listeners struct {
	UDP      *net.UDPConn     // of the resolver, bound to no address
	DNS      *net.TCPListener // of the resolver
	Proxy    *net.TCPListener
	Metadata *net.TCPListener
}

const (
	// sweepInterval is the time between two searches for idle connections and expired names. With
	// a longer one they stay, and take memory, for as much longer.
	sweepInterval = time.Minute
	// idleTime is the time after which a connection through the proxy that carries nothing is
	// ended. A shorter time would break long polls; a longer one keeps descriptors of dead
	// clients.
	idleTime = time.Hour
)

// Limits per sandbox, so that one cannot take what all need, and in total, so that all cannot
// take what the server needs; [limit] has those per owner. A connection through the proxy holds
// up to six descriptors (two sockets and two pipes), anything else one or two.
var (
	queryLimit    = limit{perSandbox: 64, total: 1024}   // questions at once
	dnsConnLimit  = limit{perSandbox: 16, total: 1024}   // connections to the resolver
	proxyLimit    = limit{perSandbox: 1024, total: 8192} // connections through the proxy
	metadataLimit = limit{perSandbox: 16, total: 1024}   // connections to the metadata service
)

// Proxy serves the resolver, the proxy and the metadata service. It holds the grants and the open
// connections. It is safe for concurrent use.
type Proxy struct {
	host Host
	log  *slog.Logger

	asking        *pace
	queries       *meter
	dnsConns      *meter
	proxied       *meter
	metadataConns *meter
	grants        *grants
	idle          time.Duration // idleTime except in tests
	hello         time.Duration // helloTime except in tests

	mu sync.Mutex
	// changes is the number of calls of Recheck.
	// +checklocks:mu
	changes uint64
	// sessions are the connections through the proxy.
	// +checklocks:mu
	sessions map[*session]struct{}
	// closers are the listeners and connections that closeAll closes, besides sessions.
	// +checklocks:mu
	closers map[io.Closer]struct{}
}

// New returns a Proxy that answers questionsPerSecond questions of each sandbox, or
// [DefaultQuestionsPerSecond] if 0. It does nothing before [Proxy.Serve].
func New(host Host, questionsPerSecond int, log *slog.Logger) *Proxy {
	return &Proxy{
		asking: newPace(cmp.Or(questionsPerSecond, DefaultQuestionsPerSecond)),
		host:   host, log: log, idle: idleTime, hello: helloTime,
		queries: newMeter(queryLimit), dnsConns: newMeter(dnsConnLimit),
		proxied: newMeter(proxyLimit), metadataConns: newMeter(metadataLimit),
		grants:   newGrants(),
		sessions: map[*session]struct{}{},
		closers:  map[io.Closer]struct{}{},
	}
}

// Serve serves until ctx ends, or until a listener fails, and returns the listener's error. It
// then closes the listeners and every connection, and waits until all have ended. Call it once.
func (p *Proxy) Serve(ctx context.Context, on Listeners) error {
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
		p.opened(on.UDP)
		run(func() error { return p.serveUDP(ctx, on.UDP) })
	}
	accept := func(l *net.TCPListener, serve func(context.Context, *net.TCPConn)) {
		if l != nil {
			p.opened(l)
			run(func() error { return p.accept(ctx, l, serve) })
		}
	}
	accept(on.DNS, p.serveDNS)
	accept(on.Proxy, p.serveTCP)
	accept(on.Metadata, p.serveMetadata)
	all.Go(func() { p.sweep(ctx) })

	<-ctx.Done()
	p.closeAll()
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// accept serves each connection in a goroutine of its own, and returns after the last one has
// ended.
func (p *Proxy) accept(ctx context.Context, l *net.TCPListener, serve func(context.Context, *net.TCPConn)) error {
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
			// The process may be out of descriptors, or the connection gone again. Go on.
			p.log.Warn("accepting a connection of a sandbox", "error", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		all.Go(func() {
			p.opened(c)
			defer p.closed(c)
			defer p.survive()
			if ctx.Err() == nil {
				serve(ctx, c)
			}
		})
	}
}

// survive recovers from a panic that the bytes of one sandbox caused, as net/http does, since the
// server serves all sandboxes.
func (p *Proxy) survive() {
	if v := recover(); v != nil {
		p.log.Error("a panic while serving a sandbox's connection", "panic", v)
	}
}

// opened registers c, so that it is closed when Serve ends.
func (p *Proxy) opened(c io.Closer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closers[c] = struct{}{}
}

// closed closes c and removes it from the register.
func (p *Proxy) closed(c io.Closer) {
	p.mu.Lock()
	delete(p.closers, c)
	p.mu.Unlock()
	_ = c.Close() // it may be closed already; nothing else can be done
}

func (p *Proxy) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.closers {
		_ = c.Close()
	}
	for s := range p.sessions {
		s.kill()
	}
}

func (p *Proxy) sweep(ctx context.Context) {
	tick := time.NewTicker(min(sweepInterval, p.idle))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			p.grants.expire(now)
			p.asking.expire(now)
			p.endIdle()
		}
	}
}

// Recheck checks the connections of the sandbox at an address again, and resets those that its
// policy no longer allows. Call it after the policy of a sandbox changed, and after a sandbox
// ended. It calls the host, so the caller may hold no lock that the host takes.
func (p *Proxy) Recheck(from netip.Addr) {
	p.mu.Lock()
	p.changes++
	var theirs []*session
	for s := range p.sessions {
		if s.from == from {
			theirs = append(theirs, s)
		}
	}
	p.mu.Unlock()
	for _, s := range theirs {
		s.recheck()
	}
}

// turnAway resets a connection beyond a limit, and reports it.
func (p *Proxy) turnAway(handle any, c *net.TCPConn) {
	defer reset(c)
	to, err := p.host.Original(c)
	if err != nil {
		p.log.Debug("looking up where a connection was to go", "from", source(c), "error", err)
		return
	}
	p.host.Excess(handle, "tcp", "", netip.AddrPortFrom(to.Addr().Unmap(), to.Port()))
}

// source returns the address that a connection comes from.
func source(c net.Conn) netip.Addr {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap()
}

// reset ends a connection with RST, so that a program sees an error at once.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // if it fails, the connection ends without RST, which does no harm
	_ = c.Close()
}
