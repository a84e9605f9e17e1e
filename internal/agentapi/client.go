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
	maxReplyHeader  = 64 << 10         // bytes; our own replies have under 1 KiB
	maxReply        = 4 << 20          // bytes of JSON; the largest is a list of processes
	idleConnTimeout = 90 * time.Second // shorter costs a dial, 1-2 ms, on the next call
	// maxIdlePerLife is how many connections of a sandbox are kept; more calls
	// at once dial anew.
	maxIdlePerLife = 8
)

// Client calls agents. The zero value does not work; see [NewClient].
type Client struct {
	// Bearer, if not nil, returns the token that a sandbox's agent wants with each request: one
	// that was started before there was a handshake. "" is none. It must not change once the
	// client is in use.
	Bearer func(sandboxID string) string

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
	c := &Client{dial: dial, conns: map[string]map[*trackedConn]struct{}{}}
	c.http = &http.Client{
		Transport: whole{c, &http.Transport{
			DialContext:            c.dialHost,
			DisableCompression:     true,
			MaxIdleConnsPerHost:    maxIdlePerLife,
			IdleConnTimeout:        idleConnTimeout,
			MaxResponseHeaderBytes: maxReplyHeader,
			ExpectContinueTimeout:  5 * time.Second, // an agent that does not answer gets the body anyway
			ReadBufferSize:         32 << 10,        // one chunk of output
			WriteBufferSize:        32 << 10,
		}},
		// A redirect can only come from somebody who is not the agent.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// whole is a transport that sends a short request as one write. By itself Go sends the header
// alone when it does not know that the body is there already, and a second packet costs its way
// through the sandbox's network stack, and a wake of the agent. It gives agents of before the
// handshake their token.
type whole struct {
	client *Client
	*http.Transport
}

// shortBody is up to how many bytes of body leave with the header; both fit the write buffer.
const shortBody = 16 << 10

func (w whole) RoundTrip(r *http.Request) (*http.Response, error) {
	if token := w.client.bearer(r.URL.Host); token != "" {
		r = r.Clone(r.Context())
		r.Header.Set(TokenHeader, token)
	}
	if r.Body == nil || r.ContentLength <= 0 || r.ContentLength > shortBody {
		return possible(w.Transport.RoundTrip(r))
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, r.ContentLength+1)) // more than it says is the transport's error
	if err := errors.Join(err, r.Body.Close()); err != nil {
		return nil, err
	}
	sent := *r // a transport does not change the caller's
	sent.Body = io.NopCloser(bytes.NewReader(body))
	return possible(w.Transport.RoundTrip(&sent))
}

// possible refuses an answer whose status is none that a request can end with: those who pass an
// answer on could not.
func possible(resp *http.Response, err error) (*http.Response, error) {
	if err == nil && (resp.StatusCode < 200 || resp.StatusCode > 599) {
		resp.Body.Close()
		return nil, unreachable(fmt.Errorf("the agent answered with the status %d", resp.StatusCode))
	}
	return resp, err
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
	id, _, _ := strings.Cut(host, ".")
	return c.Bearer(id)
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
}

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
	return c.call(ctx, t, http.MethodGet, "/health", nil, nil, nil)
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
	if err := c.call(ctx, t, http.MethodPost, "/init", nil, r, nil); err != nil || r.AccessToken == "" {
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
	err = c.call(ctx, t, http.MethodPost, "/memory/relieve", nil, RelieveRequest{Bytes: bytes}, &reply)
	return reply.Freed, reply.Killed, err
}

// Busy reports whether any process runs inside beside the agent: a command, or what one
// that has ended left in the background.
func (c *Client) Busy(ctx context.Context, t Target) (bool, error) {
	var reply BusyReply
	err := c.call(ctx, t, http.MethodGet, "/busy", nil, nil, &reply)
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

// call does one request with a JSON body and answer; body and reply may be nil.
func (c *Client) call(ctx context.Context, t Target, method, path string, query url.Values, body, reply any) error {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encoding the request: %w", err)
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, t.url(path, query), r)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if reply == nil {
		return drain(resp.Body)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(reply); err != nil {
		return unreachable(fmt.Errorf("decoding the reply of %s: %w", path, err))
	}
	return nil
}

// drain reads the little that is left, so that the connection can be reused.
func drain(r io.Reader) error {
	if _, err := io.CopyN(io.Discard, r, maxErrorText); err != nil && !errors.Is(err, io.EOF) {
		return unreachable(err)
	}
	return nil
}

// do sends the request and turns answers other than 2xx and 416 into errors.
// The caller closes the body.
func (c *Client) do(req *http.Request) (*http.Response, error) {
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
	err := codeError(resp.Header.Get(CodeHeader), body.Message, fmt.Errorf("agent answered %s: %.200s", resp.Status, body.Message))
	if f := fault.As(err); f != nil && f.Field != "" && resp.Header.Get(FieldHeader) == "to" {
		f.Field = "to" // the fault was made just now and is nobody else's yet
	}
	return err
}

// unknownCall is the error of a call that the agent does not have.
type unknownCall struct{ path string }

func (e *unknownCall) Error() string { return "the agent has no " + e.path }

// codeError makes the fault of a code; one that is not known is a plain error.
func codeError(code, text string, cause error) error {
	k, ok := kinds[code]
	if !ok {
		return cause
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
	if r != '\n' && r != '\t' && unicode.IsControl(r) {
		return -1
	}
	return r
}

// callError says what an error of the connection means.
func callError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("calling the agent: %w", context.Cause(ctx))
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
	if connect.IsWireError(err) && connect.CodeOf(err) != connect.CodeUnavailable {
		return fmt.Errorf("agent refused the call: %w", err)
	}
	return callError(ctx, err)
}

func unreachable(cause error) error {
	return fault.New(fault.Unavailable, CodeUnreachable, "the sandbox does not answer").Because(cause)
}
