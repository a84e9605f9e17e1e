package api

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/httpserver"
)

// dial sends the head of a request and the given body. The test does the rest.
func (h *testServer) dial(t *testing.T, method, path, id string, headers string, body string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: cay\r\nAuthorization: Bearer %s\r\nX-Request-Id: %s\r\n%s\r\n%s",
		method, path, h.key, id, headers, body)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// endless fakes an inside whose files never end and which discards uploads.
type endless struct{ *fakeAgent }

func (endless) Download(ctx context.Context, _ agentapi.Target, _, _, _ string) (*agentapi.Download, error) {
	return &agentapi.Download{Body: io.NopCloser(zeros{}), Size: -1, Status: 200, Header: http.Header{}}, nil
}

func (endless) Upload(_ context.Context, _ agentapi.Target, r agentapi.UploadRequest) error {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return fmt.Errorf("reading the body: %w", err)
	}
	return nil
}

// TestSlowSenders checks that callers that stop sending are answered and disconnected, however much
// they announced.
func TestSlowSenders(t *testing.T) {
	h := newTestServer(t, withAgent(endless{newFakeAgent()}))
	const short = 50 * time.Millisecond
	h.server.front.Patience = httpserver.Patience{Body: short, Stall: short, Drain: short}
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	for name, c := range map[string]struct {
		method, path, headers, body string
		status                      int
	}{
		"json":            {"POST", sbx + "/execute", "Content-Length: 100\r\n", `{"comm`, 400},
		"json in chunks":  {"POST", sbx + "/execute", "Transfer-Encoding: chunked\r\n", "5\r\n{\"com\r\n", 400},
		"file":            {"PUT", sbx + "/files?path=/a", "Content-Length: 100\r\n", "half", 400},
		"file in chunks":  {"PUT", sbx + "/files?path=/a", "Transfer-Encoding: chunked\r\n", "4\r\nhalf\r\n", 400},
		"refused at once": {"PUT", sbx + "/files?path=a", "Content-Length: 100\r\n", "half", 400},
		"without a route": {"POST", "/v1/nope", "Content-Length: 100\r\n", "half", 404},
	} {
		t.Run(name, func(t *testing.T) {
			conn := h.dial(t, c.method, c.path, "slow", c.headers, c.body)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			if resp.StatusCode != c.status || err != nil {
				t.Errorf("status %d %s, %v; want %d", resp.StatusCode, b, err, c.status)
			}
			if rest, err := io.ReadAll(conn); len(rest) > 0 || err != nil {
				t.Errorf("the connection is still open: %q, %v", rest, err)
			}
		})
	}
	if n := h.sandboxes.InUse(); n != 0 {
		t.Errorf("%d leases are still held", n)
	}
}

// TestSlowTaker checks that a caller that does not read a file does not keep a lease of the
// sandbox.
func TestSlowTaker(t *testing.T) {
	notForwarded(t, "the node releases the lease a moment later")
	h := newTestServer(t, withAgent(endless{newFakeAgent()}))
	h.server.front.Patience.Stall = 100 * time.Millisecond
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	h.dial(t, "GET", sbx+"/files?path=/a", "taker", "", "")
	if line := h.log.line(t, "taker"); line["error"] == nil || line["status"] != float64(200) &&
		line["status"] != float64(httpserver.StatusGone) {
		t.Errorf("log line %v", line)
	}
	if n := h.sandboxes.InUse(); n != 0 {
		t.Errorf("%d leases are still held", n)
	}
}

// TestDeadlinesEndWithTheCall checks that a deadline of one call affects neither the next call on
// the connection nor a command that takes longer than the deadline.
func TestDeadlinesEndWithTheCall(t *testing.T) {
	h := newTestServer(t)
	const short = 60 * time.Millisecond
	h.server.front.Patience = httpserver.Patience{Body: short, Stall: short, Drain: short}
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	h.agent.execute = func(ctx context.Context, _ agentapi.ExecuteRequest) (agentapi.ExecuteResult, error) {
		select {
		case <-ctx.Done():
			return agentapi.ExecuteResult{}, ctx.Err()
		case <-time.After(200 * time.Millisecond): // longer than any deadline
			return agentapi.ExecuteResult{Stdout: []byte("done")}, nil
		}
	}
	conn := h.dial(t, "GET", "/v1/me", "first", "", "")
	in := bufio.NewReader(conn)
	for i, next := range []string{
		"PUT " + sbx + "/files?path=/a HTTP/1.1\r\nHost: cay\r\nAuthorization: Bearer " + h.key + "\r\nContent-Length: 4\r\n\r\nfile",
		"POST " + sbx + "/execute HTTP/1.1\r\nHost: cay\r\nAuthorization: Bearer " + h.key + "\r\nContent-Length: 16\r\n\r\n{\"command\":\"id\"}",
		"PUT " + sbx + "/files?path=/b HTTP/1.1\r\nHost: cay\r\nAuthorization: Bearer " + h.key + "\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nfile",
		"DELETE " + sbx + "/files?path=/a HTTP/1.1\r\nHost: cay\r\nAuthorization: Bearer " + h.key + "\r\n\r\n",
		"",
	} {
		resp, err := http.ReadResponse(in, nil)
		for err == nil && resp.StatusCode == http.StatusContinue {
			resp, err = http.ReadResponse(in, nil)
		}
		if err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		if b, err := io.ReadAll(resp.Body); resp.StatusCode/100 != 2 || err != nil {
			t.Fatalf("answer %d: %d %s, %v", i, resp.StatusCode, b, err)
		}
		<-time.After(100 * time.Millisecond) // let the deadlines of that call pass
		if _, err := io.WriteString(conn, next); err != nil {
			t.Fatal(err)
		}
	}
}
