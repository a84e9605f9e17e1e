package fleet

import (
	"context"
	"fmt"
	"regexp"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Refused returns the error for a node whose certificate is valid and who may not speak: it was removed, has another
// key, or its session is another one.
func Refused(why string) error {
	return fault.New(fault.Denied, fault.CodeNodeRefused, "this node may not speak here: %s", why)
}

// Check returns an error if the process that has a node's certificate and names a session may not speak now: the node
// is of another cluster, was removed or has another key since it joined again, or the session is not the node's newest.
// A session whose lease is over stays the newest until another one begins.
func (s *Service) Check(ctx context.Context, who Identity, session string) error {
	newest, err := s.newest(ctx, who, session)
	if err == nil && newest != session {
		err = ErrAnotherSession
	}
	return err
}

// ErrAnotherSession refuses a process whose session is not the node's newest.
var ErrAnotherSession = Refused("another session of it has begun, or its own has ended")

// newest returns the newest session of a node, "" if it has none. It returns an error if no session of the identity may
// speak.
func (s *Service) newest(ctx context.Context, who Identity, session string) (string, error) {
	if err := s.ours(who); err != nil {
		return "", err
	}
	if err := checkSession(session); err != nil {
		return "", err
	}
	return s.store.CheckNode(ctx, who.Node, who.KeySum)
}

// ours returns an error for an identity of another cluster.
func (s *Service) ours(who Identity) error {
	if s.cfg.CA == nil {
		return errNotFleet
	}
	if who.Cluster != s.cfg.CA.Cluster() {
		return Refused("its certificate is of another cluster")
	}
	return nil
}

// Renew returns a new certificate for the key that a node has. The process that asks for it names its session, which
// must be the node's newest, unless the node has none: a copy of the key alone does not keep a certificate alive beside
// the node.
func (s *Service) Renew(ctx context.Context, who Identity, session, request string) (Joined, error) {
	newest, err := s.newest(ctx, who, session)
	switch {
	case err != nil:
		return Joined{}, err
	case newest != "" && newest != session:
		return Joined{}, ErrAnotherSession
	}
	keySum, err := s.cfg.CA.KeySum(request)
	if err != nil {
		return Joined{}, err
	}
	if keySum != who.KeySum {
		return Joined{}, Refused("a certificate is renewed for the same key")
	}
	return s.sign(request, who.Node)
}

// sessionForm limits the names of sessions, which nodes choose at random.
var sessionForm = regexp.MustCompile(`^[A-Za-z0-9]{16,64}$`)

// checkSession returns an error for a name that no session has.
func checkSession(session string) error {
	if !sessionForm.MatchString(session) {
		return fault.InvalidField("session", "must be 16 to 64 letters and digits")
	}
	return nil
}

// Enroll gives the node of this process another key and begins a session of it, which ends the one before. A server
// that signs certificates needs no token.
func (s *Service) Enroll(ctx context.Context, keySum, session string) error {
	if s.cfg.CA == nil {
		return errNotFleet
	}
	if err := s.store.EnrollNode(ctx, s.cfg.Self, keySum); err != nil {
		return fmt.Errorf("enrolling the node %s: %w", s.cfg.Self, err)
	}
	_, err := s.Begin(ctx, Identity{Cluster: s.cfg.CA.Cluster(), Node: s.cfg.Self, KeySum: keySum}, session)
	return err
}

// Begin begins a session of a node, which each server of it does once with a random name. While another session of the
// node holds its lease, as when a disk was cloned, it returns a Conflict, code "node_in_use".
func (s *Service) Begin(ctx context.Context, who Identity, session string) (Lease, error) {
	return s.lease(ctx, who, session, s.store.BeginLease)
}

// Beat extends the lease of a node's session, with what the node says about its machine, and returns the node's orders.
func (s *Service) Beat(ctx context.Context, who Identity, session string, load Load) (Lease, error) {
	load = Load{max(0, load.MemoryFreeMB), max(0, load.Sandboxes), max(0, load.Starting)}
	extend := func(ctx context.Context, id ID, keySum, session string, lease time.Duration) (Node, error) {
		return s.store.ExtendLease(ctx, id, keySum, session, lease, load)
	}
	return s.lease(ctx, who, session, extend)
}

func (s *Service) lease(ctx context.Context, who Identity, session string,
	call func(ctx context.Context, id ID, keySum, session string, lease time.Duration) (Node, error)) (Lease, error) {
	if err := s.ours(who); err != nil {
		return Lease{}, err
	}
	if err := checkSession(session); err != nil {
		return Lease{}, err
	}
	n, err := call(ctx, who.Node, who.KeySum, session, LeaseTime)
	if err != nil {
		return Lease{}, err
	}
	return Lease{For: LeaseTime, Orders: n.ordersAt(s.cfg.Now())}, nil
}

// Leave ends a node's session, so that another one can begin at once.
func (s *Service) Leave(ctx context.Context, who Identity, session string) error {
	if err := s.ours(who); err != nil {
		return err
	}
	if err := checkSession(session); err != nil {
		return err
	}
	return s.store.EndLease(ctx, who.Node, who.KeySum, session)
}

// Remove removes a node. Its certificate is refused from the next call on, and its id is never given again. It returns
// a Conflict, code "node_in_use", for this process's own node and for one that has sandboxes, suspended ones too, or
// snapshots.
func (s *Service) Remove(ctx context.Context, idOrName string) error {
	n, err := s.store.GetNode(ctx, idOrName)
	if err != nil {
		return err
	}
	if n.ID == s.cfg.Self {
		return fault.New(fault.Conflict, fault.CodeNodeInUse, "the node %s is the one that answers this call", n.Name)
	}
	if err := s.store.RemoveNode(ctx, n.ID); err != nil {
		return err
	}
	s.cfg.Log.InfoContext(ctx, "removed a node", "node", n.ID, "name", n.Name)
	return nil
}
