// Command evil is a hostile agent for tests, put in the place of cay-agent. It lets a sandbox
// start. Then it misbehaves on every call that has "evil-" and the name of an evil anywhere in its
// request: with silence, half answers, endless answers, and bytes that are not HTTP.
//
// It reads requests and writes answers as bytes on connections. A function prepares each accepted
// connection, so that real code can do the handshake between the host and the agent.
package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
)

const port = 49983 // the agent's

func main() {
	// PID 1 gets only the signals that it asks for; the Go runtime asks for these and they would end
	// the program.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	if len(os.Args) > 1 && os.Args[1] == "evils" {
		fmt.Println(strings.Join(names(), "\n"))
		return
	}
	l, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(serve(l, authenticate))
}

// key holds the token that the host gave at init. It authenticates later connections.
var key atomic.Value

// authenticate does the agent's part of the handshake on a connection that begins with one.
func authenticate(c net.Conn) (net.Conn, error) {
	var hello agentapi.Hello
	n, err := io.ReadAtLeast(c, hello[:], 1)
	if err != nil {
		return nil, err
	}
	if !agentapi.IsHello(hello[:n]) {
		return early{c, io.MultiReader(bytes.NewReader(hello[:n]), c)}, nil
	}
	if _, err := io.ReadFull(c, hello[n:]); err != nil {
		return nil, err
	}
	known, _ := key.Load().(string)
	return c, agentapi.Answer(c, hello, known)
}

// early is a connection of which the first bytes were read already.
type early struct {
	net.Conn
	rest io.Reader
}

func (e early) Read(b []byte) (int, error) { return e.rest.Read(b) }

// serve answers on all connections of l, each of which begin has prepared.
func serve(l net.Listener, begin func(net.Conn) (net.Conn, error)) error {
	for {
		raw, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer raw.Close()
			conn, err := begin(raw)
			if err != nil {
				return
			}
			in := bufio.NewReader(conn)
			for {
				r, err := http.ReadRequest(in)
				if err != nil || !answer(conn, r) {
					return
				}
			}
		}()
	}
}

var (
	asked = regexp.MustCompile(`evil-([a-z0-9]+)`)
	turn  atomic.Int64
)

// answer answers one request, and reports whether the connection can be used for another.
func answer(conn net.Conn, r *http.Request) bool {
	out := &reply{conn: conn, request: r}
	switch r.URL.Path {
	case "/init":
		var request agentapi.InitRequest
		if json.NewDecoder(r.Body).Decode(&request) == nil && request.AccessToken != "" {
			key.Store(request.AccessToken)
		}
		fallthrough
	case "/health":
		_, _ = io.Copy(io.Discard, r.Body)
		out.text("HTTP/1.1 204 No Content\r\n\r\n")
		return !out.broken
	case "/busy", "/memory/relieve":
		_, _ = io.Copy(io.Discard, r.Body)
		out.json(`{"busy":false,"freed":1,"killed":1}`)
		return !out.broken
	}
	name := ""
	if m := asked.FindStringSubmatch(r.URL.String()); m != nil {
		name = m[1]
	} else if n, err := strconv.Atoi(r.URL.Query().Get("port")); err == nil {
		name = names()[n%len(names())]
	} else {
		// It reads only the part of a body that is there at once: not to read the rest is an evil, too.
		b := make([]byte, 64<<10)
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		n, _ := r.Body.Read(b)
		_ = conn.SetReadDeadline(time.Time{})
		if m := asked.FindSubmatch(b[:n]); m != nil {
			name = string(m[1])
		}
	}
	if evils[name] == nil {
		name = names()[int(turn.Add(1))%len(names())]
	}
	evils[name](out)
	return false
}

