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

// tokenMark begins tokens, so that the proxy recognises one that goes astray. Clients of an older
// server have theirs without it, and keep them as long as their sandboxes.
const tokenMark = "cayt_"

// token returns a sandbox's token, as clients are given it.
func (s *Surface) token(kind string, id sandbox.ID) string { return tokenMark + s.tokenSum(kind, id) }

// isToken reports whether a text is a sandbox's token, with its mark or without.
func (s *Surface) isToken(text, kind string, id sandbox.ID) bool {
	return same(strings.TrimPrefix(text, tokenMark), s.tokenSum(kind, id))
}

func (s *Surface) tokenSum(kind string, id sandbox.ID) string {
	mac := hmac.New(sha256.New, s.Secret)
	mac.Write([]byte(kind + ":" + string(id)))
	return hex.EncodeToString(mac.Sum(nil)[:20]) // 160 bits: nobody guesses them
}

// same compares texts in constant time.
func same(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// errNoToken has the text that clients know.
var errNoToken = fault.New(fault.Unauthenticated, "unauthorized", "unauthorized access, please provide a valid access token or method signing if supported")

// signatureError is an error of a signature as it is answered.
func signatureError(err error) error {
	if err == nil {
		return nil
	}
	return fault.New(fault.Unauthenticated, "unauthorized", "%s", err).Because(err)
}

// checkSignature checks a request for /files that brings a signature instead of a token.
func (s *Surface) checkSignature(r *http.Request, id sandbox.ID) error {
	q, now := r.URL.Query(), time.Now()
	err := agentapi.CheckSignature(r.Method, q, s.token(envdToken, id), now)
	if errors.Is(err, agentapi.ErrSignatureInvalid) {
		err = agentapi.CheckSignature(r.Method, q, s.tokenSum(envdToken, id), now) // see tokenMark
	}
	return err
}

// Rates of searches. A signature is a hash over the path and the token, so nothing can be looked
// up by it: a search costs a hash for every living sandbox, a millisecond or two for a thousand.
// Higher rates would let strangers load the server; clients that fetch more name the sandbox, by
// host or headers.
const (
	searchesPerSecond   = 20 // of all
	searchesBurst       = 100
	searchesOfOne       = 5 // of one address
	searchesOfOneAtOnce = 25
)

// signed answers a request for /files whose URL names no sandbox: the one whose token made
// its signature is meant.
func (s *Surface) signed(w http.ResponseWriter, r *http.Request) error {
	if preflight(r) {
		allowOrigins(w, r)
		return nil
	}
	if r.URL.Query().Get("signature") == "" {
		return fault.New(fault.Invalid, "no_sandbox", "the URL names no sandbox: it needs a signature, or the headers %s and %s", idHeader, portHeader)
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
		return fault.New(fault.Exhausted, "too_many_searches", "the URL names no sandbox, and too many such are looked for; use the host name %d-ID, or the headers %s and %s",
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
