package fleet_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/store"
)

// fixture is a Service with a real store, and the orders that it gave.
type fixture struct {
	*fleet.Service
	db *store.DB

	mu     sync.Mutex
	orders []fleet.Orders
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{db: db}
	f.start(t)
	return f
}

// start runs a Service as the start of a server does.
func (f *fixture) start(t *testing.T) {
	t.Helper()
	if _, err := f.db.StartSession(t.Context(), "abcdef", false); err != nil {
		t.Fatal(err)
	}
	f.orders = nil
	f.Service = fleet.New(fleet.Config{Self: "abcdef", Now: f.db.Now, Log: slog.New(slog.DiscardHandler),
		Obey: func(o fleet.Orders) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.orders = append(f.orders, o)
		}}, f.db)
	if err := f.Register(t.Context(), "host", nil, fleet.About{Version: "v1"}); err != nil {
		t.Fatal(err)
	}
}

// last returns the last order.
func (f *fixture) last(t *testing.T) fleet.Orders {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.orders) == 0 {
		t.Fatal("no order was given")
	}
	return f.orders[len(f.orders)-1]
}

// TestOrders gives orders to the process's own node, and restarts: what was ordered holds.
func TestOrders(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	if len(f.orders) != 0 {
		t.Errorf("a node that is not cordoned got the orders %v", f.orders)
	}
	if n, err := f.Get(ctx, "host"); err != nil || n.ID != "abcdef" || n.Status != fleet.Ready || n.Version != "v1" {
		t.Errorf("the node is %+v, %v", n, err)
	}
	n, err := f.Cordon(ctx, "abcdef")
	if err != nil || n.Status != fleet.Cordoned || n.CordonedAt.IsZero() || f.last(t) != (fleet.Orders{Cordoned: true}) {
		t.Errorf("cordoned: %+v, %v, %+v", n, err, f.last(t))
	}
	f.start(t)
	if f.last(t) != (fleet.Orders{Cordoned: true}) {
		t.Errorf("after a restart the order is %+v", f.last(t))
	}
	if n, err = f.Drain(ctx, "host", time.Hour); err != nil || n.Status != fleet.Drained { // it has no sandbox
		t.Errorf("drained: %+v, %v", n, err)
	}
	f.start(t)
	if o := f.last(t); !o.Cordoned || o.Drain <= 0 || o.Drain > time.Hour {
		t.Errorf("after a restart the order is %+v", o)
	}
	if n, err = f.Uncordon(ctx, "host"); err != nil || n.Status != fleet.Ready || f.last(t) != (fleet.Orders{}) {
		t.Errorf("uncordoned: %+v, %v, %+v", n, err, f.last(t))
	}
	f.start(t)
	if len(f.orders) != 0 {
		t.Errorf("after a restart the orders are %v", f.orders)
	}

	left, leave := context.WithCancel(ctx)
	leave()
	if n, err := f.Cordon(left, "host"); err != nil || n.Status != fleet.Cordoned || !f.last(t).Cordoned {
		t.Errorf("cordoned by a caller that has left: %+v, %v", n, err)
	}
	for _, wait := range []time.Duration{0, -1, fleet.MinDrain - 1, fleet.MaxDrain + 1} {
		if _, err := f.Drain(ctx, "host", wait); !fault.Is(err, fault.Invalid) || fault.As(err).Field != "timeout" {
			t.Errorf("drained for %s: %v", wait, err)
		}
	}
	for name, call := range map[string]func() error{
		"get":      func() error { _, err := f.Get(ctx, "none"); return err },
		"cordon":   func() error { _, err := f.Cordon(ctx, "none"); return err },
		"uncordon": func() error { _, err := f.Uncordon(ctx, ""); return err },
		"drain":    func() error { _, err := f.Drain(ctx, "none", time.Hour); return err },
	} {
		if err := call(); !fault.Is(err, fault.NotFound) || fault.As(err).Code != fault.CodeNodeNotFound {
			t.Errorf("%s of no node: %v", name, err)
		}
	}
}

