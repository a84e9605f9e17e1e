package agent

import (
	"net/http"
	"net/url"
	"strconv"

	"github.com/cayhq/cay/internal/agentapi"
)

// SignatureOf is the signature of a path for the tests of the wire; expiration 0 is none.
func SignatureOf(path, op, user, token string, expiration int64) string {
	q := url.Values{"path": {path}, "username": {user}}
	if expiration != 0 {
		q.Set("signature_expiration", strconv.FormatInt(expiration, 10))
	}
	return agentapi.Signature(map[string]string{"read": http.MethodGet, "write": http.MethodPost}[op], q, token)
}
