package egressproxy

import (
	"strings"
)

// maxName is the longest domain name as text, RFC 1035 section 2.3.4.
const maxName = 253

// canonical is a domain name in lower case and without a dot at its end; false if it is
// none. Only letters, digits, hyphens and underscores are let through: DNS knows labels
// with any byte, dots included, and a name that means one thing to us and another to a
// server or a resolver is a way round.
func canonical(name string) (string, bool) {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > maxName {
		return "", false
	}
	label := 0
	for i := range len(name) {
		switch c := name[i]; {
		case c == '.':
			if label == 0 {
				return "", false
			}
			label = 0
			continue
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return "", false
		}
		if label++; label > 63 {
			return "", false
		}
	}
	return strings.ToLower(name), label > 0
}

// allows reports whether the box may reach a canonical name.
func (b Sandbox) allows(name string) bool {
	for _, d := range b.Domains {
		if below, ok := strings.CutPrefix(d, "*"); ok {
			if len(name) > len(below) && strings.HasSuffix(name, below) {
				return true
			}
		} else if name == d {
			return true
		}
	}
	return false
}

// allowsAny reports whether the box may reach one of the names.
func (b Sandbox) allowsAny(names []string) bool {
	for _, n := range names {
		if b.allows(n) {
			return true
		}
	}
	return false
}
