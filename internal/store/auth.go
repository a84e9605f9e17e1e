package store

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
)

const (
	orgColumns = "id, name, quota_sandboxes, quota_vcpus, quota_memory_mb, created_at"
	keyColumns = "id, org_id, name, hash, prefix, scopes, created_at, expires_at, revoked_at, last_used_at"
)

func orgFields(o *auth.Org) []any {
	return []any{&o.ID, &o.Name, &o.Quota.Sandboxes, &o.Quota.VCPUs, &o.Quota.MemoryMB, timeColumn{&o.CreatedAt}}
}

// keyFields returns k's columns, to scan into or to write, with hash in place of k.Hash. The table
// stores the hash as hex, which has the same type in every database and can be searched by hand.
func keyFields(k *auth.Key, hash *string) []any {
	return []any{&k.ID, &k.OrgID, &k.Name, hash, &k.Prefix, jsonColumn{&k.Scopes},
		timeColumn{&k.CreatedAt}, timeColumn{&k.ExpiresAt}, timeColumn{&k.RevokedAt}, timeColumn{&k.LastUsedAt}}
}

func noOrg(id string) error {
	return fault.New(fault.NotFound, fault.CodeOrgNotFound, "there is no organization %q", id)
}

// PutOrg implements [auth.Store].
func (db *DB) PutOrg(ctx context.Context, o auth.Org, first auth.Key) error {
	defer db.took("put_org", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		fields := orgFields(&o)
		_, err := tx.ExecContext(ctx, "INSERT INTO orgs ("+orgColumns+") VALUES ("+placeholders(len(fields))+")", fields...)
		if db.violates(err, false) {
			return fault.New(fault.Conflict, fault.CodeOrgExists, "there is an organization %q already", o.Name).Because(err)
		}
		if err != nil {
			return fmt.Errorf("writing row: %w", err)
		}
		made := event.Event{OrgID: o.ID, At: o.CreatedAt, Type: event.OrgCreated, About: event.About{Name: o.Name}}
		if err := out.add(ctx, made); err != nil {
			return err
		}
		return insertKey(ctx, tx, out, first)
	})
	if err != nil {
		return fmt.Errorf("adding organization %q: %w", o.Name, err)
	}
	return nil
}

func insertKey(ctx context.Context, tx *sql.Tx, out *outbox, k auth.Key) error {
	hash := hex.EncodeToString(k.Hash)
	fields := keyFields(&k, &hash)
	_, err := tx.ExecContext(ctx,
		"INSERT INTO api_keys ("+keyColumns+") VALUES ("+placeholders(len(fields))+")", fields...)
	if out.db.violates(err, true) {
		return noOrg(k.OrgID)
	}
	if err != nil {
		return fmt.Errorf("writing key: %w", err)
	}
	return out.add(ctx, keyEvent(event.KeyCreated, k, k.CreatedAt))
}

func keyEvent(t event.Type, k auth.Key, when time.Time) event.Event {
	return event.Event{OrgID: k.OrgID, At: when, Type: t, About: event.About{KeyID: k.ID, Name: k.Name}}
}

// GetOrg implements [auth.Store].
func (db *DB) GetOrg(ctx context.Context, id string) (auth.Org, error) {
	defer db.took("get_org", time.Now())
	var o auth.Org
	err := db.reader.QueryRowContext(ctx, "SELECT "+orgColumns+" FROM orgs WHERE id = $1", id).Scan(orgFields(&o)...)
	if errors.Is(err, sql.ErrNoRows) {
		return auth.Org{}, noOrg(id)
	}
	if err != nil {
		return auth.Org{}, fmt.Errorf("reading organization %s: %w", id, err)
	}
	return o, nil
}

// ListOrgs implements [auth.Store].
func (db *DB) ListOrgs(ctx context.Context, limit int, after string) ([]auth.Org, string, error) {
	defer db.took("list_orgs", time.Now())
	var p params
	end, err := page(listOrgs, limit, after, &p)
	if err != nil {
		return nil, "", err
	}
	all, err := collect(ctx, db.reader, orgFields, "SELECT "+orgColumns+" FROM orgs WHERE 1 = 1"+end, p...)
	if err != nil {
		return nil, "", fmt.Errorf("listing organizations: %w", err)
	}
	all, next := cut(listOrgs, all, limit, func(o auth.Org) (time.Time, string) { return o.CreatedAt, o.ID })
	return all, next, nil
}

// PutKey implements [auth.Store]. It returns NotFound if the organization does not exist.
func (db *DB) PutKey(ctx context.Context, k auth.Key, limit int) error {
	defer db.took("put_key", time.Now())
	org := ""
	if limit > 0 {
		org = k.OrgID
	}
	err := db.recordCounted(ctx, org, func(tx *sql.Tx, out *outbox) error {
		if limit > 0 {
			if err := makeRoom(ctx, tx, k, limit); err != nil {
				return err
			}
		}
		return insertKey(ctx, tx, out, k)
	})
	if err != nil {
		return fmt.Errorf("adding key %s: %w", k.ID, err)
	}
	return nil
}

const (
	isLive   = "revoked_at IS NULL AND (expires_at IS NULL OR expires_at > $2)"
	liveKeys = "SELECT COUNT(*) FROM api_keys WHERE org_id = $1 AND " + isLive
	dropKeys = `DELETE FROM api_keys WHERE org_id = $1 AND NOT (` + isLive + `) AND id NOT IN
		(SELECT id FROM api_keys WHERE org_id = $1 AND NOT (` + isLive + `) ORDER BY created_at DESC, id DESC LIMIT $3)`
)

