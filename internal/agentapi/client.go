package agentapi

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/fault"
)

// Target names one life of one sandbox.
type Target struct {
	SandboxID string
	Run       string // connections are pooled per life, so that none outlives it
}

// Limits on what an agent may make the host hold or wait for.
const (
	maxErrorText    = 4 << 10          // bytes of an error's text; longer ones are cut
	maxErrorBody    = 7 * maxErrorText // bytes; JSON makes up to six of one
	maxReplyHeader  = 16 << 10         // bytes; our own replies have under 1 KiB
	maxReply        = 64 << 10         // bytes of JSON; the largest is an entry with two paths, escaped
	maxMessage      = 64 << 10         // bytes of a message of a stream; an agent sends 32 KiB of output, or a path
	idleConnTimeout = 90 * time.Second // shorter costs a dial, 1-2 ms, on the next call
	// maxIdlePerLife is how many connections of a sandbox are kept; more calls
	// at once dial anew.
	maxIdlePerLife = 8
	// maxIdle is how many are kept of all sandboxes, those used longest ago going first. Each has some 40 KiB
	// of the server's memory, which no call answers for.
	maxIdle = 512
	// connBuffer is each of the two buffers of a connection, bytes. Larger pieces pass them by.
	connBuffer = 8 << 10
)

// Client calls agents. The zero value does not work; see [NewClient].
type Client struct {
	// Bearer, if not nil, returns the token that a sandbox's agent wants with each request: one
	// that was started before there was a handshake. "" is none. It must not change once the
	// client is in use.
	Bearer func(sandboxID string) string

	// OnCall, if not nil, is told of each request to a sandbox's agent; answered is called once the answer has been
	// read. It must not change once the client is in use.
	OnCall func(sandboxID string) (answered func())

	// Patience is how long an agent may be silent before a call ends as unreachable. It is
	// [DefaultPatience] at first and must not be changed once calls are made.
	Patience time.Duration

	http *http.Client
	dial func(ctx context.Context, sandboxID string) (net.Conn, error)

	mu sync.Mutex
	// +checklocks:mu
	conns map[string]map[*trackedConn]struct{} // by sandbox id
}

