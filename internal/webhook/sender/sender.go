// Package sender posts webhooks to receivers, which are strangers' machines.
//
// A [Sender] connects only to addresses that it is allowed to, and asks about the address that it connects to,
// after the name was resolved. It follows no redirect, uses no proxy, keeps no cookie, and bounds the time of a
// request and what it reads of the answer. Its errors name no address. It is safe for concurrent use and keeps
// some idle connections for seconds.
package sender

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/webhook"
)

const (
	// maxAnswer limits what is read of an answer, in bytes, so that a connection can be used again after a usual one.
	maxAnswer = 64 << 10
	// keptAnswer is the part of an answer that is kept for people, in bytes. Part of the contract.
	keptAnswer = 1 << 10
	// maxHead limits the head of an answer, in bytes. One with more fails.
	maxHead = 64 << 10
	// maxIdle and idleTimeout limit the connections that wait for the next request. Without them each delivery of a busy
	// webhook has another handshake; more of them hold files of this process.
	maxIdle     = 64
	idleTimeout = 30 * time.Second
)

// Config configures a Sender.
type Config struct {
	// Permit returns an error for an address that may not be called.
	Permit func(netip.AddrPort) error
	// Roots has the authorities that certificates are checked with; nil means those of this machine.
	Roots *x509.CertPool
	// UserAgent is the header of that name.
	UserAgent string
}

// Sender implements [webhook.Sender].
type Sender struct {
	cfg       Config
	transport *http.Transport
}

// New returns a Sender.
func New(cfg Config) *Sender {
	s := &Sender{cfg: cfg}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	s.transport = &http.Transport{
		Proxy: nil, DialContext: s.dial, Protocols: protocols,
		TLSClientConfig: &tls.Config{RootCAs: cfg.Roots, MinVersion: tls.VersionTLS12},
		// An answer that unpacks to gigabytes is not unpacked.
		DisableCompression: true, MaxResponseHeaderBytes: maxHead,
		MaxIdleConns: maxIdle, MaxIdleConnsPerHost: maxIdle / 8, IdleConnTimeout: idleTimeout,
		TLSHandshakeTimeout: webhook.Patience, // of a connection that no request waits for any more
	}
	return s
}

// dial connects to a receiver. Each address of its name is asked about just before the connection, so that a second
// answer of the name server cannot differ.
func (s *Sender) dial(ctx context.Context, network, address string) (net.Conn, error) {
	var permitted atomic.Bool // one of the addresses
	dialer := &net.Dialer{Timeout: webhook.Patience,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("%w: %w", webhook.ErrDenied, err)
			}
			if err := s.permit(to); err != nil {
				return err
			}
			permitted.Store(true)
			return nil
		}}
	conn, err := dialer.DialContext(ctx, network, address)
	if errors.Is(err, webhook.ErrDenied) && permitted.Load() { // the error is that of the first address
		return nil, &net.OpError{Op: "dial", Net: network, Err: errors.New("no permitted address can be reached")}
	}
	return conn, err
}

// Close closes idle connections.
func (s *Sender) Close() { s.transport.CloseIdleConnections() }

// permit asks about an address, as IPv4 if it is one.
func (s *Sender) permit(to netip.AddrPort) error {
	if err := s.cfg.Permit(netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())); err != nil {
		return fmt.Errorf("%w: %w", webhook.ErrDenied, err)
	}
	return nil
}

// CheckURL implements [webhook.Sender].
func (s *Sender) CheckURL(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("parsing the URL: %w", err)
	}
	addr, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return nil // a name, which is looked up for each request
	}
	return s.permit(netip.AddrPortFrom(addr, 0))
}

// Send implements [webhook.Sender].
func (s *Sender) Send(ctx context.Context, to string, header map[string]string, body []byte) (webhook.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, webhook.Patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return webhook.Answer{}, errors.New("the URL cannot be called")
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", s.cfg.UserAgent)
	for name, value := range header {
		r.Header.Set(name, value)
	}
	// A client would follow redirects and add what a URL says about users.
	answer, err := s.transport.RoundTrip(r)
	if err != nil {
		return webhook.Answer{}, explain(ctx, err)
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusSwitchingProtocols {
		// The body is the connection, which no deadline ends any more.
		return webhook.Answer{Status: answer.StatusCode}, nil
	}
	text, err := read(answer.Body)
	if err != nil && answer.StatusCode/100 == 2 {
		return webhook.Answer{}, explain(ctx, err) // it may have failed after its head
	}
	return webhook.Answer{Status: answer.StatusCode, Text: printable(text),
		RetryAfter: retryAfter(answer.Header.Get("Retry-After"), time.Now())}, nil
}

// read returns the beginning of an answer, and reads on up to maxAnswer.
func read(body io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(body, keptAnswer))
	if err == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(body, maxAnswer-keptAnswer))
	}
	return text, err
}

// printable returns text of a receiver as it may be shown: valid UTF-8, with U+FFFD for what does not print.
func printable(text []byte) string {
	if len(text) == keptAnswer { // a character may be cut
		for i := 0; i < utf8.UTFMax-1 && len(text) > 0; i++ {
			if r, size := utf8.DecodeLastRune(text); r != utf8.RuneError || size != 1 {
				break
			}
			text = text[:len(text)-1]
		}
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, strings.ToValidUTF8(string(text), string(utf8.RuneError)))
}

// retryAfter returns the time that a header asks for, 0 if it asks for none.
func retryAfter(text string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(text); err == nil {
		return max(at.Sub(now), 0)
	}
	return 0
}

// explain returns an error for people about a request without an answer. It tells no address: an error of the resolver
// or of a connection would.
func explain(ctx context.Context, err error) error {
	var dns *net.DNSError
	var unknown x509.UnknownAuthorityError
	var wrongName x509.HostnameError
	var invalid x509.CertificateInvalidError
	var verification *tls.CertificateVerificationError
	switch {
	case errors.Is(err, webhook.ErrDenied):
		return webhook.ErrDenied
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("the receiver did not answer within %s", webhook.Patience)
	case errors.As(err, &dns):
		return errors.New("the name of the receiver cannot be resolved")
	case errors.As(err, &unknown), errors.As(err, &invalid), errors.As(err, &wrongName), errors.As(err, &verification):
		return errors.New("the certificate of the receiver is not valid")
	case errors.Is(err, syscall.ECONNREFUSED):
		return errors.New("the receiver refused the connection")
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return errors.New("the receiver cannot be reached")
	}
	return errors.New("the receiver broke off, or did not answer in HTTP")
}
