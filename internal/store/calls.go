package store

import "time"

// OnCall sets the function that is told the name and the duration of each call that uses the database: waits for a
// connection and transactions that are run again included, also if the call fails. Names are those of the methods, in
// lower case, so there are some 70. observe must not block.
func (db *DB) OnCall(observe func(call string, took time.Duration)) { db.observe.Store(&observe) }

// took tells the observer of a call that began at a time.
func (db *DB) took(call string, begin time.Time) {
	if observe := db.observe.Load(); observe != nil {
		(*observe)(call, time.Since(begin))
	}
}
