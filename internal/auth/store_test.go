package auth

import (
	"bytes"
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// memory is a Store for the tests of this package, which fake the time, so that a database would
// only be slow. The tests of package store check the contract on the real one.
type memory struct {
	mu      sync.Mutex
	orgs    []Org
	keys    []Key
	touches int
	broken  error // returned by every write, if not nil
	looked  int   // number of calls of KeyByHash
}

func (m *memory) PutOrg(_ context.Context, o Org, first Key) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return m.broken
	}
	if slices.ContainsFunc(m.orgs, func(have Org) bool { return have.Name == o.Name }) {
		return fault.New(fault.Conflict, "org_exists", "there is one")
	}
	m.orgs, m.keys = append(m.orgs, o), append(m.keys, first)
	return nil
}

func (m *memory) GetOrg(_ context.Context, id string) (Org, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := slices.IndexFunc(m.orgs, func(o Org) bool { return o.ID == id }); i >= 0 {
		return m.orgs[i], nil
	}
	return Org{}, fault.New(fault.NotFound, "org_not_found", "none")
}

func (m *memory) ListOrgs(_ context.Context, limit int, after string) ([]Org, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return pageOf(m.orgs, limit, after)
}

func (m *memory) PutKey(_ context.Context, k Key, _ int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return m.broken
	}
	m.keys = append(m.keys, k)
	return nil
}

func (m *memory) KeyByHash(_ context.Context, hash []byte) (Key, Org, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.looked++
	for _, k := range m.keys {
		if bytes.Equal(k.Hash, hash) {
			i := slices.IndexFunc(m.orgs, func(o Org) bool { return o.ID == k.OrgID })
			return k, m.orgs[i], nil
		}
	}
	return Key{}, Org{}, fault.New(fault.NotFound, "api_key_not_found", "none")
}

func (m *memory) GetKey(_ context.Context, id string) (Key, Org, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range m.keys {
		if k.ID == id {
			i := slices.IndexFunc(m.orgs, func(o Org) bool { return o.ID == k.OrgID })
			return k, m.orgs[i], nil
		}
	}
	return Key{}, Org{}, fault.New(fault.NotFound, "api_key_not_found", "none")
}

func (m *memory) ListKeys(_ context.Context, orgID string, limit int, after string) ([]Key, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var own []Key
	for _, k := range m.keys {
		if k.OrgID == orgID {
			own = append(own, k)
		}
	}
	return pageOf(own, limit, after)
}

func (m *memory) RevokeKey(_ context.Context, orgID, id string, at time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, k := range m.keys {
		if k.OrgID == orgID && k.ID == id {
			if k.RevokedAt.IsZero() {
				m.keys[i].RevokedAt = at
			}
			return nil
		}
	}
	return fault.New(fault.NotFound, "api_key_not_found", "none")
}

func (m *memory) TouchKey(_ context.Context, id string, at time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return m.broken
	}
	m.touches++
	for i := range m.keys {
		if m.keys[i].ID == id {
			m.keys[i].LastUsedAt = at
		}
	}
	return nil
}

// pageOf returns a page, newest first; the cursor is the number of items before it.
func pageOf[T any](all []T, limit int, after string) ([]T, string, error) {
	newest := slices.Clone(all)
	slices.Reverse(newest)
	from := 0
	if after != "" {
		n, err := strconv.Atoi(after)
		if err != nil {
			return nil, "", fault.InField("invalid_cursor", "cursor", "not ours")
		}
		from = n
	}
	newest = newest[min(from, len(newest)):]
	if len(newest) <= limit {
		return newest, "", nil
	}
	return newest[:limit], strconv.Itoa(from + limit), nil
}
