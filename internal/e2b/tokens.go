package e2b

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// The token that clients hold for a sandbox is not the agent's key. The agent's key opens calls
// that only the host makes, and changes with every run of the sandbox, while clients keep their
// tokens through pauses. E2B's clients also send their tokens to programs inside. So a client's
// token is derived from the server's secret and the sandbox's id, is checked here, and never
// reaches the sandbox.

// The kinds of tokens of a sandbox.
const (
	envdToken    = "envd"    // commands and files
	trafficToken = "traffic" // other ports, if they are not public
)

// tokenMark is the first part of a token, by which portproxy recognises one that goes astray.
// Clients of an older server have tokens without it, and keep them as long as their sandboxes.
const tokenMark = "cayt_"

// token returns a sandbox's token, with its mark.
func (s *Handler) token(kind string, id sandbox.ID) string { return tokenMark + s.tokenSum(kind, id) }

// isToken reports whether a text is a sandbox's token, with its mark or without.
func (s *Handler) isToken(text, kind string, id sandbox.ID) bool {
	return same(strings.TrimPrefix(text, tokenMark), s.tokenSum(kind, id))
}

func (s *Handler) tokenSum(kind string, id sandbox.ID) string { return s.sum(kind + ":" + string(id)) }

// sum returns a hash of a text that only this server can make.
func (s *Handler) sum(text string) string { return string(s.sums()([]byte(text))) }

// sums returns a function that is sum for many texts. A result is valid until the next call.
func (s *Handler) sums() func(text []byte) []byte {
	const length = 20 // 160 bits cannot be guessed
	mac := hmac.New(sha256.New, s.Secret)
	hash, digits := make([]byte, 0, sha256.Size), make([]byte, hex.EncodedLen(length))
	return func(text []byte) []byte {
		mac.Reset()
		mac.Write(text)
		hex.Encode(digits, mac.Sum(hash)[:length])
		return digits
	}
}

// same compares texts in constant time.
func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// errNoToken has E2B's text, which clients know.
var errNoToken = fault.New(fault.Unauthenticated, fault.CodeUnauthorized,
	"unauthorized access, please provide a valid access token or method signing if supported")

// signatureError returns the answer for an error of a signature.
func signatureError(err error) error {
	if err == nil {
		return nil
	}
	return fault.New(fault.Unauthenticated, fault.CodeUnauthorized, "%s", err).Because(err)
}

// checkSignature checks the signature of a request for /files, which replaces a token.
func (s *Handler) checkSignature(r *http.Request, id sandbox.ID) error {
	q, now := r.URL.Query(), time.Now()
	err := agentapi.CheckSignature(r.Method, q, s.token(envdToken, id), now)
	if errors.Is(err, agentapi.ErrSignatureInvalid) {
		err = agentapi.CheckSignature(r.Method, q, s.tokenSum(envdToken, id), now) // see tokenMark
	}
	return err
}

// Rates of searches. A signature is a hash over the path, the user and the token, and nothing else of the
// token comes with it, so no index can find its sandbox, not of tokens nor of their hashes: a search
// computes hashes for every living sandbox, 15 ms for ten thousand. Higher rates would let strangers load
// the server; clients that fetch more name the sandbox in the host or the headers.
const (
	searchesPerSecond   = 20 // in all
	searchesBurst       = 100
	searchesOfOne       = 5 // of one address
	searchesOfOneAtOnce = 25
)

// signed answers a request for /files whose URL names no sandbox. It serves the sandbox whose
// token made the signature.
func (s *Handler) signed(w http.ResponseWriter, r *http.Request) error {
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	if r.URL.Query().Get("signature") == "" {
		return fault.New(fault.Invalid, fault.CodeNoSandbox,
			"the URL names no sandbox: it needs a signature, or the headers %s and %s", idHeader, portHeader)
	}
	signed, err := agentapi.ReadSigned(r.Method, r.URL.Query())
	if err != nil {
		return signatureError(err)
	}
	now := time.Now()
	wait := s.searchOfOne.Take(auth.Address(r.RemoteAddr), now)
	if wait == 0 {
		wait = s.search.Take("", now)
	}
	if wait > 0 {
		return fault.New(fault.Exhausted, fault.CodeTooManySearches,
			"there are too many requests with URLs that name no sandbox; use the host name %d-ID, or the headers %s and %s",
			envdPort, idHeader, portHeader).After(wait)
	}
	ids, err := s.Rows.Living(r.Context())
	if err != nil {
		return err
	}
	if id, found := s.signer(signed, ids); found {
		return s.traffic(w, r, place{shown(id), envdPort, true}) // which checks the signature's end
	}
	return signatureError(agentapi.ErrSignatureInvalid)
}

// signer returns the sandbox whose token made a signature.
func (s *Handler) signer(signed *agentapi.Signed, ids []sandbox.ID) (_ sandbox.ID, found bool) {
	sum := s.sums()
	// With room for what follows, so that appending makes no garbage.
	text, token := append(make([]byte, 0, 128), envdToken+":"...), append(make([]byte, 0, 128), tokenMark...)
	for _, id := range ids {
		digits := sum(append(text, id...))
		if signed.By(append(token, digits...)) || signed.By(digits) { // see tokenMark
			return id, true
		}
	}
	return "", false
}
