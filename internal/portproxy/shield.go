package portproxy

import (
	"net/http"
	"slices"
	"strings"

	"github.com/cayhq/cay/internal/fault"
)

// sandboxed is the policy for pages of a shared origin. Without allow-same-origin a browser gives
// each page an opaque origin of its own.
const sandboxed = "sandbox allow-scripts allow-forms allow-modals allow-popups allow-downloads " +
	"allow-pointer-lock allow-orientation-lock allow-presentation"

// beyondOrigin lists headers of answers that have an effect beyond their origin, or that describe
// the connection, which is the operator's. Browsers apply them to subdomains or to the whole
// registrable domain, or report later requests to others.
var beyondOrigin = []string{
	"Alt-Svc", "Clear-Site-Data", "Expect-Ct", "Nel", "Public-Key-Pins", "Public-Key-Pins-Report-Only", "Report-To",
	"Set-Cookie2", "Strict-Transport-Security",
}

// originWide lists headers of answers that speak for a whole origin.
var originWide = []string{
	"Accept-Ch", "Access-Control-Allow-Credentials", "Activate-Storage-Access", "Authentication-Info", "Critical-Ch",
	"Origin-Agent-Cluster", "Proxy-Authenticate", "Proxy-Authentication-Info", "Reporting-Endpoints",
	"Secure-Session-Challenge", "Secure-Session-Registration", "Service-Worker-Allowed", "Set-Cookie", "Set-Login",
	"Sec-Session-Challenge", "Sec-Session-Registration", "Speculation-Rules", "Use-As-Dictionary",
	// Browsers answer this one without asking, with the password that the user gave another
	// sandbox for the same realm, or with the user's own login.
	"Www-Authenticate",
}

// cookieAttributes lists the attributes that a cookie keeps. Domain is not among them, so a
// cookie is valid only for the host name that sets it.
var cookieAttributes = []string{"path", "expires", "max-age", "secure", "httponly", "samesite", "priority",
	"partitioned"}

// CleanAnswer removes headers that have an effect beyond the port's origin from an answer; at a
// shared origin also those that speak for the origin.
func CleanAnswer(h http.Header, shared bool) {
	for _, name := range beyondOrigin {
		h.Del(name)
	}
	if shared {
		for _, name := range originWide {
			h.Del(name)
		}
		return
	}
	for i, cookie := range h["Set-Cookie"] {
		h["Set-Cookie"][i] = hostOnly(cookie)
	}
}

// CleanTrailers does to trailers what [CleanAnswer] does to a header. It is called after the header
// was sent.
func CleanTrailers(h http.Header, shared bool) {
	for name := range h {
		plain, prefixed := strings.CutPrefix(name, http.TrailerPrefix)
		plain = http.CanonicalHeaderKey(plain)
		if prefixed && (plain == "Set-Cookie" || slices.Contains(beyondOrigin, plain) ||
			shared && slices.Contains(originWide, plain)) {
			delete(h, name)
		}
	}
	CleanAnswer(h, shared)
}

// Confine gives a page of a shared origin an opaque origin of its own, whatever its header says,
// and hides its address, which may hold a signature, from pages that it links to.
func Confine(h http.Header) {
	h.Add("Content-Security-Policy", sandboxed)
	h.Set("Referrer-Policy", "no-referrer")
}

// hostOnly drops the attributes of a Set-Cookie that are not in cookieAttributes.
func hostOnly(cookie string) string {
	pair, rest, _ := strings.Cut(cookie, ";")
	kept := []string{pair}
	for attribute := range strings.SplitSeq(rest, ";") {
		name, _, _ := strings.Cut(attribute, "=")
		if slices.Contains(cookieAttributes, strings.ToLower(strings.TrimSpace(name))) {
			kept = append(kept, " "+strings.TrimSpace(attribute))
		}
	}
	return strings.Join(kept, ";")
}

// refuse returns an error for a request that must not reach the port.
func refuse(r *http.Request, to Destination) error {
	if to.Shared && (r.Header.Get("Service-Worker") != "" || r.Header.Get("Sec-Fetch-Dest") == "serviceworker") {
		return fault.New(fault.Denied, fault.CodeServiceWorkerRefused,
			"a service worker would control the whole origin, which this port shares with others; use the port's host name")
	}
	path := to.Path
	if path == "" {
		path = r.URL.EscapedPath()
	}
	if HasSecret(path) || HasSecret(r.Method) {
		return fault.InField(fault.CodeSecretInPath, "path",
			"holds an API key, a signature or a token of cay, which must not reach a sandbox")
	}
	return nil
}

// answered rewrites the answer of the port.
func answered(resp *http.Response) error {
	pass := passageOf(resp.Request)
	if to := resp.Header.Get("Location"); pass.to.Prefix != "" && strings.HasPrefix(to, "/") &&
		!strings.HasPrefix(to, "//") {
		resp.Header.Set("Location", pass.to.Prefix+to) // so that it works from outside
	}
	CleanAnswer(resp.Header, pass.to.Shared)
	for name := range resp.Trailer { // the announced trailers; CleanTrailers removes the others
		if name == "Set-Cookie" || slices.Contains(beyondOrigin, name) ||
			pass.to.Shared && slices.Contains(originWide, name) {
			delete(resp.Trailer, name)
		}
	}
	if pass.to.Shared {
		Confine(resp.Header)
	} else if pass.signed {
		resp.Header.Set("Referrer-Policy", "no-referrer")
	}
	return nil
}
