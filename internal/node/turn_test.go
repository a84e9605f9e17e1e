package node

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{turns: make(chan struct{}, 2)}
		first, second := &box{}, &box{}
		for _, b := range []*box{first, second} {
			if err := n.turn(t.Context(), b); err != nil {
				t.Fatal(err)
			}
		}
		var came []int
		waiting := make([]*box, 3)
		for i := range waiting {
			waiting[i] = &box{}
			go func() {
				if err := n.turn(context.Background(), waiting[i]); err == nil {
					came = append(came, i)
				}
			}()
			synctest.Wait() // so that they ask in this order
		}
		first.turnOver()
		first.turnOver() // a failed step ends it too
		synctest.Wait()
		if len(came) != 1 || came[0] != 0 {
			t.Errorf("after one turn is over, %v start", came)
		}
		waiting[0].turnOver()
		synctest.Wait()
		if len(came) != 2 || came[1] != 1 {
			t.Errorf("the order is %v", came)
		}
		// Who is stuck does not keep the others.
		time.Sleep(turnMost + time.Second)
		synctest.Wait()
		if len(came) != 3 {
			t.Errorf("beside two that are stuck %v start", came)
		}
	})
}

func TestTurnThatDoesNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{turns: make(chan struct{}, 1)}
		n.turns <- struct{}{} // nobody's, and for ever
		began := time.Now()
		err := n.turn(t.Context(), &box{})
		if f := fault.As(err); f == nil || f.Kind != fault.Unavailable || f.Code != codeNoCapacity || f.RetryAfter <= 0 {
			t.Errorf("late, it is %v", err)
		}
		if took := time.Since(began); took != turnPatience {
			t.Errorf("it was told after %s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.turn(ctx, &box{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("its time being over, it is %v", err)
		}
		(&box{}).turnOver() // one that never had a turn
	})
}
