package agentapi

import (
	"context"
	"net/http"
)

// Transport makes the requests that somebody outside wants made to the sandbox's agent,
// without their token. It changes nothing else but where they go, follows no redirect, and
// gives answers as they come, errors included.
func (c *Client) Transport(t Target) http.RoundTripper { return transport{c, t} }

type transport struct {
	client *Client
	target Target
}

// RoundTrip implements [http.RoundTripper]. Errors are those of all calls.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host, out.Host = "http", t.target.host(), ""
	out.Header.Del(TokenHeader)
	resp, err := t.client.http.Transport.RoundTrip(out)
	if err != nil {
		return nil, callError(r.Context(), err)
	}
	return resp, nil
}

// Metrics is what a sandbox uses of its machine, as it sees it.
type Metrics struct {
	Unix       int64   `json:"ts"` // seconds
	CPUs       int     `json:"cpu_count"`
	CPUPercent float64 `json:"cpu_used_pct"` // of all CPUs, since it was asked before
	MemTotal   int64   `json:"mem_total"`    // bytes, as those below
	MemUsed    int64   `json:"mem_used"`
	MemCache   int64   `json:"mem_cache"`
	DiskUsed   int64   `json:"disk_used"`
	DiskTotal  int64   `json:"disk_total"`
}

// Metrics asks the agent what the sandbox uses.
func (c *Client) Metrics(ctx context.Context, t Target) (Metrics, error) {
	var m Metrics
	err := c.call(ctx, t, http.MethodGet, "/metrics", nil, nil, &m)
	return m, err
}
