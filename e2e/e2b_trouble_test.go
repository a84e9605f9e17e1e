package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// e2bSandbox is a sandbox as an E2B client has it.
type e2bSandbox struct {
	s         *server
	id, token string
}

// e2bCreate makes a sandbox through E2B's API.
func (s *server) e2bCreate(key string) e2bSandbox {
	s.t.Helper()
	status, body := s.e2bCall(key, "POST", "/v2/sandboxes", `{"templateID":"python","timeout":600}`)
	if status != 201 {
		s.t.Fatalf("create: %d %s", status, body)
	}
	return e2bSandbox{s, text(body, "sandboxID"), text(body, "envdAccessToken")}
}

func (s *server) e2bCall(key, method, path, body string) (int, []byte) {
	s.t.Helper()
	req, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, data
}

// startBody returns the one message of a Start, in its envelope.
func startBody(command string) []byte {
	message, err := json.Marshal(object{"process": object{"cmd": "/bin/bash", "args": []string{"-c", command}},
		"stdin": false})
	if err != nil {
		panic(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

// start opens the stream of a command. The caller closes it.
func (b e2bSandbox) start(ctx context.Context, client *http.Client, command string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, "POST", b.s.url+"/process.Process/Start",
		strings.NewReader(string(startBody(command))))
	if err != nil {
		return nil, err
	}
	for name, value := range map[string]string{"E2b-Sandbox-Id": b.id, "E2b-Sandbox-Port": "49983",
		"X-Access-Token": b.token,
		"Content-Type":   "application/connect+json", "Connect-Protocol-Version": "1"} {
		req.Header.Set(name, value)
	}
	return client.Do(req)
}

// frame reads one message of a stream.
func frame(r io.Reader) (flags byte, message []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	message = make([]byte, binary.BigEndian.Uint32(head[1:]))
	_, err = io.ReadFull(r, message)
	return head[0], message, err
}

// run runs a command to its end and returns its output, encoded as in the messages.
func (b e2bSandbox) run(command string) string {
	b.s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := b.start(ctx, http.DefaultClient, command)
	if err != nil {
		b.s.t.Fatal(err)
	}
	defer resp.Body.Close()
	var out strings.Builder
	for {
		flags, message, err := frame(resp.Body)
		if err != nil {
			b.s.t.Fatalf("%s: the stream breaks after %q: %v", command, out.String(), err)
		}
		if flags == 2 {
			if string(message) != "{}" {
				b.s.t.Fatalf("%s: ended with %s", command, message)
			}
			return out.String()
		}
		out.Write(message)
	}
}

var leases = regexp.MustCompile(`(?m)^cay_sandbox_leases (\d+)$`)

// noLeases waits until no lease of a sandbox is held.
func (s *server) noLeases() {
	s.t.Helper()
	var last string
	// a poll with a deadline
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		m := leases.FindStringSubmatch(s.metrics())
		if m == nil {
			s.t.Fatal("the metrics have no leases")
		}
		if last = m[1]; last == "0" {
			return
		}
	}
	s.t.Errorf("%s leases are held", last)
}

func TestE2BTrouble(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true")
	s.start()
	s.needTemplate("python")
	key := s.e2bKey()
	t.Run("200 streams at once, and a kill under them", func(t *testing.T) { s.at(t).manyStreams(key) })
	t.Run("who does not read", func(t *testing.T) { s.at(t).slowReader(key) })
	t.Run("half a message", func(t *testing.T) { s.at(t).halfWritten(key) })
	t.Run("a warm one", func(t *testing.T) { s.at(t).warmE2B(key) })
	t.Run("the way out", func(t *testing.T) { s.at(t).networkE2B(key) })
	t.Run("a stop under streams", func(t *testing.T) { s.at(t).stopUnderStreams(key) })
}

// at returns the server with its failures reported to t, for a part of a test.
func (s *server) at(t *testing.T) *server {
	part := *s
	part.t = t
	return &part
}

func (s *server) manyStreams(key string) {
	const streams = 200
	sandbox := s.e2bCreate(key)
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	ended := make(chan error, streams)
	var begun sync.WaitGroup
	begun.Add(streams)
	for i := range streams {
		go func() {
			resp, err := sandbox.start(context.Background(), client, fmt.Sprintf("echo I am %d; sleep 1000", i))
			if err != nil {
				begun.Done()
				ended <- fmt.Errorf("stream %d does not begin: %w", i, err)
				return
			}
			defer resp.Body.Close()
			for n := 0; ; n++ {
				flags, message, err := frame(resp.Body)
				if n == 1 {
					begun.Done() // the command has started and printed something
				}
				if err != nil {
					if n < 2 {
						begun.Done()
						err = fmt.Errorf("stream %d breaks at once: %w", i, err)
					}
					ended <- err
					return
				}
				if flags == 2 {
					if n < 1 {
						begun.Done()
					}
					ended <- fmt.Errorf("stream %d ends with %s", i, message)
					return
				}
			}
		}()
	}
	begun.Wait()
	if out := sandbox.run("echo between them"); !strings.Contains(out, "YmV0d2VlbiB0aGVtCg==") {
		s.t.Errorf("a command between 200 streams says %s", out)
	}
	if status, body := s.e2bCall(key, "DELETE", "/sandboxes/"+sandbox.id, ""); status != 204 {
		s.t.Errorf("kill: %d %s", status, body)
	}
	for range streams {
		select {
		case err := <-ended:
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				s.t.Error(err)
			}
		case <-time.After(patience):
			s.t.Fatal("a stream of a killed sandbox goes on")
		}
	}
	s.noLeases()
}

