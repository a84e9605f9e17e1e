package portproxy

import (
	"encoding/base64"
	"net/http"
	"slices"
	"strings"
)

// marks are the first parts of cay's secrets. Each secret is recognised by its form:
//
//	cay_, e2b_   and 40 hex digits: an API key
//	cays_        and 48 hex digits: a signature, which opens a port
//	cayt_        and 40 hex digits: a token, with which E2B's clients reach one sandbox
//	v1_          and 43 of base64: the signature of an E2B client for one file
//	at.sum       6 of base 36 and 43 of base64: a signature of a server before cays_, valid
//	             for a day at most after the server was replaced
//
// A value of the parameter cay_token counts as a signature too.
var marks = []string{"cay_", "e2b_", "cays_", "cayt_"}

const (
	// minSecret is the number of letters and digits after a mark that make a secret. Secrets have 40
	// or more. A lower bound would catch names such as cay_theme, a higher one would miss a secret
	// that was cut short.
	minSecret = 32

	// sumLength is the length of 32 bytes in base64 without padding.
	sumLength = 43

	// minEncoded is the length in base64 of the shortest secret.
	minEncoded = (len("cay_") + minSecret) * 4 / 3

	// maxLayers is the number of nested encodings that are undone. A link within a link within Basic
	// credentials has three. More would only cost time.
	maxLayers = 3
)

// HasSecret reports whether a text holds a key, a signature or a token of cay's: plain, in
// percent-encoding, or in base64.
func HasSecret(text string) bool {
	return within(text, maxLayers, func(text string) bool {
		return hasMark(text, marks) || hasSum(text) || hasParam(text)
	})
}

// HasKey reports whether a text holds an API key, in the forms that [HasSecret] knows. A key opens all that its
// organization has; signatures and tokens open one sandbox.
func HasKey(text string) bool {
	return within(text, maxLayers, func(text string) bool { return hasMark(text, marks[:2]) })
}

// within reports whether a text, or one that is encoded in it, satisfies is.
func within(text string, layers int, is func(text string) bool) bool {
	if is(text) {
		return true
	}
	if layers == 0 {
		return false
	}
	if plain := unescape(text); plain != text && within(plain, layers-1, is) {
		return true
	}
	for run := range encoded(text) {
		for skip := range 4 { // the secret may begin within a group of four characters
			if plain := decode(run[skip:]); within(plain, layers-1, is) {
				return true
			}
		}
	}
	return false
}

// hasMark reports whether a text holds one of the marks, followed by enough letters and digits. It ignores case,
// since some proxies change the case of headers.
func hasMark(text string, marks []string) bool {
	for i := 0; i < len(text)-minSecret; i++ {
		if text[i] != '_' {
			continue
		}
		digits := 0
		for digits < minSecret && i+1+digits < len(text) && isAlnum(text[i+1+digits]) {
			digits++
		}
		if digits == minSecret && slices.ContainsFunc(marks, func(mark string) bool {
			return i+1 >= len(mark) && strings.EqualFold(text[i+1-len(mark):i+1], mark)
		}) {
			return true
		}
	}
	return false
}

// hasSum reports whether a text holds a signature of an E2B client or of an older server.
func hasSum(text string) bool {
	for i := 2; i < len(text)-sumLength; i++ {
		var sign func(c byte) bool // reports whether c belongs to the alphabet
		switch {
		case text[i] == '_' && endsInWord(text[:i], isVersion) && !strings.HasSuffix(text[:i], "/v1"): // "/v1_…" is a path
			sign = func(c byte) bool { return isAlnum(c) || c == '+' || c == '/' }
		case text[i] == '.' && endsInWord(text[:i], isTime):
			sign = func(c byte) bool { return isAlnum(c) || c == '-' || c == '_' }
		default:
			continue
		}
		n := 0
		for n <= sumLength && i+1+n < len(text) && sign(text[i+1+n]) {
			n++
		}
		if n >= sumLength && isMixed(text[i+1:i+1+sumLength]) && (text[i] == '_' || n == sumLength) {
			return true
		}
	}
	return false
}

// isMixed reports whether a text has capital and small letters, as 32 random bytes in base64 do.
// The path of a page seldom does.
func isMixed(text string) bool { return strings.ToLower(text) != text && strings.ToUpper(text) != text }

