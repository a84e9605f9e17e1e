package pki

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// renewals counts what [Keeper.Run] asks for, and signs unless it is told to refuse.
type renewals struct {
	a        *Authority
	refuse   func(now time.Time) bool
	asked    []time.Time
	answered []time.Time
}

func (r *renewals) renew(_ context.Context, request []byte) (chain, authorities string, err error) {
	r.asked = append(r.asked, time.Now())
	if r.refuse != nil && r.refuse(time.Now()) {
		return "", "", errors.New("the replica is away")
	}
	chain, _, err = r.a.Sign(request, Identity{Cluster: cluster, Role: Node, ID: "aaaaaa"}, time.Now())
	r.answered = append(r.answered, time.Now())
	return chain, r.a.Certificate(), err
}

// valid reports whether a new connection with the Keeper's certificate would be accepted now.
func valid(k *Keeper) bool {
	leaf := k.now().cert.Leaf
	return !time.Now().Before(leaf.NotBefore) && !time.Now().After(leaf.NotAfter)
}

// TestKeeperRenews runs a Keeper for days: it renews at half of a certificate's time, also after eleven hours in which
// renewals failed, and at no time is its certificate over.
func TestKeeperRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		r := &renewals{a: authority(t, cluster)}
		k := keeperOf(t, r.a, Node, "aaaaaa")
		// From the second day on, replicas are away for eleven hours from each renewal that is due.
		r.refuse = func(now time.Time) bool {
			return now.Sub(began) > 30*time.Hour && now.Sub(k.now().begin) < Lifetime/2+11*time.Hour
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		failed := 0
		go func() { done <- k.Run(ctx, r.renew, func(error) { failed++ }) }()
		for time.Since(began) < 6*24*time.Hour {
			time.Sleep(time.Minute)
			synctest.Wait()
			if !valid(k) {
				t.Fatalf("after %s the certificate is over", time.Since(began))
			}
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
		if len(r.answered) < 6 || r.answered[0].Sub(began) != Lifetime/2 || r.answered[1].Sub(began) != Lifetime {
			t.Errorf("renewed after %s and %s, %d times", r.answered[0].Sub(began), r.answered[1].Sub(began), len(r.answered))
		}
		if failed == 0 || len(r.asked) != failed+len(r.answered) {
			t.Errorf("asked %d times, %d failed, %d were answered", len(r.asked), failed, len(r.answered))
		}
		for i := 1; i < len(r.asked); i++ {
			if r.asked[i].Sub(r.asked[i-1]) < firstRetry/2 {
				t.Errorf("asked twice within %s", r.asked[i].Sub(r.asked[i-1]))
			}
		}
		if failed > 5*140 { // five times eleven hours, with at most 132 waits of five minutes or more, and six shorter ones
			t.Errorf("asked %d times in vain", failed)
		}
	})
}

// TestKeeperGivesUp checks that Run ends when the certificate has expired, and that answers that do not renew it count
// as failures.
func TestKeeperGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := authority(t, cluster)
		k := keeperOf(t, a, Node, "aaaaaa")
		before, foreign := k.now(), authority(t, cluster)
		failed := 0
		err := k.Run(t.Context(), func(_ context.Context, request []byte) (string, string, error) {
			switch failed % 3 {
			case 0: // a certificate of another authority
				chain, _, err := foreign.Sign(request, before.id, time.Now())
				return chain, a.Certificate(), err
			case 1: // of another key
				return keeperChain(t, a), a.Certificate(), nil
			}
			return "", "", nil
		}, func(error) { failed++ })
		if err == nil || failed < 10 || k.Identity() != before.id {
			t.Errorf("Run returned %v after %d failures, with the identity %+v", err, failed, k.Identity())
		}
		if over := time.Since(before.id.NotAfter); over < 0 || over > lastRetry {
			t.Errorf("Run gave up %s after the end", over)
		}
	})
}

// keeperChain returns the certificate of another key of the same node.
func keeperChain(t *testing.T, a *Authority) string {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	chain, _, err := a.Sign(must(t)(NewRequest(key)), Identity{Cluster: cluster, Role: Node, ID: "aaaaaa"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return chain
}

// TestKeeperReplacesForNewConnections checks that a server's settings, made once, follow the Keeper.
func TestKeeperReplacesForNewConnections(t *testing.T) {
	first, second := authority(t, cluster), authority(t, cluster)
	replica, node := keeperOf(t, first, Replica, "bbbbbb"), keeperOf(t, second, Node, "aaaaaa")
	server := replica.ServerConfig()
	connect := func() error {
		c := node.ClientConfig()
		c.RootCAs.AddCert(first.cert)
		return errors.Join(shake(t, server, c))
	}
	if err := connect(); err == nil {
		t.Error("a replica accepted a node of an authority that it does not trust")
	}
	request := must(t)(replica.Request())
	chain, _, err := first.Sign(request, replica.Identity(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := replica.Replace(chain, first.Certificate()+second.Certificate()); err != nil {
		t.Fatal(err)
	}
	if err := connect(); err != nil {
		t.Errorf("after the authority was added: %v", err)
	}
}
