package e2b

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// What clients hold for a sandbox is not the agent's own token. That one is the host's: it
// opens calls that only the host makes, is another one in every life of the sandbox, while
// clients keep theirs through pauses, and E2B's clients send what they hold to programs
// inside as well. So theirs is derived from the server's secret and the sandbox's id,
// checked here, and replaced by the agent's on the way in.

// The tokens of a sandbox, by what they open.
const (
	envdToken    = "envd"    // commands and files
	trafficToken = "traffic" // other ports, when they are not public
)

func (s *Surface) token(kind string, id sandbox.ID) string {
	mac := hmac.New(sha256.New, s.Secret)
	mac.Write([]byte(kind + ":" + string(id)))
	return hex.EncodeToString(mac.Sum(nil)[:20]) // 160 bits: nobody guesses them
}

// same compares texts in constant time.
func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// Texts that clients compare.
var (
	errNoToken          = fault.New(fault.Unauthenticated, "unauthorized", "unauthorized access, please provide a valid access token or method signing if supported")
	errNoSignature      = fault.New(fault.Unauthenticated, "unauthorized", "missing signature query parameter")
	errSignature        = fault.New(fault.Unauthenticated, "unauthorized", "invalid signature")
	errSignatureExpired = fault.New(fault.Unauthenticated, "unauthorized", "signature is already expired")
)

// signatureOf is E2B's: what one who holds the token gives to one who may read or write
// one path, until a time if one is named.
func signatureOf(method string, q url.Values, token string) string {
	op := "read"
	if method == http.MethodPost {
		op = "write"
	}
	raw := q.Get("path") + ":" + op + ":" + q.Get("username") + ":" + token
	if until := q.Get("signature_expiration"); until != "" {
		raw += ":" + until
	}
	sum := sha256.Sum256([]byte(raw))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// checkSignature checks a request for /files that brings a signature instead of a token.
func checkSignature(method string, q url.Values, token string, now time.Time) error {
	given := q.Get("signature")
	if given == "" {
		return errNoSignature
	}
	if !same(given, signatureOf(method, q, token)) {
		return errSignature
	}
	text := q.Get("signature_expiration")
	if text == "" {
		return nil
	}
	until, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return errSignature
	}
	if now.Unix() > until {
		return errSignatureExpired
	}
	return nil
}

// signed answers a request for /files whose URL names no sandbox: the one whose token made
// its signature is meant.
func (s *Surface) signed(w http.ResponseWriter, r *http.Request) error {
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	q := r.URL.Query()
	if q.Get("signature") == "" {
		return fault.New(fault.Invalid, "no_sandbox", "the URL names no sandbox: it needs a signature, or the headers %s and %s", idHeader, portHeader)
	}
	ids, err := s.Sandboxes.Living(r.Context())
	if err != nil {
		return err
	}
	for _, id := range ids {
		err := checkSignature(r.Method, q, s.token(envdToken, id), time.Now())
		if err == nil || errors.Is(err, errSignatureExpired) {
			return s.traffic(w, r, place{shown(id), envdPort})
		}
	}
	return errSignature
}
