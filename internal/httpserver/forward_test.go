package httpserver

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// answerOf is everything of an answer that a client of HTTP can see.
type answerOf struct {
	Informed []string // 1xx
	Status   int
	Header   http.Header
	Body     string
	Err      string
	Trailer  http.Header
}

// ask makes a request and reads the whole answer.
func ask(t *testing.T, client *http.Client, r *http.Request) (a answerOf) {
	t.Helper()
	r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			a.Informed = append(a.Informed, fmt.Sprint(code, " ", http.Header(h)))
			return nil
		},
	}))
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if len(body) > 4<<10 {
		body = []byte(sameAs(bytes.NewReader(body)))
	}
	if err != nil {
		a.Err = err.Error()
	}
	resp.Header.Del("Date")
	a.Status, a.Header, a.Body, a.Trailer = resp.StatusCode, resp.Header, string(body), resp.Trailer
	if resp.ContentLength >= 0 {
		a.Body += fmt.Sprintf(" (%d bytes)", resp.ContentLength)
	}
	return a
}

// forwardCases are the requests of TestForward.
var forwardCases = map[string]struct {
	method, path string
	body         func() io.Reader
	length       int64 // of the body; -1 is chunked
	change       func(r *http.Request)
	h2           bool
	want         int
}{
	"head": {method: "GET", path: "/head", change: func(r *http.Request) {
		r.Header = http.Header{"Authorization": {"Bearer the-application's"}, "X-Api-Key": {"app"},
			"Cookie":          {"a=b; c=d", "e=f"},
			"X-Forwarded-For": {"198.51.100.7, 198.51.100.8"}, "X-Forwarded-Proto": {"https"}, "Forwarded": {"for=x"},
			"Accept-Encoding": {"br"}, "Empty": {""}, "Twice": {"1", "2"}, "User-Agent": {""}, "Range": {"bytes=0-1"},
			"Sec-Websocket-Protocol": {"a, b"}, "Cayenne": {"pepper"}, "X-Cay-Other": {"x"}}
		r.Host = "abc-8080.sandbox.test"
	}, want: 200},
	"raw path":              {method: "DELETE", path: "/head%2F..%2f/%E2%82%AC//x;y?a=%zz;b=+&&c&cay_token=x&a=1", change: onHostName, want: 200},
	"raw query":             {method: "GET", path: "/head?a=%zz;b=+&&c&cay_token=x&a=1&?", change: onHostName, want: 200},
	"JSON call":             {method: "POST", path: "/json", body: func() io.Reader { return strings.NewReader(`[1]`) }, length: 3, want: 200},
	"chunked JSON call":     {method: "POST", path: "/json", body: func() io.Reader { return strings.NewReader(`[1]`) }, length: -1, want: 200},
	"201 with Location":     {method: "PUT", path: "/created", want: 201},
	"204":                   {method: "DELETE", path: "/nothing", want: 204},
	"404 problem":           {method: "GET", path: "/problem", want: 404},
	"405 and odd methods":   {method: "PROPFIND", path: "/nothing", want: 204},
	"421 of an application": {method: "GET", path: "/misdirected", want: 421},
	"large answer":          {method: "GET", path: "/down", want: 200},
	"large body":            {method: "PUT", path: "/up", body: func() io.Reader { return pattern(big) }, length: big, want: 200},
	"large chunked body":    {method: "PUT", path: "/up", body: func() io.Reader { return pattern(big) }, length: -1, want: 200},
	"range": {method: "GET", path: "/range", change: func(r *http.Request) {
		r.Header.Set("Range", "bytes=100-199")
	}, want: 206},
	"a range beyond": {method: "GET", path: "/range", change: func(r *http.Request) {
		r.Header.Set("Range", "bytes=20000-")
	}, want: 416},
	"not modified": {method: "GET", path: "/range", change: func(r *http.Request) {
		r.Header.Set("If-Modified-Since", time.Unix(1_800_000_000, 0).UTC().Format(http.TimeFormat))
	}, want: 304},
	"HEAD":        {method: "HEAD", path: "/range", want: 200},
	"HEAD, large": {method: "HEAD", path: "/down", want: 200},
	"trailers": {method: "POST", path: "/trailers", body: func() io.Reader { return pattern(3000) }, length: -1,
		change: func(r *http.Request) { r.Trailer = http.Header{"Sum": {"1"}, "Of": {"a", "b"}} }, want: 200},
	"1xx": {method: "GET", path: "/informed", want: 200},
	"100 Continue": {method: "POST", path: "/up", body: func() io.Reader { return pattern(3000) }, length: 3000,
		change: func(r *http.Request) { r.Header.Set("Expect", "100-continue") }, want: 200},
	"an answer that breaks": {method: "GET", path: "/broken", want: 200},
	"gRPC": {method: "POST", path: "/grpc", body: func() io.Reader { return pattern(3000) }, length: -1, h2: true,
		change: func(r *http.Request) {
			r.Header.Set("Content-Type", "application/grpc")
			r.Header.Set("Te", "trailers")
		}, want: 200},
	"large answer over HTTP/2": {method: "GET", path: "/down", h2: true, want: 200},
	"a head that is too large": {method: "GET", path: "/head", change: func(r *http.Request) {
		r.Header.Set("X-Large", strings.Repeat("x", maxHeaderBytes+8<<10))
	}, want: 431},
	"the largest head": {method: "GET", path: "/nothing", change: func(r *http.Request) {
		r.Header.Set("X-Large", strings.Repeat("x", maxHeaderBytes-1<<10))
	}, want: 204},
}

