package proxy

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

// Sign makes a signature that ends at a time, to the second.
func (s Signer) Sign(sandboxID string, port int, ends time.Time) string {
	at := strconv.FormatInt(ends.Unix(), 36)
	return at + "." + s.sum(sandboxID, port, at)
}

func (s Signer) sum(sandboxID string, port int, at string) string {
	mac := hmac.New(sha256.New, s.key)
	fmt.Fprintf(mac, "port %s %d %s", sandboxID, port, at) // cannot fail
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// Check says until when a signature opens the port: Unauthenticated, code "invalid_signature" or
// "signature_expired", when it does not.
func (s Signer) Check(signature, sandboxID string, port int, now time.Time) (ends time.Time, err error) {
	at, sum, _ := strings.Cut(signature, ".")
	// As text: decoding would pass over line ends.
	if !hmac.Equal([]byte(sum), []byte(s.sum(sandboxID, port, at))) {
		return time.Time{}, fault.New(fault.Unauthenticated, "invalid_signature", "the signature is not one of this port")
	}
	seconds, err := strconv.ParseInt(at, 36, 64)
	if ends = time.Unix(seconds, 0); err != nil || !now.Before(ends) {
		return time.Time{}, fault.New(fault.Unauthenticated, "signature_expired", "the signature of this URL has expired; ask for another one")
	}
	return ends, nil
}
