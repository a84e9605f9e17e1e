package egressproxy

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

const (
	metadataTime   = 5 * time.Second  // time for a request, and for its answer
	metadataIdle   = 30 * time.Second // time between two requests of a connection
	metadataHeader = 4 << 10          // bytes of a request's header (net/http adds 4 KiB of slack)
)

// about is [Metadata] as JSON.
type about struct {
	ID        string            `json:"id"`
	Template  string            `json:"template"`
	Mode      string            `json:"mode"`
	Metadata  map[string]string `json:"metadata"`
	ExpiresAt string            `json:"expires_at,omitempty"` // RFC 3339
}

// serveMetadata serves the requests of one connection.
func (p *Proxy) serveMetadata(_ context.Context, c *net.TCPConn) {
	from := source(c)
	sandbox, handle, ok := p.host.Find(from)
	w := subject{handle, sandbox.Owner}
	if !ok {
		reset(c)
		return
	}
	if !p.metadataConns.enter(w) {
		p.turnAway(handle, c)
		return
	}
	defer p.metadataConns.leave(w)
	server := &http.Server{
		Handler:                      p.metadataHandler(from, handle),
		ReadTimeout:                  metadataTime,
		WriteTimeout:                 metadataTime,
		IdleTimeout:                  metadataIdle,
		MaxHeaderBytes:               metadataHeader,
		ErrorLog:                     slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		DisableGeneralOptionsHandler: true,
	}
	serveConn(server, c)
}

// metadataHandler answers the sandbox that the connection comes from. The request's host and
// sender do not count.
func (p *Proxy) metadataHandler(from netip.Addr, handle any) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, now, ok := p.host.Find(from); !ok || now != handle {
			panic(http.ErrAbortHandler) // the sandbox has ended; another one may have its address
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			problem(w, http.StatusMethodNotAllowed, "method_not_allowed", "only GET and HEAD")
			return
		}
		m, err := p.host.Metadata(r.Context(), handle)
		if err != nil {
			p.log.Error("looking up metadata for a sandbox", "error", err)
			problem(w, http.StatusInternalServerError, "internal", "the metadata is not available at the moment")
			return
		}
		contentType, body, ok := m.at(r.URL.Path)
		if !ok {
			problem(w, http.StatusNotFound, "not_found",
				"there are /, /id, /template, /mode, /expires_at (if it expires) and /metadata/KEY")
			return
		}
		write(w, http.StatusOK, contentType, body)
	})
}

// at returns the content that the service has at a path.
func (m Metadata) at(path string) (contentType string, body []byte, ok bool) {
	const text = "text/plain; charset=utf-8"
	expires := ""
	if !m.ExpiresAt.IsZero() {
		expires = m.ExpiresAt.UTC().Format(time.RFC3339)
	}
	switch path {
	case "/", "/v1":
		a := about{m.ID, m.Template, m.Mode, m.Metadata, expires}
		if a.Metadata == nil {
			a.Metadata = map[string]string{}
		}
		return "application/json", mustJSON(a), true
	case "/id":
		return text, []byte(m.ID), true
	case "/template":
		return text, []byte(m.Template), true
	case "/mode":
		return text, []byte(m.Mode), true
	case "/expires_at":
		return text, []byte(expires), expires != ""
	}
	key, ok := strings.CutPrefix(path, "/metadata/")
	value, is := m.Metadata[key]
	return text, []byte(value), ok && is
}

// problem writes an error as RFC 9457 says.
func problem(w http.ResponseWriter, status int, code, detail string) {
	write(w, status, "application/problem+json", mustJSON(struct {
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
		Code   string `json:"code"`
	}{"urn:cay:problem:" + code, http.StatusText(status), status, detail, code}))
}

func write(w http.ResponseWriter, status int, contentType string, body []byte) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(body) // a failure concerns the sandbox only, which is gone
}

// mustJSON encodes v, which must be a struct of strings, so that it cannot fail.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return append(b, '\n')
}