func onHostName(r *http.Request) { r.Host = "abc-8080.sandbox.test" }

// TestForward makes the same requests to a handler and to a replica that forwards to it, and compares the answers.
func TestForward(t *testing.T) {
	f := startFleet(t, map[string]http.Handler{"n1": nodeHandler()})
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	for name, c := range forwardCases {
		t.Run(name, func(t *testing.T) {
			transport := &http.Transport{DisableCompression: true, ExpectContinueTimeout: forwardPatience}
			if c.h2 {
				transport.Protocols = &h2c
			}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
				return http.ErrUseLastResponse
			}}
			var got [2]answerOf
			for i, address := range []string{f.direct, f.replica} {
				var body io.Reader
				if c.body != nil {
					body = struct{ io.Reader }{c.body()}
				}
				r := must(http.NewRequest(c.method, "http://"+address+c.path, body))
				r.Host, r.ContentLength = "cay.test", c.length
				if c.change != nil {
					c.change(r)
				}
				got[i] = ask(t, client, r)
			}
			if got[0].Status != c.want {
				t.Errorf("the handler itself answers %d, want %d", got[0].Status, c.want)
			}
			if diff := cmp.Diff(got[0], got[1]); diff != "" {
				t.Errorf("the forwarded answer differs (-direct +forwarded):\n%s", diff)
			}
		})
	}
}

// TestForwardTalks exchanges pieces in turn, so that each must arrive before the next is sent, directly and forwarded.
func TestForwardTalks(t *testing.T) {
	f := startFleet(t, map[string]http.Handler{"n1": nodeHandler()})
	for name, address := range map[string]string{"direct": f.direct, "forwarded": f.replica} {
		for _, path := range []string{"/duplex", "/events"} {
			t.Run(name+path, func(t *testing.T) {
				in, out := io.Pipe()
				r := must(http.NewRequestWithContext(t.Context(), "POST", "http://"+address+path, in))
				r.Header.Set("Accept", "text/event-stream")
				answers := make(chan *http.Response, 1)
				go func() {
					resp, err := http.DefaultTransport.RoundTrip(r)
					if err != nil {
						t.Error(err)
					}
					answers <- resp
				}()
				_, _ = out.Write([]byte("0"))
				resp := <-answers
				if resp == nil {
					return
				}
				defer resp.Body.Close()
				got := bufio.NewReader(resp.Body)
				for n := range 20 {
					for want := fmt.Sprint(n); path == "/events"; {
						line, err := got.ReadString('\n')
						if err != nil {
							t.Fatal(err)
						}
						if line == "data: "+want+"\n" {
							break
						}
					}
					if path == "/duplex" {
						if b, err := got.ReadByte(); err != nil || b != byte('0'+n) {
							t.Fatalf("%q, %v", b, err)
						}
					}
					_, _ = out.Write([]byte{byte('1' + n)})
				}
				out.Close()
				if _, err := io.Copy(io.Discard, got); err != nil {
					t.Error(err)
				}
			})
		}
		for _, protocol := range []string{"websocket", "cay-tunnel"} {
			t.Run(name+" "+protocol, func(t *testing.T) { talkUpgraded(t, address, protocol) })
		}
		t.Run(name+" refused before the body", func(t *testing.T) {
			c := rawRequest(t, address, "POST /refuse HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"+
				"Content-Length: 100000000\r\n\r\n")
			resp, err := http.ReadResponse(c.Reader, nil)
			if err != nil || resp.StatusCode != http.StatusRequestEntityTooLarge {
				t.Fatalf("%v, %v", resp, err)
			}
		})
	}
}

// rawConn is a connection to a server, on which a test writes the bytes itself.
type rawConn struct {
	*net.TCPConn
	*bufio.Reader
}

// Read reads what follows what the Reader has taken.
func (c rawConn) Read(b []byte) (int, error) { return c.Reader.Read(b) }

// WriteTo passes on what follows what the Reader has taken.
func (c rawConn) WriteTo(w io.Writer) (int64, error) { return c.Reader.WriteTo(w) }

func rawRequest(t *testing.T, address, head string) rawConn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(forwardPatience))
	if _, err := io.WriteString(c, head); err != nil {
		t.Fatal(err)
	}
	return rawConn{c.(*net.TCPConn), bufio.NewReader(c)}
}

