package agentapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// TestSilentAgents checks that each call ends as unreachable when its agent falls silent, wherever in its
// answer, and that the context of the caller goes on.
func TestSilentAgents(t *testing.T) {
	over := make(chan struct{}) // ends handlers: a server that has not read a request's body does not see its caller leave
	wait := func(r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-over:
		}
	}
	silent := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_ = http.NewResponseController(w).Flush()
		wait(r)
	}
	for name, h := range map[string]http.HandlerFunc{
		"no head": func(_ http.ResponseWriter, r *http.Request) { wait(r) },
		"no body": silent,
		"half":    func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, `{"half`); silent(w, r) },
		"drops": func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			for r.Context().Err() == nil {
				_, _ = io.WriteString(w, "{")
				_ = http.NewResponseController(w).Flush()
				<-time.After(5 * time.Millisecond) // slower than patientPace
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := serve(t, h)
			c.Patience = 100 * time.Millisecond
			over = make(chan struct{})
			t.Cleanup(func() { close(over) })
			for call, do := range map[string]func(context.Context) error{
				"stat": func(ctx context.Context) error { _, err := c.Stat(ctx, target, "/a", ""); return err },
				"list": func(ctx context.Context) error {
					return c.List(ctx, target, "/a", "", 1, func(Entry) error { return nil })
				},
				"processes": func(ctx context.Context) error { _, err := c.Processes(ctx, target); return err },
				"follow": func(ctx context.Context) error {
					_, err := c.Follow(ctx, target, FollowRequest{Ref: "7"}, func(ProcessOutput) error { return nil })
					return err
				},
				"watch": func(ctx context.Context) error {
					return c.Watch(ctx, target, "/a", false, func() {}, func(Change) error { return nil })
				},
				"execute": func(ctx context.Context) error {
					_, err := c.Execute(ctx, target, ExecuteRequest{Command: "true", Timeout: time.Millisecond})
					return err
				},
				"upload": func(ctx context.Context) error {
					body := strings.NewReader(strings.Repeat("x", 8<<20))
					return c.Upload(ctx, target, UploadRequest{Path: "/a", Body: body, Size: 8 << 20})
				},
				"download": func(ctx context.Context) error {
					d, err := c.Download(ctx, target, "/a", "", "")
					if err == nil {
						_, err = io.Copy(io.Discard, d.Body)
						d.Body.Close()
					}
					return err
				},
			} {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				err := do(ctx)
				if f := fault.As(err); ctx.Err() != nil || f == nil || f.Code != fault.CodeSandboxUnreachable {
					t.Errorf("%s: %v, context %v; want %s", call, err, ctx.Err(), fault.CodeSandboxUnreachable)
				}
				cancel()
			}
		})
	}
}

// slowReader returns pieces, and takes longer for each than an agent may be silent.
type slowReader struct{ left int }

func (s *slowReader) Read(p []byte) (int, error) {
	<-time.After(150 * time.Millisecond) // longer than the patience
	if s.left--; s.left < 0 {
		return 0, io.EOF
	}
	return copy(p, "piece"), nil
}

func TestSlowCallersAreNotSilentAgents(t *testing.T) {
	c, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, strings.Repeat("x", 1<<20))
	})
	c.Patience = 100 * time.Millisecond
	if err := c.Upload(t.Context(), target, UploadRequest{Path: "/a", Body: &slowReader{3}, Size: -1}); err != nil {
		t.Errorf("uploading slowly: %v", err)
	}
	d, err := c.Download(t.Context(), target, "/a", "", "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Body.Close()
	<-time.After(3 * c.Patience) // the caller does not read
	if b, err := io.ReadAll(d.Body); err != nil || len(b) != 1<<20 {
		t.Errorf("downloading slowly: %d bytes, %v", len(b), err)
	}
}

