package portproxy

import (
	"cmp"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
)

// What opens a port from outside, and never reaches a sandbox.
const (
	KeyHeader   = "X-Cay-Api-Key" // a key of cay's, where Authorization is the application's
	TokenParam  = "cay_token"     // a signature, in a query
	TokenCookie = "cay_token"     // a signature, of a host name
)

// rewrite makes the request that goes in.
func rewrite(pr *httputil.ProxyRequest) {
	pass := passageOf(pr.In)
	out, to := pr.Out, pass.to
	out.URL.Scheme, out.URL.Host = "http", to.host()
	if to.Path != "" {
		path, err := url.PathUnescape(to.Path)
		if err != nil {
			path = to.Path // net/http has parsed it, so this cannot be
		}
		out.URL.Path, out.URL.RawPath = path, to.Path
	}
	out.URL.RawQuery = WithoutToken(pr.In.URL.RawQuery)
	out.Host = cmp.Or(to.Host, pr.In.Host, "localhost")
	forward(pr, to.Prefix)
	WithoutSecrets(out.Header)
	if HasSecret(out.Host) {
		out.Host = "localhost" // the front of the name is the sandbox's, the rest anything
	}
	for name := range out.Trailer {
		if HasSecret(name) {
			delete(out.Trailer, name)
		}
	}
}

// forward says where the request comes from. What a proxy before us has said stands; inside
// nobody should decide by it.
func forward(pr *httputil.ProxyRequest, prefix string) {
	in, out := pr.In.Header, pr.Out.Header
	chain := in.Values("X-Forwarded-For")
	if ip, _, err := net.SplitHostPort(pr.In.RemoteAddr); err == nil {
		chain = append(chain[:len(chain):len(chain)], ip)
	}
	out.Set("X-Forwarded-For", strings.Join(chain, ", "))
	out.Set("X-Forwarded-Host", pr.In.Host)
	out.Set("X-Forwarded-Proto", Scheme(pr.In))
	if prefix != "" {
		out.Set("X-Forwarded-Prefix", prefix)
	} else {
		out.Del("X-Forwarded-Prefix")
	}
}

// Scheme is that of the caller's request: what a proxy before us has said, else our own.
func Scheme(r *http.Request) string {
	switch said := r.Header.Get("X-Forwarded-Proto"); {
	case said == "http" || said == "https":
		return said
	case r.TLS != nil:
		return "https"
	}
	return "http"
}

// IsKey reports whether a text, which came as a key, is to be one of cay's: that of an
// application must be left to it.
func IsKey(text string) bool {
	return strings.HasPrefix(text, "cay_") || strings.HasPrefix(text, "e2b_")
}
