package link

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
)

// patience is the time for something that takes milliseconds on an idle machine.
const patience = 90 * time.Second

const replicaName = "api.test"

// modeVariable has the settings of a process that the tests start; see [child].
const modeVariable = "CAY_LINK_TEST"

func TestMain(m *testing.M) {
	if text := os.Getenv(modeVariable); text != "" {
		if err := runChild(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// quiet is the log of both ends.
func quiet() *slog.Logger {
	level := slog.LevelError
	if os.Getenv("CAY_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// byName returns the name in a certificate as the node's.
func byName(_ context.Context, c *x509.Certificate, _ string) (string, error) {
	return c.Subject.CommonName, nil
}

func hubConfig(a *caytest.Authority) HubConfig {
	return HubConfig{TLS: caytest.Each(a.ServerConfig(replicaName)), Peer: byName, Origin: auth.Address, MaxConns: 2000,
		Log: quiet()}
}

func nodeConfig(a *caytest.Authority, name, session string) NodeConfig {
	return NodeConfig{TLS: caytest.Each(a.ClientConfig(name, replicaName)), Session: session, MaxConns: 2000, Log: quiet()}
}

// newHub makes a Hub that lets in all nodes with a certificate.
func newHub(t testing.TB, a *caytest.Authority, change func(*HubConfig)) *Hub {
	t.Helper()
	cfg := hubConfig(a)
	if change != nil {
		change(&cfg)
	}
	return NewHub(cfg)
}

func newNode(t testing.TB, a *caytest.Authority, name string) *Node {
	t.Helper()
	return NewNode(nodeConfig(a, name, "s1"))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// serve runs something until the test's end, or until stop is called, which waits for it.
func serve(t testing.TB, run func(ctx context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("serving ended with %v", err)
			}
		case <-time.After(patience):
			t.Error("Serve does not return")
		}
	}
	t.Cleanup(stop)
	return stop
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// startHub serves a Hub on the loopback. Its goroutines have started when startHub returns.
func startHub(t testing.TB, h *Hub) (address string, stop func()) {
	t.Helper()
	l := listen(t)
	stop = serve(t, func(ctx context.Context) error { return h.Serve(ctx, l) })
	stranger := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{dataProtocol}}
	c, err := tls.Dial("tcp4", l.Addr().String(), stranger)
	if err != nil {
		t.Fatal(err)
	}
	abort(c)
	return l.Addr().String(), stop
}

func startNode(t testing.TB, n *Node, h http.Handler, replicas ...string) (stop func()) {
	t.Helper()
	return serve(t, func(ctx context.Context) error {
		return n.Serve(ctx, func() []string { return replicas }, h)
	})
}

// pair links a Hub and the node n1, which answers with h.
func pair(t testing.TB, h http.Handler) *Hub {
	t.Helper()
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	startNode(t, newNode(t, a, "n1"), h, address)
	linked(t, hub, "n1")
	return hub
}

// eventually waits until ok does.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("waited in vain: %s\n%s", what, stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// linked waits until the node has spare connections.
func linked(t testing.TB, h *Hub, node string) {
	t.Helper()
	eventually(t, "a link of "+node, func() bool { _, spare := h.count(node); return spare >= minSpare })
}

// count returns the numbers of a node's data connections, of all and of the spare ones; -1 if it has no pulse.
func (h *Hub) count(node string) (all, spare int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.peers[node]
	if p == nil {
		return -1, -1
	}
	return len(p.all), len(p.spare)
}

// clientOf returns an HTTP client of a node.
func clientOf(h *Hub, node string) *http.Client { return &http.Client{Transport: h.Transport(node)} }

// call makes a call that the node answers with its body.
func call(h *Hub, node, text string) error {
	resp, err := clientOf(h, node).Post("http://node/echo", "text/plain", strings.NewReader(text))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != text || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d, %q, %w", resp.StatusCode, b, err)
	}
	return nil
}

// nodeHandler answers the calls of the tests.
func nodeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if r.ContentLength > 0 {
			w.Header().Set("Content-Length", strconv.FormatInt(r.ContentLength, 10))
		}
		_, _ = io.Copy(flusher{w}, r.Body)
	})
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		for piece := make([]byte, 64<<10); ; {
			if _, err := w.Write(piece); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/ticks", func(w http.ResponseWriter, r *http.Request) {
		for n := 0; r.Context().Err() == nil; n++ {
			if _, err := fmt.Fprintf(flusher{w}, "data: %d\n\n", n); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	mux.HandleFunc("/up", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%d %v", n, err)
	})
	mux.HandleFunc("/upgrade", func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		if _, err := io.Copy(conn, buffered); err == nil {
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
		}
	})
	return mux
}

// flusher sends each piece at once.
type flusher struct{ w http.ResponseWriter }

func (f flusher) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = http.NewResponseController(f.w).Flush()
	}
	return n, err
}

// stream is a call that does not end by itself. ended gives its error.
type stream struct {
	what  string
	ended chan error
	moved chan struct{} // has an element when bytes came since it was taken
}

// openStreams opens a stream of each kind, and waits until each moves.
func openStreams(t testing.TB, h *Hub, node string) (all []*stream, stop func()) {
	t.Helper()
	return openSome(t, h, node, "/endless", "/ticks", "/upload", "/upgrade")
}

func openSome(t testing.TB, h *Hub, node string, kinds ...string) (all []*stream, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	for _, what := range kinds {
		s := &stream{what, make(chan error, 1), make(chan struct{}, 1)}
		go func() { s.ended <- s.run(ctx, h, node) }()
		all = append(all, s)
	}
	for _, s := range all {
		s.moves(t)
	}
	return all, cancel
}

