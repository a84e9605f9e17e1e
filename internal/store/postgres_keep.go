package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cayhq/cay/internal/fault"
)

// keeper holds the lock of a node on a connection of its own, which keeps other servers of the node out, and probes
// whether PostgreSQL still answers. A lock that ends with its connection needs no clock and ends with the process.
type keeper struct {
	d    *postgresDialect
	node string // "" for a replica, whose keeper takes no lock and only probes
	// lost is set while the lock is not held: the server is not ready, and nothing may be removed by the records.
	lost atomic.Bool

	stop    context.CancelFunc
	stopped sync.WaitGroup
}

const (
	// lockPatience limits the wait of a server that starts for the lock of its node. PostgreSQL notices after
	// some 25 s that the machine of a server has lost its power. With a shorter time the server would have to be
	// started again after that; a longer one would hide for longer that another server runs.
	lockPatience = 40 * time.Second
	// lockRetry is the time between two tries to take the lock. A longer one delays starts, and the end of an
	// outage; a shorter one costs the database a connection each time.
	lockRetry = 200 * time.Millisecond

	// probeTick is the time between two looks at the connections, which cost no query.
	probeTick = 200 * time.Millisecond
	// probeInterval is the time between two probes while no call waits for an answer. With a longer one, the loss
	// of the lock is noticed later.
	probeInterval = time.Second
	// slowAnswer is the time that a call waits before a probe finds out whether PostgreSQL answers at all. A call may wait
	// long for a lock or for the disk; a probe needs neither.
	slowAnswer = 400 * time.Millisecond
	// silentTicks is the number of ticks without a byte from PostgreSQL, on any connection, after which a probe means that
	// PostgreSQL is away: a second. Together with slowAnswer, calls on a connection that carries nothing any more fail
	// within 2 s. With fewer, a busy machine looks as if its database were away. The keeper counts ticks and not time, so
	// that a server that was itself stopped for a while probes again first.
	silentTicks = 5
	// stuckTicks is the number of ticks after which a probe's own connection is given up although others answer: 10 s.
	stuckTicks = 50
)

// deadClient makes PostgreSQL notice within some 25 s that the machine of a server is gone, so that its lock ends.
var deadClient = map[string]string{"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5",
	"tcp_keepalives_count": "3", "tcp_user_timeout": "25000"}

// keep takes the lock of a node, and keeps it until [keeper.end].
func (d *postgresDialect) keep(ctx context.Context, node string) (*keeper, error) {
	k := &keeper{d: d, node: node}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	conn, err := k.d.connect(ctx)
	if err != nil {
		return nil, err
	}
	for {
		held, err := k.tryLock(ctx, conn)
		if held {
			break
		}
		if err == nil {
			select {
			case <-time.After(lockRetry):
				continue
			case <-ctx.Done():
			}
		}
		closeSoon(ctx, conn)
		if err != nil && ctx.Err() == nil {
			return nil, fmt.Errorf("locking the records of the node: %w", err)
		}
		return nil, fmt.Errorf("another server works with the records of node %s: this data directory, or its file "+
			"instance, is a copy of that server's; give each server a data directory and a database of its own", node)
	}
	var running context.Context
	running, k.stop = context.WithCancel(context.WithoutCancel(ctx))
	k.stopped.Go(func() { k.run(running, conn) })
	return k, nil
}

// connect returns a connection outside the pool. It connects even while calls are refused because PostgreSQL is away.
func (d *postgresDialect) connect(ctx context.Context) (*pgx.Conn, error) {
	pool := d.pool.Config()
	c := pool.ConnConfig.Copy()
	c.DialFunc = d.lines.dial
	for name, value := range deadClient {
		c.RuntimeParams[name] = value
	}
	if err := pool.BeforeConnect(ctx, c); err != nil {
		return nil, err
	}
	return pgx.ConnectConfig(ctx, c)
}

// tryLock tries once to take the lock of the node.
func (k *keeper) tryLock(ctx context.Context, conn *pgx.Conn) (held bool, err error) {
	if k.node == "" {
		return true, nil
	}
	return tryLock(ctx, conn, lockClassNode, k.node)
}

// tryLock tries once to take an advisory lock, which ends with conn.
func tryLock(ctx context.Context, conn *pgx.Conn, class int, name string) (held bool, err error) {
	err = conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1::int, hashtext($2::text))", class, name).Scan(&held)
	return held, err
}

