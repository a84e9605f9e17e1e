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

// Format tells how the secret of a key begins. Keys of both formats are otherwise equal, and are
// accepted wherever a key is.
type Format string

// The formats.
const (
	FormatCay Format = "cay"
	FormatE2B Format = "e2b" // some of E2B's clients refuse to send any other format
)

const (
	secretBytes = 20          // 160 random bits cannot be guessed at any rate of calls
	markLength  = len("cay_") // all marks have this length
	// prefixLength is the number of characters of a secret that stay readable: the mark and 8 hex
	// digits, enough to tell an organization's keys apart, and no help in guessing the other 128
	// bits.
	prefixLength = markLength + 8

	maxKeyName = 128 // characters; part of the contract
	maxOrgName = 63  // characters; part of the contract
)

var idEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// newID returns an ID with 100 random bits.
func newID(mark string) string {
	var b [13]byte
	rand.Read(b[:]) // never fails: it would end the program instead
	return mark + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20]
}

// mark returns the first characters of the secrets of the format.
func (f Format) mark() string { return string(f) + "_" }

// newSecret returns the secret of a new key.
func newSecret(f Format) string {
	var b [secretBytes]byte
	rand.Read(b[:]) // never fails: it would end the program instead
	return f.mark() + hex.EncodeToString(b[:])
}

// parseSecret checks that text has the form of a secret, "cay_" or "e2b_" and 40 lower-case hex
// digits, and returns its hash.
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

// Scopes returns all scopes.
func Scopes() []Scope {
	return []Scope{SandboxesRead, SandboxesWrite, Exec, Files, TemplatesRead, TemplatesWrite, Admin}
}

// ParseScopes checks scopes as a user wrote them: at least one, and each known. It drops
// duplicates and returns them in the order of [Scopes]. Errors are Invalid, code
// "invalid_scopes".
func ParseScopes(names []string) ([]Scope, error) {
	if len(names) == 0 {
		return nil, fault.InvalidField("scopes", "must name at least one of %s", scopeList())
	}
	var scopes []Scope
	for _, name := range names {
		if !slices.Contains(Scopes(), Scope(name)) {
			return nil, fault.InvalidField("scopes", "%.40q is not one of %s", name, scopeList())
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

// checkKeyName allows any text that prints on one line, since key names are for people.
func checkKeyName(name string) error {
	if !utf8.ValidString(name) || name == "" || utf8.RuneCountInString(name) > maxKeyName ||
		strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fault.InvalidField("name", "must be 1 to %d printable characters", maxKeyName)
	}
	return nil
}

// checkOrgName allows DNS labels, since organization names appear in commands and addresses.
func checkOrgName(name string) error {
	ok := name != "" && len(name) <= maxOrgName && name[0] != '-'
	for _, c := range []byte(name) {
		ok = ok && (c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z')
	}
	if !ok {
		return fault.InvalidField("name",
			"must be 1 to %d lower-case letters, digits and '-', and not begin with '-'", maxOrgName)
	}
	return nil
}
