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

// Target names one instance of one sandbox.
type Target struct {
	SandboxID string
	Run       string // connections are pooled per run, so that none serves another instance
}

// Limits on what an agent may make the host hold or wait for. Lower ones refuse or cut answers of
// honest agents, higher ones let a hostile agent take more of the server's memory.
const (
	maxErrorText    = 4 << 10          // bytes of an error's text; longer texts are cut
	maxErrorBody    = 7 * maxErrorText // bytes; JSON escapes one byte as up to six
	maxReplyHeader  = 16 << 10         // bytes; those of cay's agent have under 1 KiB
	maxReply        = 64 << 10         // bytes of JSON; the largest is an entry with two paths, escaped
	maxMessage      = 64 << 10         // bytes of a message of a stream; an agent sends 32 KiB of output, or a path
	idleConnTimeout = 90 * time.Second // a shorter one costs a dial, 1-2 ms, on the next call
	// maxIdlePerInstance limits the idle connections that are kept for an instance; more calls
	// at once dial anew.
	maxIdlePerInstance = 8
	// maxIdle limits the idle connections that are kept for all sandboxes; those used longest ago are
	// closed first. Each takes some 40 KiB of the server's memory, which no call's account counts.
	maxIdle = 512
	// connBuffer is the size of each of the two buffers of a connection, bytes. Larger pieces bypass them.
	connBuffer = 8 << 10
)

// Client calls agents. The zero value does not work; see [NewClient].
type Client struct {
	// Bearer, if not nil, returns the token that a sandbox's agent requires with each request.
	// Only agents of versions without the handshake require one; "" is none. Bearer must not
	// change once the client is in use.
	Bearer func(sandboxID string) string

	// OnCall, if not nil, is called before each request to a sandbox's agent, and answered once the
	// answer has been read or the request has failed. OnCall must not change once the client is in
	// use.
	OnCall func(sandboxID string) (answered func())

	// Patience limits the silence of an agent; after it a call ends as unreachable. NewClient sets
	// it to [DefaultPatience]. It must not change once the client is in use.
	Patience time.Duration

	http *http.Client
	dial func(ctx context.Context, sandboxID string) (net.Conn, error)

	mu sync.Mutex
	// +checklocks:mu
	conns map[string]map[*trackedConn]struct{} // by sandbox id
}

