package sandbox_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestStartCheck(t *testing.T) {
	port := &sandbox.Ready{Port: 80}
	get := func(port int, path string) *sandbox.Ready {
		return &sandbox.Ready{HTTP: &sandbox.ReadyHTTP{Port: port, Path: path}}
	}
	for name, c := range map[string]struct {
		start sandbox.Start
		field string // "" if the command is valid
	}{
		"none":                {sandbox.Start{}, ""},
		"command":             {sandbox.Start{Command: "serve", Ready: port}, ""},
		"arguments":           {sandbox.Start{Args: []string{"serve", ""}, Ready: &sandbox.Ready{Command: "true", Timeout: time.Second}}, ""},
		"http":                {sandbox.Start{Command: "serve", Ready: get(65535, "/a%20b?c=d")}, ""},
		"the longest timeout": {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 1, Timeout: 10 * time.Minute}}, ""},
		"both":                {sandbox.Start{Command: "serve", Args: []string{"serve"}}, "start_command"},
		"empty program":       {sandbox.Start{Args: []string{"", "x"}}, "start_command"},
		"NUL":                 {sandbox.Start{Args: []string{"serve", "\x00"}}, "start_command"},
		"long":                {sandbox.Start{Command: strings.Repeat("x", 64<<10+1)}, "start_command"},
		"nothing to wait for": {sandbox.Start{Ready: port}, "ready"},
		"no check":            {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Timeout: time.Second}}, "ready"},
		"two checks":          {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 80, Command: "true"}}, "ready"},
		"negative port":       {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: -1}}, "ready.port"},
		"large port":          {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 65536}}, "ready.port"},
		"NUL in the check":    {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Command: "\x00"}}, "ready.command"},
		"long check":          {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Command: strings.Repeat("x", 64<<10+1)}}, "ready.command"},
		"no HTTP port":        {sandbox.Start{Command: "serve", Ready: get(0, "/")}, "ready.http.port"},
		"no path":             {sandbox.Start{Command: "serve", Ready: get(80, "")}, "ready.http.path"},
		"an address":          {sandbox.Start{Command: "serve", Ready: get(80, "http://elsewhere/")}, "ready.http.path"},
		"a line break":        {sandbox.Start{Command: "serve", Ready: get(80, "/a\r\nHost: x")}, "ready.http.path"},
		"a fragment":          {sandbox.Start{Command: "serve", Ready: get(80, "/a#b")}, "ready.http.path"},
		"a long path":         {sandbox.Start{Command: "serve", Ready: get(80, "/"+strings.Repeat("a", 2048))}, "ready.http.path"},
		"impatient":           {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 80, Timeout: time.Second - 1}}, "ready.timeout"},
		"too patient":         {sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 80, Timeout: 10*time.Minute + 1}}, "ready.timeout"},
	} {
		err := c.start.Check()
		if f := fault.As(err); c.field == "" && err != nil ||
			c.field != "" && (f == nil || f.Kind != fault.Invalid || f.Field != c.field) {
			t.Errorf("%s: got %v, want a fault in %q", name, err, c.field)
		}
	}
}

// TestCreateWaitsForItsStartCommand checks that a create waits for its start command up to the
// command's timeout and no longer, and that destroy does not wait for it.
func TestCreateWaitsForItsStartCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		var given sandbox.Start
		h.node.OnCreate = func(ctx context.Context, spec sandbox.Spec) error {
			given = spec.Start
			<-ctx.Done()
			return context.Cause(ctx)
		}
		began := time.Now()
		_, err := h.create(sandbox.Request{Template: "service"})
		if took := time.Since(began); fault.KindOf(err) != fault.Internal || took != 11*time.Minute {
			t.Errorf("the create ended after %s: %v", took, err)
		}
		if diff := cmp.Diff(service, given); diff != "" {
			t.Errorf("the node was given (-want +got):\n%s", diff)
		}

		sbx, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "service"}, sandbox.Once{}, false)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
			t.Fatal(err)
		}
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Requested)
	})
}

// TestStartCommandFails checks that the error of a start command becomes the error of its sandbox,
// and that a wake starts no command.
func TestStartCommandFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.node.OnCreate = func(context.Context, sandbox.Spec) error {
			return fault.New(fault.Conflict, "start_failed", "the start command ended with exit code 3")
		}
		_, err := h.create(sandbox.Request{Template: "service"})
		wantCode(t, err, fault.Conflict, "start_failed")
		sandboxes, _, err := h.List(context.Background(), sandbox.Filter{OrgID: org, Limit: 10})
		if err != nil || len(sandboxes) != 1 || sandboxes[0].Error != "the start command ended with exit code 3" {
			t.Fatalf("left behind: %+v, %v", sandboxes, err)
		}
		h.wantState(sandboxes[0].ID, sandbox.Failed, sandbox.BootFailed)

		h.node.OnCreate = nil
		h.node.OnWake = func(_ context.Context, spec sandbox.Spec) error {
			if !spec.Start.None() {
				t.Errorf("a wake was given %+v", spec.Start)
			}
			return nil
		}
		sbx := h.mustCreate(sandbox.Request{Template: "service", Mode: string(sandbox.Persistent)})
		if _, err := h.Suspend(context.Background(), org, sbx.ID, sandbox.KeepAll); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Wake(context.Background(), h.caller(), sbx.ID); err != nil {
			t.Error(err)
		}
	})
}
