package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/cayhq/cay/internal/caytest"
)

// browser drives one page in a headless Chromium over the DevTools protocol. It has only the few
// calls that the tests need, so a library would be larger than this.
type browser struct {
	t    *testing.T
	ctx  context.Context
	conn *websocket.Conn
	last int // id of the last call
}

// openPage starts a Chromium with the page. Both end with the test.
func openPage(t *testing.T, ctx context.Context, page string, flags ...string) *browser {
	t.Helper()
	program := caytest.RequireProgram(t, "chromium")
	dir, err := os.MkdirTemp("", "cay-chromium-") // t.TempDir would be removed while the last processes still write
	if err != nil {
		t.Fatal(err)
	}
	flags = append([]string{"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--remote-debugging-port=0", "--user-data-dir=" + dir}, flags...)
	cmd := exec.Command(program, append(flags, page)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // the whole process group
		_ = cmd.Wait()                                      // the browser was killed
		_ = os.RemoveAll(dir)                               // a directory that stays harms no other test
	})
	b := &browser{t: t, ctx: ctx}
	address := b.target(dir)
	if b.conn, _, err = websocket.Dial(ctx, address, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.conn.CloseNow() }) // the browser was killed
	b.conn.SetReadLimit(16 << 20)
	return b
}

// target waits for the page and returns the address of its DevTools connection.
func (b *browser) target(dir string) string {
	b.t.Helper()
	for ; b.ctx.Err() == nil; time.Sleep(50 * time.Millisecond) { // a poll with a deadline
		port, err := os.ReadFile(filepath.Join(dir, "DevToolsActivePort"))
		if err != nil || len(strings.Fields(string(port))) == 0 { // the file is being written
			continue
		}
		resp, err := http.Get("http://127.0.0.1:" + strings.Fields(string(port))[0] + "/json")
		if err != nil {
			continue
		}
		var targets []struct {
			Type string `json:"type"`
			URL  string `json:"webSocketDebuggerUrl"`
		}
		err = json.NewDecoder(resp.Body).Decode(&targets)
		resp.Body.Close()
		for _, target := range targets {
			if err == nil && target.Type == "page" {
				return target.URL
			}
		}
	}
	b.t.Fatal("the browser shows no page")
	return ""
}

// call makes one DevTools call and decodes its result.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	b.last++
	text, err := json.Marshal(object{"id": b.last, "method": method, "params": params})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := b.conn.Write(b.ctx, websocket.MessageText, text); err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
	for {
		_, text, err := b.conn.Read(b.ctx)
		if err != nil {
			b.t.Fatalf("%s: %v", method, err)
		}
		var reply struct {
			ID     int             `json:"id"`
			Error  json.RawMessage `json:"error"`
			Result json.RawMessage `json:"result"`
		}
		if err := json.Unmarshal(text, &reply); err != nil {
			b.t.Fatal(err)
		}
		if reply.ID != b.last {
			continue // an event
		}
		if err := json.Unmarshal(reply.Result, result); reply.Error != nil || err != nil {
			b.t.Fatalf("%s: %s, %v", method, reply.Error, err)
		}
		return
	}
}

// run evaluates a script in the page and returns its value, or that of its promise, as text.
func (b *browser) run(script string) string {
	b.t.Helper()
	var reply struct {
		Result struct {
			Value any `json:"value"`
		} `json:"result"`
		Thrown json.RawMessage `json:"exceptionDetails"`
	}
	b.call("Runtime.evaluate", object{"expression": script, "returnByValue": true, "awaitPromise": true}, &reply)
	if reply.Thrown != nil {
		b.t.Fatalf("%s: %s", script, reply.Thrown)
	}
	return fmt.Sprint(reply.Result.Value)
}

// keys types a text.
func (b *browser) keys(text string) {
	b.t.Helper()
	for _, key := range text {
		b.call("Input.dispatchKeyEvent", object{"type": "keyDown", "text": string(key), "key": string(key),
			"unmodifiedText": string(key)}, &object{})
		b.call("Input.dispatchKeyEvent", object{"type": "keyUp", "key": string(key)}, &object{})
	}
	b.call("Input.dispatchKeyEvent", object{"type": "keyDown", "text": "\r", "key": "Enter", "code": "Enter",
		"windowsVirtualKeyCode": 13}, &object{})
	b.call("Input.dispatchKeyEvent", object{"type": "keyUp", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13},
		&object{})
}

// until waits until a script's value is true.
func (b *browser) until(script string) {
	b.t.Helper()
	for b.run(script) != "true" {
		if b.ctx.Err() != nil {
			b.t.Fatalf("%s never became true; the page has %s", script, b.run("JSON.stringify(terminal)"))
		}
		time.Sleep(20 * time.Millisecond) // a poll with a deadline
	}
}

// TestTerminalInABrowser types into a terminal from a page of another origin, which sends the key
// as a subprotocol.
func TestTerminalInABrowser(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	page, err := os.ReadFile("testdata/terminal.html")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(page) // the browser may have gone
	}))
	defer elsewhere.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	parameters := url.Values{"url": {"ws" + strings.TrimPrefix(s.url, "http") + "/v1/sandboxes/" + id}, "key": {s.key}}
	b := openPage(t, ctx, elsewhere.URL+"/#"+parameters.Encode())
	b.until(`typeof terminal === "object" && terminal.open && terminal.text.includes("$ ")`)
	b.keys("echo é$((6*7)); stty size")
	b.until(`terminal.text.includes("é42\r\n24 80\r\n")`)
	b.run("resize(132, 43)")
	b.keys("clear; stty size; x=kept")
	b.until(`terminal.text.includes("43 132\r\n")`)
	b.run("leave()")
	b.until("!terminal.open && terminal.code === 1005")
	b.run("rejoin()")
	b.until("terminal.open")
	b.keys("echo $x; stty size; exit 3")
	b.until(`terminal.exit === 3 && terminal.text.includes("kept\r\n30 90\r\n") && terminal.code === 1000`)
	if got := b.run("terminal.text.split('43 132').length"); got != "2" {
		t.Errorf("old output came again: %s", b.run("terminal.text"))
	}
	if shown := b.run(`document.getElementById("screen").textContent`); !strings.Contains(shown, "é42") {
		t.Errorf("the page shows %q", shown)
	}
	log, err := os.Open(s.logFile())
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if text, err := io.ReadAll(log); err != nil || strings.Contains(string(text), s.key) {
		t.Errorf("the log shows the key (%v)", err)
	}
}
