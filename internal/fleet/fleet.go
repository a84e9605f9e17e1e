// Package fleet has the nodes of a cluster, which are the machines that have its sandboxes: who they are, whether they
// take sandboxes, and how a machine is emptied.
//
// It decides what operators may ask of a node, and what a node's row means at a time. The rows are a [Store]'s, and the
// sandboxes those of package sandbox, which gets the [Orders] of its own node. The core does no I/O. A [Service] is
// safe for concurrent use: orders are carried out in the order in which their rows were written. After an error nothing
// has changed.
package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// ID names a node: the server instance, six characters of a-z and 0-9.
type ID = string

// Node is a machine of the cluster.
type Node struct {
	ID   ID
	Name string // unique; "" for a node whose server has not said it yet
	About
	Labels    map[string]string
	StartedAt time.Time // of its newest server
	// CordonedAt is the time since which the node takes no sandboxes, zero if it takes them.
	CordonedAt time.Time
	// DrainBy is the time until which the node is drained, or was; zero if it is not drained.
	DrainBy time.Time

	// JoinedAt is the time at which the machine got its present key; zero for a server that never joined.
	JoinedAt time.Time
	// LostAt is the time since which the node is lost, zero if it is not.
	LostAt time.Time
	// Session is the node's newest, with the times of its lease; all are zero without one.
	Session            string
	SeenAt, LeaseUntil time.Time
	Load               Load // at SeenAt; zero in a session that has not said it

	Sandboxes int // that are not over
	Active    int // of these, not suspended

	Status Status // set by [Service]
}

// About holds what a node's server says about itself and its machine.
type About struct {
	Version      string `json:"version"`
	VCPUs        int    `json:"vcpus"`
	MemoryMB     int    `json:"memory_mb"`     // 0 if unknown
	MaxSandboxes int    `json:"max_sandboxes"` // the operator's limit
	// Address is the host:port at which other servers reach this one, if it forwards calls; "" if it does not.
	Address string `json:"address,omitempty"`
}

// Load holds what a node says about its machine now and then. No number is negative.
type Load struct {
	MemoryFreeMB int // MiB that sandboxes may take, beyond what the operator lets the machine keep
	Sandboxes    int // on the machine, with those that are being made and without pooled ones
	Starting     int // being made, pooled ones too
}

// Status says what can be expected of a node. It follows from its row and the time.
type Status string

// The statuses.
const (
	Ready    Status = "ready"
	Cordoned Status = "cordoned" // takes no sandboxes; the last drain, if there was one, ended with some left
	Draining Status = "draining" // suspends persistent sandboxes, and waits for the others
	Drained  Status = "drained"  // has no sandbox that is not suspended
	// Unreachable is the status of a machine that has joined and has no session whose lease holds.
	Unreachable Status = "unreachable"
	// Lost is the status of a machine that was not heard of for so long that its sandboxes were given up, or cannot be
	// used until it is back.
	Lost Status = "lost"
)

// statusAt returns the status of the node at a time.
func (n Node) statusAt(now time.Time) Status {
	switch {
	case !n.LostAt.IsZero():
		return Lost
	case !n.JoinedAt.IsZero() && !now.Before(n.LeaseUntil):
		return Unreachable
	case n.CordonedAt.IsZero():
		return Ready
	case n.DrainBy.IsZero():
		return Cordoned
	case n.Active == 0:
		return Drained
	case now.Before(n.DrainBy):
		return Draining
	}
	return Cordoned
}

// ordersAt returns the orders to the node at a time.
func (n Node) ordersAt(now time.Time) Orders {
	o := Orders{Cordoned: !n.CordonedAt.IsZero()}
	if o.Cordoned && !n.DrainBy.IsZero() {
		o.Drain = max(0, n.DrainBy.Sub(now))
	}
	return o
}

// Orders tell a node what its operator wants of it.
type Orders struct {
	Cordoned bool
	Drain    time.Duration // for how long to suspend persistent sandboxes; 0 means that none are
}

// Store keeps nodes, and how machines join. Each method is one transaction; all times are of the records' clock. The
// contract suite of package store tests every implementation.
type Store interface {
	NodeStore
	JoinStore
}

