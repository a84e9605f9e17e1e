package store

import "context"

// Alone calls f, unless another server with the same records is in a call of Alone with the same name. Then it returns
// nil at once. The context of f ends when the lock that ensures this is lost.
func (db *DB) Alone(ctx context.Context, name string, f func(ctx context.Context) error) error {
	return db.alone(ctx, name, f)
}
