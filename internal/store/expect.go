package store

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/sandbox"
)

// Expect returns a context for a call that will read the sandbox id after the key of its caller. With this context,
// [DB.KeyByHash] reads both with one query, and the first [DB.Get] of the sandbox after it returns that row. The row
// may be as old as the read of the key, but never older than a write that returned from db before the Get began.
func (db *DB) Expect(ctx context.Context, id sandbox.ID) context.Context {
	return context.WithValue(ctx, expectedKey{}, &expected{id: id})
}

type expectedKey struct{}

// expected is the sandbox that a call will read.
type expected struct {
	id  sandbox.ID
	row atomic.Pointer[expectedRow] // nil until it is read, and again when it has been returned
}

type expectedRow struct {
	sandbox sandbox.Sandbox
	writes  int64 // of the DB, before the row was read
}

// keyAndSandbox selects a key by its hash, its organization, and a sandbox of any organization by its id. It selects
// nothing if the key or the sandbox does not exist.
var keyAndSandbox = strings.Replace(keyAndOrg, "\n\tFROM", ", s."+
	strings.Join(strings.Fields(strings.ReplaceAll(sandboxColumns, ",", " ")), ", s.")+"\n\tFROM", 1) +
	"JOIN sandboxes s ON s.id = $2 WHERE k.hash = $1"

// keyExpecting reads a key, and the sandbox that the call of ctx expects. It returns found false if the call expects
// none, or if the key or the sandbox does not exist.
func (db *DB) keyExpecting(ctx context.Context, hash []byte) (k auth.Key, o auth.Org, found bool, err error) {
	e, ok := ctx.Value(expectedKey{}).(*expected)
	if !ok {
		return k, o, false, nil
	}
	row := &expectedRow{writes: db.writes.Load()}
	var text string
	into := append(append(keyFields(&k, &text), orgFields(&o)...), sandboxFields(&row.sandbox)...)
	err = db.reader.QueryRowContext(ctx, keyAndSandbox, hex.EncodeToString(hash), e.id).Scan(into...)
	if errors.Is(err, sql.ErrNoRows) {
		return k, o, false, nil
	}
	if err == nil {
		k.Hash, err = hex.DecodeString(text)
	}
	if err != nil {
		return auth.Key{}, auth.Org{}, false, fmt.Errorf("reading key and sandbox: %w", err)
	}
	e.row.Store(row)
	return k, o, true, nil
}

// takeExpected returns the sandbox that was read with the key of the call of ctx, once, unless db has written since.
func (db *DB) takeExpected(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, bool) {
	e, ok := ctx.Value(expectedKey{}).(*expected)
	if !ok || e.id != id {
		return sandbox.Sandbox{}, false
	}
	row := e.row.Swap(nil)
	if row == nil || row.writes != db.writes.Load() {
		return sandbox.Sandbox{}, false
	}
	return row.sandbox, true
}

// write runs f in a transaction, as the dialect does with no organization.
func (db *DB) write(ctx context.Context, f func(tx *sql.Tx) error) error {
	return db.writeLocked(ctx, "", f)
}

// writeLocked runs f in a transaction, as the dialect does. What was read before is old when it returns.
func (db *DB) writeLocked(ctx context.Context, org string, f func(tx *sql.Tx) error) error {
	defer db.writes.Add(1)
	return db.dialect.write(ctx, org, f)
}