// NodeStore keeps the nodes. It finds and lists none that was removed.
type NodeStore interface {
	// RegisterNode writes the name, the labels and what is known about a node that has a row, and returns the row. It
	// returns a Conflict, code "node_exists", if another node has the name.
	RegisterNode(ctx context.Context, n Node) (Node, error)
	// GetNode returns a node by its id or, if no node has that id, by its name. It returns NotFound, code
	// "node_not_found", if there is none.
	GetNode(ctx context.Context, idOrName string) (Node, error)
	// ListNodes returns all nodes by name.
	ListNodes(ctx context.Context) ([]Node, error)
	// SetCordon cordons a node, found as by GetNode, or ends its cordon and its drain. A node that is cordoned stays
	// cordoned since the same time. With drain > 0 the node is drained until that much later than now; with 0 the end of
	// a drain stays as it is.
	SetCordon(ctx context.Context, idOrName string, on bool, drain time.Duration) (Node, error)
	// LoseNode declares a node lost, so that its server can write nothing any more until it has started again, and reports
	// whether it did: not if the node is lost already, or if the session is not its newest or has a lease that holds. It
	// returns NotFound for a node that does not exist.
	LoseNode(ctx context.Context, id ID, session string) (lost bool, err error)
}

// NotFound returns the error for a node that does not exist.
func NotFound(idOrName string) error {
	return fault.New(fault.NotFound, fault.CodeNodeNotFound, "there is no node %.100q", idOrName)
}

// Config holds the settings of a Service.
type Config struct {
	Self ID // the node of this process
	// Now returns the time of the records' clock.
	Now func() time.Time
	// Obey carries out orders to the node of this process. It must not block.
	Obey func(Orders)
	// Lose ends the sandboxes of a lost node that end with it; see [Service.Watch].
	Lose func(ctx context.Context, node ID) error
	// CA signs the certificates of machines that join; nil lets none join.
	CA  CA
	Log *slog.Logger
}

// Service implements the operations on nodes.
type Service struct {
	cfg   Config
	store Store

	mu sync.Mutex // held while orders are written and carried out, so that the last ones written hold
	// obeyed has the orders that were carried out, as a row has them; the zero value is none.
	// +checklocks:mu
	obeyed struct {
		cordoned bool
		drainBy  time.Time
	}
}

// New returns a Service. Call [Service.Register] before others.
func New(cfg Config, store Store) *Service { return &Service{cfg: cfg, store: store} }

// Register writes what this process's node is called and has, and carries out the orders that were given to it before,
// also to a server that has died.
func (s *Service) Register(ctx context.Context, name string, labels map[string]string, about About) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.store.RegisterNode(ctx, Node{ID: s.cfg.Self, Name: name, Labels: labels, About: about})
	if err != nil {
		return fmt.Errorf("registering the node %s: %w", s.cfg.Self, err)
	}
	if !n.CordonedAt.IsZero() {
		s.cfg.Log.InfoContext(ctx, "this node is cordoned and takes no sandboxes", "name", n.Name, "since", n.CordonedAt)
		s.obey(n)
	}
	return nil
}

// Follow carries out the orders to this process's node that other servers have written.
func (s *Service) Follow(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.store.GetNode(ctx, s.cfg.Self)
	if err != nil {
		return err
	}
	if s.obeyed.cordoned != !n.CordonedAt.IsZero() || !s.obeyed.drainBy.Equal(n.DrainBy) {
		s.cfg.Log.InfoContext(ctx, "another server has changed the orders to this node", "since", n.CordonedAt,
			"drain_by", n.DrainBy)
		s.obey(n)
	}
	return nil
}

// obey carries out the orders of a row of this process's node.
// +checklocks:s.mu
func (s *Service) obey(n Node) {
	s.obeyed.cordoned, s.obeyed.drainBy = !n.CordonedAt.IsZero(), n.DrainBy
	s.cfg.Obey(n.ordersAt(s.cfg.Now()))
}

// Get returns a node by its name or id. It returns NotFound, code "node_not_found", if there is none.
func (s *Service) Get(ctx context.Context, idOrName string) (Node, error) {
	n, err := s.store.GetNode(ctx, idOrName)
	return s.shown(n), err
}

