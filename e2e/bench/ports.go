package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of ports and directories.
const (
	portRequest = "a request to a port, kept connection"
	portDown    = "an answer of 200 MB from a port"
	portUp      = "a body of 200 MB to a port"
	portTunnel  = "200 MB out of a port by raw TCP"
	portEcho    = "a byte to a port and back by raw TCP"
	hostRequest = "  the same server on the host's loopback: a request"
	hostDown    = "  on the host's loopback: an answer of 200 MB"
	hostUp      = "  on the host's loopback: a body of 200 MB"

	treeUp   = "2000 files of 5 KB in as tar"
	treeDown = "2000 files of 5 KB out as tar"
)

const (
	bulk      = 200_000_000 // bytes of one transfer
	bulkPiece = 256 << 10   // bytes of one write of the server
	servePort = 8080
	rawPort   = 8081
	treeFiles = 2000
	treeFile  = 5000 // bytes
)

// serveBulk serves the other end of the transfers, inside and on the host; the bench runs its own
// program there. GET ?n=N returns so many bytes; any other request is read and gets an empty
// answer. The raw port sends bulk bytes for a 'd', and echoes every other byte.
func serveBulk(address, raw string) error {
	l, err := net.Listen("tcp", raw)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serveRaw(c)
		}
	}()
	piece := make([]byte, bulkPiece)
	return http.ListenAndServe(address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err != nil {
			// The caller notices lost bytes.
			_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, bulkPiece))
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(n))
		for n > 0 {
			wrote, err := w.Write(piece[:min(n, len(piece))])
			if err != nil {
				return
			}
			n -= wrote
		}
	}))
}

func serveRaw(c net.Conn) {
	defer c.Close()
	b := make([]byte, 1)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
		if b[0] != 'd' {
			if _, err := c.Write(b); err != nil {
				return
			}
			continue
		}
		piece := make([]byte, bulkPiece)
		for n := bulk; n > 0; {
			wrote, err := c.Write(piece[:min(n, len(piece))])
			if err != nil {
				return
			}
			n -= wrote
		}
		return
	}
}

// measurePorts calls one server in a sandbox and the same server on the host, in turn.
func measurePorts(ctx context.Context, o options, s *server, _ *docker, r *results) (err error) {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.api.DestroySandbox(context.WithoutCancel(ctx), id)) }()
	if err := s.serveInside(ctx, id); err != nil {
		return err
	}
	host, stop, err := serveHere(ctx)
	if err != nil {
		return err
	}
	defer stop()
	inside := fmt.Sprintf("%s/v1/sandboxes/%s/ports/%d/", s.url, id, servePort)
	c := &http.Client{Transport: &http.Transport{ReadBufferSize: bulkPiece, WriteBufferSize: bulkPiece}}
	defer c.CloseIdleConnections()
	for i := range o.commands() + 1 {
		into := r
		if i == 0 { // the first round warms up and is not counted
			into = &results{}
		}
		for name, url := range map[string]string{portRequest: inside, hostRequest: host} {
			began := time.Now()
			if err := s.ask(ctx, c, http.MethodGet, url+"?n=2", nil); err != nil {
				return err
			}
			into.took(name, began)
		}
	}
	for range o.transfers() {
		for _, way := range []struct {
			name, method, url string
		}{{portDown, http.MethodGet, inside}, {hostDown, http.MethodGet, host}, {portUp, http.MethodPut, inside},
			{hostUp, http.MethodPut, host}} {
			var body io.Reader
			url := way.url
			if way.method == http.MethodPut {
				body = io.LimitReader(zeros{}, bulk)
			} else {
				url += "?n=" + strconv.Itoa(bulk)
			}
			began := time.Now()
			if err := s.ask(ctx, c, way.method, url, body); err != nil {
				return err
			}
			r.add(way.name, unitMBps, bulk/1e6/time.Since(began).Seconds())
		}
		if err := s.tunnelOnce(ctx, id, r); err != nil {
			return err
		}
	}
	return s.measureTrees(ctx, o, id, r)
}

