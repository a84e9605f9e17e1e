package budget

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

func open(t *testing.T, b *Budget, org string, n int64) *Account {
	t.Helper()
	a := &Account{}
	if err := a.Open(b, org, n); err != nil {
		t.Fatalf("opening an account of %s with %d: %v", org, n, err)
	}
	t.Cleanup(a.Close)
	return a
}

func TestTaking(t *testing.T) {
	b := New(1000, 400)
	a := open(t, b, "a", 100)
	if err := a.Take(300); err != nil {
		t.Fatal(err)
	}
	if err := a.Take(1); !fault.Is(err, fault.Exhausted) || fault.As(err).Code != fault.CodeBuffersExceeded {
		t.Errorf("over the organization's: %v", err)
	}
	open(t, b, "b", 290)
	last := open(t, b, "c", 150)
	// 840 of 1000 are held: the third organization may hold no more than what is left.
	if err := last.Take(50); !fault.Is(err, fault.Unavailable) || fault.As(err).RetryAfter <= 0 {
		t.Errorf("over the server's: %v", err)
	}
	a.Give(300)
	if err := last.Take(50); err != nil {
		t.Errorf("after others gave back: %v", err)
	}
	if err := (*Account)(nil).Take(1 << 40); err != nil {
		t.Errorf("without an account: %v", err)
	}
	a.Close()
	a.Close()
	if got := b.Used(); got != 290+200 {
		t.Errorf("%d bytes are held, want 490", got)
	}
	if err := a.Take(1 << 40); err != nil || b.Used() != 490 {
		t.Errorf("a closed account took: %v, %d", err, b.Used())
	}
}

// TestSomethingIsLeft checks that an organization that holds nothing gets nearly as much as each
// of many that take all they can.
func TestSomethingIsLeft(t *testing.T) {
	const limit = 1 << 20
	for _, hogs := range []int{1, 2, 10, 50} {
		b := New(limit, limit)
		var accounts []*Account
		for i := range hogs {
			accounts = append(accounts, open(t, b, fmt.Sprint(i), 0))
		}
		for took := true; took; {
			took = false
			for _, a := range accounts {
				took = a.Take(64) == nil || took
			}
		}
		want := limit/int64(hogs+2) - 256
		fresh := open(t, b, "new", 0)
		if err := fresh.Take(want / 2); err != nil {
			t.Errorf("beside %d that hold %d: %v", hogs, b.Used(), err)
		}
	}
}

func TestRefusedOpenLeavesNothing(t *testing.T) {
	b := New(100, 100)
	a := &Account{}
	if err := a.Open(b, "a", 101); err == nil {
		t.Fatal("opened with more than there is")
	}
	b.mu.Lock()
	left := len(b.orgs)
	b.mu.Unlock()
	if left != 0 || b.Used() != 0 {
		t.Errorf("%d organizations, %d bytes are left", left, b.Used())
	}
	if err := a.Open(b, "a", 40); err != nil {
		t.Error(err)
	}
	if err := a.Open(b, "other", 5); err != nil || b.Used() != 45 {
		t.Errorf("opened twice: %v, %d", err, b.Used())
	}
	a.Close()
}

func TestConcurrentUse(t *testing.T) {
	b := New(1<<20, 1<<19)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for range 500 {
				a := &Account{}
				ctx := With(context.Background(), a)
				if a.Open(b, fmt.Sprint(i%4), 100) != nil {
					continue
				}
				n := rand.Int64N(1 << 16)
				if From(ctx).Take(n) == nil && rand.IntN(2) == 0 {
					a.Give(n)
				}
				if b.Used() > b.Limit()+32<<16 {
					t.Error("more is held than there is")
				}
				a.Close()
			}
		})
	}
	wg.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.Used() != 0 || len(b.orgs) != 0 {
		t.Errorf("%d bytes of %d organizations are held in the end", b.Used(), len(b.orgs))
	}
}

func TestBytes(t *testing.T) {
	b := New(1<<20, 1<<20)
	a := open(t, b, "a", 0)
	kept := Bytes{Account: a}
	var want []byte
	for i := range 2000 {
		p := bytes.Repeat([]byte{byte(i)}, rand.IntN(200))
		if i%500 == 1 {
			p = bytes.Repeat([]byte{byte(i)}, ownPiece+i)
		}
		want = append(want, p...)
		if err := kept.Keep(bytes.Clone(p)); err != nil {
			t.Fatal(err)
		}
	}
	if kept.Len() != int64(len(want)) || !bytes.Equal(kept.Bytes(), want) {
		t.Fatalf("%d bytes are kept, want %d", kept.Len(), len(want))
	}
	if used := b.Used(); used < int64(len(want)) || used > int64(len(want))*3/2 {
		t.Errorf("%d bytes cost %d", len(want), used)
	}
	var got []byte
	for p := kept.Next(); p != nil; p = kept.Next() {
		got = append(got, p...)
	}
	if !bytes.Equal(got, want) || b.Used() != 0 {
		t.Errorf("took out %d bytes of %d, and %d are held", len(got), len(want), b.Used())
	}
	if err := kept.Keep([]byte(strings.Repeat("x", 2<<20))); !fault.Is(err, fault.Exhausted) || kept.Len() != 0 {
		t.Errorf("kept more than there is: %v", err)
	}
	// A small output costs almost nothing.
	if err := kept.Keep([]byte("hello")); err != nil || b.Used() > 1<<10 {
		t.Errorf("5 bytes cost %d, %v", b.Used(), err)
	}
}