func (s *server) slowReader(key string) {
	sandbox := s.e2bCreate(key)
	ctx, leave := context.WithCancel(context.Background())
	defer leave()
	resp, err := sandbox.start(ctx, http.DefaultClient, "yes 0123456789abcdef")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, message, err := frame(resp.Body); err != nil || !strings.Contains(string(message), "start") {
		s.t.Fatalf("begins with %s, %v", message, err)
	}
	// From here on the client reads nothing, and everything else works.
	for range 10 {
		sandbox.run("head -c 1000000 /dev/zero >/tmp/zeros && wc -c </tmp/zeros")
	}
	leave()
	s.noLeases()
	// The command keeps running for a client that connects to it or kills it.
	if out := sandbox.run("pgrep -c yes"); !strings.Contains(out, "MQo=") {
		s.t.Errorf("the command ended with its reader: %s", out)
	}
	if status, _ := s.e2bCall(key, "DELETE", "/sandboxes/"+sandbox.id, ""); status != 204 {
		s.t.Errorf("kill: %d", status)
	}
}

func (s *server) halfWritten(key string) {
	sandbox := s.e2bCreate(key)
	head := fmt.Sprintf("POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: %s\r\n"+
		"E2b-Sandbox-Port: 49983\r\nX-Access-Token: %s\r\n"+
		"Content-Type: application/connect+json\r\nConnect-Protocol-Version: 1\r\n", sandbox.id, sandbox.token)
	whole := string(startBody("touch /tmp/never; sleep 1000"))
	for name, sent := range map[string]string{
		"half the head":          head[:40],
		"no body":                head + "Content-Length: 100\r\n\r\n",
		"half an envelope":       head + "Content-Length: 100\r\n\r\n\x00\x00\x00",
		"half a message":         head + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(whole), whole[:len(whole)-5]),
		"half a chunk":           head + "Transfer-Encoding: chunked\r\n\r\n64\r\n\x00\x00",
		"a length without end":   head + "Transfer-Encoding: chunked\r\n\r\n5\r\n\x00\xff\xff\xff\xff\r\n",
		"an envelope of no kind": head + "Transfer-Encoding: chunked\r\n\r\n7\r\n\x7f\x00\x00\x00\x02{}\r\n0\r\n\r\n",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			s.t.Fatal(err)
		}
		if _, err := io.WriteString(conn, sent); err != nil {
			s.t.Errorf("%s: %v", name, err)
		}
		if strings.HasSuffix(sent, "\r\n0\r\n\r\n") { // this request is whole and gets an answer
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
				s.t.Errorf("%s: %v", name, err)
			} else {
				body, _ := io.ReadAll(resp.Body) // the part that was read counts
				if !strings.Contains(string(body), `"error"`) {
					s.t.Errorf("%s: %d %q", name, resp.StatusCode, body)
				}
			}
		}
		conn.Close()
	}
	s.noLeases()
	if out := sandbox.run("ls /tmp/never 2>/dev/null; echo alive"); strings.Contains(out, "bmV2ZXI") ||
		!strings.Contains(out, "YWxpdmUK") {
		s.t.Errorf("half a request had an effect: %s", out)
	}
	if status, _ := s.e2bCall(key, "DELETE", "/sandboxes/"+sandbox.id, ""); status != 204 {
		s.t.Errorf("kill: %d", status)
	}
}

