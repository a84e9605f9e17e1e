package agentapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Errors of [CheckSignature]. E2B's clients compare their texts.
var (
	ErrSignatureMissing = errors.New("missing signature query parameter")
	ErrSignatureInvalid = errors.New("invalid signature")
	ErrSignatureExpired = errors.New("signature is already expired")
)

// SignatureLength is the length of every signature, bytes.
const SignatureLength = len(signatureMark) + 43

// Signature returns the signature, in E2B's form, of a request for /files. A holder of the
// token gives it to a client that may read the path of the query, or with POST write it, until
// the signature_expiration of the query if there is one.
func Signature(method string, q url.Values, token string) string {
	sum := signedText(method, q).sum([]byte(token))
	return signatureMark + base64.RawStdEncoding.EncodeToString(sum[:])
}

const signatureMark = "v1_"

// Signed is a request for /files with a signature, to be checked against many tokens. It is not safe for
// concurrent use.
type Signed struct {
	given         [sha256.Size]byte
	before, after string // of the token in the signed text
	expiration    string
	text          []byte // buffer
}

// signedText returns a request without its signature.
func signedText(method string, q url.Values) *Signed {
	op := "read"
	if method == http.MethodPost {
		op = "write"
	}
	s := &Signed{before: q.Get("path") + ":" + op + ":" + q.Get("username") + ":",
		expiration: q.Get("signature_expiration")}
	if s.expiration != "" {
		s.after = ":" + s.expiration
	}
	return s
}

// ReadSigned returns a request with its signature, or an error if it has none or one that no token makes.
func ReadSigned(method string, q url.Values) (*Signed, error) {
	given := q.Get("signature")
	if given == "" {
		return nil, ErrSignatureMissing
	}
	digits, ok := strings.CutPrefix(given, signatureMark)
	sum, err := base64.RawStdEncoding.Strict().DecodeString(digits)
	if !ok || err != nil || len(sum) != sha256.Size || len(given) != SignatureLength {
		return nil, ErrSignatureInvalid
	}
	s := signedText(method, q)
	copy(s.given[:], sum)
	return s, nil
}

// sum returns the hash of the text with a token.
func (s *Signed) sum(token []byte) [sha256.Size]byte {
	s.text = append(append(append(s.text[:0], s.before...), token...), s.after...)
	return sha256.Sum256(s.text)
}

// By reports whether the signature was made with a token.
func (s *Signed) By(token []byte) bool {
	sum := s.sum(token)
	return subtle.ConstantTimeCompare(s.given[:], sum[:]) == 1
}

// Check returns an error if the signature has expired at a time, or has a time that is none.
func (s *Signed) Check(now time.Time) error {
	if s.expiration == "" {
		return nil
	}
	until, err := strconv.ParseInt(s.expiration, 10, 64)
	if err != nil {
		return ErrSignatureInvalid
	}
	if now.Unix() > until {
		return ErrSignatureExpired
	}
	return nil
}

// CheckSignature returns an error unless a request for /files, which has no token, carries a
// valid signature.
func CheckSignature(method string, q url.Values, token string, now time.Time) error {
	s, err := ReadSigned(method, q)
	if err != nil {
		return err
	}
	if !s.By([]byte(token)) {
		return ErrSignatureInvalid
	}
	return s.Check(now)
}
