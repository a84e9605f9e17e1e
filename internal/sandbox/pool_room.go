package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// roomPatience bounds how long a create waits for sandboxes that are being removed, which takes
// tens of milliseconds. A higher value delays the report that there is no room; a lower one refuses
// creates that could have room.
const roomPatience = 2 * time.Second

// room makes sure that the machine can take one more sandbox, and is not cordoned. It evicts pooled
// sandboxes, cancels preparations, and waits for sandboxes that are being removed.
func (p *pool) room(ctx context.Context, size Size) error {
	if p.cordon.on.Load() {
		return errCordoned
	}
	defer trace.Start(ctx, "room")()
	patience, cancel := context.WithTimeout(ctx, roomPatience)
	defer cancel()
	for {
		err := p.node.Room(ctx, size)
		if err == nil || !fault.Is(err, fault.Unavailable) {
			return err
		}
		if p.evict(ctx, func(ready) bool { return true }) {
			continue
		}
		op := p.ops.of(opPrepare)
		if op != nil {
			op.cancel(errInterrupted)
		} else if op = p.ops.of(opDestroy); op == nil {
			return err
		}
		if op.ended(patience) != nil {
			return err
		}
	}
}