// NewClient returns a client that reaches agents through dial. dial must return connections on
// which the agent has been authenticated (see [Authenticate]), if it has a key. Calls return an
// error of dial unchanged if it is a *fault.Error.
func NewClient(dial func(ctx context.Context, sandboxID string) (net.Conn, error)) *Client {
	c := &Client{Patience: DefaultPatience, dial: dial, conns: map[string]map[*trackedConn]struct{}{}}
	c.http = &http.Client{
		Transport: whole{c, &http.Transport{
			DialContext:            c.dialHost,
			DisableCompression:     true,
			MaxIdleConns:           maxIdle,
			MaxIdleConnsPerHost:    maxIdlePerInstance,
			IdleConnTimeout:        idleConnTimeout,
			MaxResponseHeaderBytes: maxReplyHeader,
			ExpectContinueTimeout:  5 * time.Second, // an agent that does not answer gets the body anyway
			ReadBufferSize:         connBuffer,
			WriteBufferSize:        connBuffer,
		}},
		// The agent sends no redirects; a program that poses as the agent may.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// whole is a transport that sends a short request in one write, refuses answers with an impossible
// status, and gives agents without the handshake their token. Go's transport sends the header alone
// when it does not know that the body is available already; the second packet costs a passage through
// the sandbox's network stack and a wake of the agent.
type whole struct {
	client *Client
	*http.Transport
}

// shortBody is the longest body, in bytes, that is sent in one write with the header. Both must fit the
// write buffer; with a longer body they would be two writes.
const shortBody = connBuffer - 2<<10

// RoundTrip implements [http.RoundTripper], and calls OnCall.
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

// answer wraps the body of an answer and calls read when the body has been read or closed.
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
	// The transport reports a body that is longer than its ContentLength.
	body, err := io.ReadAll(io.LimitReader(r.Body, r.ContentLength+1))
	if err := errors.Join(err, r.Body.Close()); err != nil {
		return nil, err
	}
	sent := *r // a transport must not change the caller's request
	sent.Body = io.NopCloser(bytes.NewReader(body))
	return plausible(w.Transport.RoundTrip(&sent))
}

// host returns the host part of a target's URLs, by which the transport pools
// connections.
func (t Target) host() string {
	return t.SandboxID + "." + hex.EncodeToString([]byte(t.Run))
}

// url returns the URL of a call to the target's agent.
func (t Target) url(path string, query url.Values) string {
	u := url.URL{Scheme: "http", Host: t.host(), Path: path, RawQuery: query.Encode()}
	return u.String()
}

// bearer returns the token for requests to a host, "" for none.
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

// dialHost makes a connection to the sandbox of a target's host, which [Client.Drop] can break.
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

// trackedConn is a connection in the client's conns until it is closed.
type trackedConn struct {
	net.Conn // nil while it is being made; guarded by client.mu until then
	client   *Client
	id       string
	heads    heads
}

// Read reads from the connection. It fails when the head of an answer has too many lines.
func (t *trackedConn) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	if bad := t.heads.look(b[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (t *trackedConn) expectHead() { t.heads.expect() }

// forget removes t from the client's conns, and returns the connection to close, nil if none was made.
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

// Drop breaks every connection to the sandbox: those that are idle, in use or being made. Calls
// in flight end with Unavailable. A sandbox that is removed or suspended needs it: connections
// would otherwise keep its network namespace alive.
func (c *Client) Drop(sandboxID string) { c.dropBut(sandboxID, nil) }

// dropBut breaks every connection to the sandbox but kept.
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
		_ = t.Close() // its error changes nothing: the other end is gone or ends soon
	}
}

// CloseIdle closes the connections that no call uses.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// Health returns an error if the agent does not answer. An agent answers only this call without a key.
func (c *Client) Health(ctx context.Context, t Target) error {
	return c.call(ctx, t, c.Patience, http.MethodGet, "/health", nil, nil, nil)
}

// InitRequest is the body of POST /init: the key of an agent and the settings of its
// sandbox. The agent keeps its value of a field that is absent.
type InitRequest struct {
	AccessToken    string            `json:"accessToken,omitempty"`
	Env            map[string]string `json:"envVars,omitempty"`
	DefaultUser    string            `json:"defaultUser,omitempty"`
	DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`
	Hostname       string            `json:"hostname,omitempty"`
	Nameservers    []string          `json:"nameservers,omitempty"` // replaces /etc/resolv.conf
}

// Init gives the agent its key and the sandbox's defaults. An agent without a key accepts
// one from any client, so the first Init must be made before another program runs inside. An
// agent with a key accepts a new key only over connections that were authenticated with the old
// one. With a new key all other connections end, also those being made; the connection that
// brought the key remains.
func (c *Client) Init(ctx context.Context, t Target, r InitRequest) error {
	var used net.Conn
	if r.AccessToken != "" {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
			GotConn: func(i httptrace.GotConnInfo) { used = i.Conn },
		})
	}
	err := c.call(ctx, t, c.Patience, http.MethodPost, "/init", nil, r, nil)
	if err != nil || r.AccessToken == "" {
		return err
	}
	c.dropBut(t.SandboxID, used)
	return nil
}

// RelieveMemory kills the largest processes of the sandbox, by resident memory,
// until that many bytes were freed or no process is left to kill, and waits until
// the killed processes are gone. The commands that they belonged to end with OOMKilled.
func (c *Client) RelieveMemory(ctx context.Context, t Target, bytes int64) (
	freed int64, killed int, err error) {
	var reply RelieveReply
	err = c.call(ctx, t, c.Patience, http.MethodPost, "/memory/relieve", nil, RelieveRequest{Bytes: bytes}, &reply)
	return reply.Freed, reply.Killed, err
}

// Busy reports whether any process beside the agent runs inside: a command, or a process that
// an ended command left in the background.
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

// RelieveReply is the answer to POST /memory/relieve.
type RelieveReply struct {
	Freed  int64 `json:"freed"` // bytes
	Killed int   `json:"killed"`
}

// call sends one request with a JSON body and decodes the JSON answer into reply. The whole answer must
// have come within the given time. body and reply may be nil.
func (c *Client) call(ctx context.Context, t Target, within time.Duration, method, path string, query url.Values,
	body, reply any) error {
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

// decodeReply decodes an answer of up to maxReply bytes.
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

// drain reads the rest of an answer, up to maxErrorText bytes, so that the connection can be reused.
func drain(ctx context.Context, r io.Reader) error {
	if _, err := io.CopyN(io.Discard, r, maxErrorText); err != nil && !errors.Is(err, io.EOF) {
		return callError(ctx, err)
	}
	return nil
}

// do sends a request whose answer may take long. The agent has to take each piece of the body within the
// patience, to begin its answer within the patience after the last piece, and to send each patientPace
// bytes of the answer within the patience. The time that the caller takes does not count. The caller
// closes the body.
func (c *Client) do(req *http.Request) (*http.Response, error) {
	return c.doFor(req, c.Patience, c.Patience, c.Patience, patientPace)
}

// doFor is like do with three patiences: sent for each piece of the request's body, head for the head of
// the answer after the last piece, and body for each pace bytes of the answer.
func (c *Client) doFor(req *http.Request, sent, head, body time.Duration, pace int) (*http.Response, error) {
	ctx, w := watching(req.Context(), head)
	if req.Body != nil && req.Body != http.NoBody && req.GetBody == nil { // the caller made the body
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

// send sends the request and returns answers other than 2xx and 416 as errors.
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

// replyError returns the error of an answer whose body is {"code":N,"message":"…"}.
func replyError(resp *http.Response) error {
	var body struct {
		Message string `json:"message"`
	}
	// If the body is not JSON, the error has only the status.
	_ = json.NewDecoder(io.LimitReader(resp.Body, maxErrorBody)).Decode(&body)
	if resp.StatusCode == http.StatusNotFound && resp.Header.Get(CodeHeader) == "" {
		return &unknownCall{resp.Request.URL.Path}
	}
	err := codeError(resp.Header.Get(CodeHeader), body.Message,
		fmt.Errorf("the agent answered %.40s: %s", resp.Status, body.Message))
	if f := fault.As(err); f != nil && f.Field != "" && resp.Header.Get(FieldHeader) == "to" {
		f.Field = "to" // codeError made this fault, so no other code shares it
	}
	return err
}

// unknownCall reports a call that the agent does not have.
type unknownCall struct{ path string }

func (e *unknownCall) Error() string { return "the agent has no " + e.path }

// codeError returns the fault of a code. For an unknown code it returns an error that says that the
// sandbox, and not the server, is at fault.
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

// printable returns -1 for characters on which a terminal would act, and others unchanged.
func printable(r rune) rune {
	if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
		return -1
	}
	return r
}

// callError returns the error of a call for an error of its connection or its context.
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

// connectError returns the error of a call for an error of the Connect protocol.
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
