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

// Auth holds the credentials for a registry: a user's name and password, or a bearer token. It
// does not print them, so that no log shows them by accident.
type Auth struct {
	Username string `json:"-"`
	Password string `json:"-"`
	Token    string `json:"-"` // instead of both
	// AWSRegion, if set, makes Username and Password an access key of AWS and its secret, for the registry in the region.
	AWSRegion string `json:"-"`
}

// Format implements fmt.Formatter. It prints no secret, whatever the verb.
func (Auth) Format(f fmt.State, _ rune) { fmt.Fprint(f, "(hidden)") }

// authenticator returns the library's form of the credentials. Without any it is anonymous.
func (a *Auth) authenticator() authn.Authenticator {
	if a == nil {
		return authn.Anonymous
	}
	return authn.FromConfig(authn.AuthConfig{Username: a.Username, Password: a.Password, RegistryToken: a.Token})
}

// queries matches the queries of URLs, which may hold the signature of a redirect or a request
// for a token.
var queries = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

// hide returns an error with the text of err without secrets: credentials, also in the form of a
// header, and the queries of URLs. err itself is not in its chain, since that would reveal them.
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
