package noderpc

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/pki"
)

// Client makes the calls of a node.
type Client struct {
	keeper *pki.Keeper
	urls   func() []string

	mu sync.Mutex
	// +checklocks:mu
	serial string // of the certificate that client's connections have
	// +checklocks:mu
	client *http.Client
}

// NewClient returns a client with the certificate of a Keeper. urls returns the replicas to ask, such as
// https://10.0.0.1:7071, in the order to try them.
func NewClient(k *pki.Keeper, urls func() []string) *Client { return &Client{keeper: k, urls: urls} }

// Close closes the connections that no call uses.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
}

// connections returns a client whose connections have the present certificate. A connection keeps the certificate with
// which it began, and a replica refuses one that has expired.
func (c *Client) connections() *http.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	if serial := c.keeper.Identity().Serial; c.client == nil || c.serial != serial {
		if c.client != nil {
			c.client.CloseIdleConnections()
		}
		c.client, c.serial = newHTTP(func() *tls.Config { return c.keeper.ClientConfig("h2") }), serial
	}
	return c.client
}

// newHTTP returns a client that speaks HTTP/2 alone and follows no redirects, so that what a replica answers cannot
// send a token elsewhere.
func newHTTP(config func() *tls.Config) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	dialer := &net.Dialer{Timeout: callTimeout}
	return &http.Client{
		Timeout:       callTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{Protocols: protocols, MaxResponseHeaderBytes: 8 << 10, IdleConnTimeout: time.Minute,
			DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				d := tls.Dialer{NetDialer: dialer, Config: config()}
				return d.DialContext(ctx, network, addr)
			}},
	}
}

// Renewal returns the function that [pki.Keeper.Run] wants, which asks for another certificate of the Keeper's key in
// the name of a session.
func (c *Client) Renewal(session string) func(ctx context.Context, request []byte) (chain, authorities string,
	err error) {
	return func(ctx context.Context, request []byte) (string, string, error) {
		var out joined
		err := c.call(ctx, pathRenew, renewRequest{Session: session, CSR: string(request)}, &out)
		return out.Certificate, out.Authorities, err
	}
}

// Begin begins a session of the node, as [fleet.Service.Begin] does.
func (c *Client) Begin(ctx context.Context, session string) (fleet.Lease, error) {
	var out lease
	err := c.call(ctx, pathSession, sessionRequest{Session: session}, &out)
	return out.lease(), err
}

// Beat extends the lease of the session, says what the machine has, and returns the node's orders.
func (c *Client) Beat(ctx context.Context, session string, load fleet.Load) (fleet.Lease, error) {
	var out lease
	err := c.call(ctx, pathBeat, beatRequest{Session: session, MemoryFreeMB: load.MemoryFreeMB,
		Sandboxes: load.Sandboxes, Starting: load.Starting}, &out)
	return out.lease(), err
}

// Leave ends the session.
func (c *Client) Leave(ctx context.Context, session string) error {
	return c.call(ctx, pathLeave, sessionRequest{Session: session}, &struct{}{})
}

func (c *Client) call(ctx context.Context, path string, in, out any) error {
	return call(ctx, c.connections(), c.urls(), path, in, out)
}

// Join joins the cluster of a token with a key. about has what the machine says; its Token and CSR are not used. If the
// answer is lost, Join can be called again with the same key.
func Join(ctx context.Context, urls []string, token string, key *ecdsa.PrivateKey,
	about fleet.JoinRequest) (fleet.Joined, error) {
	_, fingerprint, err := fleet.ParseToken(token)
	if err != nil {
		return fleet.Joined{}, err
	}
	request, err := pki.NewRequest(key)
	if err != nil {
		return fleet.Joined{}, err
	}
	client := newHTTP(func() *tls.Config { return pki.JoinConfig(fingerprint, "h2") })
	defer client.CloseIdleConnections()
	var out joined
	err = call(ctx, client, urls, pathJoin, joinRequest{Token: token, CSR: string(request), Name: about.Name,
		Version: about.Version, VCPUs: about.VCPUs, MemoryMB: about.MemoryMB, MaxSandboxes: about.MaxSandboxes}, &out)
	if err != nil {
		return fleet.Joined{}, fmt.Errorf("joining: %w", err)
	}
	return fleet.Joined{Node: out.Node, Cluster: out.Cluster, Certificate: out.Certificate,
		Authorities: out.Authorities}, nil
}

// call asks one replica after the other until one answers.
func call(ctx context.Context, client *http.Client, urls []string, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	errs := []error{errors.New("no replica answers")}
	for _, url := range urls {
		if !strings.HasPrefix(url, "https://") { // http.Transport would send the token without TLS
			return fmt.Errorf("the replica %q must begin with https://", url)
		}
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(url, "/")+path, bytes.NewReader(body))
		if err != nil {
			return err
		}
		r.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(r)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		return answerOf(resp, out)
	}
	return errors.Join(errs...)
}

// answerOf reads the answer of a call, and returns the error that it has.
func answerOf(resp *http.Response, out any) error {
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if len(text) > maxBody {
		return fmt.Errorf("the answer has more than %d bytes", maxBody)
	}
	if resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(text, out); err != nil {
			return fmt.Errorf("reading the answer: %w", err)
		}
		return nil
	}
	var p problem
	if err := json.Unmarshal(text, &p); err != nil || p.Code == "" {
		return fmt.Errorf("the answer has the status %d", resp.StatusCode)
	}
	return &fault.Error{Kind: fault.OfStatus(resp.StatusCode), Code: p.Code, Detail: p.Detail, Field: p.Field,
		RetryAfter: time.Duration(p.RetryAfterMs) * time.Millisecond}
}