// talkUpgraded upgrades a connection, with a line that is sent at once, and ends either half first.
func talkUpgraded(t *testing.T, address, protocol string) {
	for query, want := range map[string]string{"": "EARLY\nONE\nTWO\nthe other side ended\n", "?close": "bye\n"} {
		c := rawRequest(t, address, "GET /upgrade"+query+" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: "+protocol+
			"\r\n\r\nearly\n")
		resp, err := http.ReadResponse(c.Reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Upgrade") != protocol ||
			resp.Header.Get("X-Own") != "yes" {
			t.Fatalf("%+v", resp)
		}
		var got bytes.Buffer
		if query == "" {
			for _, line := range []string{"one\n", "two\n"} {
				if text, err := c.Reader.ReadString('\n'); err != nil {
					t.Fatal(err)
				} else {
					got.WriteString(text)
				}
				_, _ = io.WriteString(c.TCPConn, line)
			}
			_ = c.CloseWrite()
		}
		if _, err := io.Copy(&got, c.Reader); err != nil { // the other half ends, while ours is open if query is set
			t.Error(err)
		}
		if got.String() != want {
			t.Errorf("%q: %q, want %q", query, &got, want)
		}
	}
}

// TestForwardErrors has calls fail before their answers.
func TestForwardErrors(t *testing.T) {
	f := startFleet(t, map[string]http.Handler{"n1": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/abort":
			panic(http.ErrAbortHandler)
		case "/wait":
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
		}
	})})
	c := rawRequest(t, f.replica, "GET /abort HTTP/1.1\r\nHost: x\r\n\r\n")
	resp := must(http.ReadResponse(c.Reader, nil))
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusServiceUnavailable ||
		string(b) != fault.CodeNodeUnreachable || resp.Header.Get("X-Request-Id") == "" {
		t.Errorf("an answer that breaks before it begins: %d %s %v", resp.StatusCode, b, resp.Header)
	}
	c = rawRequest(t, f.replica, "POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
	_ = c.CloseWrite()
	resp = must(http.ReadResponse(c.Reader, nil))
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusBadRequest || string(b) != fault.CodeIncompleteBody {
		t.Errorf("a body that breaks off: %d %s", resp.StatusCode, b)
	}
	budgeted := budget.New(1<<30, ForwardCost-1)
	address := httpServer(t, frontOf(func(w *Recorder, r *http.Request) error {
		if err := CallOf(r).OpenAccount(budgeted, r, "org_1", 0); err != nil {
			return err
		}
		return f.forwarder.Forward(w, r, "n1", Passage{ID: CallOf(r).ID, Front: "api"})
	}))
	c = rawRequest(t, address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	resp = must(http.ReadResponse(c.Reader, nil))
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusTooManyRequests ||
		string(b) != fault.CodeBuffersExceeded {
		t.Errorf("a call without memory: %d %s", resp.StatusCode, b)
	}
	if budgeted.Used() != 0 {
		t.Errorf("%d bytes are held", budgeted.Used())
	}
}

// benchmarkForward measures requests to a handler and to a replica that forwards to it.
func benchmarkForward(b *testing.B, size int64, method, path string, body func() io.Reader) {
	f := startFleet(b, map[string]http.Handler{"n1": nodeHandler()})
	transport := &http.Transport{DisableCompression: true, WriteBufferSize: 64 << 10, ReadBufferSize: 64 << 10}
	defer transport.CloseIdleConnections()
	for name, address := range map[string]string{"direct": f.direct, "forwarded": f.replica} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			before := cpuTime(b)
			for b.Loop() {
				var content io.Reader
				if body != nil {
					content = body()
				}
				resp, err := transport.RoundTrip(must(http.NewRequest(method, "http://"+address+path, content)))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					b.Fatal(err)
				}
				resp.Body.Close()
			}
			if spent := cpuTime(b) - before; size > 0 {
				b.ReportMetric(spent.Seconds()/(float64(b.N)*float64(size)/1e9), "cpu-s/GB")
			} else {
				b.ReportMetric(float64(spent.Microseconds())/float64(b.N), "cpu-µs/op")
			}
		})
	}
}

// cpuTime returns the CPU time that the process has used: that of the client, the replica and the node.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkForwardCall(b *testing.B) {
	text := `{"a":"` + strings.Repeat("x", 1000) + `"}`
	benchmarkForward(b, 0, "POST", "/json", func() io.Reader { return strings.NewReader(text) })
}

func BenchmarkForwardDown(b *testing.B) { benchmarkForward(b, big, "GET", "/zeros", nil) }

func BenchmarkForwardUp(b *testing.B) {
	zeros := make([]byte, big)
	benchmarkForward(b, big, "PUT", "/drop", func() io.Reader { return bytes.NewReader(zeros) })
}
