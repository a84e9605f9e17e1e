package httpserver

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// connectionsServer serves h with a limit of 16 connections.
func connectionsServer(t *testing.T, h http.HandlerFunc) (c *connections, addr string) {
	t.Helper()
	srv := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, IdleTimeout: time.Minute,
		Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	c = newConnections(16 * shareOfFiles)
	c.rest = 50 * time.Millisecond
	c.bound(srv)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }() // ends when srv is closed
	t.Cleanup(func() { _ = srv.Close() })
	return c, l.Addr().String()
}

// held waits until the server has at most atMost connections.
func (c *connections) held(t *testing.T, atMost int) {
	t.Helper()
	var n int
	// Poll until the deadline.
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		c.mu.Lock()
		n = len(c.all)
		c.mu.Unlock()
		if n <= atMost {
			return
		}
	}
	t.Errorf("%d connections are open, want at most %d", n, atMost)
}

func dialed(t *testing.T, addr, send string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := io.WriteString(conn, send); err != nil {
		t.Fatal(err)
	}
	return conn
}

// answered makes a request over a new connection.
func answered(t *testing.T, addr string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + addr + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); string(b) != "here" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

func here(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") }

func TestConnectionsAreBounded(t *testing.T) {
	const head = "GET / HTTP/1.1\r\nHost: x\r\n"
	for name, send := range map[string]string{
		"nothing sent":         "",
		"half a header":        head + "X-Slow: ",
		"at rest":              head + "\r\n",
		"body to come":         "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx",
		"HTTP/2":               "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
		"half a header, again": head + "X-Slow: a\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, addr := connectionsServer(t, here)
			for range 100 {
				dialed(t, addr, send)
			}
			c.held(t, 16)
			answered(t, addr)
		})
	}
}

// TestConnectionsInUseStay floods a server while it answers calls, some of them on upgraded
// connections.
func TestConnectionsInUseStay(t *testing.T) {
	const calls = 6
	goOn, begun := make(chan struct{}), make(chan struct{}, 2*calls)
	c, addr := connectionsServer(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/long":
			begun <- struct{}{}
			<-goOn
			here(w, r)
		case "/upgrade":
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			begun <- struct{}{}
			<-goOn
			_, _ = io.WriteString(conn, "here")
		default:
			here(w, r)
		}
	})
	var wg sync.WaitGroup
	for i := range calls {
		conn := dialed(t, addr, "GET "+[]string{"/long", "/upgrade"}[i%2]+" HTTP/1.0\r\n\r\n")
		wg.Go(func() {
			if b, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(b), "here") {
				t.Errorf("call %d was answered %q, %v", i, b, err)
			}
		})
		<-begun
	}
	for range 100 {
		dialed(t, addr, "GET / HTTP/1.1\r\n")
	}
	c.held(t, 16)
	answered(t, addr)
	close(goOn)
	wg.Wait()
	c.held(t, 16)
}

// TestConnectionsAllInUse makes as many calls as there may be connections, so that there is no room
// for another.
func TestConnectionsAllInUse(t *testing.T) {
	goOn := make(chan struct{})
	var begun sync.WaitGroup
	begun.Add(16)
	c, addr := connectionsServer(t, func(w http.ResponseWriter, r *http.Request) {
		begun.Done()
		<-goOn
	})
	for range 16 {
		dialed(t, addr, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	begun.Wait()
	conn := dialed(t, addr, "")
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the 17th is not closed: %d, %v", n, err)
	}
	c.held(t, 16)
	close(goOn)
}

// TestRefusedCallsAreNoCalls checks that calls whose body never arrives do not keep others out
// while the server waits for the body.
func TestRefusedCallsAreNoCalls(t *testing.T) {
	c, addr := connectionsServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength > 0 {
			WithoutCall(r, func() { _, _ = io.Copy(io.Discard, r.Body) })
		}
		here(w, r)
	})
	for range 100 {
		dialed(t, addr, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
	}
	c.held(t, 16)
	answered(t, addr)
}

// TestRestOfBodyIsBounded checks that the server closes a connection if the body of an answered
// request never arrives.
func TestRestOfBodyIsBounded(t *testing.T) {
	c, addr := connectionsServer(t, here)
	conn := dialed(t, addr, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v, %v", resp, err)
	}
	_, _ = io.Copy(io.Discard, resp.Body) // read to the end of the answer
	if _, err := in.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection is kept: %v", err)
	}
	c.held(t, 0)
	// A connection whose body was read is used again, however long the call took.
	_, addr = connectionsServer(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		here(w, r)
	})
	client := &http.Client{}
	defer client.CloseIdleConnections()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, "POST", "http://"+addr, strings.NewReader("whole"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); string(b) != "here" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		resp.Body.Close()
		time.Sleep(60 * time.Millisecond) // longer than the server reads the rest of a body
	}
}

// TestClosedConnectionIsNotCounted reads the first bytes of a connection just after it was closed as
// surplus. No other connection is closed in its place.
func TestClosedConnectionIsNotCounted(t *testing.T) {
	c := newConnections(0)
	c.most = 1
	srv := &http.Server{}
	c.bound(srv)
	first, second := net.Conn(&net.TCPConn{}), net.Conn(&net.UnixConn{}) // Close returns an error, which is ignored
	for _, conn := range []net.Conn{first, second} {
		srv.ConnContext(t.Context(), conn)
		srv.ConnState(conn, http.StateNew)
	}
	srv.ConnState(first, http.StateActive)
	if len(c.all) != 1 || c.all[second] == nil {
		t.Errorf("the connections are %v, want the second one alone", c.all)
	}
}
