package agent

import "strconv"

// SignatureOf is signature for the tests of the wire; expiration 0 is none.
func SignatureOf(path, op, user, token string, expiration int64) string {
	text := ""
	if expiration != 0 {
		text = strconv.FormatInt(expiration, 10)
	}
	return signature(path, op, user, token, text)
}
