package httpserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// placeTries limits the nodes that one create is offered. A refusal costs a round trip and a look at a machine; more
	// tries delay the answer while every machine is full, and fewer refuse creates while some machine has room.
	placeTries = 5

	// fetchPatience limits what a call that asks several nodes waits for each. A longer time lets a node that has hung
	// delay the answers of the others; a shorter one leaves out nodes that are busy.
	fetchPatience = 5 * time.Second

	// retryLost is the time after which the caller of what a lost machine has should try again.
	retryLost = 30 * time.Second

	// retryPlace is the time after which the caller of a create that no node took should try again.
	retryPlace = 2 * time.Second
)

// Relay sends calls to the servers that can do them. A nil Relay has every call done here, as a server does that is
// alone. A Relay is safe for concurrent use.
type Relay struct {
	Self      string // the node of this process; "" if it has none
	Forwarder *Forwarder
	// Nodes returns nodes that may take a new sandbox, the best first.
	Nodes func(ctx context.Context, needs Needs) ([]string, error)
	// Lost returns the time since which a node is lost, and whether it is. Calls that it alone can do are refused.
	Lost func(node string) (since time.Time, lost bool)
	// Builder returns the node that builds templates.
	Builder func(ctx context.Context) (node string, err error)
}

// Needs says what a new sandbox needs of a machine, as far as a replica knows it.
type Needs struct {
	MemoryMB int               // of its size in MiB, 0 if it is not known
	Labels   map[string]string // of the node
}

// Away reports whether another server must do a call about what the node has. A request that was forwarded to this
// server goes no further: its node answers where it belongs.
func (l *Relay) Away(r *http.Request, node string) bool {
	return l.Forwards(r) && !l.here(node)
}

// AwayUnlessLost is Away for a call that any server does once the node is lost.
func (l *Relay) AwayUnlessLost(r *http.Request, node string) bool {
	_, lost := l.LostSince(node)
	return l.Away(r, node) && !lost
}

// LostSince returns the time since which a node is lost, and whether it is.
func (l *Relay) LostSince(node string) (since time.Time, lost bool) {
	if l == nil || l.Lost == nil {
		return time.Time{}, false
	}
	return l.Lost(node)
}

func (l *Relay) here(node string) bool { return node != "" && node == l.Self }

// Forwards reports whether the request may be sent on.
func (l *Relay) Forwards(r *http.Request) bool {
	if l == nil {
		return false
	}
	_, forwarded := PassageOf(r.Context())
	return !forwarded
}

// BuilderAway returns the node that builds templates, and whether that is another server.
func (l *Relay) BuilderAway(r *http.Request) (node string, away bool, err error) {
	if !l.Forwards(r) {
		return "", false, nil
	}
	node, err = l.Builder(r.Context())
	return node, err == nil && !l.here(node), err
}

// Send sends a call to a node and passes its answer back. It fills in what p says about the call and its caller. Errors
// are those of [Forwarder.Forward]; a node that names another one, which cannot be asked again, is Unavailable, code
// "elsewhere".
func (l *Relay) Send(w http.ResponseWriter, r *http.Request, node string, p Passage) error {
	if since, lost := l.LostSince(node); lost {
		return fault.New(fault.Unavailable, fault.CodeNodeUnreachable, "the machine that has it is lost since %s; "+
			"the call can be done when the machine is back", since.UTC().Format(time.RFC3339)).After(retryLost)
	}
	c := CallOf(r)
	if p.Port == 0 && c.Body.stall.Load() == 0 { // programs may take bodies of any slowness
		c.Body.Piecewise(c.Patience.Stall)
	}
	err := l.Forwarder.Forward(w, r, node, c.passage(p))
	var other *Misdirected
	if errors.As(err, &other) {
		return fault.New(fault.Unavailable, fault.CodeElsewhere,
			"what the call is for has just moved to another machine; try again").After(forwardRetry).Because(err)
	}
	return err
}

// passage returns a passage with what is known about the call.
func (c *Call) passage(p Passage) Passage {
	p.ID, p.Who, p.Org, p.Sandbox = c.ID, c.Who, c.Org(), c.Sandbox
	if c.Who.Org.ID != "" {
		p.Quota = c.Who.Org.Quota
	}
	return p
}

// Gather sends a GET of the call's path to several nodes at once, to each with its query, and calls take with each node
// and the body of its answer, one after the other. It leaves out a node that does not answer with 200, or with more
// than limit bytes. Nothing of the call's head travels. Errors are those of the call's account.
func (l *Relay) Gather(r *http.Request, queries map[string]string, limit int64, p Passage,
	take func(node string, body []byte) error) error {
	account := &CallOf(r).Account
	held := int64(len(queries)) * (ForwardCost + limit)
	if err := account.Take(held); err != nil {
		return err
	}
	defer account.Give(held)
	var mu sync.Mutex // held by take
	var all sync.WaitGroup
	for node, query := range queries {
		all.Go(func() {
			body, err := l.fetch(r, node, query, limit, p)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				err = take(node, body)
			}
			if err != nil {
				l.Forwarder.Log.WarnContext(r.Context(), "leaving out what a node has", "node", node, "error", err)
			}
		})
	}
	all.Wait()
	return nil
}

