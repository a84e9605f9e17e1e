package node

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
)

// make returns a description of what every sandbox of this Node is made with, apart from its spec.
// A pooled sandbox with another description, which a former process of the server made, differs
// from what a create would make now.
func (n *Node) make() string { return n.makeWith(n.cfg.Programs.Version, runsc.Flags(n.cfg.Platform)) }

// makeWith returns the same description as make for programs and flags that may be those of an
// older snapshot.
func (n *Node) makeWith(v embedded.Version, flags []string) string {
	return strings.Join(slices.Concat(
		[]string{v.Agent, v.Runsc, fmt.Sprint(n.cfg.MaxPIDs), fmt.Sprint("uid ", n.cfg.FirstUID)},
		flags, n.cfg.Nameservers), " ")
}

// Prepare implements sandbox.Node. The slot of a pooled sandbox without a start command gets no
// policy, so that nothing leaves it.
func (n *Node) Prepare(ctx context.Context, spec sandbox.Spec) error {
	b, steps, err := n.making(ctx, spec)
	if err != nil {
		return err
	}
	b.record.Warm = n.makeWith(b.record.Programs, b.record.Flags)
	if spec.Start.None() {
		b.record.Shape.Egress = sandbox.Egress{}
		steps = slices.DeleteFunc(steps, func(s step) bool { return s.name == "policy" })
	}
	return n.take(ctx, b, steps, n.Destroy)
}

// Claim implements sandbox.Node. It changes the record first: a server that adopts the sandbox
// after that knows that it is not pooled any more.
func (n *Node) Claim(ctx context.Context, spec sandbox.Spec) error {
	b := n.instance(spec.ID)
	if b == nil || !b.unwarm(spec) {
		return fault.New(fault.Conflict, fault.CodeNoPooled, "there is no pooled sandbox %s on this machine", spec.ID)
	}
	return n.walk(ctx, b, []step{
		{"claimed", func(context.Context) error { return b.writeRecord() }},
		{"policy", func(ctx context.Context) error {
			err := b.applyPolicy(ctx)
			n.policyChanged(b.slot)
			return err
		}},
		{"init", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, meetTimeout)
			defer cancel()
			err := n.agents.Init(ctx, b.target(), agentapi.InitRequest{
				Env: spec.Env, DefaultUser: spec.User, DefaultWorkdir: spec.Workdir})
			if err != nil {
				return fmt.Errorf("telling the agent about its sandbox: %w", err)
			}
			return nil
		}},
	}, n.Destroy)
}

// unwarm turns a pooled sandbox into one that is being claimed, with the policy of the spec. It
// returns false if the spec does not name a pooled sandbox.
func (b *instance) unwarm(spec sandbox.Spec) bool {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	if b.record.Warm == "" || b.record.Run != spec.Run || b.record.Token != spec.Token {
		return false
	}
	b.record.Warm, b.record.Shape, b.record.Org = "", spec.Shape, spec.OrgID
	return true
}

// warm reports whether the sandbox is pooled and is made as this Node would make it now.
func (b *instance) warm() bool {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	return b.record.Warm != "" && b.record.Warm == b.node.make()
}

// Check implements sandbox.Node.
func (n *Node) Check(ctx context.Context, id sandbox.ID) error {
	b := n.instance(id)
	if b == nil || b.slot == nil || b.dead() {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s does not run on this machine", id)
	}
	return n.agents.Health(ctx, b.target())
}
