package agentapi

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Every connection to an agent that has a key begins with a handshake. In it host and agent
// prove to each other that they know the key, without sending it:
//
//	host:  helloMagic, 16 bytes of nonce
//	agent: 16 bytes of nonce, proof of "agent"
//	host:  proof of "host", at once followed by the first request
//
// A proof is an HMAC-SHA256 with the key of the role, both nonces, and both addresses of the
// connection as its ends see them. The nonces make a recorded handshake worthless. The addresses
// make a relayed handshake worthless: a program that takes the host's connection in the agent's
// place has to open another one to the agent, and that one comes from an address of the sandbox.

// helloMagic begins a handshake. No HTTP request has its first byte, so the agent can tell both
// apart.
const helloMagic = "\x00cay/1\r\n"

const (
	nonceSize = 16
	// HelloSize is the length of a [Hello], bytes.
	HelloSize = len(helloMagic) + nonceSize
	// ProofSize is the length of a proof, bytes.
	ProofSize = sha256.Size

	// handshakePatience bounds the host's wait for an agent's proof. The proof takes a
	// millisecond; an agent whose sandbox uses all its CPU may need seconds, and a shorter wait
	// would make such a sandbox unreachable. A longer wait only holds the caller of an agent that
	// never answers.
	handshakePatience = 20 * time.Second
	// proofDelay is the time for which the host keeps back its own proof, so that it leaves in
	// one packet with the first request. After it the host sends the proof alone, because the
	// agent gives up on a connection without a proof. A shorter delay costs a packet where the
	// request comes later.
	proofDelay = time.Second
)

// ErrNotTheAgent reports that the program at the other end of a connection does not know the key.
var ErrNotTheAgent = errors.New("the program that answers in the sandbox is not its agent")

// Hello is the beginning of a handshake: the magic and the host's nonce.
type Hello [HelloSize]byte

// IsHello reports whether the first bytes of a connection begin a handshake.
func IsHello(first []byte) bool {
	n := min(len(first), len(helloMagic))
	return n > 0 && string(first[:n]) == helloMagic[:n]
}

// The roles of a handshake.
const (
	roleAgent = 'a'
	roleHost  = 'h'
)

// proof returns the proof of a role that only a holder of the key can make.
func proof(key string, role byte, hello *Hello, nonce []byte, host, agent netip.AddrPort) []byte {
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte{role})
	mac.Write(hello[:])
	mac.Write(nonce)
	for _, a := range []netip.AddrPort{host, agent} {
		b := a.Addr().Unmap().As16()
		mac.Write(b[:])
		mac.Write([]byte{byte(a.Port() >> 8), byte(a.Port())})
	}
	return mac.Sum(nil)
}

// ends returns the addresses of this end and of the other end of a connection.
func ends(c net.Conn) (local, remote netip.AddrPort, err error) {
	l, ok := c.LocalAddr().(*net.TCPAddr)
	r, ok2 := c.RemoteAddr().(*net.TCPAddr)
	if !ok || !ok2 {
		return local, remote, fmt.Errorf("a handshake needs a TCP connection, not one of %s", c.LocalAddr().Network())
	}
	return l.AddrPort(), r.AddrPort(), nil
}

// Authenticate does the host's part of a handshake on a new connection and returns the
// connection to use from then on. It returns [ErrNotTheAgent] when the other end does not
// prove that it knows the key; before that proof it sends nothing that depends on the key. ctx
// bounds only the handshake. After an error the connection is closed.
func Authenticate(ctx context.Context, c net.Conn, key string) (net.Conn, error) {
	proven, err := authenticate(ctx, c, key)
	if err != nil {
		_ = c.Close() // its error changes nothing: no request was sent
		return nil, err
	}
	return proven, nil
}

func authenticate(ctx context.Context, c net.Conn, key string) (net.Conn, error) {
	local, remote, err := ends(c)
	if err != nil {
		return nil, err
	}
	var hello Hello
	copy(hello[:], helloMagic)
	_, _ = rand.Read(hello[len(helloMagic):]) // never fails

	late := fmt.Errorf("no handshake within %s", handshakePatience)
	ctx, cancel := context.WithTimeoutCause(ctx, handshakePatience, late)
	defer cancel()
	// A deadline in the past ends a read or write that is under way.
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	var answer [nonceSize + ProofSize]byte
	if _, err = c.Write(hello[:]); err == nil {
		_, err = io.ReadFull(c, answer[:])
	}
	if !stop() {
		err = context.Cause(ctx) // the deadline is set, or about to be
	}
	if err != nil {
		return nil, fmt.Errorf("greeting the agent: %w", err)
	}
	nonce := answer[:nonceSize]
	if !hmac.Equal(answer[nonceSize:], proof(key, roleAgent, &hello, nonce, local, remote)) {
		return nil, ErrNotTheAgent
	}
	p := &provenConn{Conn: c, proof: proof(key, roleHost, &hello, nonce, local, remote)}
	p.late = time.AfterFunc(proofDelay, func() { _, _ = p.Write(nil) }) // the next write has the same error
	return p, nil
}

// provenConn is a connection on which the agent has proved itself. It sends the host's proof
// before the first bytes that are written.
type provenConn struct {
	net.Conn
	late *time.Timer

	mu sync.Mutex
	// +checklocks:mu
	proof []byte // nil once it was sent
}

func (p *provenConn) Write(b []byte) (int, error) {
	p.mu.Lock()
	if p.proof == nil {
		p.mu.Unlock()
		return p.Conn.Write(b)
	}
	defer p.mu.Unlock()
	p.late.Stop()
	head := p.proof
	p.proof = nil
	n, err := p.Conn.Write(append(head, b...))
	return max(n-len(head), 0), err
}

// Close closes the connection.
func (p *provenConn) Close() error {
	p.late.Stop()
	return p.Conn.Close()
}

// Answer does the agent's part of a handshake on a connection that brought a hello. It returns
// an error unless the other end proves that it knows the key. The deadline of the connection
// bounds its wait for that proof.
func Answer(c net.Conn, hello Hello, key string) error {
	if key == "" {
		return errors.New("the agent has no key yet")
	}
	if !IsHello(hello[:]) {
		return errors.New("a connection began neither with a handshake nor with HTTP")
	}
	agent, host, err := ends(c)
	if err != nil {
		return err
	}
	nonce := make([]byte, nonceSize, nonceSize+ProofSize)
	_, _ = rand.Read(nonce) // never fails
	want := proof(key, roleHost, &hello, nonce, host, agent)
	if _, err := c.Write(append(nonce, proof(key, roleAgent, &hello, nonce, host, agent)...)); err != nil {
		return fmt.Errorf("answering a handshake: %w", err)
	}
	var got [ProofSize]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return fmt.Errorf("waiting for the host's proof: %w", err)
	}
	if !hmac.Equal(got[:], want) {
		return errors.New("the program that opened the connection is not the host")
	}
	return nil
}
