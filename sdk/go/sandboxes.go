package cay

import (
	"context"
	"encoding/base64"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// CreateOptions holds the options of [Client.CreateSandbox].
type CreateOptions struct {
	// NoWait makes CreateSandbox return at once, with a sandbox that is still creating.
	NoWait bool
	// IdempotencyKey makes a retry safe: calls with the same key and request within 24
	// hours return the same sandbox. It has 1 to 255 printable ASCII characters; "" is
	// none.
	IdempotencyKey string
}

// CreateSandbox makes a sandbox and returns when it runs, or at once if o.NoWait is set.
func (c *Client) CreateSandbox(ctx context.Context, r CreateSandboxRequest, o CreateOptions) (*Sandbox, error) {
	var p createSandboxParams
	if o.NoWait {
		p.Wait = new(false)
	}
	if o.IdempotencyKey != "" {
		p.IdempotencyKey = &o.IdempotencyKey
	}
	return decode[Sandbox](c.wire.CreateSandbox(ctx, &p, r))
}

// ListSandboxesOptions selects sandboxes and a page; the zero value selects the first
// page of all sandboxes that are not destroyed.
type ListSandboxesOptions struct {
	Status   []SandboxStatus   // selects sandboxes in any of these; empty is all but destroyed
	Metadata map[string]string // all must match
	ListOptions
}

// ListSandboxes returns a page of sandboxes, newest first.
func (c *Client) ListSandboxes(ctx context.Context, o ListSandboxesOptions) (*SandboxList, error) {
	var p listSandboxesParams
	p.Limit, p.Cursor = o.params()
	if len(o.Status) > 0 {
		p.Status = o.Status
	}
	return decode[SandboxList](c.wire.ListSandboxes(ctx, &p, withMetadata(o.Metadata)))
}

// withMetadata adds filters by metadata to a request. OpenAPI cannot describe their names.
func withMetadata(metadata map[string]string) requestEditorFn {
	return func(_ context.Context, r *http.Request) error {
		q := url.Values{}
		for k, v := range metadata {
			q.Set("metadata."+k, v)
		}
		if extra := q.Encode(); extra != "" {
			if r.URL.RawQuery != "" {
				r.URL.RawQuery += "&"
			}
			r.URL.RawQuery += extra
		}
		return nil
	}
}

// Sandboxes returns an iterator over all sandboxes that o selects, which reads them page
// by page and ends after the first error.
func (c *Client) Sandboxes(ctx context.Context, o ListSandboxesOptions) iter.Seq2[Sandbox, error] {
	return all(o.ListOptions, func(page ListOptions) ([]Sandbox, *string, error) {
		o.ListOptions = page
		l, err := c.ListSandboxes(ctx, o)
		if err != nil {
			return nil, nil, err
		}
		return l.Sandboxes, l.NextCursor, nil
	})
}

// GetSandbox returns a sandbox. The call never wakes the sandbox and does not count as
// activity.
func (c *Client) GetSandbox(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.GetSandbox(ctx, id))
}

// DestroySandbox removes a sandbox. It is safe to repeat.
func (c *Client) DestroySandbox(ctx context.Context, id string) error {
	return done(c.wire.DestroySandbox(ctx, id))
}

// Keepalive gives an ephemeral sandbox a new lifetime from now on; 0 is the sandbox's own
// lifetime. The server clamps a timeout above 24 hours to 24 hours.
func (c *Client) Keepalive(ctx context.Context, id string, timeout time.Duration) (*Sandbox, error) {
	var r keepaliveRequest
	if timeout != 0 {
		r.Timeout = new(timeout.String())
	}
	return decode[Sandbox](c.wire.KeepaliveSandbox(ctx, id, r))
}

// Wake wakes a suspended sandbox, which continues where it was, and returns when it runs.
// Calls that use a sandbox wake it themselves.
func (c *Client) Wake(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.WakeSandbox(ctx, id))
}

// Suspend saves a persistent sandbox to disk with its memory and processes, and returns
// when the sandbox uses no CPU or memory of the machine. The next call that uses the
// sandbox wakes it. While other calls use it, Suspend fails with code "sandbox_in_use".
func (c *Client) Suspend(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.SuspendSandbox(ctx, id, suspendRequest{}))
}

// SuspendFiles is like Suspend, but keeps only the files on the sandbox's disk. Its processes
// end, and the next call that uses the sandbox boots it and runs its start command.
func (c *Client) SuspendFiles(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.SuspendSandbox(ctx, id, suspendRequest{Memory: new(false)}))
}

// Checkpoint takes a recovery point of a running persistent sandbox. The sandbox falls
// back to it when the machine or the sandbox's kernel dies. It runs on after a pause that
// grows with its memory.
func (c *Client) Checkpoint(ctx context.Context, id string) (*RecoveryPoint, error) {
	return decode[RecoveryPoint](c.wire.CheckpointSandbox(ctx, id))
}

// SetEgress replaces a sandbox's egress policy, at once and also for established
// connections. For a suspended sandbox the new policy applies when it wakes.
func (c *Client) SetEgress(ctx context.Context, id string, e Egress) (*Sandbox, error) {
	return decode[Sandbox](c.wire.SetEgress(ctx, id, e))
}

// ListEvents returns a page of a sandbox's events, newest first.
func (c *Client) ListEvents(ctx context.Context, id string, o ListOptions) (*EventList, error) {
	var p listEventsParams
	p.Limit, p.Cursor = o.params()
	return decode[EventList](c.wire.ListEvents(ctx, id, &p))
}

// Events returns an iterator over all events of a sandbox, newest first, which ends after the
// first error.
func (c *Client) Events(ctx context.Context, id string, o ListOptions) iter.Seq2[Event, error] {
	return all(o, func(page ListOptions) ([]Event, *string, error) {
		l, err := c.ListEvents(ctx, id, page)
		if err != nil {
			return nil, nil, err
		}
		return l.Events, l.NextCursor, nil
	})
}

// Execute runs a command and returns when it has ended. It first wakes a suspended
// sandbox. If the command fails, Execute returns its ExitCode and no error. When ctx ends,
// the command is killed.
func (c *Client) Execute(ctx context.Context, id string, r ExecuteRequest) (*ExecuteResult, error) {
	return decode[ExecuteResult](c.wire.ExecuteCommand(ctx, id, r))
}

// StdoutBytes returns the standard output as the command wrote it; it decodes Stdout if
// StdoutEncoding is set.
func (r *ExecuteResult) StdoutBytes() ([]byte, error) {
	return outputBytes(r.Stdout, r.StdoutEncoding != nil)
}

// StderrBytes returns the standard error as the command wrote it; it decodes Stderr if
// StderrEncoding is set.
func (r *ExecuteResult) StderrBytes() ([]byte, error) {
	return outputBytes(r.Stderr, r.StderrEncoding != nil)
}

// outputBytes returns the bytes of s, which is base64 if encoded.
func outputBytes(s string, encoded bool) ([]byte, error) {
	if encoded {
		return base64.StdEncoding.DecodeString(s)
	}
	return []byte(s), nil
}
