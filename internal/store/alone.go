package store

import "context"

// Alone calls f, unless another server with the same records is in such a call under the same name: then it returns at
// once. The context of f ends when this can no longer be told.
func (db *DB) Alone(ctx context.Context, name string, f func(ctx context.Context) error) error {
	return db.alone(ctx, name, f)
}