// TestOrdersAgreeWithRows gives orders from many callers at once: the last one that was carried out is the one in the
// row.
func TestOrdersAgreeWithRows(t *testing.T) {
	f := newFixture(t)
	for range 20 {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				var err error
				if i%2 == 0 {
					_, err = f.Cordon(t.Context(), "host")
				} else {
					_, err = f.Uncordon(t.Context(), "host")
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		n, err := f.Get(t.Context(), "host")
		if err != nil || f.last(t).Cordoned != (n.Status == fleet.Cordoned) {
			t.Fatalf("the row is %s and the last order %+v, %v", n.Status, f.last(t), err)
		}
	}
}

// brokenStore fails each write.
type brokenStore struct{ fleet.Store }

var errBroken = errors.New("injected: the database is broken")

func (brokenStore) SetCordon(context.Context, string, bool, time.Duration) (fleet.Node, error) {
	return fleet.Node{}, errBroken
}

// TestFailedOrdersAreNotObeyed checks that a node does not do what its row does not say.
func TestFailedOrdersAreNotObeyed(t *testing.T) {
	cfg := fleet.Config{Self: "abcdef", Now: time.Now, Obey: func(fleet.Orders) { t.Error("obeyed") }}
	s := fleet.New(cfg, brokenStore{})
	if _, err := s.Cordon(t.Context(), "abcdef"); !errors.Is(err, errBroken) {
		t.Errorf("cordoned: %v", err)
	}
}

// TestOrdersToOthers checks that an order to another node is written, and not carried out here.
func TestOrdersToOthers(t *testing.T) {
	f := newFixture(t)
	if _, err := f.db.StartSession(t.Context(), "other1", false); err != nil {
		t.Fatal(err)
	}
	n, err := f.Cordon(t.Context(), "other1")
	if err != nil || n.Status != fleet.Cordoned || len(f.orders) != 0 {
		t.Errorf("cordoned %+v, %v, with the orders %v", n, err, f.orders)
	}
	all, err := f.List(t.Context())
	if err != nil || len(all) != 2 || all[0].ID != "other1" || all[0].Status != fleet.Cordoned ||
		all[1].Status != fleet.Ready {
		t.Errorf("the nodes are %+v, %v", all, err)
	}
}

// TestOrdersByOthers has another server write orders to this process's node.
func TestOrdersByOthers(t *testing.T) {
	f := newFixture(t)
	other := fleet.New(fleet.Config{Self: "other1", Now: f.db.Now, Log: slog.New(slog.DiscardHandler)}, f.db)
	follow := func(want int) {
		t.Helper()
		for range 2 { // the second call finds nothing new
			if err := f.Follow(t.Context()); err != nil || len(f.orders) != want {
				t.Errorf("%d orders, %v, want %d: %v", len(f.orders), err, want, f.orders)
			}
		}
	}
	follow(0)
	if _, err := other.Drain(t.Context(), "host", time.Hour); err != nil {
		t.Fatal(err)
	}
	follow(1)
	if o := f.last(t); !o.Cordoned || o.Drain <= 0 {
		t.Errorf("the order is %+v", o)
	}
	if _, err := other.Uncordon(t.Context(), "host"); err != nil {
		t.Fatal(err)
	}
	follow(2)
	if o := f.last(t); o != (fleet.Orders{}) {
		t.Errorf("the order is %+v", o)
	}
	if _, err := f.Cordon(t.Context(), "host"); err != nil { // its own
		t.Fatal(err)
	}
	follow(3)
}

func TestNames(t *testing.T) {
	for host, want := range map[string]string{"": "node", "web-1": "web-1", "Web_1.Example.COM": "web-1.example.com",
		"-x-": "x", "...": "node", "ü": "node", "a" + strings.Repeat("-", 70) + "b": "a",
		strings.Repeat("a", 70): strings.Repeat("a", 63),
		"host name":             "host-name"} {
		if got := fleet.NameOf(host); got != want || fleet.CheckName(got) != nil {
			t.Errorf("the host %q is named %q, want %q", host, got, want)
		}
	}
	for _, bad := range []string{"", "A", "a_b", "-a", "a-", ".a", "a/b", strings.Repeat("a", 64), "a\n"} {
		if fleet.CheckName(bad) == nil {
			t.Errorf("accepted the name %q", bad)
		}
	}
}

func TestLabels(t *testing.T) {
	got, err := fleet.ParseLabels([]string{"zone=a", "example.com/disk=SSD_1", "empty="})
	want := map[string]string{"zone": "a", "example.com/disk": "SSD_1", "empty": ""}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("read %v, %v", got, err)
	}
	var many []string
	for i := range fleet.MaxLabels + 1 {
		many = append(many, fmt.Sprintf("k%d=v", i))
	}
	for _, bad := range [][]string{{"zone"}, {"=a"}, {"Zone=a"}, {"zone=a", "zone=b"}, {"zone=a b"}, {"zone=-"},
		{"zone=" + strings.Repeat("a", 64)}, {strings.Repeat("k", 64) + "=a"}, many} {
		if labels, err := fleet.ParseLabels(bad); err == nil {
			t.Errorf("read %q as %v", bad, labels)
		}
	}
}

// TestPlacementByLabels places sandboxes that need labels, on nodes of which one is away.
func TestPlacementByLabels(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	labels := map[string]string{"zone": "a", "gpu": ""}
	if err := f.Register(ctx, "host", labels, fleet.About{Version: "v1", Address: "a:1"}); err != nil {
		t.Fatal(err)
	}
	token := fleet.Token{Hash: "hash", Settings: fleet.TokenSettings{Labels: map[string]string{"zone": "b"}}}
	if _, err := f.db.AddToken(ctx, token, time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := f.db.Join(ctx, "hash", fleet.Node{ID: "away00", Name: "away"}, "key"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		needs map[string]string
		nodes int        // that it is offered to
		takes fault.Kind // why this node does not take it
	}{
		{nil, 1, 0}, {map[string]string{"zone": "a"}, 1, 0}, {labels, 1, 0}, {map[string]string{"gpu": ""}, 1, 0},
		{map[string]string{"zone": "b"}, 0, fault.Unavailable}, // the one that has it may come back
		{map[string]string{"zone": "c"}, 0, fault.Invalid},
		{map[string]string{"zone": "b", "gpu": ""}, 0, fault.Invalid},
		{map[string]string{"Zone": "a"}, 0, fault.Invalid},
	} {
		ids, err := f.Place(ctx, fleet.Needs{Labels: c.needs})
		if invalid := fault.Is(err, fault.Invalid); len(ids) != c.nodes || invalid != (c.takes == fault.Invalid) ||
			invalid && fault.As(err).Field != "placement.require" {
			t.Errorf("%v: offered to %v, %v", c.needs, ids, err)
		}
		err = f.Takes(ctx, c.needs)
		if (err == nil) != (c.takes == 0) || err != nil && !fault.Is(err, c.takes) {
			t.Errorf("%v: this node takes it: %v", c.needs, err)
		}
	}
}
