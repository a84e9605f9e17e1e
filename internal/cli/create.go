package cli

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	cay "github.com/cayhq/cay/sdk/go"
)

// createFlags holds the flags that describe a new sandbox.
type createFlags struct {
	template         string
	snapshot         string
	persistent       bool
	timeout          time.Duration
	idleTimeout      time.Duration
	recoveryInterval time.Duration
	size             string
	env              []string
	metadata         []string
	diskSizeMB       int
	require          []string
	egress           egressFlags
}

// addCommon adds the flags that create and run share.
func (c *createFlags) addCommon(f *pflag.FlagSet) {
	f.StringVarP(&c.template, "template", "t", "base", "name or id of the template")
	f.StringVarP(&c.size, "size", "s", "", "size, such as shared-cpu-1x (default the template's)")
	f.StringArrayVar(&c.metadata, "metadata", nil, "label NAME=VALUE (repeatable)")
	f.IntVar(&c.diskSizeMB, "disk-size-mb", 0, "space that the sandbox may write to, in MiB (default the template's)")
	f.StringArrayVar(&c.require, "require", nil, "label NAME=VALUE that the machine must have (repeatable)")
	c.egress.add(f, " (default the template's)")
}

// addLife adds the flags that only create has.
func (c *createFlags) addLife(f *pflag.FlagSet) {
	f.StringVar(&c.snapshot, "snapshot", "",
		"name or id of a snapshot to start from, instead of a template; size and disk are its own")
	f.BoolVar(&c.persistent, "persistent", false, "suspend it when idle instead of destroying it at its timeout")
	f.DurationVar(&c.timeout, "timeout", 0, "destroy it after this time, 1s to 24h; not with --persistent (default 5m)")
	f.DurationVar(&c.idleTimeout, "idle-timeout", 0,
		"suspend it after this time without use, 10s to 24h, 0 for never; with --persistent (default 10m)")
	f.DurationVar(&c.recoveryInterval, "recovery-interval", 0,
		"interval between recovery points, 1m to 24h, 0 for never; with --persistent (default 10m)")
	f.StringArrayVarP(&c.env, "env", "e", nil,
		"environment variable NAME=VALUE; NAME alone passes your own value (repeatable)")
}

// createRequest returns the call that the flags ask for. It leaves all checks to the server that the server can make,
// so that the rules exist once.
func (a *app) createRequest(c createFlags, f *pflag.FlagSet) (cay.CreateSandboxRequest, error) {
	r := cay.CreateSandboxRequest{Template: c.template, Size: given(c.size)}
	if c.snapshot != "" {
		r.Snapshot = c.snapshot
		if !f.Changed("template") { // which has a default
			r.Template = ""
		}
	}
	var err error
	if r.Env, err = pairs("--env", c.env, a.getenv); err != nil {
		return r, err
	}
	if r.Metadata, err = pairs("--metadata", c.metadata, nil); err != nil {
		return r, err
	}
	if c.require != nil {
		labels, err := pairs("--require", c.require, nil)
		if err != nil {
			return r, err
		}
		r.Placement = &cay.Placement{Require: labels}
	}
	if c.persistent {
		r.Mode = new("persistent")
	}
	if f.Changed("timeout") {
		r.Timeout = new(c.timeout.String())
	}
	if f.Changed("idle-timeout") {
		r.IdleTimeout = new(c.idleTimeout.String())
	}
	if f.Changed("recovery-interval") {
		r.RecoveryInterval = new(c.recoveryInterval.String())
	}
	if f.Changed("disk-size-mb") {
		r.DiskSizeMB = &c.diskSizeMB
	}
	r.Egress = c.egress.policy()
	return r, nil
}

// createCommand returns the verb that creates a sandbox.
func (a *app) createCommand() *cobra.Command {
	var flags createFlags
	var noWait bool
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Create a sandbox and print its id",
		Long: `Create a sandbox and print its id when it runs.

The sandbox is ephemeral unless you give --persistent: after its --timeout it is
destroyed with everything in it. A persistent sandbox is suspended after its
--idle-timeout without use. The next use wakes it, and it continues where it was. It
stays until you destroy it.`,
		Example: `  cay sandbox create -t python --timeout 1h
  cay sandbox create -t python --persistent --idle-timeout 30m
  cay sandbox create --snapshot after-setup --timeout 1h
  cay sandbox create -s shared-cpu-2x -e TOKEN=abc --metadata team=red --require zone=a
  cay sandbox create --egress-allow-cidr 203.0.113.0/24 --egress-allow-port 443
  cay sandbox create --egress-allow-domain pypi.org --egress-allow-domain '*.pythonhosted.org'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := a.createRequest(flags, cmd.Flags())
			if err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s, err := c.CreateSandbox(cmd.Context(), r, cay.CreateOptions{NoWait: noWait})
			if err != nil {
				return err
			}
			return a.show(s, func() error {
				if isTerminal(a.err) {
					fmt.Fprintf(a.err, "%s from %s version %d, %s\n", s.Size, s.Template, s.TemplateVersion, ends(s))
				}
				_, err := fmt.Fprintln(a.out, s.ID)
				return err
			})
		},
	}
	flags.addCommon(cmd.Flags())
	flags.addLife(cmd.Flags())
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return at once, while the sandbox is being created")
	a.completeFlag(cmd, "template")
	return cmd
}

// completeFlag lets the shell complete a flag that names a template.
func (a *app) completeFlag(cmd *cobra.Command, flag string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, a.completeTemplates); err != nil {
		panic(err) // the verb has no such flag, which every test finds
	}
}

// ends returns a text about the end of a sandbox.
func ends(s *cay.Sandbox) string {
	switch {
	case s.ExpiresAt != nil:
		return "ends " + until(s.ExpiresAt)
	case s.IdleTimeoutSeconds != nil && *s.IdleTimeoutSeconds > 0:
		return "suspended when idle for " + seconds(s.IdleTimeoutSeconds)
	default:
		return "runs until it is destroyed"
	}
}

// noArgs refuses arguments of a verb that has none.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%q: %s takes no arguments, only flags; see %s --help", args[0], cmd.CommandPath(),
			cmd.CommandPath())
	}
	return nil
}

// theArgs returns a check for as many arguments as there are names. Those with names in brackets may be left out, and a
// last one with "..." may be repeated.
func theArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		for i, name := range names {
			if i >= len(args) && name[0] != '[' {
				return fmt.Errorf("%s: missing; see %s --help", name, cmd.CommandPath())
			}
		}
		last := names[len(names)-1]
		if len(args) > len(names) && last[len(last)-1] != '.' {
			return fmt.Errorf("%q: one argument too many; see %s --help", args[len(names)], cmd.CommandPath())
		}
		for i, arg := range args {
			if arg == "" {
				return errors.New(names[min(i, len(names)-1)] + ": must not be empty")
			}
		}
		return nil
	}
}
