package agentapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Errors of [CheckSignature]. E2B's clients compare their texts.
var (
	ErrSignatureMissing = errors.New("missing signature query parameter")
	ErrSignatureInvalid = errors.New("invalid signature")
	ErrSignatureExpired = errors.New("signature is already expired")
)

// SignatureLength is the length of every signature, bytes.
const SignatureLength = len("v1_") + 43

// Signature returns the signature, in E2B's form, of a request for /files. A holder of the
// token gives it to a client that may read the path of the query, or with POST write it, until
// the signature_expiration of the query if there is one.
func Signature(method string, q url.Values, token string) string {
	op := "read"
	if method == http.MethodPost {
		op = "write"
	}
	raw := q.Get("path") + ":" + op + ":" + q.Get("username") + ":" + token
	if expiration := q.Get("signature_expiration"); expiration != "" {
		raw += ":" + expiration
	}
	sum := sha256.Sum256([]byte(raw))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// CheckSignature returns an error unless a request for /files, which has no token, carries a
// valid signature.
func CheckSignature(method string, q url.Values, token string, now time.Time) error {
	given := q.Get("signature")
	if given == "" {
		return ErrSignatureMissing
	}
	if subtle.ConstantTimeCompare([]byte(given), []byte(Signature(method, q, token))) != 1 {
		return ErrSignatureInvalid
	}
	expiration := q.Get("signature_expiration")
	if expiration == "" {
		return nil
	}
	until, err := strconv.ParseInt(expiration, 10, 64)
	if err != nil {
		return ErrSignatureInvalid
	}
	if now.Unix() > until {
		return ErrSignatureExpired
	}
	return nil
}
