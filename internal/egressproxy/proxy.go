package egressproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// helloTime is the time in which a client must name its server, from its first byte, or from
	// the beginning on the ports where clients speak first.
	helloTime = 10 * time.Second
	// patience is the time that the proxy waits for the client to speak before it calls the
	// server, on ports where the server may have to speak first. It spares HTTP and TLS a useless
	// connection; no decision depends on it.
	patience = 200 * time.Millisecond
	// dialTime is the time in which the server must accept a connection.
	dialTime = 30 * time.Second
)

// errRefused reports that policy forbids the connection.
var errRefused = errors.New("refused by policy")

// session is one connection through the proxy.
type session struct {
	proxy  *Proxy
	client *net.TCPConn
	from   netip.Addr
	handle any
	to     netip.AddrPort // the client's destination

	first opening // of client
	// maybeHTTP reports that the client may still turn out to speak HTTP.
	maybeHTTP bool

	mu sync.Mutex
	// names are the names of which the policy must allow one; nil until the first was allowed.
	// +checklocks:mu
	names []string
	// server is the connection to the server, nil if there is none or if HTTP made its own.
	// +checklocks:mu
	server *net.TCPConn
	// +checklocks:mu
	dead bool
}

// serveTCP serves one redirected connection.
func (p *Proxy) serveTCP(ctx context.Context, c *net.TCPConn) {
	from := source(c)
	sandbox, handle, ok := p.host.Find(from)
	if !ok {
		reset(c)
		return
	}
	to, err := p.host.Original(c)
	if err != nil {
		p.log.Debug("looking up where a connection was to go", "from", from, "error", err)
		reset(c)
		return
	}
	w := subject{handle, sandbox.Owner}
	if !p.proxied.enter(w) {
		p.turnAway(handle, c)
		return
	}
	defer p.proxied.leave(w)
	s := &session{proxy: p, client: c, from: from, handle: handle,
		to: netip.AddrPortFrom(to.Addr().Unmap(), to.Port()), first: opening{r: c}}
	p.mu.Lock()
	p.sessions[s] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.sessions, s)
		p.mu.Unlock()
		s.kill()
	}()
	if err := s.serve(ctx); err != nil {
		p.log.Debug("a sandbox's connection", "to", s.to, "error", err)
		s.kill()
	}
}

// serve serves the session. It returns nil if both sides ended it in order.
func (s *session) serve(ctx context.Context) error {
	names := s.proxy.grants.names(s.handle, s.to.Addr(), time.Now())
	if err := s.admit(names...); err != nil {
		return err
	}
	serverFirst := s.to.Port() != 443 && s.to.Port() != 80
	wait := s.proxy.hello
	if serverFirst {
		wait = patience
	}
	if err := s.client.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	err := s.first.more()
	if serverFirst && errors.Is(err, os.ErrDeadlineExceeded) {
		return s.serverFirst(ctx)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("waiting for the client: %w", err)
	}
	what, err := s.listen()
	if err != nil {
		return err
	}
	if what == protocolHTTP {
		return s.serveHTTP()
	}
	if err := s.dial(ctx); err != nil {
		return err
	}
	s.maybeHTTP = what == protocolOther
	return s.splice(nil, nil)
}

// listen returns the protocol of the client's first bytes. It checks the server name, except for
// HTTP, which is checked by request.
func (s *session) listen() (protocol, error) {
	if err := s.client.SetReadDeadline(time.Now().Add(s.proxy.hello)); err != nil {
		return 0, err
	}
	what, err := sniff(&s.first)
	if err != nil {
		return 0, fmt.Errorf("listening to the client: %w", err)
	}
	switch what {
	case protocolTLS:
		name, err := readHello(&s.first)
		if err != nil {
			return 0, s.deny(name, err)
		}
		if err := s.admit(name); err != nil {
			return 0, err
		}
	case protocolOther:
		if s.to.Port() == 443 || s.to.Port() == 80 {
			return 0, s.deny("", errors.New("neither TLS nor HTTP on a port of theirs"))
		}
	}
	return what, s.client.SetReadDeadline(time.Time{})
}

