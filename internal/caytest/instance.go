package caytest

import (
	"crypto/rand"
	"strings"
)

// Instance makes a name for what a test puts on the host: six characters, so that
// it fits into the name of a network link.
func Instance() string { return strings.ToLower(rand.Text()[:6]) }
