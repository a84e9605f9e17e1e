package cay

import (
	"context"
	"fmt"
	"io"
	"iter"
)

// Pool returns the state of the warm pool, by template and size. It needs a key of the server's
// first organization with the scope admin.
func (c *Client) Pool(ctx context.Context) ([]PoolEntry, error) {
	p, err := decode[pool](c.wire.GetPool(ctx))
	if err != nil {
		return nil, err
	}
	return p.Pool, nil
}

// ListSizes returns the sizes that a sandbox may have.
func (c *Client) ListSizes(ctx context.Context) ([]Size, error) {
	l, err := decode[sizeList](c.wire.ListSizes(ctx))
	if err != nil {
		return nil, err
	}
	return l.Sizes, nil
}

// Me returns the organization and the key with which the client makes its calls.
func (c *Client) Me(ctx context.Context) (*Me, error) {
	return decode[Me](c.wire.GetMe(ctx))
}

// CreateAPIKey makes a key. The field APIKey of the answer has the key's secret, which
// the server never returns again.
func (c *Client) CreateAPIKey(ctx context.Context, r CreateAPIKeyRequest) (*NewAPIKey, error) {
	return decode[NewAPIKey](c.wire.CreateAPIKey(ctx, r))
}

// ListAPIKeys returns a page of the organization's keys, newest first.
func (c *Client) ListAPIKeys(ctx context.Context, o ListOptions) (*APIKeyList, error) {
	var p listAPIKeysParams
	p.Limit, p.Cursor = o.params()
	return decode[APIKeyList](c.wire.ListAPIKeys(ctx, &p))
}

// APIKeys returns an iterator over all of the organization's keys, which ends after the first error.
func (c *Client) APIKeys(ctx context.Context, o ListOptions) iter.Seq2[APIKey, error] {
	return all(o, func(page ListOptions) ([]APIKey, *string, error) {
		l, err := c.ListAPIKeys(ctx, page)
		if err != nil {
			return nil, nil, err
		}
		return l.APIKeys, l.NextCursor, nil
	})
}

// RevokeAPIKey revokes a key. It is safe to repeat.
func (c *Client) RevokeAPIKey(ctx context.Context, id string) error {
	return done(c.wire.RevokeAPIKey(ctx, id))
}

// CreateOrg makes an organization with its first key. The field APIKey of the answer has
// the key's secret, which the server never returns again.
func (c *Client) CreateOrg(ctx context.Context, r CreateOrgRequest) (*NewOrg, error) {
	return decode[NewOrg](c.wire.CreateOrg(ctx, r))
}

// ListOrgs returns a page of organizations, newest first.
func (c *Client) ListOrgs(ctx context.Context, o ListOptions) (*OrgList, error) {
	var p listOrgsParams
	p.Limit, p.Cursor = o.params()
	return decode[OrgList](c.wire.ListOrgs(ctx, &p))
}

// Orgs returns an iterator over all organizations, which ends after the first error.
func (c *Client) Orgs(ctx context.Context, o ListOptions) iter.Seq2[Org, error] {
	return all(o, func(page ListOptions) ([]Org, *string, error) {
		l, err := c.ListOrgs(ctx, page)
		if err != nil {
			return nil, nil, err
		}
		return l.Orgs, l.NextCursor, nil
	})
}

// Health returns an error if the server does not answer.
func (c *Client) Health(ctx context.Context) (*Health, error) {
	return decode[Health](c.wire.GetHealth(ctx))
}

// Ready returns an [*Error] with code "not_ready" if the server cannot create
// sandboxes.
func (c *Client) Ready(ctx context.Context) (*Health, error) {
	return decode[Health](c.wire.GetReady(ctx))
}

// Metrics opens the server's metrics in the text format of Prometheus. The caller
// closes them.
func (c *Client) Metrics(ctx context.Context) (io.ReadCloser, error) {
	resp, err := open(c.wire.GetMetrics(ctx))
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// OpenAPI returns the server's openapi.yaml.
func (c *Client) OpenAPI(ctx context.Context) ([]byte, error) {
	resp, err := open(c.wire.GetOpenAPI(ctx))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("reading openapi.yaml: %w", err)
	}
	return b, nil
}
