package store

import (
	"context"
	"fmt"
	"time"
)

// Shared reports whether other servers may work with the same records.
func (db *DB) Shared() bool {
	_, shared := db.dialect.(*postgresDialect)
	return shared
}

// Alone calls f, unless another server with the same records is in a call of Alone with the same name. Then it returns
// nil at once. The context of f ends when the lock that ensures this is lost.
func (db *DB) Alone(ctx context.Context, name string, f func(ctx context.Context) error) error {
	return db.alone(ctx, name, f)
}

const (
	// leadRetry is the time between two tries of a server to lead. With a longer one, the work of a server that died
	// rests for longer; a shorter one costs the database a connection each time.
	leadRetry = 2 * time.Second
	// handover is the time for which a server that follows another one as the leader waits. The other one may have lost
	// its connection only, and notices that within aloneCheck and the time of a look. With a shorter time, both could
	// lead for a moment; a longer one delays their work.
	handover = aloneCheck + connectTimeout + 500*time.Millisecond
)

// Lead calls f when this server is the leader of a name, and again when it is the leader once more, until ctx ends. Of
// all servers with the same records one leads at a time, and another one follows within seconds after it has died or
// lost its connection. The context of f ends when the server does not lead any more, and f returns within moments then.
// server names this one among them, also after a restart. failed learns of the loss of the lead, and of the first of
// several errors that keep this server from leading. If no other server can work with the records, Lead is a call of f.
func (db *DB) Lead(ctx context.Context, name, server string, f func(ctx context.Context), failed func(error)) {
	if !db.Shared() {
		f(ctx)
		return
	}
	for reported := false; ctx.Err() == nil; sleep(ctx, leadRetry) {
		err := db.Alone(ctx, name, func(leading context.Context) error {
			if err := db.follow(leading, name, server); err != nil {
				return err
			}
			reported = false
			f(leading)
			return context.Cause(leading)
		})
		if err != nil && ctx.Err() == nil && !reported {
			failed(fmt.Errorf("leading %s: %w", name, err))
		}
		reported = err != nil
	}
}

// Leader returns the server that leads a name or did last, or found false if none has. With SQLite none is noted.
func (db *DB) Leader(ctx context.Context, name string) (server string, found bool, err error) {
	defer db.took("leader", time.Now())
	return db.Setting(ctx, "leader_"+name)
}

// follow waits until the leader before this one has noticed that it leads no more. A server follows itself at once: its
// f has returned, or died with its process.
func (db *DB) follow(ctx context.Context, name, server string) error {
	setting := "leader_" + name
	last, found, err := db.Setting(ctx, setting)
	if err != nil || found && last == server {
		return err
	}
	if found {
		sleep(ctx, handover)
	}
	// While the setting has the other leader, the next one waits too.
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return db.SetSetting(ctx, setting, server)
}