// admit sets the session's names if the current policy allows one of them, and the address.
func (s *session) admit(names ...string) error {
	canon := make([]string, 0, len(names))
	for _, n := range names {
		if c, ok := canonical(n); ok {
			canon = append(canon, c)
		}
	}
	for {
		s.proxy.mu.Lock()
		changes := s.proxy.changes
		s.proxy.mu.Unlock()
		if err := s.allowed(canon); err != nil {
			name := ""
			if len(names) > 0 {
				name = names[0]
			}
			return s.deny(name, err)
		}
		if s.take(canon, changes) {
			return nil
		}
	}
}

// take sets the names, unless Recheck was called after changes was read.
func (s *session) take(names []string, changes uint64) bool {
	s.proxy.mu.Lock()
	defer s.proxy.mu.Unlock()
	if s.proxy.changes != changes {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names = names
	return true
}

// allowed checks with the host whether one of the names, and the address, are allowed now.
func (s *session) allowed(names []string) error {
	sandbox, handle, ok := s.proxy.host.Find(s.from)
	if !ok || handle != s.handle {
		return errors.New("the sandbox has ended")
	}
	if !sandbox.allowsAny(names) {
		return errRefused
	}
	return s.proxy.host.Permitted(s.handle, s.to.Addr())
}

// deny reports a refusal to the host and returns an error for it.
func (s *session) deny(name string, err error) error {
	s.proxy.host.Denied(s.handle, "tcp", name, s.to)
	return fmt.Errorf("%q at %s: %w", name, s.to, err)
}

// recheck ends the session if it is no longer allowed. A session without names is about to ask.
func (s *session) recheck() {
	s.mu.Lock()
	names := s.names
	s.mu.Unlock()
	if names == nil {
		return
	}
	if err := s.allowed(names); err != nil {
		s.proxy.host.Denied(s.handle, "tcp", names[0], s.to)
		s.kill()
	}
}

// kill resets the connections of the session. It may be called again.
func (s *session) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return
	}
	s.dead = true
	reset(s.client)
	if s.server != nil {
		reset(s.server)
	}
}

// connect connects to the client's destination, after checking once more that it is permitted.
func (s *session) connect(ctx context.Context) (*net.TCPConn, error) {
	if err := s.proxy.host.Permitted(s.handle, s.to.Addr()); err != nil {
		return nil, s.deny("", err)
	}
	c, err := (&net.Dialer{Timeout: dialTime}).DialContext(ctx, "tcp4", s.to.String())
	if err != nil {
		return nil, fmt.Errorf("calling the server: %w", err)
	}
	return c.(*net.TCPConn), nil
}

// dial connects the session to its server.
func (s *session) dial(ctx context.Context) error {
	c, err := s.connect(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		reset(c)
		return net.ErrClosed
	}
	s.server = c
	return nil
}

// serverFirst connects to the server before the client has spoken. It passes the server's bytes
// to the client at once; it holds the client's bytes back until they are checked, however late
// they come.
func (s *session) serverFirst(ctx context.Context) error {
	if err := s.client.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	if err := s.dial(ctx); err != nil {
		return err
	}
	var spoke atomic.Bool
	err := s.splice(func() error {
		if err := s.first.more(); err != nil {
			return err
		}
		// A server that speaks first accepts no HTTP requests, and its client may type letter by
		// letter, so this does not wait for a line.
		if spoke.Load() && !beginsLikeTLS(s.first.said[0]) {
			return nil
		}
		what, err := s.listen()
		if err == nil && what == protocolHTTP {
			return errHTTP
		}
		s.maybeHTTP = what == protocolOther
		return err
	}, &spoke)
	if !errors.Is(err, errHTTP) {
		return err
	}
	// HTTP makes its own connections. A server that speaks at this very moment is odd enough to
	// end the session.
	if spoke.Load() {
		return s.deny("", errors.New("HTTP to a server that spoke first"))
	}
	return s.serveHTTP()
}

