// Package auth decides who may do what. It keeps organizations, their API keys and scopes, their
// quotas, and the rate at which a key and an organization may call.
//
// In memory it keeps only the rate buckets and the last uses that are not written yet. It looks
// keys up in the [Store] on every call, so that revoking takes effect at once. It stores the
// SHA-256 of a secret only (secrets carry 160 random bits, so a slow hash would add nothing) and
// returns a secret once. After an error nothing has changed. A [Service] is safe for concurrent
// use. Of cay it imports only fault.
//
// The package counts no sandboxes: the store holds an organization to its [Quota] in the transaction
// that adds a row. The fronts decide which scope a call needs, and ask [Service.Allow] for each call
// with a key.
//
// A key with the scope admin administers its own organization: its keys, and nothing of others.
// Admin keys of the operator's organization also make and list organizations. That organization
// has the name [OperatorOrg] and is made when the server first starts. Names of organizations are
// unique and never change, so no other organization can take its place.
package auth

import (
	"context"
	"time"
)

// Scope is one thing that a key may do. The scopes are part of the contract.
type Scope string

// The scopes. Admin covers all others and the administration of organizations.
const (
	SandboxesRead  Scope = "sandboxes:read"
	SandboxesWrite Scope = "sandboxes:write"
	Exec           Scope = "exec"
	Files          Scope = "files"
	TemplatesRead  Scope = "templates:read"
	TemplatesWrite Scope = "templates:write"
	Admin          Scope = "admin"
)

// Quota limits what an organization may have running at once; 0 is no limit.
type Quota struct {
	Sandboxes int
	VCPUs     int
	MemoryMB  int
}

// Org is an organization, which owns sandboxes, templates and keys.
type Org struct {
	ID        string // "org_" and 20 lower-case base32 characters
	Name      string
	Quota     Quota
	CreatedAt time.Time
}

// Key is an API key without its secret.
type Key struct {
	ID         string // "key_" and 20 lower-case base32 characters
	OrgID      string
	Name       string
	Hash       []byte // SHA-256 of the secret "cay_…" or "e2b_…"
	Prefix     string // first characters of the secret, so that people can tell keys apart
	Scopes     []Scope
	CreatedAt  time.Time
	ExpiresAt  time.Time // zero: the key never expires
	RevokedAt  time.Time // zero: the key is not revoked
	LastUsedAt time.Time // to the minute; zero: never used
}

// lives reports whether the key is neither revoked nor expired.
func (k Key) lives(now time.Time) bool {
	return k.RevokedAt.IsZero() && (k.ExpiresAt.IsZero() || now.Before(k.ExpiresAt))
}

// Principal identifies the caller of an authenticated call.
type Principal struct {
	Org Org
	Key Key
}

// May reports whether the principal's key covers the scope. Admin covers all;
// "templates:write" covers reading templates, "sandboxes:write" reading sandboxes.
func (p Principal) May(s Scope) bool {
	for _, have := range p.Key.Scopes {
		switch {
		case have == Admin, have == s:
			return true
		case have == SandboxesWrite && s == SandboxesRead, have == TemplatesWrite && s == TemplatesRead:
			return true
		}
	}
	return false
}

// Store keeps organizations and keys. Every method is atomic and durable when it returns.
type Store interface {
	// PutOrg inserts an organization with its first key. A name that is taken gives Conflict,
	// code "org_exists".
	PutOrg(ctx context.Context, o Org, first Key) error
	GetOrg(ctx context.Context, id string) (Org, error) // NotFound, code "org_not_found"
	ListOrgs(ctx context.Context, limit int, cursor string) ([]Org, string, error)
	// PutKey adds a key. If the organization already has limit keys that are neither revoked nor
	// expired when k is made, it gives Exhausted, code "quota_exceeded". Of the revoked and
	// expired keys it keeps the newest, at most limit. A limit of 0 means no limit.
	PutKey(ctx context.Context, k Key, limit int) error
	// KeyByHash finds a key, even if revoked or expired, and its organization. Without one it
	// gives NotFound.
	KeyByHash(ctx context.Context, hash []byte) (Key, Org, error)
	// GetKey finds a key by its ID, as KeyByHash does.
	GetKey(ctx context.Context, id string) (Key, Org, error)
	ListKeys(ctx context.Context, orgID string, limit int, cursor string) ([]Key, string, error)
	// RevokeKey marks a key as revoked; revoking it again changes nothing. If the organization
	// has no key of that ID it gives NotFound, code "api_key_not_found".
	RevokeKey(ctx context.Context, orgID, id string, at time.Time) error
	// TouchKey records a use of a key.
	TouchKey(ctx context.Context, id string, at time.Time) error
}
