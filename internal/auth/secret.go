package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/fault"
)

// Format is how the secret of a key begins. Keys of both kinds are the same otherwise,
// and are taken wherever a key is.
type Format string

// The formats.
const (
	FormatCay Format = "cay"
	FormatE2B Format = "e2b" // some of E2B's clients refuse to send any other
)

const (
	secretBytes = 20          // 160 random bits: guessing is hopeless whatever the rate limit
	markLength  = len("cay_") // that of all marks
	// prefixLength is how much of a secret stays readable, in characters: the
	// mark and 8 hex digits, enough to tell the keys of an organization apart
	// and no help in guessing the other 128 bits.
	prefixLength = markLength + 8

	maxKeyName = 128 // characters; part of the contract
	maxOrgName = 63  // characters; part of the contract
)

var idEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// newID makes an ID with 100 random bits.
func newID(mark string) string {
	var b [13]byte
	rand.Read(b[:]) // never fails: it ends the program instead
	return mark + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20]
}

// mark is what the secret of a key of the format begins with.
func (f Format) mark() string { return string(f) + "_" }

// newSecret makes the secret of a key.
func newSecret(f Format) string {
	var b [secretBytes]byte
	rand.Read(b[:]) // never fails: it ends the program instead
	return f.mark() + hex.EncodeToString(b[:])
}

// parseSecret checks that text has the form of a secret, which is "cay_" or "e2b_" and 40
// lower-case hex digits, and returns its hash.
func parseSecret(text string) (hash [sha256.Size]byte, ok bool) {
	if len(text) != markLength+2*secretBytes {
		return hash, false
	}
	mark, digits := text[:markLength], text[markLength:]
	if mark != FormatCay.mark() && mark != FormatE2B.mark() {
		return hash, false
	}
	for _, c := range []byte(digits) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return hash, false
		}
	}
	return sha256.Sum256([]byte(text)), true
}

// Scopes lists all scopes.
func Scopes() []Scope {
	return []Scope{SandboxesRead, SandboxesWrite, Exec, Files, TemplatesRead, TemplatesWrite, Admin}
}

// ParseScopes checks scopes as a user wrote them: at least one, each known. One
// given twice counts once; the order is that of [Scopes]. Errors are Invalid,
// code "invalid_scopes".
func ParseScopes(names []string) ([]Scope, error) {
	if len(names) == 0 {
		return nil, fault.InField("invalid_scopes", "scopes", "must name at least one of %s", scopeList())
	}
	var scopes []Scope
	for _, name := range names {
		if !slices.Contains(Scopes(), Scope(name)) {
			return nil, fault.InField("invalid_scopes", "scopes", "%.40q is not one of %s", name, scopeList())
		}
	}
	for _, s := range Scopes() {
		if slices.Contains(names, string(s)) {
			scopes = append(scopes, s)
		}
	}
	return scopes, nil
}

func scopeList() string {
	var names []string
	for _, s := range Scopes() {
		names = append(names, string(s))
	}
	return strings.Join(names, ", ")
}

// checkKeyName: a name is for people, so anything that prints on one line.
func checkKeyName(name string) error {
	if !utf8.ValidString(name) || name == "" || utf8.RuneCountInString(name) > maxKeyName ||
		strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fault.InField("invalid_name", "name", "must be 1 to %d printable characters", maxKeyName)
	}
	return nil
}

// checkOrgName: a name is used in commands and addresses, so a DNS label.
func checkOrgName(name string) error {
	ok := name != "" && len(name) <= maxOrgName && name[0] != '-'
	for _, c := range []byte(name) {
		ok = ok && (c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z')
	}
	if !ok {
		return fault.InField("invalid_name", "name", "must be 1 to %d lower-case letters, digits and '-', and not begin with '-'", maxOrgName)
	}
	return nil
}
