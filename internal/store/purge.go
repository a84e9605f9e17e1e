package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// purgeBatch limits the sandboxes that one transaction of [DB.Purge] drops: some milliseconds of
// work. A higher limit would delay creates; a lower one would sync the database more often.
const purgeBatch = 200

const (
	purgeOld = "SELECT id FROM sandboxes WHERE ended_at IS NOT NULL AND ended_at < $1 ORDER BY ended_at LIMIT $2"
	// crowded selects the organizations whose sandboxes that are over weigh more than the limit.
	crowded = "SELECT org_id FROM sandboxes WHERE ended_at IS NOT NULL GROUP BY org_id HAVING SUM(weight) > $1"
	// purgeMany selects the sandboxes of one organization beyond the limit, counted from the newest.
	purgeMany = `SELECT id FROM (SELECT id, SUM(weight) OVER (ORDER BY ended_at DESC, id DESC) AS upto
		FROM sandboxes WHERE ended_at IS NOT NULL AND org_id = $1) AS all_over WHERE upto > $2 LIMIT $3`
)

// Purge implements [sandbox.Store]. It works in batches, so that creates run between them. After an
// error it returns the number of sandboxes that it has dropped already. It also drops what the dialect keeps of old
// transactions.
func (db *DB) Purge(ctx context.Context, over, now time.Time, most int) (int, error) {
	defer db.took("purge", time.Now())
	var p params
	oldest := db.now(&p, now) + " - " + p.add(onceFor.Microseconds())
	err := db.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM idempotency WHERE created_at <= "+oldest, p...)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("dropping old idempotency keys: %w", err)
	}
	if err := db.dropCommits(ctx); err != nil {
		return 0, fmt.Errorf("dropping old transactions: %w", err)
	}
	gone, err := db.purge(ctx, purgeOld, at(over))
	if err != nil || most == 0 {
		return gone, err
	}
	orgs, err := db.texts(ctx, "looking for organizations with many sandboxes that are over", crowded, most)
	if err != nil {
		return gone, err
	}
	for _, org := range orgs {
		n, err := db.purge(ctx, purgeMany, org, most)
		if gone += n; err != nil {
			return gone, err
		}
	}
	return gone, nil
}

// purge drops the sandboxes that a query selects, in batches. It adds the last parameter of the
// query, which limits a batch.
func (db *DB) purge(ctx context.Context, which string, args ...any) (int, error) {
	var gone int
	for {
		var ids []string
		err := db.write(ctx, func(tx *sql.Tx) (err error) {
			ids, err = texts(ctx, tx, "DELETE FROM sandboxes WHERE id IN ("+which+") RETURNING id",
				append(args[:len(args):len(args)], purgeBatch)...)
			if err != nil || len(ids) == 0 {
				return err
			}
			return dropListed(ctx, tx, ids)
		})
		if err != nil {
			return gone, fmt.Errorf("dropping old sandboxes: %w", err)
		}
		gone += len(ids)
		if len(ids) < purgeBatch {
			return gone, nil
		}
	}
}
