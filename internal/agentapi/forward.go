package agentapi

import (
	"context"
	"net/http"
	"time"
)

// Transport returns a RoundTripper that passes requests of clients outside to the sandbox's
// agent, without their token. It changes nothing else but their address, follows no redirect,
// and returns answers unchanged, also those with errors. With stream the agent may be silent
// for as long as it likes.
func (c *Client) Transport(t Target, stream bool) http.RoundTripper { return transport{c, t, stream} }

type transport struct {
	client *Client
	target Target
	stream bool
}

// endless is the patience with streams: longer than any sandbox lives, so that none ends for
// silence.
const endless = 1 << 62 * time.Nanosecond

// RoundTrip implements [http.RoundTripper]. Its errors are those of all calls.
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

// Metrics holds the resources that a sandbox uses, as seen from inside.
type Metrics struct {
	Unix       int64   `json:"ts"` // seconds
	CPUs       int     `json:"cpu_count"`
	CPUPercent float64 `json:"cpu_used_pct"` // of all CPUs, since the call before
	MemTotal   int64   `json:"mem_total"`    // bytes, as the fields below
	MemUsed    int64   `json:"mem_used"`
	MemCache   int64   `json:"mem_cache"`
	DiskUsed   int64   `json:"disk_used"`
	DiskTotal  int64   `json:"disk_total"`
}

// Metrics returns the resources that the sandbox uses.
func (c *Client) Metrics(ctx context.Context, t Target) (Metrics, error) {
	var m Metrics
	err := c.call(ctx, t, c.Patience, http.MethodGet, "/metrics", nil, nil, &m)
	return m, err
}
