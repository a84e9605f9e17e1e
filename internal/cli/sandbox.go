package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// sandboxCommand returns the verbs for sandboxes.
func (a *app) sandboxCommand() *cobra.Command {
	cmd := group("sandbox", "Create and use sandboxes",
		"  id=$(cay sandbox create -t python)\n  cay sandbox exec $id -- python3 -V\n  cay sandbox destroy $id")
	cmd.Aliases = []string{"sandboxes", "sbx"}
	cmd.AddCommand(a.createCommand(), a.sandboxListCommand(), a.statusCommand(), a.execCommand(), a.shellCommand(),
		a.psCommand(), a.logsCommand(), a.waitCommand(), a.killCommand(),
		a.uploadCommand(), a.downloadCommand(), a.lsCommand(), a.copyCommand(), a.watchCommand(),
		a.keepaliveCommand(), a.suspendCommand(), a.wakeCommand(), a.checkpointCommand(), a.snapshotCommand(),
		a.forkCommand(), a.egressCommand(), a.destroyCommand(), a.eventsCommand(), a.poolCommand(),
		a.portForwardCommand(), a.portURLCommand())
	return cmd
}

// group returns a command that only holds others.
func group(name, short, example string) *cobra.Command {
	return &cobra.Command{
		Use: name, Short: short, Example: example,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%q: %s has no such command; see %s --help", args[0], cmd.CommandPath(), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
}

// sandboxListCommand returns the verb that lists sandboxes.
func (a *app) sandboxListCommand() *cobra.Command {
	var status, metadata []string
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List sandboxes, newest first",
		Example: "  cay sandbox list\n  cay sandbox list --status running --metadata team=red\n  cay sandbox list --status suspended --status destroyed --json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			labels, err := pairs("--metadata", metadata, nil)
			if err != nil {
				return err
			}
			o := cay.ListSandboxesOptions{Metadata: labels, ListOptions: cay.ListOptions{Limit: pageSize(limit)}}
			for _, s := range status {
				o.Status = append(o.Status, cay.SandboxStatus(s))
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := collect(c.Sandboxes(cmd.Context(), o), limit)
			if err != nil {
				return err
			}
			return a.show(cay.SandboxList{Sandboxes: all}, func() error {
				var rows [][]string
				for _, s := range all {
					rows = append(rows, []string{s.ID, s.Template, string(s.Status), s.Size, age(s.CreatedAt), until(expiry(&s)),
						labelsText(s.Metadata)})
				}
				return a.table([]string{"ID", "TEMPLATE", "STATUS", "SIZE", "CREATED", "EXPIRES", "METADATA"}, rows)
			})
		},
	}
	cmd.Flags().StringArrayVar(&status, "status", nil,
		"creating, running, suspended or destroyed (repeatable; default all but destroyed)")
	cmd.Flags().StringArrayVar(&metadata, "metadata", nil, "only those with the label NAME=VALUE (repeatable)")
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// expiry returns the time at which a sandbox will be destroyed, nil if it is destroyed already.
func expiry(s *cay.Sandbox) *time.Time {
	if s.Status == cay.SandboxStatusDestroyed {
		return nil
	}
	return s.ExpiresAt
}

// labelsText returns pairs as NAME=VALUE in the order of names.
func labelsText(m map[string]string) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		all = append(all, name+"="+m[name])
	}
	return strings.Join(all, ",")
}

// statusCommand returns the verb that shows a sandbox.
func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "status ID",
		Short:             "Show a sandbox",
		Long:              "Show a sandbox. This neither wakes it nor counts as use.",
		Example:           "  cay sandbox status sbx_…\n  cay sandbox status sbx_… --json",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s, err := c.GetSandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(s, func() error { return a.showSandbox(s) })
		},
	}
}

// showSandbox prints a sandbox for people.
func (a *app) showSandbox(s *cay.Sandbox) error {
	state := string(s.Status)
	if string(s.State) != state {
		state += " (" + string(s.State) + ")"
	}
	created := s.CreatedAt
	return a.details("id", s.ID, "status", state, "error", deref(s.Error),
		"unavailable", deref(s.Unavailable), "reason", deref(s.DestroyReason),
		"template", fmt.Sprintf("%s version %d", s.Template, s.TemplateVersion),
		"made from", deref(s.Origin), "mode", string(s.Mode),
		"size", fmt.Sprintf("%s: %d vCPU, %d MiB memory, %d MiB disk", s.Size, s.VCPUs, s.MemoryMB, s.DiskMB),
		"egress", egressText(s.Egress), "network", networkText(s.Network),
		"env", labelsText(s.Env), "metadata", labelsText(s.Metadata),
		"created", moment(&created), "started", moment(s.StartedAt), "expires", moment(expiry(s)),
		"timeout", seconds(s.TimeoutSeconds), "idle timeout", seconds(s.IdleTimeoutSeconds),
		"recovery every", seconds(s.RecoveryIntervalSeconds), "last used", moment(s.LastActivityAt),
		"suspended", moment(s.SuspendedAt), "destroyed", moment(s.DestroyedAt))
}