// warmE2B checks that the pool serves E2B's clients, with their user and environment.
func (s *server) warmE2B(key string) {
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // a poll with a deadline
		sandbox := s.e2bCreate(key)
		row := s.get("sbx_" + sandbox.id)
		out := sandbox.run("whoami")
		if status, _ := s.e2bCall(key, "DELETE", "/sandboxes/"+sandbox.id, ""); status != 204 {
			s.t.Errorf("kill: %d", status)
		}
		if !strings.Contains(out, "dXNlcgo=") {
			s.t.Fatalf("whoami says %s", out)
		}
		if orZero(row.Source) == "warm" {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("the pool serves none: %s", jsonOf(row))
		}
	}
}

// networkE2B checks that E2B's network settings apply to traffic that leaves the sandbox.
func (s *server) networkE2B(key string) {
	o := newOutside(s.t.(*testing.T))
	o.listen(s.t.(*testing.T), 8080)
	one, two := o.address+":8080", o.second+":8080"
	status, body := s.e2bCall(key, "POST", "/v2/sandboxes", `{"templateID":"python","allow_internet_access":false}`)
	if status != 201 {
		s.t.Fatalf("create: %d %s", status, body)
	}
	id := text(body, "sandboxID")
	s.reaches("sbx_"+id, map[string]bool{one: false, two: false})
	for body, want := range map[string]map[string]bool{
		`{}`:                               {one: true, two: true},
		`{"denyOut":["` + o.block + `"]}`:  {one: false, two: false},
		`{"denyOut":["` + o.second + `"]}`: {one: true, two: false},
		`{"allow_internet_access":false}`:  {one: false, two: false},
		`{"denyOut":["0.0.0.0/0"],"allowOut":["` + o.second + `"]}`:        {one: false, two: true},
		`{"denyOut":["` + o.block + `"],"allowOut":["` + o.address + `"]}`: {one: true, two: false}, // allowOut wins
	} {
		if status, answer := s.e2bCall(key, "PUT", "/sandboxes/"+id+"/network", body); status != 204 {
			s.t.Fatalf("%s: %d %s", body, status, answer)
		}
		s.t.Log(body)
		s.reaches("sbx_"+id, want)
	}
	if status, _ := s.e2bCall(key, "DELETE", "/sandboxes/"+id, ""); status != 204 {
		s.t.Errorf("kill: %d", status)
	}
}

// stopUnderStreams checks that a server that stops does not wait for endless streams, and that the
// command goes on under the next server.
func (s *server) stopUnderStreams(key string) {
	sandbox := s.e2bCreate(key)
	resp, err := sandbox.start(context.Background(), http.DefaultClient, "echo $$ >/tmp/pid; sleep 1000")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, _, err := frame(resp.Body); err != nil {
		s.t.Fatal(err)
	}
	began := time.Now()
	s.stop(15)
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		s.t.Errorf("the stream ended with %v", err)
	}
	if d := time.Since(began); d > 25*time.Second { // the shutdown timeout is 30 s
		s.t.Errorf("the stop took %s", d)
	}
	s.start()
	if out := sandbox.run("kill -0 $(cat /tmp/pid) && echo lives"); !strings.Contains(out, "bGl2ZXMK") {
		s.t.Errorf("the command has ended: %s", out)
	}
	if status, _ := s.e2bCall(key, "DELETE", "/sandboxes/"+sandbox.id, ""); status != 204 {
		s.t.Errorf("kill: %d", status)
	}
}
