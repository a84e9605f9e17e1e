package store

import "time"

// OnCall sets the function that gets the name and the duration of each call that uses the database, also of one that
// fails. The duration includes waits for a connection and transactions that are run again. A name is that of the method
// in snake case, such as "get_build"; there are some 70. observe must not block.
func (db *DB) OnCall(observe func(call string, took time.Duration)) { db.observe.Store(&observe) }

// took reports a call that began at begin to the observer.
func (db *DB) took(call string, begin time.Time) {
	if observe := db.observe.Load(); observe != nil {
		(*observe)(call, time.Since(begin))
	}
}
