package link

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/httpserver"
)

// TestSlowReaders forwards endless answers to callers that read nothing, and checks what this process, the replica,
// holds for each. The node is another process.
func TestSlowReaders(t *testing.T) {
	const readers, most = 200, httpserver.ForwardCost + httpserver.CallCost
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	child{Authority: a.Save(t), Node: "n1", Address: address}.start(t, nil)
	linked(t, hub, "n1")
	forwarder := &httpserver.Forwarder{Via: hub.Transport, Log: quiet()}
	front := httpserver.New(httpserver.Config{Log: slog.New(slog.DiscardHandler), Patience: httpserver.Usual,
		Failed: func(string) error { return nil },
		Problem: func(w http.ResponseWriter, r *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}})
	srv := httpserver.Server("", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		front.Serve(w, r, func(w *httpserver.Recorder, r *http.Request) error {
			return forwarder.Forward(w, r, "n1", httpserver.Passage{ID: httpserver.CallOf(r).ID, Front: "api"})
		})
	}), quiet())
	l := must((&net.ListenConfig{Control: smallBuffers}).Listen(t.Context(), "tcp4", "127.0.0.1:0"))
	done := make(chan struct{})
	go func() {
		_ = srv.Serve(l) // ends when srv is closed
		close(done)
	}()
	defer func() {
		_ = srv.Close()
		<-done
	}()
	before := held(t)
	for range readers {
		c, err := (&net.Dialer{Control: smallBuffers}).Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /endless HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil { // the answer has begun
			t.Fatal(err)
		}
	}
	each := (held(t) - before) / readers // what the answers hold has settled when they have stalled
	t.Logf("a forwarded call whose caller does not read holds %d bytes", each)
	if each > most {
		t.Errorf("a call holds %d bytes, over %d", each, most)
	}
	for range 20 {
		if err := call(hub, "n1", "meanwhile"); err != nil {
			t.Fatal(err)
		}
	}
}

// smallBuffers makes the kernel hold little for a connection between a caller and the replica. Otherwise it takes long
// until nothing more fits into it.
func smallBuffers(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10))
	})
	return errors.Join(err, failed)
}