func names() []string {
	var all []string
	for name := range evils {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// reply writes to the host until the host has closed the connection.
type reply struct {
	conn    net.Conn
	request *http.Request
	broken  bool
}

func (r *reply) text(s string) bool {
	_, err := io.WriteString(r.conn, s)
	r.broken = r.broken || err != nil
	return !r.broken
}

func (r *reply) head(lines ...string) bool {
	return r.text("HTTP/1.1 200 OK\r\nContent-Type: " + r.contentType() + "\r\n" + strings.Join(lines, "") + "\r\n")
}

// contentType returns the type that an honest answer would have.
func (r *reply) contentType() string {
	if t := r.request.Header.Get("Content-Type"); strings.Contains(t, "connect") || strings.Contains(t, "proto") {
		return t
	}
	return "application/json"
}

func (r *reply) json(s string) {
	r.text("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(s)) + "\r\n\r\n" + s)
}

// chunk writes a piece of a chunked body.
func (r *reply) chunk(s string) bool { return r.text(fmt.Sprintf("%x\r\n%s\r\n", len(s), s)) }

// again calls f until the host has closed the connection.
func (r *reply) again(pause time.Duration, f func() bool) {
	for f() {
		time.Sleep(pause)
	}
}

// wait keeps the connection until the host closes it.
func (r *reply) wait() { _, _ = io.Copy(io.Discard, r.conn) }

func (r *reply) chunked() bool { return r.head("Transfer-Encoding: chunked\r\n") }

func envelope(flags byte, size uint32, data string) string {
	b := append([]byte{flags}, binary.BigEndian.AppendUint32(nil, size)...)
	return string(b) + data
}

// bytesField returns a field of a protobuf message.
func bytesField(number int, data string) string {
	return string(binary.AppendUvarint([]byte{byte(number<<3 | 2)}, uint64(len(data)))) + data
}

// output returns a message of a process's stream with output: stream 1 is stdout, 2 stderr.
func output(stream int, data string) string {
	m := bytesField(1, bytesField(2, bytesField(stream, data)))
	return envelope(0, uint32(len(m)), m)
}

// ended returns the message that a process has ended, and the end of its stream.
func ended() string {
	m := bytesField(1, bytesField(3, ""))
	return envelope(0, uint32(len(m)), m) + envelope(2, 2, "{}")
}

func frame(kind byte, offset uint64, size uint32, data string) string {
	b := append([]byte{kind}, binary.BigEndian.AppendUint64(nil, offset)...)
	return string(binary.BigEndian.AppendUint32(b, size)) + data
}

func bomb() string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	zeros := make([]byte, 1<<20)
	for range 64 {
		_, _ = z.Write(zeros)
	}
	_ = z.Close()
	return b.String()
}

const long = 1 << 20 // bytes of an overlong part of an answer

// evils maps names to functions that write the answers.
var evils map[string]func(*reply)

func init() {
	x := strings.Repeat("x", 32<<10)
	binary := strings.Repeat("\xff\x00", 16<<10)
	evils = map[string]func(*reply){
		"silence": func(r *reply) { r.wait() },
		"close":   func(*reply) {},
		"reset": func(r *reply) {
			if c, ok := r.conn.(*net.TCPConn); ok {
				_ = c.SetLinger(0)
			}
		},
		"garbage": func(r *reply) { r.text("\x00\x01\x02 this is no HTTP\r\n\r\n"); r.wait() },
		"slowhead": func(r *reply) {
			if r.text("HTTP/1.1 200 OK\r\nX-Slow: ") {
				r.again(100*time.Millisecond, func() bool { return r.text("x") })
			}
		},
		"halfhead":  func(r *reply) { r.text("HTTP/1.1 200 OK\r\nContent-Ty") },
		"longhead":  func(r *reply) { r.head("X-Long: " + strings.Repeat("x", long) + "\r\n"); r.wait() },
		"manylines": func(r *reply) { r.text("HTTP/1.1 200 OK\r\n"); r.again(0, func() bool { return r.text(lines()) }) },
		"oneline":   func(r *reply) { r.again(0, func() bool { return r.text(x) }) },
		"only1xx": func(r *reply) {
			r.again(0, func() bool { return r.text("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n") })
		},
		"slow1xx": func(r *reply) {
			r.again(300*time.Millisecond, func() bool { return r.text("HTTP/1.1 100 Continue\r\n\r\n") })
		},
		"status000": func(r *reply) { r.text("HTTP/1.1 000 None\r\nContent-Length: 100\r\n\r\n"); r.wait() },
		"status099": func(r *reply) { r.text("HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n") },
		"status999": func(r *reply) { r.text("HTTP/1.1 999 High\r\nContent-Length: 0\r\n\r\n") },
		"status101": func(r *reply) {
			r.text("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
			r.again(0, func() bool { return r.text(x) })
		},
		"silent101": func(r *reply) {
			r.text("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
			r.wait()
		},
		"status500": func(r *reply) { r.text("HTTP/1.1 500 \x1b[31mred\x07\r\nContent-Length: 4\r\n\r\noops") },
		"redirect": func(r *reply) {
			r.text("HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
		},
		"madecode":  func(r *reply) { r.error("made_up_\x1b", "x") },
		"longerror": func(r *reply) { r.error("invalid_path", strings.Repeat("\x1b[31m\u202e", long/8)) },
		"enderror": func(r *reply) {
			r.text("HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n")
			r.again(0, func() bool { return r.chunk(x) })
		},
		"wrongtype":  func(r *reply) { r.text("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi") },
		"toolong":    func(r *reply) { r.head("Content-Length: 9223372036854775807\r\n"); r.text(x) },
		"shortbody":  func(r *reply) { r.head("Content-Length: 1000\r\n"); r.text("short") },
		"silentbody": func(r *reply) { r.head("Content-Length: 1000\r\n"); r.wait() },
		"slowbody":   func(r *reply) { r.chunked(); r.again(200*time.Millisecond, func() bool { return r.chunk("{") }) },
		"endless":    func(r *reply) { r.chunked(); r.again(0, func() bool { return r.chunk(x) }) },
		"blank":      func(r *reply) { r.chunked(); r.again(0, func() bool { return r.chunk(strings.Repeat(" ", 32<<10)) }) },
		"hugechunk": func(r *reply) {
			r.chunked()
			r.text("7fffffffffffffff\r\n")
			r.again(0, func() bool { return r.text(x) })
		},
		"badchunk": func(r *reply) { r.chunked(); r.text("zz\r\nxx\r\n"); r.wait() },
		"trailers": func(r *reply) {
			r.chunked()
			r.text("0\r\n")
			r.again(0, func() bool { return r.text("X-T: " + x + "\r\n") })
		},
		"gzip": func(r *reply) {
			b := bomb()
			r.head("Content-Encoding: gzip\r\nContent-Length: " + strconv.Itoa(len(b)) + "\r\n")
			r.text(b)
		},
		"deep": func(r *reply) { r.chunked(); r.again(0, func() bool { return r.chunk(strings.Repeat("[", 32<<10)) }) },
		"manynull": func(r *reply) {
			r.chunked()
			r.chunk(`{"processes":[`)
			r.again(0, func() bool { return r.chunk(strings.Repeat("{},", 8<<10)) })
		},
		"manyargs": func(r *reply) {
			r.chunked()
			r.chunk(`{"args":[`)
			r.again(0, func() bool { return r.chunk(strings.Repeat(`"",`, 8<<10)) })
		},
		"lines": func(r *reply) { r.chunked(); r.again(0, func() bool { return r.chunk(entry(20_000)) }) },
		"entries": func(r *reply) {
			r.chunked()
			r.again(0, func() bool { return r.chunk(strings.Repeat(entry(100), 50)) })
		},
		"longnames": func(r *reply) { r.chunked(); r.again(0, func() bool { return r.chunk(entry(4000)) }) },
		"year": func(r *reply) {
			r.json(strings.Replace(entry(3), "2026-01-02T03:04:05Z", "9999-12-31T23:59:59-23:00", 1))
		},
		"envelope": func(r *reply) {
			r.chunked()
			r.chunk(envelope(0, 1<<32-1, x))
			r.again(0, func() bool { return r.chunk(x) })
		},
		"half":    func(r *reply) { r.chunked(); r.chunk(envelope(0, 60<<10, x)); r.wait() },
		"flagged": func(r *reply) { r.chunked(); b := bomb(); r.chunk(envelope(1, uint32(len(b)), b)); r.wait() },
		"zipped": func(r *reply) {
			b := bomb()
			r.head("Connect-Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n")
			r.chunk(envelope(1, uint32(len(b)), b))
			r.wait()
		},
		"messages": func(r *reply) {
			r.chunked()
			r.again(0, func() bool { return r.chunk(strings.Repeat(output(1, "x"), 1000)) })
		},
		"nothings": func(r *reply) {
			r.chunked()
			r.again(0, func() bool { return r.chunk(strings.Repeat(envelope(0, 0, ""), 5000)) })
		},
		"flood": func(r *reply) {
			r.chunked()
			r.again(0, func() bool { return r.chunk(output(1, binary)) && r.chunk(output(2, binary)) })
		},
		"noend": func(r *reply) { r.chunked(); r.chunk(output(1, "out")); r.text("0\r\n\r\n") },
		"controls": func(r *reply) {
			r.chunked()
			r.again(0, func() bool { return r.chunk(frame(1, 0, 64<<10, strings.Repeat("\x01", 64<<10))) })
		},
		"hugeframe": func(r *reply) { r.chunked(); r.chunk(frame(1, 0, 1<<32-1, x)); r.wait() },
		"halfframe": func(r *reply) { r.chunked(); r.chunk(frame(1, 0, 64<<10, x)); r.wait() },
		"badframe":  func(r *reply) { r.chunked(); r.chunk(frame(99, 1<<63, 8, "12345678")); r.wait() },
		"lostframe": func(r *reply) { r.chunked(); r.chunk(frame(4, 0, 8, "\x7f\xff\xff\xff\xff\xff\xff\xff")); r.wait() },
		"full":      full(binary),
	}
}

// full ends a command after more output on both streams than the host keeps. None of it is text.
func full(piece string) func(*reply) {
	return func(r *reply) {
		r.chunked()
		for range 8<<20/len(piece) + 1 {
			if !r.chunk(output(1, piece)) || !r.chunk(output(2, piece)) {
				return
			}
		}
		r.chunk(ended())
		r.text("0\r\n\r\n")
		r.wait()
	}
}

func lines() string {
	var b strings.Builder
	for range 1000 {
		fmt.Fprintf(&b, "%x:\r\n", turn.Add(1))
	}
	return b.String()
}

func entry(length int) string {
	name := strings.Repeat("n", length)
	return fmt.Sprintf(`{"name":"%.200s","path":"/%s","type":"file","size":1,"mode":420,"owner":"root","group":"root",`+
		`"modified_at":"2026-01-02T03:04:05Z","symlink_target":"%s"}`+"\n", name, name, name)
}

func (r *reply) error(code, message string) {
	body := `{"code":400,"message":"` + strings.NewReplacer("\x1b", `\u001b`).Replace(message) + `"}`
	r.text("HTTP/1.1 400 Bad Request\r\nCay-Error-Code: " + code + "\r\nContent-Length: " + strconv.Itoa(len(body)) +
		"\r\n\r\n" + body)
}