// endsInWord reports whether a text ends in a word that satisfies is. The word must not be part of a
// longer one, or follow another one and a dot, as in a JWT.
func endsInWord(text string, is func(word string) bool) bool {
	n := 0
	for n < len(text) && n < 8 && isAlnum(text[len(text)-1-n]) {
		n++
	}
	word, before := text[len(text)-n:], text[:len(text)-n]
	return is(word) && (before == "" || !isAlnum(before[len(before)-1]) &&
		!strings.ContainsRune("._-+", rune(before[len(before)-1])))
}

func isVersion(word string) bool { return word == "v1" }

// isTime reports whether a word is a time of the years 2025 to 2028 in base 36, to the second. The
// servers that made such signatures ran in these years.
func isTime(word string) bool {
	return len(word) == 6 && ('t' <= word[0] && word[0] <= 'u') && strings.ToLower(word) == word
}

// hasParam reports whether a text holds the parameter cay_token with a value.
func hasParam(text string) bool {
	for {
		_, rest, ok := strings.Cut(text, TokenParam+"=")
		if !ok {
			return false
		}
		if rest != "" && rest[0] != '&' {
			return true
		}
		text = rest
	}
}

// unescape undoes percent-encoding. It leaves wrong escapes as they are.
func unescape(text string) string {
	if !strings.Contains(text, "%") {
		return text
	}
	plain := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] == '%' && i+2 < len(text) {
			high, low := hexDigit(text[i+1]), hexDigit(text[i+2])
			if high >= 0 && low >= 0 {
				plain = append(plain, byte(high<<4|low))
				i += 2
				continue
			}
		}
		plain = append(plain, text[i])
	}
	return string(plain)
}

func hexDigit(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return int(c|0x20-'a') + 10
	}
	return -1
}

// encoded yields the parts of a text that could hold a secret in base64.
func encoded(text string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for begin := 0; begin < len(text); {
			end := begin
			for end < len(text) && isBase64(text[end]) {
				end++
			}
			if end-begin >= minEncoded && !yield(text[begin:end]) {
				return
			}
			begin = end + 1
		}
	}
}

var urlToStd = strings.NewReplacer("-", "+", "_", "/")

// decode decodes base64 of either alphabet, as far as it goes.
func decode(text string) string {
	if len(text)%4 == 1 {
		text = text[:len(text)-1]
	}
	plain, err := base64.RawStdEncoding.DecodeString(urlToStd.Replace(text))
	if err != nil {
		return "" // cannot happen, since encoded yields only characters of the alphabets
	}
	return string(plain)
}

func isAlnum(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
}

// isBase64 reports whether a character belongs to one of the two alphabets.
func isBase64(c byte) bool { return isAlnum(c) || c == '+' || c == '/' || c == '-' || c == '_' }

// WithoutSecrets removes keys, signatures and tokens of cay's from a request's header, wherever they
// are. It drops the whole value that holds one; of a cookie header it drops only the pair.
func WithoutSecrets(h http.Header) {
	h.Del(KeyHeader)
	for name, values := range h {
		switch {
		case HasSecret(name):
			delete(h, name)
			continue
		case name == "Cookie":
			continue
		}
		kept := values[:0:0]
		for _, v := range values {
			if !HasSecret(v) {
				kept = append(kept, v)
			}
		}
		if len(kept) == 0 {
			delete(h, name)
		} else if len(kept) < len(values) {
			h[name] = kept
		}
	}
	cookies := h.Values("Cookie")
	h.Del("Cookie")
	for _, line := range cookies {
		var kept []string
		for pair := range strings.SplitSeq(line, ";") {
			pair = strings.TrimSpace(pair)
			if name, _, _ := strings.Cut(pair, "="); strings.TrimSpace(name) != TokenCookie && name != "" && !HasSecret(pair) {
				kept = append(kept, pair)
			}
		}
		if len(kept) > 0 {
			h.Add("Cookie", strings.Join(kept, "; "))
		}
	}
}

// WithoutToken removes the parameter cay_token, and others that hold a secret, from a query. It
// leaves the rest as it is.
func WithoutToken(query string) string {
	var kept []string
	for pair := range strings.SplitSeq(query, "&") {
		name, _, _ := strings.Cut(pair, "=")
		if strings.ReplaceAll(unescape(name), "+", " ") == TokenParam || HasSecret(pair) {
			continue // in any encoding
		}
		kept = append(kept, pair)
	}
	return strings.Join(kept, "&")
}