// closeSoon ends the locks of a connection and closes it, also after ctx has ended. PostgreSQL ends them when it has
// noticed that the connection is closed, which may be later than the next server tries to take them. closeSoon cuts a
// connection that cannot be closed in order within connectTimeout.
func closeSoon(ctx context.Context, conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
	defer cancel()
	_, _ = conn.Exec(ctx, "SELECT pg_advisory_unlock_all()") // else the end of the connection does it
	_ = conn.Close(ctx)                                      // nothing that is needed is lost
}

// end gives the lock back.
func (k *keeper) end() {
	k.stop()
	k.stopped.Wait()
}

// run watches conn, and replaces it when it is lost.
func (k *keeper) run(ctx context.Context, conn *pgx.Conn) {
	for {
		away := k.watch(ctx, conn)
		closeSoon(ctx, conn)
		if ctx.Err() != nil {
			return
		}
		k.lost.Store(true)
		if away {
			k.d.lines.cut()
		}
		if conn = k.again(ctx); conn == nil {
			return
		}
		k.lost.Store(false)
	}
}

// again tries until it has the lock again. It returns nil if ctx has ended, or if a newer server of the node has
// started: then the lock stays lost.
func (k *keeper) again(ctx context.Context) *pgx.Conn {
	for ; ; sleep(ctx, lockRetry) {
		if ctx.Err() != nil {
			return nil
		}
		conn, err := k.d.connect(ctx)
		if err != nil {
			continue
		}
		k.d.lines.join()
		held, newest, err := k.tryAgain(ctx, conn)
		// The session is missing while the server starts. Restored records have a lower fence; see current.
		s := k.d.db.session.Load()
		superseded := s != nil && newest > s.Holder.Fence
		if err == nil && held && !superseded {
			return conn
		}
		closeSoon(ctx, conn)
		if superseded {
			return nil
		}
	}
}

// tryAgain tries to take the lock, and returns the newest fence of the node if it has it. A database that does not
// answer is an error after connectTimeout.
func (k *keeper) tryAgain(ctx context.Context, conn *pgx.Conn) (held bool, newest int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if held, err = k.tryLock(ctx, conn); err != nil || !held {
		return held, -1, err
	}
	err = conn.QueryRow(ctx, "SELECT COALESCE((SELECT fence FROM nodes WHERE id = $1), 0)", k.node).Scan(&newest)
	return held, newest, err
}

// sleep waits for a time, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// watch probes conn until it is lost or ctx ends. It reports whether PostgreSQL is away for all connections.
func (k *keeper) watch(ctx context.Context, conn *pgx.Conn) (away bool) {
	tick := time.NewTicker(probeTick)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
		if time.Since(last) < probeInterval && !k.d.lines.waiting(slowAnswer) {
			continue
		}
		last = time.Now()
		if away, err := k.probe(ctx, conn, tick.C); err != nil {
			return away
		}
	}
}

var errSilent = errors.New("PostgreSQL does not answer")

// probe returns nil if PostgreSQL answers on conn. Otherwise away reports whether all other connections are silent too.
func (k *keeper) probe(ctx context.Context, conn *pgx.Conn, tick <-chan time.Time) (away bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	answered := make(chan error, 1)
	heard := k.d.lines.heard.Load()
	go func() { answered <- k.d.clock.read(ctx, conn) }()
	silent := 0
	for n := 0; n < stuckTicks && silent < silentTicks; n++ {
		select {
		case err := <-answered:
			cancel()
			return false, err
		case <-tick:
		}
		if now := k.d.lines.heard.Load(); now != heard {
			heard, silent = now, 0
			continue
		}
		silent++
	}
	cancel()
	<-answered // the connection must not be used by two
	return silent == silentTicks, errSilent
}

// check returns an error while the lock is lost.
func (k *keeper) check() error {
	if k == nil || !k.lost.Load() {
		return nil
	}
	if k.node == "" {
		return fault.New(fault.Unavailable, fault.CodeNotReady, "the server cannot reach PostgreSQL").After(awayRetry)
	}
	return fault.New(fault.Unavailable, fault.CodeNotReady, "the server has lost its lock on the records: it cannot "+
		"reach PostgreSQL, or another server with a copy of its data directory has started").After(awayRetry)
}
