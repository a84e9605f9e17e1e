package sandbox

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// SetEgress replaces the policy of a sandbox. For a running sandbox the new policy is in force when
// SetEgress returns, for established connections too; a suspended one gets it when it wakes.
// SetEgress counts as no activity and wakes no sandbox. It waits for any operation on the sandbox
// and continues when ctx ends. A destroyed sandbox is Conflict, code "sandbox_not_running". After
// an error the old policy is in force; the error is the machine's own, or Internal, code
// "egress_failed".
func (s *Service) SetEgress(ctx context.Context, orgID string, id ID, e Egress) (Sandbox, error) {
	sbx, err := operate(ctx, s, orgID, id, opEgress, nil, func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
		return s.setEgress(ctx, sbx, e)
	})
	return s.live.shown(sbx), err
}

// setEgress writes the policy to the row, as the wanted one, and then to the kernel; the caller
// holds the operation. If the server dies between the two writes, the next server applies the
// policy of the row.
func (s *Service) setEgress(ctx context.Context, before Sandbox, e Egress) (Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	sbx, err := s.store.SetEgress(ctx, before.ID, e, changed(e))
	if err != nil {
		return Sandbox{}, err
	}
	if sbx.State == Running {
		if err := s.node.SetEgress(ctx, sbx.ID, e); err != nil {
			return Sandbox{}, s.egressFailed(ctx, before, err)
		}
	}
	s.log.InfoContext(ctx, "egress policy of a sandbox changed", "sandbox", sbx.ID, "egress", e.summary())
	return sbx, nil
}

// changed returns the event of a change of policy. It is written with the row, which the machine
// follows in the end. A policy that is restored after an error gets such an event too.
func changed(e Egress) Event {
	return Event{At: time.Now().UTC(), Reason: ReasonEgressChanged, Detail: e.summary()}
}

// egressFailed writes the policy that is still in force back to the row. If that fails too, row and
// machine differ until Reconcile makes them agree.
func (s *Service) egressFailed(ctx context.Context, before Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s was destroyed while its policy was changed", before.ID)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	s.log.ErrorContext(ctx, "changing the policy of a sandbox", "sandbox", before.ID, "error", cause)
	if _, err := s.store.SetEgress(ctx, before.ID, before.Egress, changed(before.Egress)); err != nil {
		s.log.ErrorContext(ctx, "writing back the policy of a sandbox", "sandbox", before.ID, "error", err)
	}
	if fault.As(cause) != nil {
		return cause
	}
	return fault.New(fault.Internal, fault.CodeEgressFailed,
		"the policy of sandbox %s was not changed", before.ID).Because(cause)
}

// summary returns the policy in one line. It gives only the lengths of lists, since they may be
// long.
func (e Egress) summary() string {
	parts := []string{string(e.Mode)}
	for _, list := range []struct {
		name   string
		length int
	}{{"allow_cidrs", len(e.AllowCIDRs)}, {"deny_cidrs", len(e.DenyCIDRs)}, {"allow_ports", len(e.AllowPorts)},
		{"allow_domains", len(e.AllowDomains)}} {
		if list.length > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", list.length, list.name))
		}
	}
	return strings.Join(parts, ", ")
}

// Traffic counts the traffic that left a sandbox since its instance started: allowed by its policy,
// or denied. It does not count answers to that traffic.
type Traffic struct {
	PacketsAllowed, BytesAllowed uint64
	PacketsDenied, BytesDenied   uint64
}

// Traffic returns the traffic that left the sandbox during its present run, or nil when it does not
// run.
func (s *Service) Traffic(ctx context.Context, sbx Sandbox) (*Traffic, error) {
	if sbx.State.Status() != StatusRunning {
		return nil, nil
	}
	if err := s.held(sbx); err != nil {
		return nil, err
	}
	t, err := s.node.Traffic(ctx, sbx.ID)
	if fault.Is(err, fault.Conflict) {
		return nil, nil // the sandbox has just ended
	}
	if err != nil {
		return nil, fmt.Errorf("counting the traffic of %s: %w", sbx.ID, err)
	}
	return &t, nil
}
