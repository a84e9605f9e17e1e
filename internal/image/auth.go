package image

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Auth is what a registry wants to know of who pulls: a user's name and password,
// or a bearer token. It prints as nothing, so that no log shows it by accident.
type Auth struct {
	Username string `json:"-"`
	Password string `json:"-"`
	Token    string `json:"-"` // in place of both
}

// Format implements fmt.Formatter: whatever the verb, no secret comes out.
func (Auth) Format(f fmt.State, _ rune) { fmt.Fprint(f, "(hidden)") }

// authenticator is the library's form of it; nil asks anonymously.
func (a *Auth) authenticator() authn.Authenticator {
	if a == nil {
		return authn.Anonymous
	}
	return authn.FromConfig(authn.AuthConfig{Username: a.Username, Password: a.Password, RegistryToken: a.Token})
}

// queries are those of URLs: what signs a redirect or asks for a token.
var queries = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

// hide returns an error with the text of err, less what is secret: credentials,
// also as a header has them, and the queries of URLs. The original is not in its
// chain, since it would tell.
func (a *Auth) hide(err error) error {
	text := queries.ReplaceAllString(err.Error(), "$1?…")
	if a != nil {
		pair := base64.StdEncoding.EncodeToString([]byte(a.Username + ":" + a.Password))
		for _, secret := range []string{pair, a.Password, a.Token} {
			if secret == "" {
				continue
			}
			quoted := strconv.Quote(secret)
			for _, form := range []string{secret, quoted[1 : len(quoted)-1], url.QueryEscape(secret), url.PathEscape(secret)} {
				text = strings.ReplaceAll(text, form, "…")
			}
		}
	}
	return errors.New(text)
}