// NewClient makes a client that reaches agents through dial, which returns connections on which
// the agent has been authenticated (see [Authenticate]), if it has a key. An error of dial that
// is a *fault.Error comes back from the calls as it is.
func NewClient(dial func(ctx context.Context, sandboxID string) (net.Conn, error)) *Client {
	c := &Client{Patience: DefaultPatience, dial: dial, conns: map[string]map[*trackedConn]struct{}{}}
	c.http = &http.Client{
		Transport: whole{c, &http.Transport{
			DialContext:            c.dialHost,
			DisableCompression:     true,
			MaxIdleConns:           maxIdle,
			MaxIdleConnsPerHost:    maxIdlePerLife,
			IdleConnTimeout:        idleConnTimeout,
			MaxResponseHeaderBytes: maxReplyHeader,
			ExpectContinueTimeout:  5 * time.Second, // an agent that does not answer gets the body anyway
			ReadBufferSize:         connBuffer,
			WriteBufferSize:        connBuffer,
		}},
		// A redirect can only come from somebody who is not the agent.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// whole is a transport that refuses answers that are none, and sends a short request as one write. By itself Go sends the header
// alone when it does not know that the body is there already, and a second packet costs its way
// through the sandbox's network stack, and a wake of the agent. It gives agents of before the
// handshake their token.
type whole struct {
	client *Client
	*http.Transport
}

// shortBody is up to how many bytes of body leave with the header; both fit the write buffer.
const shortBody = connBuffer - 2<<10

func (w whole) RoundTrip(r *http.Request) (*http.Response, error) {
	if w.client.OnCall == nil {
		return w.roundTrip(r)
	}
	answered := w.client.OnCall(sandboxOf(r.URL.Host))
	resp, err := w.roundTrip(r)
	if err != nil || resp.StatusCode == http.StatusSwitchingProtocols {
		answered()
		return resp, err
	}
	resp.Body = &answer{resp.Body, sync.OnceFunc(answered)}
	return resp, nil
}

// answer is the body of an answer that tells when it was read.
type answer struct {
	io.ReadCloser
	read func()
}

func (a *answer) Read(p []byte) (int, error) {
	n, err := a.ReadCloser.Read(p)
	if err != nil {
		a.read()
	}
	return n, err
}

func (a *answer) Close() error {
	a.read()
	return a.ReadCloser.Close()
}

func (w whole) roundTrip(r *http.Request) (*http.Response, error) {
	if token := w.client.bearer(r.URL.Host); token != "" {
		r = r.Clone(r.Context())
		r.Header.Set(TokenHeader, token)
	}
	r = r.WithContext(WithHeads(r.Context()))
	if r.Body == nil || r.ContentLength <= 0 || r.ContentLength > shortBody {
		return plausible(w.Transport.RoundTrip(r))
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, r.ContentLength+1)) // more than it says is the transport's error
	if err := errors.Join(err, r.Body.Close()); err != nil {
		return nil, err
	}
	sent := *r // a transport does not change the caller's
	sent.Body = io.NopCloser(bytes.NewReader(body))
	return plausible(w.Transport.RoundTrip(&sent))
}

// host is the host part of a target's URLs, which is what the transport pools
// connections by.
func (t Target) host() string {
	return t.SandboxID + "." + hex.EncodeToString([]byte(t.Run))
}

func (t Target) url(path string, query url.Values) string {
	u := url.URL{Scheme: "http", Host: t.host(), Path: path, RawQuery: query.Encode()}
	return u.String()
}

// bearer returns the token that goes with requests to a host, "" for none.
func (c *Client) bearer(host string) string {
	if c.Bearer == nil {
		return ""
	}
	return c.Bearer(sandboxOf(host))
}

// sandboxOf returns the id of the sandbox of a target's host.
func sandboxOf(host string) string {
	id, _, _ := strings.Cut(host, ".")
	return id
}

func (c *Client) dialHost(ctx context.Context, _, addr string) (net.Conn, error) {
	id, _, _ := strings.Cut(addr, ".")
	t := &trackedConn{client: c, id: id}
	c.mu.Lock()
	if c.conns[id] == nil {
		c.conns[id] = map[*trackedConn]struct{}{}
	}
	c.conns[id][t] = struct{}{}
	c.mu.Unlock()
	conn, err := c.dial(ctx, id)
	if err != nil {
		t.forget()
		return nil, err
	}
	c.mu.Lock()
	_, wanted := c.conns[id][t]
	t.Conn = conn
	c.mu.Unlock()
	if !wanted {
		_ = conn.Close() // nothing was sent
		return nil, unreachable(errors.New("the connection was dropped while it was made"))
	}
	return t, nil
}

// trackedConn leaves the client's books when it is closed.
type trackedConn struct {
	net.Conn // nil while it is being made; guarded by client.mu until then
	client   *Client
	id       string
	heads    heads
}

// Read reads what came, if it is no head without an end.
func (t *trackedConn) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	if bad := t.heads.look(b[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (t *trackedConn) expectHead() { t.heads.expect() }

// forget takes it out of the client's books, and returns the connection to close, if there is one.
func (t *trackedConn) forget() net.Conn {
	t.client.mu.Lock()
	defer t.client.mu.Unlock()
	delete(t.client.conns[t.id], t)
	if len(t.client.conns[t.id]) == 0 {
		delete(t.client.conns, t.id)
	}
	return t.Conn
}

func (t *trackedConn) Close() error {
	if conn := t.forget(); conn != nil {
		return conn.Close()
	}
	return nil
}

// Drop breaks every connection to the sandbox, idle, in use or being made. Calls in flight
// end with Unavailable. For a sandbox that goes away or is suspended: its
// connections would otherwise keep its network namespace alive.
func (c *Client) Drop(sandboxID string) { c.dropBut(sandboxID, nil) }

// dropBut is Drop of all connections but one.
func (c *Client) dropBut(sandboxID string, kept net.Conn) {
	c.mu.Lock()
	var conns []*trackedConn
	for t := range c.conns[sandboxID] {
		if net.Conn(t) != kept {
			conns = append(conns, t)
		}
	}
	c.mu.Unlock()
	for _, t := range conns {
		// The peer is gone or about to be; there is nobody to tell.
		_ = t.Close()
	}
}

// CloseIdle closes the connections that no call uses.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// Health asks whether the agent answers. It is the one call that an agent answers to everybody.
func (c *Client) Health(ctx context.Context, t Target) error {
	return c.call(ctx, t, c.Patience, http.MethodGet, "/health", nil, nil, nil)
}

// InitRequest is what an agent is told about its sandbox. Absent fields leave
// what the agent has.
type InitRequest struct {
	AccessToken    string            `json:"accessToken,omitempty"`
	Env            map[string]string `json:"envVars,omitempty"`
	DefaultUser    string            `json:"defaultUser,omitempty"`
	DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`
	Hostname       string            `json:"hostname,omitempty"`
	Nameservers    []string          `json:"nameservers,omitempty"` // replaces /etc/resolv.conf
}

// Init gives the agent its key and the sandbox's defaults. An agent without a
// key takes any from anybody, so the first Init is made before anything else runs inside; one
// that has a key takes another over connections that were authenticated with the former. With a
// new key all other connections end, those being made included; the one that brought the key
// goes on under it.
func (c *Client) Init(ctx context.Context, t Target, r InitRequest) error {
	var used net.Conn
	if r.AccessToken != "" {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { used = i.Conn }})
	}
	if err := c.call(ctx, t, c.Patience, http.MethodPost, "/init", nil, r, nil); err != nil || r.AccessToken == "" {
		return err
	}
	c.dropBut(t.SandboxID, used)
	return nil
}

// RelieveMemory kills the largest processes of the sandbox, by resident memory,
// until that many bytes were freed or nothing is left to kill, and waits until
// they are gone. The commands they belonged to end with OOMKilled.
func (c *Client) RelieveMemory(ctx context.Context, t Target, bytes int64) (freed int64, killed int, err error) {
	var reply RelieveReply
	err = c.call(ctx, t, c.Patience, http.MethodPost, "/memory/relieve", nil, RelieveRequest{Bytes: bytes}, &reply)
	return reply.Freed, reply.Killed, err
}

// Busy reports whether any process runs inside beside the agent: a command, or what one
// that has ended left in the background.
func (c *Client) Busy(ctx context.Context, t Target) (bool, error) {
	var reply BusyReply
	err := c.call(ctx, t, c.Patience, http.MethodGet, "/busy", nil, nil, &reply)
	return reply.Busy, err
}

// BusyReply is the answer to GET /busy.
type BusyReply struct {
	Busy bool `json:"busy"`
}

// RelieveRequest is the body of POST /memory/relieve.
type RelieveRequest struct {
	Bytes int64 `json:"bytes"`
}

// RelieveReply is its answer.
type RelieveReply struct {
	Freed  int64 `json:"freed"`
	Killed int   `json:"killed"`
}

// call does one request with a JSON body and answer, all of which has to be there within a time; body and
// reply may be nil.
func (c *Client) call(ctx context.Context, t Target, within time.Duration, method, path string, query url.Values, body, reply any) error {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encoding the request: %w", err)
		}
		r = bytes.NewReader(b)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, within, errSilent)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, t.url(path, query), r)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.send(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if reply == nil {
		return drain(ctx, resp.Body)
	}
	return decodeReply(ctx, resp.Body, path, reply)
}

// decodeReply decodes an answer, as far as one may be long.
func decodeReply(ctx context.Context, body io.Reader, path string, reply any) error {
	b, err := io.ReadAll(io.LimitReader(body, maxReply+1))
	switch {
	case err != nil:
		return callError(ctx, err)
	case len(b) > maxReply:
		return unusable(fmt.Errorf("the reply of %s has more than %d bytes", path, maxReply))
	}
	if err := json.Unmarshal(b, reply); err != nil {
		return unusable(fmt.Errorf("decoding the reply of %s: %w", path, err))
	}
	return nil
}

// drain reads the little that is left, so that the connection can be reused.
func drain(ctx context.Context, r io.Reader) error {
	if _, err := io.CopyN(io.Discard, r, maxErrorText); err != nil && !errors.Is(err, io.EOF) {
		return callError(ctx, err)
	}
	return nil
}

// do sends a request whose answer may go on. The agent has to take each piece of what is sent within the
// patience, and to begin the answer after the last one, and from then on send each patientPace of it. The
// time that the caller takes does not count. The caller closes the body.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	return c.doFor(req, c.Patience, c.Patience, c.Patience, patientPace)
}

// doFor is do with the patience for each piece of what is sent, that for the head once all is sent, and that for
// pace bytes of the body.
func (c *Client) doFor(req *http.Request, sent, head, body time.Duration, pace int) (*http.Response, error) {
	ctx, w := watching(req.Context(), head)
	if req.Body != nil && req.Body != http.NoBody && req.GetBody == nil { // one that comes from a caller
		w.begun(sent, 0)
		w.wait()
		req.Body = &sentBody{req.Body, w, head}
	}
	resp, err := c.send(req.WithContext(ctx))
	if err != nil {
		w.end()
		return nil, err
	}
	w.answered(body, pace)
	resp.Body = &watchedBody{resp.Body, w, ctx}
	return resp, nil
}

// send sends the request and turns answers other than 2xx and 416 into errors.
// The caller closes the body.
func (c *Client) send(req *http.Request) (*http.Response, error) {
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, callError(req.Context(), err)
	}
	if resp.StatusCode/100 == 2 || resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, replyError(resp)
}

// replyError reads {"code":N,"message":"…"}.
func replyError(resp *http.Response) error {
	var body struct {
		Message string `json:"message"`
	}
	// A body that is no JSON leaves the status to speak.
	_ = json.NewDecoder(io.LimitReader(resp.Body, maxErrorBody)).Decode(&body)
	if resp.StatusCode == http.StatusNotFound && resp.Header.Get(CodeHeader) == "" {
		return &unknownCall{resp.Request.URL.Path}
	}
	err := codeError(resp.Header.Get(CodeHeader), body.Message, fmt.Errorf("the agent answered %.40s: %s", resp.Status, body.Message))
	if f := fault.As(err); f != nil && f.Field != "" && resp.Header.Get(FieldHeader) == "to" {
		f.Field = "to" // the fault was made just now and is nobody else's yet
	}
	return err
}

// unknownCall is the error of a call that the agent does not have.
type unknownCall struct{ path string }

func (e *unknownCall) Error() string { return "the agent has no " + e.path }

// codeError makes the fault of a code. One that is not known says that the sandbox, and not the server,
// is at fault.
func codeError(code, text string, cause error) error {
	k, ok := kinds[code]
	if !ok {
		return unusable(cause)
	}
	if len(text) > maxErrorText {
		text = text[:maxErrorText]
	}
	e := fault.New(k.kind, code, "%s", strings.Map(printable, strings.ToValidUTF8(text, "\uFFFD")))
	e.Field = k.field
	return e
}

// printable drops what a terminal would act on.
func printable(r rune) rune {
	if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
		return -1
	}
	return r
}

// callError says what an error of the connection means.
func callError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); cause != error(errSilent) {
			return fmt.Errorf("calling the agent: %w", cause)
		}
		return errSilent
	}
	if f := fault.As(err); f != nil {
		return f
	}
	return unreachable(err)
}

// connectError is callError for errors of the Connect protocol.
func connectError(ctx context.Context, err error) error {
	var e *connect.Error
	if errors.As(err, &e) && e.Meta().Get(CodeHeader) != "" {
		return codeError(e.Meta().Get(CodeHeader), e.Message(), err)
	}
	if ctx.Err() == nil && connect.IsWireError(err) && connect.CodeOf(err) != connect.CodeUnavailable {
		return unusable(fmt.Errorf("the agent refused the call: %w", err))
	}
	return callError(ctx, err)
}
