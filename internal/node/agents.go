package node

import (
	"context"
	"errors"
	"net"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// The agent of a sandbox that is booted has no key, and nothing but it runs there, so whatever
// answers is the agent: the first init gives it one. One that is restored has the key that was
// saved with it, and its processes run when it is first spoken to; it proves that it knows that
// key before it is given another. Which of these it is, and whether its agent is of before there
// were keys that are not sent, is what the host has recorded. Nothing that is said inside
// changes it.

// agentKnows notes the key that the agent has from here on.
func (b *box) agentKnows(key string) {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	b.agentKey = key
}

// key returns the key that the agent has now, "" while it has none.
func (b *box) key() string {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	return b.agentKey
}

// bearer returns the token to send with requests to a sandbox whose agent is of before the
// handshake, "" for all others.
func (n *Node) bearer(id string) string {
	b := n.box(sandbox.ID(id))
	if b == nil || b.life.Handshake {
		return ""
	}
	return b.key()
}

// warnOlder tells the operator of a sandbox whose agent is of before the handshake.
func (n *Node) warnOlder(b *box) {
	if !b.life.Handshake {
		n.log.Warn("the agent of a sandbox is of an older cay: programs inside can read what is sent to it", "sandbox", b.life.ID)
	}
}

// reach connects to the agent of a sandbox, and makes sure that it is the agent.
func (n *Node) reach(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	conn, err := n.Dial(ctx, id)
	if err != nil {
		return nil, err
	}
	b := n.box(id)
	if b == nil {
		_ = conn.Close() // nothing was sent
		return nil, fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s has no agent on this machine", id)
	}
	key := b.key()
	if key == "" || !b.life.Handshake {
		return conn, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.ctx, cancel)() // a dead sandbox is silent
	proven, err := agentapi.Authenticate(ctx, conn, key)
	if errors.Is(err, agentapi.ErrNotTheAgent) {
		b.impostor.Do(func() { n.log.WarnContext(ctx, "something else than the agent answers in a sandbox", "sandbox", id) })
	}
	return proven, err
}