// suspendCommand returns the verb that suspends a sandbox.
func (a *app) suspendCommand() *cobra.Command {
	var files bool
	suspend := func(c *cay.Client, ctx context.Context, id string) (*cay.Sandbox, error) {
		if files {
			return c.SuspendFiles(ctx, id)
		}
		return c.Suspend(ctx, id)
	}
	cmd := oneSandbox(a, "suspend", suspend, (*app).showStatus)
	cmd.Short = "Suspend a persistent sandbox"
	cmd.Long = `Write a persistent sandbox to disk, its memory and processes included, so that it
takes nothing else of the machine. Using it wakes it. Connections to the outside are
cut. It waits 5s for other calls that use the sandbox, and is refused after that.
With --files only its files are kept: its processes end, and using it boots it.`
	cmd.Flags().BoolVar(&files, "files", false, "keep the files without processes and memory")
	return cmd
}

// wakeCommand returns the verb that wakes a sandbox.
func (a *app) wakeCommand() *cobra.Command {
	cmd := oneSandbox(a, "wake", (*cay.Client).Wake, (*app).showStatus)
	cmd.Short = "Wake a suspended sandbox"
	cmd.Long = `Wake a suspended sandbox where it was; one that runs stays as it is.
exec, upload, download and ls do it by themselves.`
	return cmd
}

// showStatus prints the id and the status of a sandbox.
func (a *app) showStatus(s *cay.Sandbox, _ string) error {
	_, err := fmt.Fprintln(a.out, s.ID, s.Status)
	return err
}

// checkpointCommand returns the verb that takes a recovery point.
func (a *app) checkpointCommand() *cobra.Command {
	show := func(a *app, p *cay.RecoveryPoint, id string) error {
		at := p.CreatedAt.Local().Format("2006-01-02 15:04:05")
		_, err := fmt.Fprintln(a.out, id, "has a recovery point of", at+",", bytesText(p.SizeBytes))
		return err
	}
	cmd := oneSandbox(a, "checkpoint", (*cay.Client).Checkpoint, show)
	cmd.Short = "Take a recovery point of a persistent sandbox"
	cmd.Long = `Take a recovery point of a running persistent sandbox: what it falls back to when
the machine or the sandbox's kernel dies. It runs on after a pause that grows with
its memory. See --recovery-interval of cay sandbox create.`
	return cmd
}

// oneSandbox returns a verb that makes one call for one sandbox and shows the answer.
func oneSandbox[T any](a *app, verb string, do func(*cay.Client, context.Context, string) (*T, error),
	show func(*app, *T, string) error) *cobra.Command {
	return &cobra.Command{
		Use:               verb + " ID",
		Example:           "  cay sandbox " + verb + " sbx_…\n  cay sandbox " + verb + " sbx_… --json",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			v, err := do(c, cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(v, func() error { return show(a, v, args[0]) })
		},
	}
}

// keepaliveCommand returns the verb that extends the lifetime of a sandbox.
func (a *app) keepaliveCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:               "keepalive ID",
		Short:             "Give an ephemeral sandbox a new lifetime, beginning now",
		Example:           "  cay sandbox keepalive sbx_…\n  cay sandbox keepalive sbx_… --timeout 1h",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("timeout") && timeout <= 0 {
				return fmt.Errorf("--timeout: must be at least 1s, not %s", timeout)
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s, err := c.Keepalive(cmd.Context(), args[0], timeout)
			if err != nil {
				return err
			}
			return a.show(s, func() error {
				_, err := fmt.Fprintln(a.out, s.ID, ends(s))
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "the new lifetime, 1s to 24h (default the sandbox's own)")
	return cmd
}

// destroyCommand returns the verb that destroys sandboxes.
func (a *app) destroyCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "destroy ID...",
		Aliases:           []string{"rm"},
		Short:             "Destroy sandboxes",
		Long:              "Destroy sandboxes with everything in them. It is safe to repeat.",
		Example:           "  cay sandbox destroy sbx_…\n  cay sandbox list --json | jq -r '.sandboxes[].id' | xargs cay sandbox destroy",
		Args:              theArgs("ID..."),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			// After an error the others are destroyed nevertheless.
			var failed error
			for _, id := range args {
				if err := c.DestroySandbox(cmd.Context(), id); err != nil {
					if failed != nil {
						fmt.Fprintf(a.err, "cay: %s\n", oneLine(explain(failed, cmd)))
					}
					failed = fmt.Errorf("destroying %s: %w", id, err)
					continue
				}
				if !a.json {
					fmt.Fprintln(a.out, id)
				}
			}
			return failed
		},
	}
}

// why returns the reason of an event with its detail.
func why(e cay.Event) string {
	if e.Detail == nil {
		return e.Reason
	}
	return strings.TrimPrefix(e.Reason+": "+*e.Detail, ": ")
}

// eventsCommand returns the verb that lists the events of a sandbox.
func (a *app) eventsCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:               "events ID",
		Short:             "List what happened to a sandbox, newest first",
		Example:           "  cay sandbox events sbx_…",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := collect(c.Events(cmd.Context(), args[0], cay.ListOptions{Limit: pageSize(limit)}), limit)
			if err != nil {
				return err
			}
			return a.show(cay.EventList{Events: all}, func() error {
				var rows [][]string
				for _, e := range all {
					rows = append(rows, []string{e.Time.Local().Format("2006-01-02 15:04:05.000"), age(e.Time),
						first(string(deref(e.From)), "-"), string(e.To), why(e)})
				}
				return a.table([]string{"TIME", "AGE", "FROM", "TO", "REASON"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}