// moves waits until bytes come on a stream.
func (s *stream) moves(t testing.TB) {
	t.Helper()
	select { // of before
	case <-s.moved:
	default:
	}
	select {
	case <-s.moved:
	case err := <-s.ended:
		t.Fatalf("%s ended: %v", s.what, err)
	case <-time.After(patience):
		stacks := make([]byte, 1<<20)
		t.Fatalf("%s does not move\n%s", s.what, stacks[:runtime.Stack(stacks, true)])
	}
}

// breaks waits until a stream ends with an error.
func (s *stream) breaks(t testing.TB) {
	t.Helper()
	select {
	case err := <-s.ended:
		if err == nil {
			t.Errorf("%s ended as if it were complete", s.what)
		}
	case <-time.After(patience):
		t.Errorf("%s does not end", s.what)
	}
}

func (s *stream) move() {
	select {
	case s.moved <- struct{}{}:
	default:
	}
}

// run reads a stream until it ends. It returns an error unless the end looks like that of a whole answer.
func (s *stream) run(ctx context.Context, h *Hub, node string) error {
	method, path, body := "GET", s.what, io.Reader(nil)
	if s.what == "/upload" {
		method, path, body = "POST", "/echo", endless{}
	}
	r := must(http.NewRequestWithContext(ctx, method, "http://node"+path, body))
	if s.what == "/upgrade" {
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "echo")
	}
	resp, err := h.Transport(node).RoundTrip(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if s.what == "/upgrade" {
		// The context of a request does not end an upgraded connection.
		defer context.AfterFunc(ctx, func() { _ = resp.Body.Close() })()
		both := resp.Body.(io.ReadWriter)
		for b := make([]byte, 1); ; s.move() {
			if _, err := both.Write([]byte("x")); err != nil {
				return err
			}
			if _, err := io.ReadFull(both, b); err != nil {
				return err // an end of the connection ends an upgraded one too
			}
		}
	}
	for b := make([]byte, 32<<10); ; s.move() {
		if _, err := resp.Body.Read(b); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// leftovers returns a function that waits until the process has as many goroutines and descriptors as before.
func leftovers(t testing.TB) (check func()) {
	t.Helper()
	count := func() (goroutines, files int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return runtime.NumGoroutine(), len(entries)
	}
	goroutines, files := count()
	return func() {
		t.Helper()
		eventually(t, "goroutines and descriptors end", func() bool {
			g, f := count()
			return g <= goroutines && f <= files
		})
	}
}

// child has the settings of another process: a node, or a replica that opens streams to the node n1.
type child struct {
	Authority string
	Node      string // name of a node; "" is a replica
	Session   string // of a node; "" is s1
	Address   string // of the replica
}

// start runs another process until it is killed or the test ends.
func (c child) start(t testing.TB, command func(ctx context.Context, self string) *exec.Cmd) *exec.Cmd {
	t.Helper()
	if command == nil {
		command = func(ctx context.Context, self string) *exec.Cmd { return exec.CommandContext(ctx, self) }
	}
	cmd := command(context.Background(), must(os.Executable()))
	cmd.Env = append(os.Environ(), modeVariable+"="+string(must(json.Marshal(c))))
	var errs bytes.Buffer
	cmd.Stderr = &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kill(cmd)
		if errs.Len() > 0 {
			t.Logf("another process said: %s", &errs)
		}
	})
	return cmd
}

// kill ends a process at once, as kill -9 does, and waits for its end.
func kill(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // says that it was killed
	}
}

func runChild(text string) error {
	var c child
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	a, err := caytest.LoadAuthority(c.Authority)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if c.Node != "" {
		n := NewNode(nodeConfig(a, c.Node, cmp.Or(c.Session, "s1")))
		mux := nodeHandler().(*http.ServeMux)
		mux.HandleFunc("/session", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, c.Session) })
		return n.Serve(ctx, func() []string { return []string{c.Address} }, mux)
	}
	h := NewHub(hubConfig(a))
	l, err := net.Listen("tcp4", c.Address)
	if err != nil {
		return err
	}
	for _, what := range []string{"/endless", "/ticks", "/upload", "/upgrade"} {
		s := &stream{what, nil, make(chan struct{}, 1)}
		go func() {
			for ctx.Err() == nil {
				if all, _ := h.count("n1"); all >= 0 {
					_ = s.run(ctx, h, "n1") // the test sees it at the node
				}
				time.Sleep(10 * time.Millisecond)
			}
		}()
	}
	return h.Serve(ctx, l)
}

// dialTLS makes a connection to a Hub as a stranger does.
func dialTLS(t testing.TB, address string, cfg *tls.Config, protocol string) *tls.Conn {
	t.Helper()
	cfg = cfg.Clone()
	cfg.NextProtos = []string{protocol}
	c, err := tls.Dial("tcp", address, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abort(c) })
	return c
}

// dialAs makes a connection to a Hub as a session of a node does.
func dialAs(t testing.TB, address string, cfg *tls.Config, protocol, session string) *tls.Conn {
	t.Helper()
	c := dialTLS(t, address, cfg, protocol)
	if err := sendSession(c, session); err != nil {
		t.Fatal(err)
	}
	return c
}

// refused waits until a Hub ends a connection on which it sends nothing.
func refused(t testing.TB, what string, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the hub sent %d bytes, %v", what, n, err)
	}
}
