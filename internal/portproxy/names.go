package portproxy

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// idPrefix is the first part of sandbox IDs. Host names leave it out, since they cannot hold its
// underscore.
const idPrefix = "sbx_"

// Names forms the host names of ports, PORT-ID.DOMAIN. The zero value forms none.
type Names struct {
	Domain string // with a port, unless it is the scheme's default; "" if there are no host names
	Scheme string // of the URLs made: "https" or "http"
	// Local reports whether the names lead to the server only in browsers and programs on its own machine
	// that resolve all names below localhost to it, as browsers and curl do.
	Local bool
}

// LocalNames returns the names below localhost for a server on the loopback. Browsers treat localhost as a
// public suffix, so that each name is a site of its own.
func LocalNames(port int) Names {
	return Names{Domain: net.JoinHostPort("localhost", strconv.Itoa(port)), Scheme: "http", Local: true}
}

var portLabel = regexp.MustCompile(`^([1-9][0-9]{0,4})-([a-z0-9]{20})$`)

// Parse returns the port and the sandbox that a Host names.
func (n Names) Parse(host string) (port int, sandboxID string, ok bool) {
	if n.Domain == "" {
		return 0, "", false
	}
	label, domain, _ := strings.Cut(strings.ToLower(bare(host)), ".")
	if domain != strings.ToLower(bare(n.Domain)) {
		return 0, "", false
	}
	m := portLabel.FindStringSubmatch(label)
	if m == nil {
		return 0, "", false
	}
	port, err := strconv.Atoi(m[1])
	return port, idPrefix + m[2], err == nil && port <= 65535
}

// bare returns a host without its port and without the root's dot.
func bare(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.TrimSuffix(host, ".")
}

// Of returns the URL of a port, without a path, or "" if there are no host names.
func (n Names) Of(sandboxID string, port int) string {
	if n.Domain == "" {
		return ""
	}
	return fmt.Sprintf("%s://%d-%s.%s", n.Scheme, port, strings.TrimPrefix(sandboxID, idPrefix), n.Domain)
}

// Path returns the path of a port on the API's own host, without a slash at the end.
func Path(sandboxID string, port int) string {
	return fmt.Sprintf("/v1/sandboxes/%s/ports/%d", sandboxID, port)
}

// Signer makes and checks signatures. A signature opens one port of one sandbox until a time.
type Signer struct{ key []byte }

// NewSecret returns a new random secret for [NewSigner].
func NewSecret() string {
	var b [sha256.Size]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// NewSigner returns a Signer with a secret. Anybody who has the secret can open every port.
func NewSigner(secret string) Signer { return Signer{[]byte(secret)} }

// A signature consists of the mark, the time of its end and a sum. Its fixed length and alphabet let
// [HasSecret] recognise it.
const (
	signatureMark = "cays_"
	timeDigits    = 8  // hex digits of seconds since 1970: until 2106
	sumDigits     = 40 // hex digits: 160 bits, which cannot be guessed
)

// Sign returns a signature that opens a port until ends, to the second.
func (s Signer) Sign(sandboxID string, port int, ends time.Time) string {
	at := fmt.Sprintf("%0*x", timeDigits, uint32(ends.Unix()))
	return signatureMark + at + s.sum(sandboxID, port, at)
}

func (s Signer) sum(sandboxID string, port int, at string) string {
	return hex.EncodeToString(s.mac("cays "+sandboxID, port, at))[:sumDigits]
}

func (s Signer) mac(what string, port int, at string) []byte {
	mac := hmac.New(sha256.New, s.key)
	fmt.Fprintf(mac, "%s %d %s", what, port, at) // cannot fail
	return mac.Sum(nil)
}

// Check returns the time until which a signature opens the port. If it does not, it gives
// Unauthenticated, code "invalid_signature" or "signature_expired".
func (s Signer) Check(signature, sandboxID string, port int, now time.Time) (ends time.Time, err error) {
	seconds, ok := s.end(signature, sandboxID, port)
	if !ok {
		return time.Time{}, fault.New(fault.Unauthenticated, fault.CodeInvalidSignature,
			"the signature is not valid for this port")
	}
	if ends = time.Unix(seconds, 0); !now.Before(ends) {
		return time.Time{}, fault.New(fault.Unauthenticated, fault.CodeSignatureExpired,
			"the signature of this URL has expired; ask for another one")
	}
	return ends, nil
}

// end returns the end of a signature, in seconds since 1970, if the signature opens the port.
func (s Signer) end(signature, sandboxID string, port int) (seconds int64, ok bool) {
	if rest, marked := strings.CutPrefix(signature, signatureMark); marked {
		if len(rest) != timeDigits+sumDigits {
			return 0, false
		}
		at, sum := rest[:timeDigits], rest[timeDigits:]
		if !hmac.Equal([]byte(sum), []byte(s.sum(sandboxID, port, at))) {
			return 0, false
		}
		seconds, err := strconv.ParseInt(at, 16, 64)
		return seconds, err == nil
	}
	// Older servers made signatures without the mark. None is valid for longer than a day.
	at, sum, _ := strings.Cut(signature, ".")
	// Compare the text, since decoding would ignore line ends.
	if !hmac.Equal([]byte(sum), []byte(base64.RawURLEncoding.EncodeToString(s.mac("port "+sandboxID, port, at)))) {
		return 0, false
	}
	seconds, err := strconv.ParseInt(at, 36, 64)
	return seconds, err == nil
}