// zeros is an endless reader of zeros.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// ask makes one request and reads the answer to its end.
func (s *server) ask(ctx context.Context, c *http.Client, method, url string, body io.Reader) error {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+s.key)
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, make([]byte, bulkPiece)); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", url, resp.Status)
	}
	return nil
}

// tunnelOnce sends bytes there and back, then downloads the bulk, over one connection.
func (s *server) tunnelOnce(ctx context.Context, id string, r *results) error {
	conn, err := s.api.DialPort(ctx, id, rawPort)
	if err != nil {
		return fmt.Errorf("dialling a port: %w", err)
	}
	defer conn.Close()
	b := []byte{'e'}
	for range 20 {
		began := time.Now()
		if _, err := conn.Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, b); err != nil {
			return err
		}
		r.took(portEcho, began)
	}
	began := time.Now()
	if _, err := conn.Write([]byte{'d'}); err != nil {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, bulkPiece))
	if err != nil || n != bulk {
		return fmt.Errorf("got %d bytes of %d: %w", n, bulk, err)
	}
	r.add(portTunnel, unitMBps, bulk/1e6/time.Since(began).Seconds())
	return nil
}

// serveInside puts the bench's own program into a sandbox and runs it there as a server.
func (s *server) serveInside(ctx context.Context, id string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	f, err := os.Open(self)
	if err != nil {
		return err
	}
	defer f.Close()
	mode := os.FileMode(0o755)
	if err := s.api.WriteFile(ctx, id, "/opt/bench", f, cay.WriteFileOptions{Mode: &mode}); err != nil {
		return fmt.Errorf("uploading the server: %w", err)
	}
	line := fmt.Sprintf("nohup /opt/bench -serve 127.0.0.1:%d,127.0.0.1:%d >/tmp/bench.log 2>&1 &", servePort, rawPort)
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Command: &line}); err != nil {
		return err
	}
	return s.poll(ctx, patience, func() (bool, error) {
		conn, err := s.api.DialPort(ctx, id, servePort)
		if cay.HasCode(err, "port_closed") {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		return true, conn.Close()
	})
}

// serveHere runs the same server on the host's loopback.
func serveHere(ctx context.Context) (url string, stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return "", nil, err
	}
	raw, err := freeAddress()
	if err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, self, "-serve", address+","+raw)
	if err := cmd.Start(); err != nil {
		cancel()
		return "", nil, err
	}
	stop = func() { cancel(); _ = cmd.Wait() } // the program was killed
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			return "http://" + address + "/", stop, conn.Close()
		}
		if time.Now().After(deadline) {
			stop()
			return "", nil, fmt.Errorf("the server on the host: %w", err)
		}
	}
}

// measureTrees uploads and downloads a directory.
func (s *server) measureTrees(ctx context.Context, o options, id string, r *results) error {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	content := make([]byte, treeFile)
	if _, err := rand.Read(content); err != nil {
		return err
	}
	for i := range treeFiles {
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%02d/f%d", i/50, i), Mode: 0o644,
			Size: treeFile}); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	for i := range o.transfers() {
		dir := fmt.Sprintf("/var/tmp/tree%d", i)
		began := time.Now()
		if err := s.api.UploadTree(ctx, id, dir, bytes.NewReader(archive.Bytes()), ""); err != nil {
			return fmt.Errorf("uploading a directory: %w", err)
		}
		r.took(treeUp, began)
		began = time.Now()
		back, err := s.api.DownloadTree(ctx, id, dir)
		if err != nil {
			return fmt.Errorf("downloading a directory: %w", err)
		}
		n, err := io.Copy(io.Discard, back)
		if err := errors.Join(err, back.Close()); err != nil || n < treeFiles*treeFile {
			return fmt.Errorf("downloading a directory: got %d bytes: %w", n, err)
		}
		r.took(treeDown, began)
	}
	return nil
}