// makeRoom returns Exhausted if the organization has limit live keys. Otherwise it deletes the
// revoked and expired keys, except the newest limit of them. It reads the keys of the organization,
// which are at most twice the limit.
func makeRoom(ctx context.Context, tx *sql.Tx, k auth.Key, limit int) error {
	var live int
	if err := tx.QueryRowContext(ctx, liveKeys, k.OrgID, at(k.CreatedAt)).Scan(&live); err != nil {
		return fmt.Errorf("counting keys: %w", err)
	}
	if live >= limit {
		return fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
			"the organization may have %d API keys; revoke one that is not needed", limit)
	}
	if _, err := tx.ExecContext(ctx, dropKeys, k.OrgID, at(k.CreatedAt), limit); err != nil {
		return fmt.Errorf("dropping old keys: %w", err)
	}
	return nil
}

// keyByHash and keyByID select a key and its organization. They are constants, so that the first of
// them, the most frequent query, always has the same text.
const (
	keyAndOrg = `SELECT k.id, k.org_id, k.name, k.hash, k.prefix, k.scopes, k.created_at, k.expires_at, k.revoked_at, k.last_used_at,
	o.id, o.name, o.quota_sandboxes, o.quota_vcpus, o.quota_memory_mb, o.created_at
	FROM api_keys k JOIN orgs o ON o.id = k.org_id `
	keyByHash = keyAndOrg + "WHERE k.hash = $1"
	keyByID   = keyAndOrg + "WHERE k.id = $1"
)

// KeyByHash implements [auth.Store].
func (db *DB) KeyByHash(ctx context.Context, hash []byte) (auth.Key, auth.Org, error) {
	defer db.took("key_by_hash", time.Now())
	if k, o, found, err := db.keyExpecting(ctx, hash); found || err != nil {
		return k, o, err
	}
	return db.key(ctx, keyByHash, hex.EncodeToString(hash))
}

// GetKey implements [auth.Store].
func (db *DB) GetKey(ctx context.Context, id string) (auth.Key, auth.Org, error) {
	defer db.took("get_key", time.Now())
	return db.key(ctx, keyByID, id)
}

// key reads the key that a query selects by one parameter.
func (db *DB) key(ctx context.Context, query, by string) (auth.Key, auth.Org, error) {
	var k auth.Key
	var o auth.Org
	var text string
	err := db.reader.QueryRowContext(ctx, query, by).Scan(append(keyFields(&k, &text), orgFields(&o)...)...)
	if errors.Is(err, sql.ErrNoRows) {
		return auth.Key{}, auth.Org{}, fault.New(fault.NotFound, fault.CodeAPIKeyNotFound, "there is no such API key")
	}
	if err == nil {
		k.Hash, err = hex.DecodeString(text)
	}
	if err != nil {
		return auth.Key{}, auth.Org{}, fmt.Errorf("reading key: %w", err)
	}
	return k, o, nil
}

// ListKeys implements [auth.Store].
func (db *DB) ListKeys(ctx context.Context, orgID string, limit int, after string) ([]auth.Key, string, error) {
	defer db.took("list_keys", time.Now())
	var p params
	q := "SELECT " + keyColumns + " FROM api_keys WHERE org_id = " + p.add(orgID)
	end, err := page(listKeys, limit, after, &p)
	if err != nil {
		return nil, "", err
	}
	rows, err := db.reader.QueryContext(ctx, q+end, p...)
	if err != nil {
		return nil, "", fmt.Errorf("listing keys: %w", err)
	}
	defer rows.Close()
	var all []auth.Key
	for rows.Next() {
		var k auth.Key
		var hash string
		if err := rows.Scan(keyFields(&k, &hash)...); err != nil {
			return nil, "", fmt.Errorf("listing keys: %w", err)
		}
		if k.Hash, err = hex.DecodeString(hash); err != nil {
			return nil, "", fmt.Errorf("listing keys: %w", err)
		}
		all = append(all, k)
	}
	if err := rows.Err(); err != nil {
		return nil, "", fmt.Errorf("listing keys: %w", err)
	}
	all, next := cut(listKeys, all, limit, func(k auth.Key) (time.Time, string) { return k.CreatedAt, k.ID })
	return all, next, nil
}

// RevokeKey implements [auth.Store].
func (db *DB) RevokeKey(ctx context.Context, orgID, id string, when time.Time) error {
	defer db.took("revoke_key", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		k := auth.Key{ID: id, OrgID: orgID}
		err := tx.QueryRowContext(ctx, `UPDATE api_keys SET revoked_at = $1
			WHERE org_id = $2 AND id = $3 AND revoked_at IS NULL RETURNING name`,
			at(when), orgID, id).Scan(&k.Name)
		if err == nil {
			return out.add(ctx, keyEvent(event.KeyRevoked, k, when))
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		err = tx.QueryRowContext(ctx, "SELECT name FROM api_keys WHERE org_id = $1 AND id = $2", orgID, id).Scan(&k.Name)
		if errors.Is(err, sql.ErrNoRows) {
			return fault.New(fault.NotFound, fault.CodeAPIKeyNotFound, "there is no API key %s", id)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("revoking key %s: %w", id, err)
	}
	return nil
}

// TouchKey implements [auth.Store]. It changes nothing if a later use is recorded or if the key does
// not exist.
func (db *DB) TouchKey(ctx context.Context, id string, when time.Time) error {
	defer db.took("touch_key", time.Now())
	err := db.change(ctx,
		"UPDATE api_keys SET last_used_at = $1 WHERE id = $2 AND (last_used_at IS NULL OR last_used_at < $1)", at(when), id)
	if err != nil {
		return fmt.Errorf("recording a use of key %s: %w", id, err)
	}
	return nil
}