// errHTTP reports that a client turned out to speak HTTP.
var errHTTP = errors.New("the client speaks HTTP")

// splice copies both ways until both sides have ended or one has failed. If check is not nil it
// runs before the client's bytes are passed on; io.EOF from it means that the client has ended.
func (s *session) splice(check func() error, spoke *atomic.Bool) error {
	s.mu.Lock()
	server := s.server
	s.mu.Unlock()
	var leaving atomic.Bool
	down := make(chan error, 1)
	go func() {
		err := s.download(server, spoke)
		if err != nil && !leaving.Load() {
			s.kill() // ends the upload too
		}
		down <- err
	}()
	var err error
	if check != nil {
		err = check()
	}
	switch {
	case errors.Is(err, errHTTP):
		leaving.Store(true)
		s.mu.Lock()
		s.server = nil
		s.mu.Unlock()
		reset(server) // ends the download
		<-down
		return err
	case errors.Is(err, io.EOF):
		err = server.CloseWrite()
	case err == nil:
		err = s.upload(server)
	}
	if err != nil {
		s.kill() // ends the download too
	}
	return errors.Join(err, <-down)
}

// upload copies from the client to the server, beginning with the bytes that were checked. The
// kernel moves the rest with splice(2).
func (s *session) upload(server *net.TCPConn) error {
	var line firstLine
	said := s.first.take()
	buffer := make([]byte, 4<<10)
	for {
		// The bytes that complete an HTTP line are not sent, so the server has no whole request.
		if s.maybeHTTP && line.read(said) {
			return s.deny("", errors.New("HTTP behind something else"))
		}
		if _, err := server.Write(said); err != nil {
			return fmt.Errorf("copying from the client: %w", err)
		}
		if !s.maybeHTTP || line.over {
			break
		}
		n, err := s.client.Read(buffer)
		if said = buffer[:n]; n == 0 && errors.Is(err, io.EOF) {
			if line.read([]byte{'\n'}) { // a lenient server takes the end of the stream for the end of the line
				return s.deny("", errors.New("HTTP behind something else"))
			}
			return server.CloseWrite()
		} else if n == 0 && err != nil {
			return fmt.Errorf("copying from the client: %w", err)
		}
	}
	if _, err := io.Copy(server, s.client); err != nil {
		return fmt.Errorf("copying from the client: %w", err)
	}
	return server.CloseWrite()
}

// download copies from the server to the client. It sets spoke, if not nil, once the server has
// sent anything or ended.
func (s *session) download(server *net.TCPConn, spoke *atomic.Bool) error {
	if spoke != nil {
		b := make([]byte, 1024)
		n, err := server.Read(b)
		spoke.Store(n > 0 || !errors.Is(err, net.ErrClosed))
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("copying from the server: %w", err)
		}
		if _, err := s.client.Write(b[:n]); err != nil {
			return fmt.Errorf("copying from the server: %w", err)
		}
	}
	if _, err := io.Copy(s.client, server); err != nil {
		return fmt.Errorf("copying from the server: %w", err)
	}
	return s.client.CloseWrite()
}

// endIdle ends the sessions that carried nothing for p.idle. All bytes pass the client's socket,
// and the kernel notes the time there, so counting costs nothing.
func (p *Proxy) endIdle() {
	p.mu.Lock()
	all := slices.Collect(maps.Keys(p.sessions))
	p.mu.Unlock()
	for _, s := range all {
		if quiet, err := quietTime(s.client); err == nil && quiet >= p.idle {
			s.kill()
		}
	}
}

// quietTime returns the time since data last came or went.
func quietTime(c *net.TCPConn) (time.Duration, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, err
	}
	return time.Duration(min(info.Last_data_recv, info.Last_data_sent)) * time.Millisecond, nil
}
