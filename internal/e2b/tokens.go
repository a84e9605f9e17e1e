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
func (s *Surface) token(kind string, id sandbox.ID) string { return tokenMark + s.tokenSum(kind, id) }

// isToken reports whether a text is a sandbox's token, with its mark or without.
func (s *Surface) isToken(text, kind string, id sandbox.ID) bool {
	return same(strings.TrimPrefix(text, tokenMark), s.tokenSum(kind, id))
}

func (s *Surface) tokenSum(kind string, id sandbox.ID) string { return s.sum(kind + ":" + string(id)) }

// sum returns a hash of a text that only this server can make.
func (s *Surface) sum(text string) string {
	mac := hmac.New(sha256.New, s.Secret)
	mac.Write([]byte(text))
	return hex.EncodeToString(mac.Sum(nil)[:20]) // 160 bits cannot be guessed
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
func (s *Surface) checkSignature(r *http.Request, id sandbox.ID) error {
	q, now := r.URL.Query(), time.Now()
	err := agentapi.CheckSignature(r.Method, q, s.token(envdToken, id), now)
	if errors.Is(err, agentapi.ErrSignatureInvalid) {
		err = agentapi.CheckSignature(r.Method, q, s.tokenSum(envdToken, id), now) // see tokenMark
	}
	return err
}

// Rates of searches. A signature is a hash over the path and the token, so no index can find its
// sandbox: a search computes a hash for every living sandbox, a millisecond or two for a
// thousand. Higher rates would let strangers load the server; clients that fetch more name the
// sandbox in the host or the headers.
const (
	searchesPerSecond   = 20 // in all
	searchesBurst       = 100
	searchesOfOne       = 5 // of one address
	searchesOfOneAtOnce = 25
)

// signed answers a request for /files whose URL names no sandbox. It serves the sandbox whose
// token made the signature.
func (s *Surface) signed(w http.ResponseWriter, r *http.Request) error {
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	if r.URL.Query().Get("signature") == "" {
		return fault.New(fault.Invalid, fault.CodeNoSandbox,
			"the URL names no sandbox: it needs a signature, or the headers %s and %s", idHeader, portHeader)
	}
	if len(r.URL.Query().Get("signature")) != agentapi.SignatureLength {
		return signatureError(agentapi.ErrSignatureInvalid)
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
	ids, err := s.Sandboxes.Living(r.Context())
	if err != nil {
		return err
	}
	for _, id := range ids {
		err := s.checkSignature(r, id)
		if err == nil || errors.Is(err, agentapi.ErrSignatureExpired) {
			return s.traffic(w, r, place{shown(id), envdPort, true})
		}
	}
	return signatureError(agentapi.ErrSignatureInvalid)
}
