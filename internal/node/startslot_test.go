package node

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{startSlots: newStartSlots(2)}
		first, second := &instance{}, &instance{}
		for _, b := range []*instance{first, second} {
			if err := n.awaitStartSlot(t.Context(), b, ""); err != nil {
				t.Fatal(err)
			}
		}
		var came []int
		waiting := make([]*instance, 3)
		for i := range waiting {
			waiting[i] = &instance{}
			go func() {
				if err := n.awaitStartSlot(context.Background(), waiting[i], ""); err == nil {
					came = append(came, i)
				}
			}()
			synctest.Wait() // so that they ask in this order
		}
		first.releaseStartSlot()
		first.releaseStartSlot() // a failed step ends it too
		synctest.Wait()
		if len(came) != 1 || came[0] != 0 {
			t.Errorf("after one turn is over, %v start", came)
		}
		waiting[0].releaseStartSlot()
		synctest.Wait()
		if len(came) != 2 || came[1] != 1 {
			t.Errorf("the order is %v", came)
		}
		// A start that is stuck does not delay the others.
		time.Sleep(startSlotMost + time.Second)
		synctest.Wait()
		if len(came) != 3 {
			t.Errorf("beside two that are stuck %v start", came)
		}
	})
}

func TestTurnThatDoesNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{startSlots: newStartSlots(1)}
		n.startSlots.take("") // a slot without a start, which never ends
		began := time.Now()
		err := n.awaitStartSlot(t.Context(), &instance{}, "")
		f := fault.As(err)
		if f == nil || f.Kind != fault.Unavailable || f.Code != fault.CodeNoCapacity || f.RetryAfter <= 0 {
			t.Errorf("late, it is %v", err)
		}
		if took := time.Since(began); took != startSlotPatience {
			t.Errorf("it was told after %s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.awaitStartSlot(ctx, &instance{}, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("its time being over, it is %v", err)
		}
		(&instance{}).releaseStartSlot() // a sandbox that never had a slot
	})
}

// TestTurnsAreFair lets one organization ask for many starts at once: the single start of another
// does not wait for all of them, and starts that give up cost no slot.
func TestTurnsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{startSlots: newStartSlots(1)}
		holder := &instance{}
		if err := n.awaitStartSlot(t.Context(), holder, "busy"); err != nil {
			t.Fatal(err)
		}
		type start struct {
			org      string
			instance *instance
		}
		came := make(chan start, 100)
		ask := func(ctx context.Context, org string) {
			b := &instance{}
			go func() {
				if n.awaitStartSlot(ctx, b, org) == nil {
					came <- start{org, b}
				}
			}()
			synctest.Wait() // so that they ask in this order
		}
		leaving, leave := context.WithCancel(t.Context())
		ask(leaving, "gone")
		for range 20 {
			ask(t.Context(), "busy")
		}
		ask(leaving, "busy")
		ask(t.Context(), "modest")
		ask(t.Context(), "other")
		leave()
		synctest.Wait()
		var order []string
		next := holder
		for range 22 {
			next.releaseStartSlot()
			synctest.Wait()
			s := <-came
			order, next = append(order, s.org), s.instance
		}
		// The busy organization has had a slot.
		if got := order[:4]; !slices.Equal(got, []string{"modest", "other", "busy", "busy"}) {
			t.Errorf("they start as %v", order)
		}
		next.releaseStartSlot()
		if len(n.startSlots.waiting) > 0 || n.startSlots.free != 1 {
			t.Errorf("in the end there are %+v", n.startSlots)
		}
	})
}

// TestSeldomStartsComeFirst lets three organizations ask for starts all the time: one that asks now
// and then is next each time, and the three get equally many slots.
func TestSeldomStartsComeFirst(t *testing.T) {
	startSlots := newStartSlots(1)
	given := map[string][]chan struct{}{}
	ask := func(org string) { given[org] = append(given[org], startSlots.take(org)) }
	had := func(org string) (n int) {
		for _, awaitStartSlot := range given[org] {
			select {
			case <-awaitStartSlot:
				n++
			default:
			}
		}
		return n
	}
	for range 20 {
		ask("a")
		ask("b")
		ask("c")
	}
	for i := range 40 {
		startSlots.over()
		if i%5 != 4 {
			continue
		}
		before := had("seldom")
		ask("seldom")
		startSlots.over()
		if had("seldom") != before+1 {
			t.Fatalf("after %d turns the seldom start is not next: %+v", i, startSlots)
		}
	}
	if a, b, c := had("a"), had("b"), had("c"); max(a, b, c)-min(a, b, c) > 1 || a == 0 {
		t.Errorf("the others had %d, %d and %d turns", a, b, c)
	}
	for i := range 2 * remembered {
		startSlots.take(strconv.Itoa(i))
		startSlots.over()
	}
	for range 60 {
		startSlots.over()
	}
	if startSlots.mu.Lock(); len(startSlots.last) > remembered+1 || len(startSlots.waiting) > 0 {
		t.Errorf("%d organizations are remembered, %d wait", len(startSlots.last), len(startSlots.waiting))
	}
	startSlots.mu.Unlock()
}
