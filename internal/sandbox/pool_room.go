package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// roomPatience bounds how long a create waits for sandboxes that are being removed, which takes
// tens of milliseconds, and for callers that may give room back. A higher value delays the report that there is no
// room; a lower one refuses creates that could have room.
const roomPatience = 2 * time.Second

// room is the room on the machine that a caller has reserved for a sandbox.
type room struct {
	pool    *pool
	giveUp  func()        // of the node
	settled chan struct{} // closed once the row is written, or the room is given back
}

// settle records that the row of the sandbox is written, so that no other caller waits for the room.
func (r *room) settle() {
	r.pool.reserving.Lock()
	defer r.pool.reserving.Unlock()
	if _, open := r.pool.unsettled[r]; open {
		delete(r.pool.unsettled, r)
		close(r.settled)
	}
}

// release gives the room back, unless the sandbox has taken it over. It is safe to repeat.
func (r *room) release() {
	r.giveUp()
	r.settle()
}

// reserve keeps room on the machine for one more sandbox, unless the machine is cordoned or cannot have its image. The
// caller calls settle once the row is written, and release in any case.
func (p *pool) reserve(ctx context.Context, sbx Sandbox) (*room, error) {
	r, err := p.reserveRoom(ctx, sbx.ID, sbx.Size)
	if err != nil {
		return nil, err
	}
	if err := p.node.FindImage(ctx, sbx.Image); err != nil {
		r.release()
		return nil, err
	}
	return r, nil
}

// reserveRoom reserves room as reserve does. It evicts pooled sandboxes, cancels preparations, and waits for sandboxes
// that are being removed. It also waits for rooms without a row: a create that repeats another or exceeds a quota gives
// its room back at once.
func (p *pool) reserveRoom(ctx context.Context, id ID, size Size) (*room, error) {
	if p.cordon.on.Load() {
		return nil, errCordoned
	}
	defer trace.Start(ctx, "room")()
	patience, cancel := context.WithTimeout(ctx, roomPatience)
	defer cancel()
	for {
		r, other, err := p.tryReserve(ctx, id, size)
		if err == nil || !fault.Is(err, fault.Unavailable) {
			return r, err
		}
		if p.evict(ctx, func(ready) bool { return true }) {
			continue
		}
		var wait <-chan struct{}
		if op := p.ops.of(opPrepare); op != nil {
			op.cancel(errInterrupted)
			wait = op.done
		} else if op := p.ops.of(opDestroy); op != nil {
			wait = op.done
		} else if other != nil {
			wait = other.settled
		} else {
			return nil, err
		}
		select {
		case <-wait:
		case <-patience.Done():
			return nil, err
		}
	}
}

// tryReserve reserves room on the machine. With an error it returns a room without a row, or nil if there is none.
func (p *pool) tryReserve(ctx context.Context, id ID, size Size) (r, other *room, err error) {
	p.reserving.Lock()
	defer p.reserving.Unlock()
	giveUp, err := p.node.Reserve(ctx, id, size)
	if err != nil {
		for other = range p.unsettled {
			break
		}
		return nil, other, err
	}
	r = &room{p, giveUp, make(chan struct{})}
	p.unsettled[r] = struct{}{}
	return r, nil, nil
}