// TestProcessThatDoesNotRead checks that a call lasts while the agent waits InputPatience for a process to read its
// input, and returns the agent's error.
func TestProcessThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		defer there.Close()
		c := NewClient(func(context.Context, string) (net.Conn, error) { return here, nil })
		go func() {
			r := bufio.NewReader(there)
			if _, err := http.ReadRequest(r); err != nil {
				t.Errorf("reading the call: %v", err)
				return
			}
			time.Sleep(InputPatience + time.Second) // and does not read the body
			fmt.Fprintf(there, "HTTP/1.1 409 Conflict\r\n%s: %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
				CodeHeader, fault.CodeStdinBlocked)
		}()
		_, err := c.WriteInput(t.Context(), target, "1", strings.NewReader(strings.Repeat("x", 1<<20)), false)
		if f := fault.As(err); f == nil || f.Code != fault.CodeStdinBlocked {
			t.Errorf("got %v", err)
		}
		c.CloseIdle()
	})
}

// TestBrief checks that the text of an agent is one short printable line in an error, which wraps its cause.
func TestBrief(t *testing.T) {
	err := unreachable(errors.New("\x1b[31m\nred\u202e\xff" + strings.Repeat("x", 10_000)))
	if text := err.Error(); len(text) > 2*maxSaid || strings.ContainsAny(text, "\x1b\n\u202e") || !utf8.ValidString(text) {
		t.Errorf("%q", text)
	}
	cause := errors.New("cause")
	if !errors.Is(unreachable(fmt.Errorf("wrapped: %w", cause)), cause) {
		t.Error("the cause is lost")
	}
}

func TestHeads(t *testing.T) {
	informational := "HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
	final := "HTTP/1.1 200 OK\r\nA: b\r\n\r\n"
	body := strings.Repeat("\n", 10_000)
	for name, c := range map[string]struct {
		text string
		bad  bool
	}{
		"a body of lines":   {final + body, false},
		"one informational": {informational + final + body, false},
		"many":              {strings.Repeat(informational, maxHeadLines) + final, true},
		"many lines":        {"HTTP/1.1 200 OK\r\n" + strings.Repeat("a:\n", maxHeadLines+1), true},
		"bare newlines":     {strings.Repeat("HTTP/1.1 100\n\n", maxHeadLines+1), true},
	} {
		for _, size := range []int{1, 7, 4096} {
			var h heads
			h.expect()
			var err error
			for b := []byte(c.text); len(b) > 0 && err == nil; b = b[min(size, len(b)):] {
				err = h.look(b[:min(size, len(b))])
			}
			if (err != nil) != c.bad {
				t.Errorf("%s, %d at once: %v", name, size, err)
			}
		}
	}
}

// TestOutputIsTaken checks that a stream takes the memory of a message from its account while the message comes,
// and returns it when the message is whole or the stream is closed.
func TestOutputIsTaken(t *testing.T) {
	b := budget.New(1<<20, 1<<20)
	var account budget.Account
	if err := account.Open(b, "a", 0); err != nil {
		t.Fatal(err)
	}
	half := strings.NewReader("\x00\x00\x00\x40\x00" + strings.Repeat("x", 8<<10))
	e := envelopes{ReadCloser: io.NopCloser(half), account: &account}
	if _, err := io.ReadAll(&e); err != nil || b.Used() != 3*16<<10 {
		t.Errorf("half a message of 16 KiB takes %d, %v", b.Used(), err)
	}
	if err := e.Close(); err != nil || b.Used() != 0 {
		t.Errorf("closed, it takes %d, %v", b.Used(), err)
	}
	for text, bad := range map[string]bool{
		"\x00\x00\x00\x20\x00" + strings.Repeat("x", 8<<10) + "\x02\x00\x00\x00\x02{}": false,
		"\x00\xff\xff\xff\xff": true,
	} {
		e := envelopes{ReadCloser: io.NopCloser(strings.NewReader(text)), account: &account}
		if _, err := io.ReadAll(&e); (err != nil) != bad || b.Used() != 0 {
			t.Errorf("%.10q: %v, and %d are held", text, err, b.Used())
		}
	}
	account.Close()
}
