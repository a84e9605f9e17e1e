package httpserver

import (
	"log/slog"
	"net/http"
	"time"
)

// Limits on slow and absent callers. A caller on a slow line must be able to work; a caller that
// only holds connections open must not.
const (
	headerTimeout  = 10 * time.Second // to send a request's headers
	idleTimeout    = 2 * time.Minute  // between two requests on a connection
	maxHeaderBytes = 32 << 10         // fits a key, an escaped path of 4 KiB and filters; read before the caller is known
	// http2Window limits the bytes of unread bodies that an HTTP/2 connection can make the server
	// hold. 64 KiB - 1 is the least that HTTP/2 allows, and the budget does not count it. At a round
	// trip of 50 ms it lets an upload reach 1.3 MB a second; a larger window uploads faster and holds
	// more uncounted memory.
	http2Window = 64<<10 - 1
	// http2Streams limits the concurrent calls on one HTTP/2 connection.
	http2Streams = 100
)

// Server returns an HTTP server that protects itself against slow callers. It sets no timeout for
// whole requests, because commands and transfers may take long; the handler checks that they make
// progress.
//
// The server also speaks HTTP/2 without TLS, but only to clients that begin with it: proxies that
// terminate TLS in front of the server, and gRPC clients.
func Server(addr string, h http.Handler, log *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{
		Protocols:         protocols,
		Addr:              addr,
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: http2Window, MaxReceiveBufferPerStream: http2Window,
			MaxConcurrentStreams: http2Streams},
	}
	newConnections(files()).bound(srv)
	return srv
}
