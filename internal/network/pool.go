package network

import (
	"context"
	"time"
)

const (
	// refillBackoff is the pause after the first slot that could not be made;
	// each further failure doubles it up to refillBackoffMax, so that a broken
	// host is tried about twice a minute instead of filling the log.
	refillBackoff    = time.Second
	refillBackoffMax = 30 * time.Second
)

// wakePool tells the pool that a slot was taken or an index became free.
func (n *Network) wakePool() {
	select {
	case n.fill <- struct{}{}:
	default: // it is awake, or will be
	}
}

// refill keeps the target number of slots ready until ctx ends. One is made at a
// time, with a pause as long as making it took: the kernel configures links
// under one lock, and whoever waits for a slot now should get it.
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

// makeReady adds a slot to the pool; made is false when nothing is to be done:
// the pool is full, the range is used up, or the network is closed.
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
