package node

import (
	"context"
	"errors"
	"net"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// The host decides from its own records how it recognizes an agent. Nothing that is said inside the
// sandbox changes that.
//
// The agent of a booted sandbox has no key, and no other program runs there, so every answer comes
// from the agent; the first init gives it a key. The agent of a restored sandbox has the key that
// was saved with it, and other processes run when the host first calls it: it proves that it knows
// its key before it gets another. An agent from before the handshake gets its key as a token with
// each request.

// agentKnows records the key that the agent has from now on.
func (b *instance) agentKnows(key string) {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	b.agentKey = key
}

// key returns the agent's present key, "" while it has none.
func (b *instance) key() string {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	return b.agentKey
}

// bearer returns the token to send with requests to an agent from before the handshake, "" for all
// other agents.
func (n *Node) bearer(id string) string {
	b := n.instance(sandbox.ID(id))
	if b == nil || b.record.Handshake {
		return ""
	}
	return b.key()
}

// warnOlder logs a warning if the agent of the sandbox is from before the handshake.
func (n *Node) warnOlder(b *instance) {
	if !b.record.Handshake {
		n.log.Warn("the agent of a sandbox is from an older version of cay: programs inside can read what is sent to it",
			"sandbox", b.record.ID)
	}
}

// reach connects to the agent of a sandbox and authenticates it, unless the agent has no key yet or
// is from before the handshake.
func (n *Node) reach(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	conn, err := n.Dial(ctx, id)
	if err != nil {
		return nil, err
	}
	b := n.instance(id)
	if b == nil {
		_ = conn.Close() // nothing was sent
		return nil, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s has no agent on this machine", id)
	}
	key := b.key()
	if key == "" || !b.record.Handshake {
		return conn, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.ctx, cancel)() // a dead sandbox does not answer
	proven, err := agentapi.Authenticate(ctx, conn, key)
	if errors.Is(err, agentapi.ErrNotTheAgent) {
		b.impostor.Do(func() { n.log.WarnContext(ctx, "a program other than the agent answers in a sandbox", "sandbox", id) })
	}
	return proven, err
}
