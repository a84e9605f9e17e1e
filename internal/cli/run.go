package cli

import (
	"context"
	"fmt"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

const (
	// runLifetime ends the sandbox of a run when cay is killed and cannot destroy it. A shorter one could end the sandbox
	// while the network fails for a moment; with a longer one the sandbox of a killed cay takes memory for longer.
	runLifetime = 5 * time.Minute
	// runExtend is the time between two extensions of the lifetime while the command runs. It leaves room for several
	// tries within runLifetime; with less, a run makes more calls.
	runExtend = time.Minute
	// destroyTimeout limits the destroying at the end of a run, which Ctrl-C does not stop. A destroy takes well under a
	// second. With less, a busy server keeps the sandbox until its lifetime ends; with more, cay hangs without a server.
	destroyTimeout = 30 * time.Second
	// buildPoll is the time between two questions about a template's build, whose progress changes every few seconds. With
	// more, a run begins later than it could.
	buildPoll = time.Second
)

// runCommand returns the verb that runs a command in a new sandbox.
func (a *app) runCommand() *cobra.Command {
	var sandbox createFlags
	var flags commandFlags
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG...]",
		Short: "Run a command in a new sandbox and destroy it",
		Long: `Create a sandbox, run a command in it, destroy it.

The command gets cay's standard input if that is a pipe or a file; its output goes
to cay's own streams, and its exit status is cay's. Status 124 means that the command
was killed at its timeout, 128+N that signal N killed it, 125 that cay itself failed. If the template is
still being built, cay waits for it. The sandbox is always destroyed, even after
Ctrl-C.`,
		Example: `  cay run -t python -- python3 -c 'print(6*7)'
  cay run -t python -- python3 - < script.py
  cay run -s performance-2x --timeout 1m -e N=7 -- sh -c 'echo $N'`,
		Annotations: map[string]string{runsCommands: "yes"},
		RunE: func(cmd *cobra.Command, args []string) error {
			env, err := pairs("--env", flags.env, a.getenv)
			if err != nil {
				return err
			}
			r, err := a.executeRequest(flags, env, args)
			if err != nil {
				return err
			}
			create, err := a.createRequest(sandbox, cmd.Flags())
			if err != nil {
				return err
			}
			create.Timeout = new(runLifetime.String())
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			var stdin []byte
			if !flags.noStdin {
				if stdin, err = a.readStdin(cmd.Context()); err != nil {
					return err
				}
			}
			return a.runOnce(cmd.Context(), c, create, r, stdin, flags.timeout)
		},
	}
	cmd.Flags().SetInterspersed(false)
	sandbox.addCommon(cmd.Flags())
	flags.add(cmd.Flags())
	a.completeFlag(cmd, "template")
	return cmd
}

// runOnce creates a sandbox, runs the command in it and destroys it.
func (a *app) runOnce(ctx context.Context, c *cay.Client, create cay.CreateSandboxRequest,
	r cay.ExecuteRequest, stdin []byte, timeout time.Duration) error {
	// The sandbox must be destroyed also if cay's output is no longer read.
	signal.Ignore(syscall.SIGPIPE)
	s, err := a.createWhenReady(ctx, c, create)
	if err != nil {
		return err
	}
	destroyed := make(chan error, 1)
	destroy := func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
		defer cancel()
		destroyed <- c.DestroySandbox(ctx, s.ID)
	}
	var result *cay.ExecuteResult
	if err = ctx.Err(); err == nil {
		stop := keepalive(ctx, c, s.ID)
		result, err = a.execute(ctx, c, s.ID, r, stdin)
		stop()
	}
	go destroy()
	if err == nil {
		err = a.deliver(result, timeout) // while the sandbox is destroyed
	}
	if gone := <-destroyed; gone != nil {
		// It is printed and not returned, since cay exits with the command's status.
		fmt.Fprintf(a.err, "cay: sandbox %s could not be destroyed and ends by itself within %s: %s\n", s.ID, runLifetime,
			oneLine(gone.Error()))
	}
	return err
}

// keepalive extends the sandbox's lifetime until stop is called.
func keepalive(ctx context.Context, c *cay.Client, id string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	tick := time.NewTicker(runExtend)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				// There are more tries before the lifetime ends. If all fail, the command fails too.
				_, _ = c.Keepalive(ctx, id, 0)
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// createWhenReady creates a sandbox. It waits for the first build of its template.
func (a *app) createWhenReady(ctx context.Context, c *cay.Client,
	r cay.CreateSandboxRequest) (*cay.Sandbox, error) {
	p := a.progress()
	defer p.done()
	for {
		s, err := createSandbox(ctx, c, r)
		if !cay.HasCode(err, "template_not_ready") {
			return s, err
		}
		if err := waitForTemplate(ctx, c, r.Template, p, err); err != nil {
			return nil, err
		}
	}
}

// createSandbox creates a sandbox. It waits for the answer even after the end of ctx, since without it cay does not
// know which sandbox to destroy.
func createSandbox(ctx context.Context, c *cay.Client, r cay.CreateSandboxRequest) (*cay.Sandbox, error) {
	calling, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	type result struct {
		s   *cay.Sandbox
		err error
	}
	done := make(chan result, 1)
	go func() {
		s, err := c.CreateSandbox(calling, r, cay.CreateOptions{})
		done <- result{s, err}
	}()
	select {
	case r := <-done:
		return r.s, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.s, r.err
	case <-time.After(destroyTimeout):
		return nil, fmt.Errorf(
			"creating a sandbox: the server did not answer for %s; a sandbox may be left until its timeout", destroyTimeout)
	}
}

// waitForTemplate waits until the template has a version that can be used. It returns refused, the error of the
// create, if the template is not being built.
func waitForTemplate(ctx context.Context, c *cay.Client, name string, p *progress, refused error) error {
	for {
		t, err := c.GetTemplate(ctx, name)
		if err != nil {
			return fmt.Errorf("waiting for template %s: %w", name, err)
		}
		switch {
		case t.Version > 0:
			p.say("template %s is ready", t.Name)
			return nil
		case t.Status == "failed":
			return fmt.Errorf("building template %s failed: %s; see cay templates logs %s", t.Name,
				first(buildErrorText(t.BuildError), "no reason is known"), t.Name)
		case t.Status != "pending" && t.Status != "building":
			return refused
		}
		p.say("waiting for template %s: %s", t.Name, first(deref(t.Progress), string(t.Status)))
		select {
		case <-time.After(buildPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
