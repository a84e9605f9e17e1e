package network

import (
	"context"
	"time"
)

const (
	// refillBackoff is the pause after the first slot that could not be made. Each further
	// failure doubles it up to refillBackoffMax, so that a broken host is tried about twice a
	// minute and does not fill the log.
	refillBackoff    = time.Second
	refillBackoffMax = 30 * time.Second
)

// wakePool tells the pool that a slot was taken or that an index became free.
func (n *Network) wakePool() {
	select {
	case n.fill <- struct{}{}:
	default: // the pool is awake, or will be
	}
}

// refill keeps the target number of slots ready until ctx ends. It makes one at a time, with a
// pause as long as making it took: the kernel configures links under one lock, and an Acquire
// that makes a slot itself should get it.
func (n *Network) refill(ctx context.Context) {
	backoff := refillBackoff
	for {
		started := time.Now()
		made, err := n.makeReady()
		pause := time.Since(started)
		switch {
		case err != nil:
			n.log.Warn("making a ready slot failed", "error", err, "retry_in", backoff)
			pause, backoff = backoff, min(2*backoff, refillBackoffMax)
		case made:
			backoff = refillBackoff
		default:
			select {
			case <-ctx.Done():
				return
			case <-n.fill:
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// makeReady adds a slot to the pool. made is false if there is nothing to do: the pool is full,
// the range is used up, or the network is closed.
func (n *Network) makeReady() (made bool, err error) {
	n.mu.Lock()
	if n.closed || len(n.idle) >= n.ready {
		n.mu.Unlock()
		return false, nil
	}
	index, ok := n.reserveLocked()
	n.mu.Unlock()
	if !ok {
		return false, nil
	}
	s := n.layout.slot(index)
	if err := n.build(s); err != nil {
		return false, err
	}
	n.mu.Lock()
	if !n.closed {
		n.idle = append(n.idle, s)
		n.mu.Unlock()
		return true, nil
	}
	n.mu.Unlock()
	return false, n.dismantle(context.Background(), s)
}
