package proxy

import (
	"cmp"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
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
	withoutSecrets(out.Header)
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

// withoutSecrets removes keys of cay's and signatures, wherever in a head callers put them:
// values with a key in them go, of cookies only those that are one.
func withoutSecrets(h http.Header) {
	h.Del(KeyHeader)
	for name, values := range h {
		if name == "Cookie" {
			continue
		}
		kept := values[:0:0]
		for _, v := range values {
			if !hasSecret(v) {
				kept = append(kept, v)
			}
		}
		if len(kept) == 0 {
			delete(h, name)
		} else if len(kept) < len(values) {
			h[name] = kept
		}
	}
	cookies := h.Values("Cookie")
	h.Del("Cookie")
	for _, line := range cookies {
		var kept []string
		for pair := range strings.SplitSeq(line, ";") {
			if name, value, _ := strings.Cut(strings.TrimSpace(pair), "="); name != TokenCookie && name != "" && !hasSecret(value) {
				kept = append(kept, strings.TrimSpace(pair))
			}
		}
		if len(kept) > 0 {
			h.Add("Cookie", strings.Join(kept, "; "))
		}
	}
}

// secret is what keys look like. They have 40 characters; "cay_theme" is none.
var secret = regexp.MustCompile(`(?:cay|e2b)_[0-9A-Za-z]{32,}`)

// hasSecret reports whether there is a key in a text.
func hasSecret(text string) bool {
	return (strings.Contains(text, "cay_") || strings.Contains(text, "e2b_")) && secret.MatchString(text)
}

// IsKey reports whether a text, which came as a key, is to be one of cay's: that of an
// application must be left to it.
func IsKey(text string) bool {
	return strings.HasPrefix(text, "cay_") || strings.HasPrefix(text, "e2b_")
}

// WithoutToken removes our signature from a query and leaves the rest as it is.
func WithoutToken(query string) string {
	var kept []string
	for pair := range strings.SplitSeq(query, "&") {
		name, _, _ := strings.Cut(pair, "=")
		if plain, err := url.QueryUnescape(name); err == nil && plain == TokenParam {
			continue // however it is written: it was taken for one
		}
		kept = append(kept, pair)
	}
	return strings.Join(kept, "&")
}

// restorePrefix makes a redirect to another path lead there from outside.
func restorePrefix(resp *http.Response) error {
	prefix := passageOf(resp.Request).to.Prefix
	to := resp.Header.Get("Location")
	if prefix != "" && strings.HasPrefix(to, "/") && !strings.HasPrefix(to, "//") {
		resp.Header.Set("Location", prefix+to)
	}
	return nil
}
