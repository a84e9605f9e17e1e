// Package auth is who may do what: organizations, their API keys and scopes,
// their quotas, and the rate at which a key may call.
//
// It keeps nothing but the rate buckets and the last uses not yet written in
// memory: keys are looked up in the [Store] on every call, so that revoking takes
// effect at once. Secrets are stored as SHA-256 only (they carry 160 random bits,
// so a slow hash would add nothing) and shown once. After an error nothing has
// changed. A [Service] is safe for concurrent use. Of cay it imports only fault.
//
// Who administers. A key with the scope admin administers its own organization:
// its keys, and nothing of others. Organizations as such are made and listed by
// the admin keys of one of them, the operator's, which is the one called
// [OperatorOrg] and made when the server first starts. Names of organizations are
// unique and never change, so nobody can become it.
package auth

import (
	"context"
	"time"
)

// Scope is one thing a key may do. Part of the contract.
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

// Quota is what an organization may have running at once; 0 is no limit.
type Quota struct {
	Sandboxes int
	VCPUs     int
	MemoryMB  int
}

// Org is an organization: the owner of sandboxes, templates and keys.
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
	ExpiresAt  time.Time // zero is never
	RevokedAt  time.Time // zero is not
	LastUsedAt time.Time // to the minute; zero is never
}

// Principal is who makes a call.
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
	// PutOrg inserts an organization with its first key; a name that is taken is
	// Conflict, code "org_exists".
	PutOrg(ctx context.Context, o Org, first Key) error
	GetOrg(ctx context.Context, id string) (Org, error) // NotFound, code "org_not_found"
	ListOrgs(ctx context.Context, limit int, cursor string) ([]Org, string, error)
	// PutKey adds a key, unless its organization has limit keys that are neither revoked nor
	// expired when k is made: Exhausted, code "quota_exceeded". Of the others no more than limit
	// stay, the newest. A limit of 0 is none.
	PutKey(ctx context.Context, k Key, limit int) error
	// KeyByHash finds a key, revoked and expired ones too, with its organization: NotFound.
	KeyByHash(ctx context.Context, hash []byte) (Key, Org, error)
	ListKeys(ctx context.Context, orgID string, limit int, cursor string) ([]Key, string, error)
	// RevokeKey marks a key; NotFound (code "api_key_not_found") if the organization has
	// none of that ID; revoking again changes nothing.
	RevokeKey(ctx context.Context, orgID, id string, at time.Time) error
	// TouchKey records a use.
	TouchKey(ctx context.Context, id string, at time.Time) error
}
