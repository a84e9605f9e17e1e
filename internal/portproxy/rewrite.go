package portproxy

import (
	"cmp"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
)

// Secrets that open a port from outside. They never reach a sandbox.
const (
	KeyHeader   = "X-Cay-Api-Key" // an API key, where Authorization belongs to the application
	TokenParam  = "cay_token"     // a signature in a query
	TokenCookie = "cay_token"     // a signature of a host name
)

// rewrite builds the request for the port.
func rewrite(pr *httputil.ProxyRequest) {
	pass := passageOf(pr.In)
	out, to := pr.Out, pass.to
	out.URL.Scheme, out.URL.Host = "http", to.host()
	if to.Path != "" {
		path, err := url.PathUnescape(to.Path)
		if err != nil {
			path = to.Path // cannot happen, since net/http has parsed it
		}
		out.URL.Path, out.URL.RawPath = path, to.Path
	}
	out.URL.RawQuery = WithoutToken(pr.In.URL.RawQuery)
	out.Host = cmp.Or(to.Host, pr.In.Host, "localhost")
	forward(pr, to.Prefix)
	WithoutSecrets(out.Header)
	if HasSecret(out.Host) {
		out.Host = "localhost" // the name begins with the sandbox and goes on with anything
	}
	for name := range out.Trailer {
		if HasSecret(name) {
			delete(out.Trailer, name)
		}
	}
}

// forward sets the headers that tell where the request comes from. It keeps what a proxy before
// the server has set. Applications should not trust these headers.
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

// Scheme returns the scheme of the caller's request: as a proxy before the server set it, or else
// of the server's own connection.
func Scheme(r *http.Request) string {
	switch said := r.Header.Get("X-Forwarded-Proto"); {
	case said == "http" || said == "https":
		return said
	case r.TLS != nil:
		return "https"
	}
	return "http"
}

// IsKey reports whether a text in the place of a key claims to be one of cay's. Keys of an
// application must be left to it.
func IsKey(text string) bool {
	return strings.HasPrefix(text, "cay_") || strings.HasPrefix(text, "e2b_")
}
