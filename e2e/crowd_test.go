package e2e

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// TestCrowd lets more clients create, execute and destroy in a loop than the machine has room for.
// Each is served or told to retry, other clients are answered meanwhile, and nothing is left.
func TestCrowd(t *testing.T) {
	onOneStore(t)
	s := newServer(t, "CAY_POOL_ENABLED=true", "CAY_CAPACITY_MAX_SANDBOXES=6")
	s.start()
	s.needTemplate("python")
	c, err := cay.New(s.url, s.key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var served, refused, looked atomic.Int64
	enough := func() bool { return served.Load() >= 10 && refused.Load() > 0 && looked.Load() >= 10 }
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for ctx.Err() == nil {
				switch visit(t, c) {
				case http.StatusCreated:
					served.Add(1)
				case http.StatusServiceUnavailable:
					refused.Add(1)
					time.Sleep(50 * time.Millisecond) // a client's pause
				default:
					return // visit has reported the error
				}
			}
		})
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := c.ListSandboxes(ctx, cay.ListSandboxesOptions{}); err != nil && ctx.Err() == nil {
				t.Errorf("list: %v", err)
			}
			looked.Add(1)
			time.Sleep(100 * time.Millisecond) // a client's pause
		}
	})
	for began := time.Now(); ctx.Err() == nil && (time.Since(began) < 15*time.Second || !enough()); {
		time.Sleep(100 * time.Millisecond) // between two looks
	}
	cancel()
	wg.Wait()
	t.Logf("%d were served, %d refused; the list was read %d times", served.Load(), refused.Load(), looked.Load())
	if !enough() {
		t.Error("some must be served, some refused, and the list must be read")
	}
	s.stop(syscall.SIGTERM)
	s.env = append(s.env, "CAY_POOL_ENABLED=false")
	s.start()
	s.agree(time.Now())
	if n := len(s.sandboxes("running")); n > 0 {
		t.Errorf("%d sandboxes still run", n)
	}
}

// visit creates a sandbox, uses it and destroys it. It returns the status of the create, or 0 after
// an error, which it reports.
func visit(t *testing.T, c *cay.Client) int {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	sandbox, err := c.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: "python", Timeout: new("2m")},
		cay.CreateOptions{})
	var refused *cay.Error
	switch {
	case errors.As(err, &refused) && refused.Status == http.StatusServiceUnavailable && refused.Code == "no_capacity" &&
		refused.RetryAfter > 0:
		return refused.Status
	case err != nil:
		t.Errorf("create: %v", err)
		return 0
	}
	if res, err := c.Execute(ctx, sandbox.ID, cay.ExecuteRequest{Args: []string{"true"}}); err != nil ||
		res.ExitCode != 0 {
		t.Errorf("execute: %+v, %v", res, err)
	}
	if err := c.DestroySandbox(ctx, sandbox.ID); err != nil {
		t.Errorf("destroy: %v", err)
	}
	return http.StatusCreated
}
