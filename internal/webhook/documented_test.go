package webhook_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/webhook"
)

// TestDocumentedReceivers runs the receivers of docs/webhooks.md. They take what is signed and refuse what is not.
func TestDocumentedReceivers(t *testing.T) {
	text, err := os.ReadFile("../../docs/webhooks.md")
	if err != nil {
		t.Fatal(err)
	}
	programs := map[string][]string{"Python": {caytest.RequirePython(t, "http.server")},
		"Node": {caytest.RequireProgram(t, "node")}}
	for name, program := range programs {
		block := regexp.MustCompile("(?s)<!-- receiver in " + name + " -->\n\n```[a-z]+\n(.*?)```").FindSubmatch(text)
		if block == nil {
			t.Fatalf("the document has no receiver in %s", name)
		}
		h := open(t, nil)
		h.org("org_a")
		l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		w := h.hook("org_a", fmt.Sprint("http://127.0.0.1:", port, "/"), "api_key.created")
		file := filepath.Join(t.TempDir(), "receiver.cjs")
		if err := os.WriteFile(file, block[1], 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), program[0], append(program[1:], file)...)
		cmd.Env = append(os.Environ(), "WEBHOOK_SECRET="+string(w.Secret), "PORT="+strconv.Itoa(port))
		var out strings.Builder
		cmd.Stdout = &out
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "that the receiver listens", func() bool {
			c, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", port))
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		broken, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", port)) // a request that ends in its body
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(broken, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"); err != nil {
			t.Fatal(err)
		}
		broken.Close()
		h.happen("org_a", "one")
		h.settled(w, 1)
		if _, err := h.Change(t.Context(), "org_a", w.ID, webhook.Change{Secret: new(webhook.Secret)}); err != nil {
			t.Fatal(err)
		}
		if a, err := h.Test(t.Context(), "org_a", w.ID); err != nil || a.Status != http.StatusUnauthorized {
			t.Errorf("%s answers a wrong signature with %+v, %v", name, a, err)
		}
		if status := old(t, fmt.Sprint("http://127.0.0.1:", port, "/"), w); status != http.StatusUnauthorized {
			t.Errorf("%s answers an old request with %d", name, status)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // it was killed
		if !strings.Contains(out.String(), "api_key.created\n") || strings.Contains(out.String(), "webhook.test") {
			t.Errorf("%s printed %q", name, out.String())
		}
	}
}

// old sends a request with a right signature that is ten minutes old, and returns the status of the answer.
func old(t *testing.T, url string, w webhook.Webhook) int {
	t.Helper()
	const body = `{"type":"webhook.test"}`
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range webhook.NewStandard(encode).Header(w, "msg_old", time.Now().Add(-10*time.Minute),
		[]byte(body)) {
		r.Header.Set(name, value)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	return answer.StatusCode
}