// List returns all nodes by name.
func (s *Service) List(ctx context.Context) ([]Node, error) {
	all, err := s.store.ListNodes(ctx)
	for i := range all {
		all[i] = s.shown(all[i])
	}
	return all, err
}

func (s *Service) shown(n Node) Node {
	n.Status = n.statusAt(s.cfg.Now())
	return n
}

// Cordon makes a node take no more sandboxes. A drain goes on. It is safe to repeat.
func (s *Service) Cordon(ctx context.Context, idOrName string) (Node, error) {
	return s.setCordon(ctx, idOrName, true, 0)
}

// Uncordon makes a node take sandboxes again, and ends its drain. It is safe to repeat.
func (s *Service) Uncordon(ctx context.Context, idOrName string) (Node, error) {
	return s.setCordon(ctx, idOrName, false, 0)
}

// The bounds of a drain.
const (
	MinDrain = time.Second
	// MaxDrain is longer than an ephemeral sandbox lives.
	MaxDrain = 7 * 24 * time.Hour
)

// Drain cordons a node, and lets it suspend its persistent sandboxes and wait for the others, for a time from now. It
// returns at once; the node's status tells the end. A second call gives the drain another end.
func (s *Service) Drain(ctx context.Context, idOrName string, wait time.Duration) (Node, error) {
	if wait < MinDrain || wait > MaxDrain {
		return Node{}, fault.InvalidField("timeout", "must be between %s and %s, not %s", MinDrain, MaxDrain, wait)
	}
	return s.setCordon(ctx, idOrName, true, wait)
}

// setCordon writes an order and carries it out, also if the caller leaves in between.
func (s *Service) setCordon(ctx context.Context, idOrName string, on bool, drain time.Duration) (Node, error) {
	ctx = context.WithoutCancel(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.store.SetCordon(ctx, idOrName, on, drain)
	if err != nil {
		return Node{}, err
	}
	n = s.shown(n)
	s.cfg.Log.InfoContext(ctx, "node "+string(n.Status), "node", n.ID, "name", n.Name, "drain_by", n.DrainBy)
	if n.ID == s.cfg.Self {
		s.obey(n)
	}
	return n, nil
}

// The forms of names and labels. They are those of host names and their labels, so that a host name is a name.
var (
	nameForm  = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	labelForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9./-]{0,61}[a-z0-9])?$`)
	valueForm = regexp.MustCompile(`^[A-Za-z0-9]?([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
)

// MaxLabels limits the labels of a node.
const MaxLabels = 32

// CheckName returns an error if a node cannot have a name.
func CheckName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("must be 1 to 63 of a-z, 0-9, '.' and '-', with a letter or digit at each end, not %.100q", name)
	}
	return nil
}

// NameOf returns the name of a node on a host with a host name: the host name in the form of names, and "node" if
// nothing of it has that form.
func NameOf(host string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(host))
	name = strings.Trim(name[:min(len(name), 63)], "-.")
	if name == "" {
		return "node"
	}
	return name
}

// ParseLabels returns the labels that a list of texts such as "zone=a" names.
func ParseLabels(list []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, text := range list {
		key, value, ok := strings.Cut(text, "=")
		switch _, taken := labels[key]; {
		case !ok:
			return nil, fmt.Errorf("must be KEY=VALUE, not %.100q", text)
		case taken:
			return nil, fmt.Errorf("names %q twice", key)
		}
		labels[key] = value
	}
	if err := checkLabels(labels); err != nil {
		return nil, err
	}
	return labels, nil
}

// checkLabels returns an error if a node cannot have labels.
func checkLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return fmt.Errorf("has %d labels, more than %d", len(labels), MaxLabels)
	}
	for key, value := range labels {
		switch {
		case !labelForm.MatchString(key):
			return fmt.Errorf("the key %.100q must be 1 to 63 of a-z, 0-9, '.', '/' and '-', "+
				"with a letter or digit at each end", key)
		case !valueForm.MatchString(value):
			return fmt.Errorf("the value of %.100q must be at most 63 letters, digits, '.', '_' and '-', "+
				"with a letter or digit at each end", key)
		}
	}
	return nil
}
