package agentapi

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// pair returns both ends of a TCP connection.
func pair(t *testing.T) (host, agent *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	a, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return c.(*net.TCPConn), a
}

// answers does the agent's part of a handshake on a connection, and sends its error on the returned channel.
func answers(c net.Conn, key string) <-chan error {
	done := make(chan error, 1)
	go func() {
		var hello Hello
		_, err := io.ReadFull(c, hello[:])
		if err == nil {
			err = Answer(c, hello, key)
		}
		done <- err
	}()
	return done
}

func TestHandshake(t *testing.T) {
	host, agent := pair(t)
	done := answers(agent, "key")
	c, err := Authenticate(t.Context(), host, "key")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := c.Write([]byte("request")); n != 7 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	if _, err := c.Write([]byte(" more")); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Fatalf("the agent refuses: %v", err)
	}
	c.Close()
	if b, err := io.ReadAll(agent); err != nil || string(b) != "request more" {
		t.Errorf("the agent reads %q, %v", b, err)
	}
}

// TestHandshakeAhead checks that a connection without a request proves the host to the agent too.
func TestHandshakeAhead(t *testing.T) {
	host, agent := pair(t)
	done := answers(agent, "key")
	if _, err := Authenticate(t.Context(), host, "key"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("the agent refuses: %v", err)
	}
}

func TestHandshakeRefused(t *testing.T) {
	recorded := func(t *testing.T) (hello, answer, proof []byte) {
		host, agent := pair(t)
		var fromHost, fromAgent bytes.Buffer
		done := answers(recorder{agent, &fromHost, &fromAgent}, "key")
		c, err := Authenticate(t.Context(), host, "key")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(nil); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return fromHost.Bytes()[:HelloSize], fromAgent.Bytes(), fromHost.Bytes()[HelloSize:]
	}
	for name, answer := range map[string]func(*net.TCPConn){
		"another key": func(c *net.TCPConn) { <-answers(c, "other") },
		"a recording": func(c *net.TCPConn) {
			_, answer, _ := recorded(t)
			_, _ = c.Write(answer)
			_, _ = io.Copy(io.Discard, c)
		},
		"its own hello": func(c *net.TCPConn) {
			_, _ = io.CopyN(c, c, int64(HelloSize))
			_, _ = c.Write(make([]byte, nonceSize+ProofSize-HelloSize))
			_, _ = io.Copy(io.Discard, c)
		},
		"a relay": func(c *net.TCPConn) {
			host, agent := pair(t)
			done := answers(agent, "key")
			go func() { _, _ = io.Copy(c, host) }()
			_, _ = io.Copy(host, c)
			host.Close()
			if <-done == nil {
				t.Error("the agent takes a relayed connection")
			}
		},
		"HTTP": func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"+string(make([]byte, 100)))
			_, _ = io.Copy(io.Discard, c)
		},
	} {
		t.Run("host/"+name, func(t *testing.T) {
			host, agent := pair(t)
			over := make(chan struct{})
			go func() { answer(agent); close(over) }()
			if c, err := Authenticate(t.Context(), host, "key"); !errors.Is(err, ErrNotTheAgent) {
				t.Errorf("got %v, %v", c, err)
			}
			if _, err := host.Write([]byte("x")); err == nil {
				t.Error("the connection is open")
			}
			agent.Close()
			<-over
		})
	}
	hello, _, proof := recorded(t)
	for name, send := range map[string][2][]byte{
		"another key": {hello, make([]byte, ProofSize)}, "a recording": {hello, proof},
		"no magic": {bytes.Repeat([]byte{1}, HelloSize), proof},
	} {
		t.Run("agent/"+name, func(t *testing.T) {
			host, agent := pair(t)
			done := answers(agent, "key")
			_, _ = host.Write(send[0])
			_, _ = host.Write(send[1])
			if err := <-done; err == nil {
				t.Error("the agent is convinced")
			}
		})
	}
	if Answer(nil, Hello(hello), "") == nil {
		t.Error("an agent without a key answers")
	}
}

// TestHandshakeEnds checks that the host gives up on an agent that sends nothing or a part of its answer.
func TestHandshakeEnds(t *testing.T) {
	for _, said := range []int{0, nonceSize, nonceSize + ProofSize - 1} {
		host, agent := pair(t)
		_, _ = agent.Write(make([]byte, said))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := Authenticate(ctx, host, "key"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %d bytes: %v", said, err)
		}
		cancel()
	}
}

// recorder is a connection that copies what is read to in and what is written to out.
type recorder struct {
	net.Conn
	in, out *bytes.Buffer
}

func (r recorder) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.in.Write(b[:n])
	return n, err
}

func (r recorder) Write(b []byte) (int, error) {
	r.out.Write(b)
	return r.Conn.Write(b)
}
