package auth

import (
	"cmp"
	"context"
	"crypto/subtle"
	"fmt"
	"log/slog"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// OperatorOrg is the name of the organization whose admin keys administer the
// organizations of the server.
const OperatorOrg = "default"

// minExpiry is the shortest life of a key. A key with a shorter one could expire before its
// answer arrives.
const minExpiry = time.Second

// Config holds the operator's choices about keys and organizations.
type Config struct {
	// Quota is given to an organization that is made without one.
	Quota Quota
	// Rate is the number of calls a second that each key may make in the long run, Burst the
	// number at once. A Rate of 0 is no limit.
	Rate  float64
	Burst int
	// OrgFactor is the number of keys at their Rate and Burst that the calls of all keys of an
	// organization together may come to; 0 is no limit.
	OrgFactor int
	// FailedRate limits the calls a second of one address without a valid key, signature or token
	// in the long run, FailedBurst those at once; a FailedRate of 0 is no limit. Valid calls are not
	// counted, so that others behind the same proxy are not locked out.
	FailedRate  float64
	FailedBurst int
	// MaxKeys limits the keys of an organization that are neither revoked nor expired, and also
	// the number of revoked and expired keys that are kept; 0 is no limit.
	MaxKeys int
	// Log receives a warning when a last use cannot be written. It must not be nil.
	Log *slog.Logger
	// Now tells the time by which keys are made and expire, which servers with the same keys must share. A nil Now is
	// the clock of this machine.
	Now func() time.Time
	// Alone calls f, unless another server with the same keys is in a call of Alone with the same name: then it returns
	// nil at once. A nil Alone means that there is no other server.
	Alone func(ctx context.Context, name string, f func(ctx context.Context) error) error
}

// Service authenticates callers and administers keys and organizations. Close it.
type Service struct {
	cfg     Config
	store   Store
	buckets *Buckets // by key
	orgs    *Buckets // by organization
	failed  *Buckets // by address
	uses    *uses
}

// New returns a Service on store. It starts one goroutine, which Close ends.
func New(store Store, cfg Config) *Service {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Alone == nil {
		cfg.Alone = func(ctx context.Context, _ string, f func(context.Context) error) error { return f(ctx) }
	}
	return &Service{cfg: cfg, store: store, uses: newUses(store, cfg.Log),
		buckets: NewBuckets(cfg.Rate, cfg.Burst), failed: NewBuckets(cfg.FailedRate, cfg.FailedBurst),
		orgs: NewBuckets(float64(cfg.OrgFactor)*cfg.Rate, cfg.OrgFactor*cfg.Burst)}
}

// Close writes the last uses that are not written yet, until ctx ends.
func (s *Service) Close(ctx context.Context) error { return s.uses.close(ctx) }

// Bootstrap makes the operator's organization and its first key, with the scope admin, if there
// is no organization yet. It passes the secret to save before it stores anything: if the process
// dies in between, the next start makes another key, so the secret of a stored first key is never
// lost. Of several servers that call Bootstrap at once one makes the key and saves its secret, and
// the others return when it has.
func (s *Service) Bootstrap(ctx context.Context, save func(secret string) error) (made bool, err error) {
	for {
		if begun, err := s.begun(ctx); begun || err != nil {
			return false, err
		}
		done := false
		err := s.cfg.Alone(ctx, "first key", func(ctx context.Context) error {
			done = true
			begun, err := s.begun(ctx) // another server may have made it since
			if err == nil && !begun {
				err = s.makeFirst(ctx, save)
				made = err == nil
			}
			return err
		})
		if err != nil || done {
			return made, err
		}
		select {
		case <-time.After(bootstrapRetry):
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// bootstrapRetry is the time between two looks for the first key, which another server makes in some milliseconds.
const bootstrapRetry = 50 * time.Millisecond

// begun reports whether there is an organization.
func (s *Service) begun(ctx context.Context) (bool, error) {
	orgs, _, err := s.store.ListOrgs(ctx, 1, "")
	if err != nil {
		return false, fmt.Errorf("looking for organizations: %w", err)
	}
	return len(orgs) > 0, nil
}

// makeFirst makes the operator's organization and its first key.
func (s *Service) makeFirst(ctx context.Context, save func(secret string) error) error {
	org := Org{ID: newID("org_"), Name: OperatorOrg, Quota: s.cfg.Quota, CreatedAt: s.cfg.Now().UTC()}
	key, secret := newKey(org.CreatedAt, org.ID, "first key of the server", []Scope{Admin}, 0, FormatCay)
	if err := save(secret); err != nil {
		return fmt.Errorf("saving the first key: %w", err)
	}
	if err := s.store.PutOrg(ctx, org, key); err != nil {
		return fmt.Errorf("making the first organization: %w", err)
	}
	return nil
}

func newKey(now time.Time, orgID, name string, scopes []Scope, expiresIn time.Duration, f Format) (Key, string) {
	secret := newSecret(f)
	hash, _ := parseSecret(secret)
	k := Key{ID: newID("key_"), OrgID: orgID, Name: name, Hash: hash[:], Prefix: secret[:prefixLength], Scopes: scopes,
		CreatedAt: now.UTC()}
	if expiresIn > 0 {
		k.ExpiresAt = k.CreatedAt.Add(expiresIn)
	}
	return k, secret
}

// Authenticate returns the owner of a secret. A missing, malformed, unknown, expired or revoked
// secret gives Unauthenticated, always with the same text.
func (s *Service) Authenticate(ctx context.Context, secret string) (Principal, error) {
	refused := fault.New(fault.Unauthenticated, fault.CodeUnauthenticated,
		"a valid API key is needed: Authorization: Bearer cay_…")
	hash, ok := parseSecret(secret)
	if !ok {
		return Principal{}, refused
	}
	// The database compares a hash, whose bits the caller cannot choose, so its timing tells
	// nothing about a secret. This comparison guards against a store that matches too loosely.
	key, org, err := s.store.KeyByHash(ctx, hash[:])
	if fault.Is(err, fault.NotFound) {
		return Principal{}, refused
	}
	if err != nil {
		return Principal{}, fmt.Errorf("looking up key: %w", err)
	}
	now := s.cfg.Now()
	if subtle.ConstantTimeCompare(key.Hash, hash[:]) != 1 || !key.lives(now) {
		return Principal{}, refused
	}
	s.uses.note(key, now)
	return Principal{Org: org, Key: key}, nil
}

// Holder returns the owner of a key, for work that the key allowed before: it gives Unauthenticated if
// the key has been revoked or has expired since, or if there is no such key.
func (s *Service) Holder(ctx context.Context, keyID string) (Principal, error) {
	key, org, err := s.store.GetKey(ctx, keyID)
	if fault.Is(err, fault.NotFound) || err == nil && !key.lives(s.cfg.Now()) {
		return Principal{}, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated,
			"the API key that allowed this is no longer valid")
	}
	if err != nil {
		return Principal{}, fmt.Errorf("looking up key: %w", err)
	}
	return Principal{Org: org, Key: key}, nil
}

// Allow takes one call from the key's bucket, and from that of its organization. If one is empty it gives
// Exhausted, code "rate_limited", with RetryAfter, and takes from neither.
func (s *Service) Allow(p Principal) error {
	now := time.Now()
	giveBack, wait := s.buckets.take(p.Key.ID, now)
	if wait > 0 {
		return fault.New(fault.Exhausted, fault.CodeRateLimited,
			"this key may make %g calls a second, %d at once", s.cfg.Rate,
			s.buckets.burst).After(wait)
	}
	if wait := s.orgs.Take(p.Org.ID, now); wait > 0 {
		giveBack()
		return fault.New(fault.Exhausted, fault.CodeRateLimited,
			"all keys of this organization together may make %g calls a second, %d at once", s.orgs.rate,
			s.orgs.burst).After(wait)
	}
	return nil
}

// Failed counts a call without a valid key, signature or token against its address. If the
// address has too many it gives Exhausted, code [fault.CodeTooManyAttempts], with RetryAfter.
func (s *Service) Failed(remote string) error {
	if wait := s.failed.Take(Address(remote), time.Now()); wait > 0 {
		return fault.New(fault.Exhausted, fault.CodeTooManyAttempts,
			"calls without a valid key may come from one address %g times a second, %d at once",
			s.cfg.FailedRate, s.failed.burst).After(wait)
	}
	return nil
}

// needAdmin refuses a key without the scope admin.
func needAdmin(p Principal) error {
	if !p.May(Admin) {
		return fault.New(fault.Denied, fault.CodeScopeMissing, "the key lacks the scope %s", Admin)
	}
	return nil
}

// needOperator refuses a key that does not administer organizations.
func needOperator(p Principal) error {
	if err := needAdmin(p); err != nil {
		return err
	}
	if p.Org.Name != OperatorOrg {
		return fault.New(fault.Denied, fault.CodeNotTheOperator,
			"organizations are administered with keys of the organization %q",
			OperatorOrg)
	}
	return nil
}

// KeyRequest describes the key to create.
type KeyRequest struct {
	Name      string
	Scopes    []string      // may be empty with FormatE2B, which then gets e2bScopes
	ExpiresIn time.Duration // 0: the key never expires
	Format    Format        // "" is FormatCay
}

// e2bScopes returns the scopes that E2B's clients need.
func e2bScopes() []string {
	return []string{string(SandboxesWrite), string(Exec), string(Files), string(TemplatesWrite)}
}

// CreateKey makes a key in p's organization and returns it with its secret, which is not kept. It
// needs the scope admin. A scope that p's key lacks gives Denied, code "scope_missing". A wrong
// name, scope or expiry gives Invalid with the field. If the organization has as many keys as it
// may, it gives Exhausted, code "quota_exceeded".
func (s *Service) CreateKey(ctx context.Context, p Principal, r KeyRequest) (Key, string, error) {
	if err := needAdmin(p); err != nil {
		return Key{}, "", err
	}
	if err := checkKeyName(r.Name); err != nil {
		return Key{}, "", err
	}
	if len(r.Scopes) == 0 && r.Format == FormatE2B {
		r.Scopes = e2bScopes()
	}
	parsed, err := ParseScopes(r.Scopes)
	if err != nil {
		return Key{}, "", err
	}
	for _, scope := range parsed {
		if !p.May(scope) {
			return Key{}, "", fault.New(fault.Denied, fault.CodeScopeMissing,
				"a key without the scope %s cannot give it to another key", scope)
		}
	}
	format := cmp.Or(r.Format, FormatCay)
	if format != FormatCay && format != FormatE2B {
		return Key{}, "", fault.InvalidField("format", "must be %s or %s, not %.40q", FormatCay, FormatE2B,
			r.Format)
	}
	if r.ExpiresIn != 0 && r.ExpiresIn < minExpiry {
		return Key{}, "", fault.InvalidField("expires_in", "must be 0 for never, or at least %s", minExpiry)
	}
	k, secret := newKey(s.cfg.Now(), p.Org.ID, r.Name, parsed, r.ExpiresIn, format)
	if err := s.store.PutKey(ctx, k, s.cfg.MaxKeys); err != nil {
		return Key{}, "", fmt.Errorf("storing key: %w", err)
	}
	return k, secret, nil
}

// ListKeys returns a page of the keys of p's organization, newest first, including revoked and
// expired ones. It needs the scope admin.
func (s *Service) ListKeys(ctx context.Context, p Principal, limit int, cursor string) ([]Key, string, error) {
	if err := needAdmin(p); err != nil {
		return nil, "", err
	}
	return s.store.ListKeys(ctx, p.Org.ID, limit, cursor)
}

// Org returns an organization by its ID, for work that is done for it without a key.
func (s *Service) Org(ctx context.Context, id string) (Org, error) { return s.store.GetOrg(ctx, id) }

// RevokeKey revokes a key of p's organization for good, from the next call on. It needs the scope
// admin, but any key may revoke itself. It is safe to repeat. If the organization has no such key
// it gives NotFound, code "api_key_not_found".
func (s *Service) RevokeKey(ctx context.Context, p Principal, id string) error {
	if id != p.Key.ID {
		if err := needAdmin(p); err != nil {
			return err
		}
	}
	return s.store.RevokeKey(ctx, p.Org.ID, id, s.cfg.Now())
}

// QuotaRequest is the quota in the operator's request. A nil field takes the configured default.
type QuotaRequest struct {
	Sandboxes, VCPUs, MemoryMB *int
}

func (s *Service) quota(r QuotaRequest) (Quota, error) {
	q := s.cfg.Quota
	for _, of := range []struct {
		name string
		ask  *int
		set  *int
	}{{"sandboxes", r.Sandboxes, &q.Sandboxes}, {"vcpus", r.VCPUs, &q.VCPUs}, {"memory_mb", r.MemoryMB, &q.MemoryMB}} {
		if of.ask == nil {
			continue
		}
		if *of.ask < 0 {
			return Quota{}, fault.InvalidField("quota."+of.name, "must be 0 for no limit, or more")
		}
		*of.set = *of.ask
	}
	return q, nil
}

// CreateOrg makes an organization and its first key, with the scope admin. It returns both and
// the key's secret, which is not kept. Callers other than the operator get Denied. A name that is
// taken gives Conflict, code "org_exists".
func (s *Service) CreateOrg(ctx context.Context, p Principal, name string, r QuotaRequest) (Org, Key, string, error) {
	if err := needOperator(p); err != nil {
		return Org{}, Key{}, "", err
	}
	if err := checkOrgName(name); err != nil {
		return Org{}, Key{}, "", err
	}
	quota, err := s.quota(r)
	if err != nil {
		return Org{}, Key{}, "", err
	}
	org := Org{ID: newID("org_"), Name: name, Quota: quota, CreatedAt: s.cfg.Now().UTC()}
	key, secret := newKey(org.CreatedAt, org.ID, "first key of "+name, []Scope{Admin}, 0, FormatCay)
	if err := s.store.PutOrg(ctx, org, key); err != nil {
		return Org{}, Key{}, "", fmt.Errorf("storing organization: %w", err)
	}
	return org, key, secret, nil
}

// ListOrgs returns a page of all organizations, newest first. Only the operator may call it.
func (s *Service) ListOrgs(ctx context.Context, p Principal, limit int, cursor string) ([]Org, string, error) {
	if err := needOperator(p); err != nil {
		return nil, "", err
	}
	return s.store.ListOrgs(ctx, limit, cursor)
}
