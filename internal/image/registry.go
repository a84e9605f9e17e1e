package image

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

const (
	// answerFactor, multiplied by the time to connect, is the time for a registry to answer a
	// request for a manifest, with its token service.
	answerFactor = 4
	// stallTimeout is the time without a byte after which a download is given up. Without it a
	// dead connection would hold a build for hours.
	stallTimeout = time.Minute
	// configTimeout bounds the time for the configuration of an image, usually a few kilobytes.
	configTimeout = 2 * time.Minute
	// pullTimeout bounds one download, since a registry may send a byte now and then. With a
	// shorter one a slow line never gets a large image.
	pullTimeout = 2 * time.Hour
)

// ErrUnreachable reports that a registry gave no answer, in errors of [Store.Pull].
var ErrUnreachable = errors.New("its registry is not reachable")

// errDenied reports that an address must not be connected to.
var errDenied = errors.New("the registry may not be used")

// parseReference checks an OCI reference as users write it ("python:3.13",
// "ghcr.io/a/b@sha256:…").
func parseReference(text string, opts ...name.Option) (name.Reference, error) {
	ref, err := name.ParseReference(text, opts...)
	if err != nil {
		return nil, fmt.Errorf("%.200q is not an image reference: %w", text, err)
	}
	return ref, nil
}

// AskedOf reports whether a reference belongs to a registry, which is given by host and port as
// in references ("docker.io", "registry.example.com:5000").
func AskedOf(reference, registry string) bool {
	ref, err := parseReference(reference)
	if err != nil {
		return false
	}
	asked, err := name.NewRegistry(registry)
	return err == nil && ref.Context().RegistryStr() == asked.RegistryStr()
}

// reference parses a reference as this store uses it.
func (s *Store) reference(text string) (name.Reference, error) {
	ref, err := parseReference(text)
	if err != nil {
		return nil, err
	}
	if slices.Contains(s.cfg.PlainHTTP, ref.Context().RegistryStr()) {
		return parseReference(text, name.Insecure)
	}
	// The library by itself speaks plain HTTP with private addresses.
	if s.cfg.Dial != nil && ref.Context().Scheme() != "https" {
		return nil, fmt.Errorf("%w: %s is private, and not one of those that the operator lists", errDenied,
			ref.Context().RegistryStr())
	}
	return ref, nil
}

// moves reports whether a source can give another result later.
func (src Source) moves() bool {
	if src.Image == "" {
		return false
	}
	ref, err := parseReference(src.Image)
	if err != nil {
		return true
	}
	_, digest := ref.(name.Digest)
	return !digest
}

// transport returns the transport of one pull. It asks about every connection that it makes.
func (s *Store) transport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSHandshakeTimeout = s.cfg.RegistryTimeout
	t.ResponseHeaderTimeout = answerFactor * s.cfg.RegistryTimeout
	free := &net.Dialer{Timeout: s.cfg.RegistryTimeout}
	asked := &net.Dialer{Timeout: s.cfg.RegistryTimeout,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			// This is the resolved address, just before the connection: a second answer of the name
			// server cannot differ.
			to, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("%w: %q is not an address", errDenied, address)
			}
			return s.allowed(to)
		}}
	var proxies []string
	for _, scheme := range []string{"http", "https"} {
		if proxy, err := http.ProxyFromEnvironment(
			&http.Request{URL: &url.URL{Scheme: scheme, Host: "registry.invalid"}}); err == nil && proxy != nil {
			proxies = append(proxies, hostPort(proxy))
		}
	}
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if s.cfg.Dial == nil || slices.Contains(proxies, address) ||
			slices.ContainsFunc(s.cfg.PlainHTTP, func(registry string) bool {
				return address == registry || address == registry+":80"
			}) {
			return free.DialContext(ctx, network, address)
		}
		return asked.DialContext(ctx, network, address)
	}
	t.Proxy = func(r *http.Request) (*url.URL, error) {
		proxy, err := http.ProxyFromEnvironment(r)
		if err != nil || proxy == nil || s.cfg.Dial == nil {
			return proxy, err
		}
		// The proxy resolves and checks names; an address can be checked here.
		if to, err := netip.ParseAddrPort(hostPort(r.URL)); err == nil {
			return proxy, s.allowed(to)
		}
		return proxy, nil
	}
	return t
}

// allowed asks Config.Dial about an address, as IPv4 if it is one.
func (s *Store) allowed(to netip.AddrPort) error {
	if err := s.cfg.Dial(netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())); err != nil {
		return fmt.Errorf("%w: %w", errDenied, err)
	}
	return nil
}

// hostPort returns the host and port of a URL to connect to.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	if port == "" {
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// find asks the registry for the image for this machine's architecture. It gives up soon, since
// most machines without a registry must not wait for one. The image keeps ctx for later reads.
func (s *Store) find(ctx context.Context, ref name.Reference, auth *Auth,
	transport http.RoundTripper) (v1.Image, error) {
	limit := answerFactor * s.cfg.RegistryTimeout
	asking, answered := context.WithCancelCause(ctx)
	giveUp := time.AfterFunc(limit, func() { answered(fmt.Errorf("no answer within %v", limit)) })
	defer giveUp.Stop()
	img, err := remote.Image(ref, remote.WithContext(asking), remote.WithTransport(transport),
		remote.WithAuth(auth.authenticator()), remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}),
		remote.WithRetryBackoff(remote.Backoff{Duration: time.Millisecond, Factor: 1, Steps: 1}), remote.WithJobs(1))
	if err == nil {
		return img, nil
	}
	hidden := auth.hide(err)
	network := new(net.OpError)
	switch cause := context.Cause(asking); {
	case errors.Is(err, errDenied):
		_, reason, _ := strings.Cut(hidden.Error(), errDenied.Error())
		hidden = fmt.Errorf("%w%s", errDenied, reason)
	case cause != nil:
		hidden = fmt.Errorf("%w: %w", ErrUnreachable, cause)
	case errors.As(err, &network) || os.IsTimeout(err):
		hidden = fmt.Errorf("%w: %w", ErrUnreachable, hidden)
	}
	answered(err)
	return nil, fmt.Errorf("asking the registry: %w", hidden)
}
