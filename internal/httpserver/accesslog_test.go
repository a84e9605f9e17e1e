package httpserver

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// write writes n lines of one caller.
func write(l *accessLog, n int, remote, path string, e entry) {
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr, r.URL.Path = remote, path
	for range n {
		l.write(r, e)
	}
}

func newLog() (*accessLog, *bytes.Buffer) {
	var b bytes.Buffer
	return newAccessLog(slog.New(slog.NewJSONHandler(&b, nil))), &b
}

// TestLinesAreBounded sends texts of any length.
func TestLinesAreBounded(t *testing.T) {
	l, b := newLog()
	long := strings.Repeat("é", 30_000)
	r := httptest.NewRequest("GET", "/", nil)
	r.Method, r.URL.Path, r.RemoteAddr = long, "/"+long, long
	for _, key := range []string{"", "key_a"} {
		b.Reset()
		l.write(r, entry{ID: "req_1", Key: key, Sandbox: long, Err: errors.New("stack")})
		if b.Len() > 2000 || !strings.Contains(b.String(), "60001 bytes") || strings.Contains(b.String(), `\ufffd`) {
			t.Errorf("with the key %q the line has %d bytes: %.3000s", key, b.Len(), b)
		}
	}
	b.Reset()
	l.write(r, entry{Err: errors.New(strings.Repeat("x", 1<<20))})
	if b.Len() > maxError+2000 {
		t.Errorf("an error makes a line of %d bytes", b.Len())
	}
}

// TestStrangersCannotFillTheLog sends requests without a key as fast as possible.
func TestStrangersCannotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, b := newLog()
		for range 100 { // 10 seconds of 10,000 a second, of which one has a key
			write(l, 500, "192.0.2.1:1", "/", entry{})
			for i := range 500 {
				write(l, 1, fmt.Sprintf("198.51.100.%d:1", i%256), "/many", entry{})
			}
			write(l, 1, "192.0.2.1:1", "/keyed", entry{Key: "key_a", Org: "org_a"})
			write(l, 500, "192.0.2.1:1", "/limited", entry{Key: "key_a", Org: "org_a", Status: 429})
			time.Sleep(100 * time.Millisecond)
		}
		out := b.String()
		if n := strings.Count(out, `"msg":"request"`); n > totalBurst+10*totalPerSecond+100+1 {
			t.Errorf("%d lines are written", n)
		}
		if n := strings.Count(out, `"path":"/",`); n > eachBurst+10*eachPerSecond+1 {
			t.Errorf("one address has %d lines", n)
		}
		if n := strings.Count(out, "/keyed"); n != 100 {
			t.Errorf("a caller with a key has %d lines of 100", n)
		}
		if n := strings.Count(out, "/limited"); n > eachBurst+10*eachPerSecond+1 {
			t.Errorf("a caller beyond its rate has %d lines", n)
		}
		if n := strings.Count(out, "some are left out"); n != 1 {
			t.Errorf("it is said %d times that lines are left out", n)
		}
		b.Reset()
		time.Sleep(time.Minute)
		write(l, 1, "192.0.2.1:1", "/", entry{})
		if !strings.Contains(b.String(), `"count":1`) || !strings.Contains(b.String(), `"path":"/"`) {
			t.Errorf("afterwards the log has %s", b)
		}
		b.Reset()
		time.Sleep(time.Minute)
		write(l, 1, "192.0.2.1:1", "/", entry{})
		if strings.Contains(b.String(), "left out") {
			t.Errorf("what is over is told again: %s", b)
		}
	})
}
