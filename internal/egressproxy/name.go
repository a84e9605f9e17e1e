package egressproxy

import (
	"strings"
)

// maxName is the longest domain name as text, RFC 1035 section 2.3.4.
const maxName = 253

// canonical returns a domain name in lower case and without a dot at its end, or false if name is
// none. It allows only letters, digits, hyphens and underscores. DNS allows any byte in a label,
// even dots, and a name that a server or resolver reads differently would circumvent the policy.
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

// allows reports whether the sandbox may reach a canonical name.
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

// allowsAny reports whether the sandbox may reach one of the names.
func (b Sandbox) allowsAny(names []string) bool {
	for _, n := range names {
		if b.allows(n) {
			return true
		}
	}
	return false
}
