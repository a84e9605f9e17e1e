package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/daemon"
)

// doctorCommand returns the verb that checks this machine.
func (a *app) doctorCommand() *cobra.Command {
	var doClean bool
	var file string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check this machine for what cay needs, and for leftovers of dead servers",
		Long: `Check whether this machine has what cay server needs, whether a server answers, and
whether dead servers left something behind, and print what to do about it. Given a server's
settings, by --config or CAY_… variables, it also checks PostgreSQL and the bucket of files.url. In the
bucket it writes small objects and removes them again.
--clean skips these checks and removes what dead servers left: their sandboxes' processes,
networks, control groups and files. The rest of a data directory stays; cay server --purge
removes it. The exit status is 1 if something is wrong.`,
		Example: "  cay doctor\n  sudo cay doctor --clean",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if doClean {
				return a.cleanDead(cmd.Context())
			}
			cfg, err := config.Read(file, os.Environ())
			if err == nil {
				err = cfg.Check()
			}
			if err != nil {
				return err
			}
			all := append(daemon.CheckHost(cfg.DataDir), daemon.CheckRecords(cmd.Context(), cfg.Store))
			all = append(all, daemon.CheckFiles(cmd.Context(), cfg.Files)...)
			return a.showFindings(append(all, a.deadFinding(), a.serverFinding(cmd.Context())))
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "TOML file with the settings of the server")
	cmd.Flags().BoolVar(&doClean, "clean", false, "remove what dead servers left on this machine")
	return cmd
}

// showFindings prints the findings. It fails if one of them is wrong.
func (a *app) showFindings(all []daemon.Finding) error {
	wrong := 0
	for _, f := range all {
		if !f.OK {
			wrong++
		}
	}
	err := a.show(struct {
		Findings []daemon.Finding `json:"findings"`
	}{all}, func() error {
		for _, f := range all {
			mark := "ok   "
			if !f.OK {
				mark = "WRONG"
			}
			fmt.Fprintf(a.out, "%s  %s: %s\n", mark, f.Check, printable(oneLine(f.Detail)))
			if f.Fix != "" && !f.OK {
				fmt.Fprintf(a.out, "       -> %s\n", f.Fix)
			}
		}
		return nil
	})
	if err == nil && wrong > 0 {
		return exitError{exitFailed}
	}
	return err
}

// serverFinding asks the server that the other verbs use.
func (a *app) serverFinding(ctx context.Context) daemon.Finding {
	f := daemon.Finding{Check: "server", Fix: "start one with cay server, or name yours with --api-url and --api-key"}
	c, err := a.client(ctx)
	if err != nil { // no server is configured
		f.OK, f.Detail, f.Fix = true, "none is configured here", ""
		return f
	}
	me, err := c.Me(ctx)
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK, f.Fix = true, ""
	f.Detail = fmt.Sprintf("answers, with the key %s of the organization %s", me.APIKey.Name, me.Org.Name)
	return f
}

// deadFinding looks for leftovers of servers that do not run.
func (a *app) deadFinding() daemon.Finding {
	f := daemon.Finding{Check: "leftovers", OK: true, Detail: "no dead server left anything"}
	dead, err := daemon.Dead(a.runDir)
	switch {
	case err != nil:
		f.OK, f.Detail = false, "looking for dead servers: "+err.Error()
	case len(dead) > 0:
		f.OK, f.Detail = false, fmt.Sprintf("of servers that do not run: %v", slices.Sorted(maps.Keys(dead)))
		f.Fix = "start those servers again, or remove what they left with cay doctor --clean"
	}
	return f
}

// cleanDead removes the leftovers of dead servers. After an error it goes on with the next server.
func (a *app) cleanDead(ctx context.Context) error {
	dead, err := daemon.Dead(a.runDir)
	if err != nil {
		return fmt.Errorf("looking for dead servers: %w", err)
	}
	if len(dead) == 0 {
		fmt.Fprintln(a.err, "no dead server left anything")
	}
	var errs []error
	for _, instance := range slices.Sorted(maps.Keys(dead)) {
		if err := daemon.Clean(ctx, a.runDir, instance, dead[instance]); err != nil {
			errs = append(errs, fmt.Errorf("removing what server %s left: %w", instance, err))
			continue
		}
		fmt.Fprintf(a.err, "removed what server %s left\n", instance)
	}
	return errors.Join(errs...)
}
