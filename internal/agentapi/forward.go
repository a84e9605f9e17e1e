package agentapi

import (
	"context"
	"net/http"
	"time"
)

// Transport makes the requests that somebody outside wants made to the sandbox's agent,
// without their token. It changes nothing else but where they go, follows no redirect, and
// gives answers as they come, errors included. The answer to a stream may take as long as it
// likes.
func (c *Client) Transport(t Target, stream bool) http.RoundTripper { return transport{c, t, stream} }

type transport struct {
	client *Client
	target Target
	stream bool
}

// endless is longer than any sandbox lives that a stream may be silent in.
const endless = 1 << 62 * time.Nanosecond

// RoundTrip implements [http.RoundTripper]. Errors are those of all calls.
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	head, body := headPatience(t.client.Patience, r.ContentLength), t.client.Patience
	if t.stream {
		head, body = endless, endless
	}
	ctx, w := watching(r.Context(), head)
	out := r.Clone(ctx)
	out.URL.Scheme, out.URL.Host, out.Host = "http", t.target.host(), ""
	out.Header.Del(TokenHeader)
	if out.Body != nil && out.Body != http.NoBody {
		out.Body = &sentBody{out.Body, w, head}
	}
	resp, err := t.client.http.Transport.RoundTrip(out)
	if err != nil {
		err = callError(ctx, err)
		w.end()
		return nil, err
	}
	w.answered(body, patientPace)
	resp.Body = &watchedBody{resp.Body, w, ctx}
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
	err := c.call(ctx, t, c.Patience, http.MethodGet, "/metrics", nil, nil, &m)
	return m, err
}
