// Package cay calls a cay server: it creates sandboxes, runs commands in them, and moves files in and
// out.
//
//	c, err := cay.New("http://127.0.0.1:7070", os.Getenv("CAY_API_KEY"))
//	sandbox, err := c.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: "python"}, cay.CreateOptions{})
//	defer c.DestroySandbox(context.WithoutCancel(ctx), sandbox.ID)
//	result, err := c.Execute(ctx, sandbox.ID, cay.ExecuteRequest{Args: []string{"python3", "-c", "print(6*7)"}})
//
// The example of the package is a whole program.
//
// If the server refuses a call, the error is an [*Error]; any other error is one of the connection. A
// [Client] is safe for concurrent use and keeps nothing but idle connections. It never retries a call; a
// caller can safely retry a create with [CreateOptions].IdempotencyKey.
//
// The types of requests and answers have the fields of the HTTP API. A pointer is nil if a field is
// absent; new("value") makes one.
package cay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// dialTimeout and headerTimeout end calls to a server that is gone. A command
	// may run for 5 minutes before its answer begins, and a create may wait for a
	// boot and 10 minutes for its start command; a headerTimeout below that would
	// break off good calls.
	dialTimeout   = 10 * time.Second
	headerTimeout = 12 * time.Minute
	// maxAnswer limits the memory that a broken server can make the client use,
	// bytes. The largest honest answer has two streams of 8 MiB, which JSON may escape
	// to six times their size; a lower limit would refuse it.
	maxAnswer = 128 << 20
)

// Client calls one server with one API key.
type Client struct {
	wire *wire
}

// Option sets an option of a [Client].
type Option func(*options)

// options holds the settings of [New].
type options struct {
	http      *http.Client
	userAgent string
}

// WithHTTPClient makes the client use h, with its transport and timeouts. A
// Timeout of h also ends commands and transfers that take longer.
func WithHTTPClient(h *http.Client) Option { return func(o *options) { o.http = h } }

// WithUserAgent sets the User-Agent header.
func WithUserAgent(name string) Option { return func(o *options) { o.userAgent = name } }

// New returns a client for the server at baseURL (http or https, with a path if the
// server is reached below one). It makes no call. An empty apiKey is enough for
// [Client.Health], [Client.Ready] and [Client.OpenAPI].
func New(baseURL, apiKey string, opts ...Option) (*Client, error) {
	u, err := url.Parse(baseURL)
	if err != nil {
		return nil, fmt.Errorf("parsing the server's URL: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%q is not the URL of a server such as http://127.0.0.1:7070", baseURL)
	}
	o := options{userAgent: "cay-client"}
	for _, opt := range opts {
		opt(&o)
	}
	if o.http == nil {
		o.http = &http.Client{Transport: transport()}
	}
	identify := func(_ context.Context, r *http.Request) error {
		if apiKey != "" {
			r.Header.Set("Authorization", "Bearer "+apiKey)
		}
		r.Header.Set("User-Agent", o.userAgent)
		return nil
	}
	w, err := newClient(u.String(), withHTTPClient(o.http), withRequestEditorFn(identify))
	if err != nil {
		return nil, err
	}
	return &Client{wire: w}, nil
}

// transport returns the transport of a client without [WithHTTPClient].
func transport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout:   dialTimeout,
		ResponseHeaderTimeout: headerTimeout,
		ExpectContinueTimeout: 2 * time.Second, // a server that does not answer gets the body anyway
		IdleConnTimeout:       90 * time.Second,
		MaxIdleConnsPerHost:   32, // more calls at once dial anew
	}
}

// Error reports that the server refused a call.
type Error struct {
	Status    int    // HTTP status
	Code      string // stable, e.g. "sandbox_not_found"; "" if the answer was not from cay
	Detail    string // for people
	Field     string // the offending field of the request, "" if none
	RequestID string // names the request in the server's log

	// RetryAfter is the time that the server asks the caller to wait before a
	// retry, 0 if it names none.
	RetryAfter time.Duration
}

// Error returns the field, the detail, the status, the code and the request's ID.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Detail)
	fmt.Fprintf(&b, " (%d", e.Status)
	if e.Code != "" {
		b.WriteString(" " + e.Code)
	}
	if e.RequestID != "" {
		b.WriteString(", request " + e.RequestID)
	}
	return b.String() + ")"
}

// HasCode reports whether err is an [*Error] with the code.
func HasCode(err error, code string) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

// errorOf returns the error of an answer with a status other than 2xx.
func errorOf(resp *http.Response) *Error {
	e := &Error{Status: resp.StatusCode, RequestID: resp.Header.Get("X-Request-Id")}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		e.RetryAfter = time.Duration(seconds) * time.Second
	}
	const maxProblem = 64 << 10 // bytes; cay's are under 1 KiB
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	var p problem
	if err == nil && strings.HasPrefix(resp.Header.Get("Content-Type"), "application/problem+json") &&
		json.Unmarshal(body, &p) == nil {
		e.Code, e.Detail = p.Code, p.Detail
		if p.Field != nil {
			e.Field = *p.Field
		}
	}
	if e.Detail == "" {
		e.Detail = "the server answered " + resp.Status
	}
	return e
}

// open returns an answer with a status of 2xx, else an error. The caller closes the body.
func open(resp *http.Response, err error) (*http.Response, error) {
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, errorOf(resp)
	}
	return resp, nil
}

// decode decodes the JSON of an answer.
func decode[T any](resp *http.Response, err error) (*T, error) {
	if resp, err = open(resp, err); err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	v := new(T)
	body := io.LimitReader(resp.Body, maxAnswer)
	if err := json.NewDecoder(body).Decode(v); err != nil {
		return nil, fmt.Errorf("decoding the server's answer: %w", err)
	}
	// A newline follows the value. Reading it lets the connection be reused; an
	// error of that read does not affect the value.
	_, _ = io.CopyN(io.Discard, body, 512)
	return v, nil
}

// done closes an answer without a body and returns the error of the call.
func done(resp *http.Response, err error) error {
	if resp, err = open(resp, err); err != nil {
		return err
	}
	return resp.Body.Close()
}

// ListOptions selects a page of a listing.
type ListOptions struct {
	Limit  int    // entries on a page, 1 to 200; 0 is the server's default, 50
	Cursor string // NextCursor of the page before; "" is the first page
}

// params returns the options as parameters of a request, nil where they are not set.
func (o ListOptions) params() (limit *int, cursor *string) {
	if o.Limit != 0 {
		limit = &o.Limit
	}
	if o.Cursor != "" {
		cursor = &o.Cursor
	}
	return limit, cursor
}

// all returns an iterator over the entries of all pages of a listing, which ends after the first error.
func all[T any](o ListOptions, page func(ListOptions) ([]T, *string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			entries, next, err := page(o)
			if err != nil {
				var zero T
				yield(zero, err)
				return
			}
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
			if next == nil || *next == "" {
				return
			}
			o.Cursor = *next
		}
	}
}
