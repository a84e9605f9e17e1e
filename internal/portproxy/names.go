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

// idPrefix begins sandbox IDs. Host names cannot hold its underscore and go without.
const idPrefix = "sbx_"

// Names are the host names of ports: PORT-ID.DOMAIN. The zero value has none.
type Names struct {
	Domain string // with a port where it is not the scheme's; "" is no host names
	Scheme string // of the URLs that are made: "https", or "http"
}

var portLabel = regexp.MustCompile(`^([1-9][0-9]{0,4})-([a-z0-9]{20})$`)

// Parse finds the port and the sandbox that a Host names.
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

// bare is a host without its port and without the dot of the root.
func bare(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.TrimSuffix(host, ".")
}

// Of is the URL of a port, without a path; "" when there are no host names.
func (n Names) Of(sandboxID string, port int) string {
	if n.Domain == "" {
		return ""
	}
	return fmt.Sprintf("%s://%d-%s.%s", n.Scheme, port, strings.TrimPrefix(sandboxID, idPrefix), n.Domain)
}

// Path is where a port is reached on the API's own host, without a slash at the end.
func Path(sandboxID string, port int) string {
	return fmt.Sprintf("/v1/sandboxes/%s/ports/%d", sandboxID, port)
}

// Signer makes and checks signatures, which open one port of one sandbox until a time.
type Signer struct{ key []byte }

// NewSecret makes the text of a secret for [NewSigner].
func NewSecret() string {
	var b [sha256.Size]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// NewSigner makes a signer of a secret. Whoever has it opens every port.
func NewSigner(secret string) Signer { return Signer{[]byte(secret)} }

// A signature consists of the mark, the time of its end and a sum. Its fixed length and alphabet let
// [HasSecret] recognise it.
const (
	signatureMark = "cays_"
	timeDigits    = 8  // hex digits of seconds since 1970: until 2106
	sumDigits     = 40 // hex digits: 160 bits: guessing is hopeless
)

// Sign makes a signature that ends at a time, to the second.
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

// Check says until when a signature opens the port: Unauthenticated, code "invalid_signature" or
// "signature_expired", when it does not.
func (s Signer) Check(signature, sandboxID string, port int, now time.Time) (ends time.Time, err error) {
	seconds, ok := s.end(signature, sandboxID, port)
	if !ok {
		return time.Time{}, fault.New(fault.Unauthenticated, "invalid_signature", "the signature is not one of this port")
	}
	if ends = time.Unix(seconds, 0); !now.Before(ends) {
		return time.Time{}, fault.New(fault.Unauthenticated, "signature_expired", "the signature of this URL has expired; ask for another one")
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
	// As servers made them before there was a mark. None lives longer than a day.
	at, sum, _ := strings.Cut(signature, ".")
	// As text: decoding would pass over line ends.
	if !hmac.Equal([]byte(sum), []byte(base64.RawURLEncoding.EncodeToString(s.mac("port "+sandboxID, port, at)))) {
		return 0, false
	}
	seconds, err := strconv.ParseInt(at, 36, 64)
	return seconds, err == nil
}
