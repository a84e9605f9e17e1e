package store

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// clock tells the time of the database without asking for it each time. It goes on from a reading by the machine's
// monotonic clock, so it does not matter how the machine's clock is set.
type clock struct{ last atomic.Pointer[reading] }

// reading is the time of the database at a moment of this machine.
type reading struct{ database, machine time.Time }

const (
	// exactReading is the longest time that a reading takes which replaces a younger one than oldReading. The error of
	// a reading is half that at most. With a shorter time a distant database is read seldom; with a longer one a busy
	// machine tells a wrong time for a second.
	exactReading = 100 * time.Millisecond
	// oldReading is the age at which any reading is better: clocks of machines differ by some milliseconds a minute at
	// most, and the machine may have been suspended. With a longer one that goes unnoticed on a slow network.
	oldReading = time.Minute
)

// read asks for the time of the database.
func (c *clock) read(ctx context.Context, conn *pgx.Conn) error {
	began := time.Now()
	var micros int64
	if err := conn.QueryRow(ctx, "SELECT "+databaseNow).Scan(&micros); err != nil {
		return fmt.Errorf("reading the time of the database: %w", err)
	}
	took := time.Since(began)
	if last := c.last.Load(); last == nil || took < exactReading || time.Since(last.machine) > oldReading {
		c.last.Store(&reading{time.UnixMicro(micros).UTC(), began.Add(took / 2)})
	}
	return nil
}

// now returns the time of the database, to some milliseconds.
func (c *clock) now() time.Time {
	last := c.last.Load()
	if last == nil {
		return time.Now().UTC() // before the first connection
	}
	return last.database.Add(time.Since(last.machine))
}

// Now returns the present time by the clock of the records: that of the database if several machines can share it, and
// otherwise that of this machine.
func (db *DB) Now() time.Time { return db.present() }

func (d *postgresDialect) present() time.Time { return d.clock.now() }
