package egressproxy

import (
	"context"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"
)

const (
	webIdle   = 2 * time.Minute // time between two requests of a connection
	webHeader = 64 << 10        // bytes of a request's header
)

// webConn is the client's connection, beginning with the bytes already read from it.
type webConn struct {
	*net.TCPConn
	first []byte
}

func (c *webConn) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.TCPConn.Read(b)
}

// serveHTTP passes on the requests of a connection, each after checking its Host. It writes
// requests anew from what net/http understood, so that the server cannot understand them
// differently: no second Host, no target with another name, no body of unclear length.
func (s *session) serveHTTP() error {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := s.connect(ctx)
			if err != nil {
				return nil, err // not a nil *net.TCPConn in an interface
			}
			return c, nil
		},
		MaxConnsPerHost:        1,
		DisableCompression:     true,
		IdleConnTimeout:        webIdle,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 1 << 20,
	}
	defer transport.CloseIdleConnections()
	server := &http.Server{
		Handler:                      s.web(transport),
		ReadHeaderTimeout:            s.proxy.hello,
		IdleTimeout:                  webIdle,
		MaxHeaderBytes:               webHeader,
		ErrorLog:                     s.webLog(),
		DisableGeneralOptionsHandler: true,
	}
	serveConn(server, &webConn{TCPConn: s.client, first: s.first.take()})
	return nil
}

func (s *session) webLog() *log.Logger {
	return slog.NewLogLogger(s.proxy.log.Handler(), slog.LevelDebug)
}

// web returns a handler that checks requests and passes them on over transport.
func (s *session) web(transport http.RoundTripper) http.Handler {
	return s.checked(&httputil.ReverseProxy{
		Transport:     transport,
		FlushInterval: -1, // pass on at once
		ErrorLog:      s.webLog(),
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", s.to.String()
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			r.Out.Host = r.In.Host
		},
		// The client sees what it would without a proxy: a server that cannot be reached, or that
		// breaks off.
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { s.kill() },
	})
}

// checked returns a handler that refuses requests for names that are not allowed.
func (s *session) checked(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		if r.Method == http.MethodConnect || r.ProtoMajor != 1 {
			err = s.deny(r.Host, errRefused)
		} else {
			err = s.admit(hostName(r.Host))
		}
		if err != nil {
			s.proxy.log.Debug("a sandbox's request", "to", s.to, "error", err)
			s.kill()
			panic(http.ErrAbortHandler)
		}
		// A WebSocket carries no names that could be checked; HTTP/2 would.
		if u := r.Header.Values("Upgrade"); len(u) != 1 || !strings.EqualFold(u[0], "websocket") {
			r.Header.Del("Upgrade")
		}
		r.Header.Del("Http2-Settings")
		// Without this net/http would add headers that the server left out.
		w.Header()["Date"], w.Header()["Content-Type"] = nil, nil
		next.ServeHTTP(w, r)
	})
}

// hostName returns the name in a Host header, which may have a port.
func hostName(host string) string {
	name, port, ok := strings.Cut(host, ":")
	if ok && strings.Trim(port, "0123456789") != "" {
		return host // no such name is allowed
	}
	return name
}