// fetch sends one GET of Gather.
func (l *Relay) fetch(r *http.Request, node, query string, limit int64, p Passage) ([]byte, error) {
	ctx, cancel := context.WithTimeout(r.Context(), fetchPatience)
	defer cancel()
	passage, _, err := CallOf(r).passage(p).sealed(r)
	if err != nil {
		return nil, err
	}
	target := url.URL{Scheme: "http", Host: "localhost", Path: r.URL.Path, RawQuery: query}
	out, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("making a request for the node %s: %w", node, err)
	}
	out.Header.Set(passageHeader, passage)
	resp, err := l.Forwarder.Via(node).RoundTrip(out)
	if err != nil {
		return nil, fmt.Errorf("asking the node %s: %w", node, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the node %s answers %s", node, resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the answer of the node %s: %w", node, err)
	case int64(len(b)) > limit:
		return nil, fmt.Errorf("the answer of the node %s has more than %d bytes", node, limit)
	}
	return b, nil
}

// Place sends a create to a node that takes it. It reads the body, of at most limit bytes, and sends it to one node
// after the other until one does not refuse. If it returns a request, this server is the one to try: the caller does
// that request, and a refusal by [Front.Fail] goes to the nodes that are left. needsOf, if not nil, returns what
// the body of a create asks for.
func (l *Relay) Place(w http.ResponseWriter, r *http.Request, limit int64, p Passage,
	needsOf func(body []byte) Needs) (here *http.Request, err error) {
	if !l.Forwards(r) {
		return r, nil
	}
	body, err := ReadBody(w, r, limit)
	if err != nil {
		return nil, err
	}
	var needs Needs
	if needsOf != nil {
		needs = needsOf(body)
	}
	nodes, err := l.Nodes(r.Context(), needs)
	if err != nil {
		return nil, err
	}
	if len(nodes) == 0 && l.Self != "" {
		nodes = []string{l.Self} // which says why it does not take the sandbox
	}
	again := *r
	again.ContentLength, again.TransferEncoding = int64(len(body)), nil
	again.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	none := fault.New(fault.Unavailable, fault.CodeNoCapacity, "no machine can take the sandbox now").After(retryPlace)
	return l.offer(w, &again, nodes[:min(len(nodes), placeTries)], p, none)
}

// offer sends a create to one of the nodes, as Place does. why is the error if there is none.
func (l *Relay) offer(w http.ResponseWriter, r *http.Request, nodes []string, p Passage,
	why error) (here *http.Request, err error) {
	for i, node := range nodes {
		again := *r
		if again.Body, err = r.GetBody(); err != nil {
			return nil, err
		}
		rest := nodes[i+1:]
		if l.here(node) {
			CallOf(r).refused = func(err error) error {
				has := fault.As(err).Node // of the snapshot, or of the sandbox of an earlier create
				if has == "" {
					_, err = l.offer(w, r, rest, p, err)
					return err
				}
				if again.Body, err = r.GetBody(); err != nil {
					return err
				}
				p.Offered = false
				return l.Send(w, &again, has, p)
			}
			return &again, nil
		}
		p.Offered = len(rest) > 0 // the last one's refusal is the answer
		if err = l.Send(w, &again, node, p); !errors.Is(err, errRefused) && !unsent(err) {
			return nil, err
		}
	}
	return nil, why
}

// errRefused reports that a node does not take a create that it was offered.
var errRefused = errors.New("the node refuses the create")

// errBrokeOff is the cause of an error of a request that a node may have got.
var errBrokeOff = errors.New("the connection broke off")

// unsent reports whether a request failed before it reached a node.
func unsent(err error) bool {
	f := fault.As(err)
	return f != nil && f.Code == fault.CodeNodeUnreachable && !errors.Is(err, errBrokeOff)
}

// refuses reports whether another machine may do what this one cannot.
func refuses(err error) bool {
	f := fault.As(err)
	if f == nil || f.Kind != fault.Unavailable {
		return false
	}
	if f.Node != "" {
		return true
	}
	switch f.Code {
	case fault.CodeNoCapacity, fault.CodeShuttingDown, fault.CodeImageUnavailable:
		return true
	}
	return false
}

// CallerOf returns who makes a forwarded call, or false if the request was not forwarded. It returns Denied, code
// "scope_missing", if the caller lacks one of the scopes, and Unauthenticated without a key. The replica has found
// the same; a node does not take its word alone for what a key may do.
func CallerOf(r *http.Request, scopes ...auth.Scope) (who auth.Principal, forwarded bool, err error) {
	p, ok := PassageOf(r.Context())
	if !ok {
		return auth.Principal{}, false, nil
	}
	if p.Who.Key.ID == "" {
		return auth.Principal{}, true, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated, "the call has no key")
	}
	for _, scope := range scopes {
		if scope != "" && !p.Who.May(scope) {
			return auth.Principal{}, true, MissingScope(scope)
		}
	}
	return p.Who, true, nil
}

// MissingScope returns the error for a key that lacks a scope.
func MissingScope(scope auth.Scope) error {
	return fault.New(fault.Denied, fault.CodeScopeMissing, "the key lacks the scope %s", scope)
}
