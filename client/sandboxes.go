package client

import (
	"context"
	"encoding/base64"
	"iter"
	"net/http"
	"net/url"
	"time"
)

// CreateOptions says how to create; the zero value waits until the sandbox runs.
type CreateOptions struct {
	// NoWait returns at once, with a sandbox that is still creating.
	NoWait bool
	// IdempotencyKey makes it safe to try again: the same key and request within
	// 24 hours give the same sandbox. 1 to 255 printable ASCII characters; "" is off.
	IdempotencyKey string
}

// CreateSandbox makes a sandbox and returns when it runs.
func (c *Client) CreateSandbox(ctx context.Context, r CreateSandboxRequest, o CreateOptions) (*Sandbox, error) {
	var p CreateSandboxParams
	if o.NoWait {
		p.Wait = new(false)
	}
	if o.IdempotencyKey != "" {
		p.IdempotencyKey = &o.IdempotencyKey
	}
	return decode[Sandbox](c.wire.CreateSandbox(ctx, &p, r))
}

// ListSandboxesOptions selects and pages; the zero value is the first page of all
// that are not destroyed.
type ListSandboxesOptions struct {
	Status   []SandboxStatus   // any of; empty is all but destroyed
	Metadata map[string]string // all must match
	ListOptions
}

// ListSandboxes returns a page of sandboxes, newest first.
func (c *Client) ListSandboxes(ctx context.Context, o ListSandboxesOptions) (*SandboxList, error) {
	var p ListSandboxesParams
	p.Limit, p.Cursor = o.params()
	if len(o.Status) > 0 {
		p.Status = o.Status
	}
	return decode[SandboxList](c.wire.ListSandboxes(ctx, &p, withMetadata(o.Metadata)))
}

// withMetadata adds the filters, whose names OpenAPI cannot describe.
func withMetadata(metadata map[string]string) requestEditor {
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

// Sandboxes walks all sandboxes that o selects, page by page, and ends after the
// first error.
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

// GetSandbox returns a sandbox. It never wakes it and does not count as activity.
func (c *Client) GetSandbox(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.GetSandbox(ctx, id))
}

// DestroySandbox removes a sandbox. It is safe to repeat.
func (c *Client) DestroySandbox(ctx context.Context, id string) error {
	return done(c.wire.DestroySandbox(ctx, id))
}

// Keepalive gives an ephemeral sandbox a new lifetime from now; 0 is its own.
// Above 24 hours is clamped to 24 hours.
func (c *Client) Keepalive(ctx context.Context, id string, timeout time.Duration) (*Sandbox, error) {
	var r KeepaliveRequest
	if timeout != 0 {
		r.Timeout = new(timeout.String())
	}
	return decode[Sandbox](c.wire.KeepaliveSandbox(ctx, id, r))
}

// DurationOrZero is a duration such as "10m"; "0" is never.
type DurationOrZero = string

// Wake makes sure a sandbox runs: a suspended one is woken where it was. Calls that
// use a sandbox do it by themselves.
func (c *Client) Wake(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.WakeSandbox(ctx, id))
}

// Suspend writes a persistent sandbox to disk, its memory and processes included,
// and returns when it takes none of the machine any more. The next call that uses
// it wakes it. "sandbox_in_use" is the code when calls are being made in it.
func (c *Client) Suspend(ctx context.Context, id string) (*Sandbox, error) {
	return decode[Sandbox](c.wire.SuspendSandbox(ctx, id))
}

// Checkpoint takes a recovery point of a running persistent sandbox, what it falls
// back to when the machine or the sandbox's kernel dies. The sandbox runs on after a
// pause that grows with its memory.
func (c *Client) Checkpoint(ctx context.Context, id string) (*RecoveryPoint, error) {
	return decode[RecoveryPoint](c.wire.CheckpointSandbox(ctx, id))
}

// SetEgress replaces a sandbox's egress policy, at once and for established connections
// too; a suspended sandbox has it when it wakes.
func (c *Client) SetEgress(ctx context.Context, id string, e Egress) (*Sandbox, error) {
	return decode[Sandbox](c.wire.SetEgress(ctx, id, e))
}

// ListEvents returns a page of a sandbox's events, newest first.
func (c *Client) ListEvents(ctx context.Context, id string, o ListOptions) (*EventList, error) {
	var p ListEventsParams
	p.Limit, p.Cursor = o.params()
	return decode[EventList](c.wire.ListEvents(ctx, id, &p))
}

// Events walks all events of a sandbox, newest first, and ends after the first error.
func (c *Client) Events(ctx context.Context, id string, o ListOptions) iter.Seq2[Event, error] {
	return all(o, func(page ListOptions) ([]Event, *string, error) {
		l, err := c.ListEvents(ctx, id, page)
		if err != nil {
			return nil, nil, err
		}
		return l.Events, l.NextCursor, nil
	})
}

// Execute runs a command and returns when it has ended, waking the sandbox first if
// it is suspended. A command that fails is no error: see ExitCode. When ctx ends,
// the command is killed.
func (c *Client) Execute(ctx context.Context, id string, r ExecuteRequest) (*ExecuteResult, error) {
	return decode[ExecuteResult](c.wire.ExecuteCommand(ctx, id, r))
}

// StdoutBytes is the standard output as the command wrote it, whatever the encoding.
func (r *ExecuteResult) StdoutBytes() ([]byte, error) {
	return outputBytes(r.Stdout, r.StdoutEncoding != nil)
}

// StderrBytes is the standard error as the command wrote it, whatever the encoding.
func (r *ExecuteResult) StderrBytes() ([]byte, error) {
	return outputBytes(r.Stderr, r.StderrEncoding != nil)
}

func outputBytes(s string, encoded bool) ([]byte, error) {
	if encoded {
		return base64.StdEncoding.DecodeString(s)
	}
	return []byte(s), nil
}
