package api

import (
	"bytes"
	"html/template"
	"net/http"
	"strings"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
)

// wantsPage reports whether a browser asks for the answer in order to show it to a person.
func wantsPage(r *http.Request) bool {
	return strings.Contains(r.Header.Get("Accept"), "text/html") && r.Header.Get("Upgrade") == ""
}

// errorPage is self-contained, because it is shown on host names that serve no other file of ours.
var errorPage = template.Must(template.New("error").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{.Title}}</title>
<style>
body{font:16px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:34rem;padding:0 1.5rem;color:#222;background:#fff}
code{background:#f2f2f2;padding:.1em .3em;border-radius:3px}small{color:#777}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}code{background:#333}}
</style></head><body>
<h1>{{.Title}}</h1>
<p>{{.Detail}}.</p>
{{with .Hint}}<p>{{.}}</p>{{end}}
<p><small>{{.Status}} <code>{{.Code}}</code>, request <code>{{.RequestID}}</code></small></p>
</body></html>
`))

// writePage writes a fault as a page for people.
func (s *server) writePage(w http.ResponseWriter, r *http.Request, status int, f *fault.Error) {
	c := callOf(r)
	title, hint := http.StatusText(status), ""
	switch f.Code {
	case fault.CodePortClosed:
		title, hint = "Nothing to see here yet", "Start a server in the sandbox, then reload this page."
	case fault.CodeUnauthenticated:
		title, hint = "This port is private", "Ask the owner of the sandbox for a link."
	case fault.CodeSignatureExpired:
		title, hint = "This link has expired", "Ask the owner of the sandbox for another one."
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	var page bytes.Buffer
	err := errorPage.Execute(&page, struct {
		Title, Detail, Hint, Code, RequestID string
		Status                               int
	}{title, f.Detail, hint, f.Code, c.ID, status})
	if err != nil { // cannot happen with texts and numbers
		panic(err)
	}
	httpserver.Refuse(w, r, status, f.Code, page.Bytes())
}
