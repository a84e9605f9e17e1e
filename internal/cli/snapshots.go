package cli

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// snapshotsCommand returns the verbs for snapshots.
func (a *app) snapshotsCommand() *cobra.Command {
	cmd := group("snapshots", "Manage sandboxes that were kept as they were",
		"  cay sandbox snapshot sbx_… --name after-setup\n  cay snapshots list\n  cay sandbox create --snapshot after-setup")
	cmd.Aliases = []string{"snapshot"}
	cmd.AddCommand(a.snapshotsListCommand(), a.snapshotsShowCommand(), a.snapshotsDeleteCommand())
	return cmd
}

// snapshotCommand returns the verb that takes a snapshot of a sandbox.
func (a *app) snapshotCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "snapshot ID",
		Short: "Save a sandbox as it is, to create others from it",
		Long: `Save a sandbox as it is now, with its processes, memory and files, and print the
snapshot's id. The sandbox keeps running. The snapshot stays until you delete it.`,
		Example:           "  cay sandbox snapshot sbx_… --name after-setup\n  cay sandbox create --snapshot after-setup",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s, err := c.CreateSnapshot(cmd.Context(), args[0], name)
			if err != nil {
				return err
			}
			return a.show(s, func() error {
				_, err := fmt.Fprintln(a.out, s.ID)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the snapshot (default none)")
	return cmd
}

// snapshotsListCommand returns the verb that lists snapshots.
func (a *app) snapshotsListCommand() *cobra.Command {
	var o cay.ListSnapshotsOptions
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List snapshots, newest first",
		Example: "  cay snapshots list\n  cay snapshots list --sandbox sbx_…",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			o.Limit = pageSize(limit)
			all, err := collect(c.Snapshots(cmd.Context(), o), limit)
			if err != nil {
				return err
			}
			return a.show(cay.SnapshotList{Snapshots: all}, func() error {
				var rows [][]string
				for _, s := range all {
					rows = append(rows, []string{s.ID, first(deref(s.Name), "-"), s.SandboxID, s.Template, s.Size,
						bytesText(s.SizeBytes), age(s.CreatedAt)})
				}
				return a.table([]string{"ID", "NAME", "SANDBOX", "TEMPLATE", "SIZE", "ON DISK", "CREATED"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&o.SandboxID, "sandbox", "", "only snapshots of this sandbox")
	cmd.Flags().StringVar(&o.Name, "name", "", "only the snapshot of this name")
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// snapshotsShowCommand returns the verb that shows a snapshot.
func (a *app) snapshotsShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Show a snapshot",
		Long:    "Show a snapshot, by name or id.",
		Example: "  cay snapshots show after-setup",
		Args:    theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s, err := c.GetSnapshot(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(s, func() error {
				return a.details("id", s.ID, "name", deref(s.Name), "sandbox", s.SandboxID,
					"template", fmt.Sprintf("%s version %d", s.Template, s.TemplateVersion),
					"size", fmt.Sprintf("%s: %d vCPU, %d MiB", s.Size, s.VCPUs, s.MemoryMB),
					"disk", fmt.Sprintf("%d MiB", s.DiskMB), "env", labelsText(s.Env),
					"egress", egressText(s.Egress), "on disk", bytesText(s.SizeBytes), "created", moment(&s.CreatedAt))
			})
		},
	}
}

// snapshotsDeleteCommand returns the verb that deletes snapshots.
func (a *app) snapshotsDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "delete NAME...",
		Short:   "Delete snapshots",
		Long:    "Delete snapshots, by name or id. Sandboxes created from them continue.",
		Example: "  cay snapshots delete after-setup",
		Args:    theArgs("NAME..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				if err := c.DeleteSnapshot(cmd.Context(), name); err != nil {
					if len(args) > 1 {
						err = fmt.Errorf("deleting %s: %w", name, err)
					}
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		},
	}
}

// forkCommand returns the verb that forks a sandbox.
func (a *app) forkCommand() *cobra.Command {
	var count int
	var timeout time.Duration
	var env, metadata []string
	cmd := &cobra.Command{
		Use:   "fork ID",
		Short: "Make children of a running sandbox and print their ids",
		Long: `Make children of a running sandbox. A child is a new sandbox that continues from the
present state of the first, with its processes, memory and files. The first sandbox keeps
running. Settings that you do not give are those of the first sandbox. The exit status is
1 if not all children could be made.`,
		Example:           "  cay sandbox fork sbx_…\n  cay sandbox fork sbx_… -n 10 --timeout 10m -e ROLE=child",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := cay.ForkRequest{Count: &count}
			var err error
			if r.Env, err = pairs("--env", env, a.getenv); err != nil {
				return err
			}
			if r.Metadata, err = pairs("--metadata", metadata, nil); err != nil {
				return err
			}
			if cmd.Flags().Changed("timeout") {
				r.Timeout = new(timeout.String())
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			children, err := c.Fork(cmd.Context(), args[0], r)
			if err != nil {
				return err
			}
			var failed error
			for _, child := range children {
				if child.Error != nil {
					failed = fmt.Errorf("%s (%s)", child.Error.Detail, child.Error.Code)
					fmt.Fprintf(a.err, "cay: a child was not made: %s\n", oneLine(failed.Error()))
				}
			}
			if err := a.show(map[string]any{"children": children}, func() error {
				for _, child := range children {
					if child.Sandbox != nil {
						fmt.Fprintln(a.out, child.Sandbox.ID)
					}
				}
				return nil
			}); err != nil {
				return err
			}
			if failed != nil {
				return exitError{exitFailed}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.IntVarP(&count, "count", "n", 1, "number of children, 1 to 100")
	f.DurationVar(&timeout, "timeout", 0,
		"destroy them after this time, 1s to 24h; ephemeral ones only (default the sandbox's)")
	f.StringArrayVarP(&env, "env", "e", nil,
		"environment variable NAME=VALUE, beside the sandbox's; NAME alone passes your own value (repeatable)")
	f.StringArrayVar(&metadata, "metadata", nil, "label NAME=VALUE, instead of the sandbox's (repeatable)")
	return cmd
}
