package agent

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

// Texts that clients compare.
var (
	errSignatureMissing = errors.New("missing signature query parameter")
	errSignatureInvalid = errors.New("invalid signature")
	errSignatureExpired = errors.New("signature is already expired")
)

// signature is E2B's: what one who knows the token gives to one who may read or
// write (op) one path until a time. expiration is the decimal text of Unix
// seconds, "" for none.
func signature(path, op, user, token, expiration string) string {
	raw := path + ":" + op + ":" + user + ":" + token
	if expiration != "" {
		raw += ":" + expiration
	}
	sum := sha256.Sum256([]byte(raw))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// checkSignature lets a request for /files through that carries a valid
// signature instead of the token.
func checkSignature(r *http.Request, token string) error {
	op := "read"
	if r.Method == http.MethodPost {
		op = "write"
	}
	return verifySignature(r.URL.Query(), op, token, time.Now())
}

func verifySignature(q url.Values, op, token string, now time.Time) error {
	given := q.Get("signature")
	if given == "" {
		return errSignatureMissing
	}
	expiration := q.Get("signature_expiration")
	want := signature(q.Get("path"), op, q.Get("username"), token, expiration)
	if subtle.ConstantTimeCompare([]byte(given), []byte(want)) != 1 {
		return errSignatureInvalid
	}
	if expiration == "" {
		return nil
	}
	until, err := strconv.ParseInt(expiration, 10, 64)
	if err != nil {
		return errSignatureInvalid
	}
	if now.Unix() > until {
		return errSignatureExpired
	}
	return nil
}
