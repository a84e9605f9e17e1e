package cli

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/daemon"
)

// serverCommand returns the verb that runs a server.
func (a *app) serverCommand() *cobra.Command {
	var file string
	var purge, acceptRestore bool
	flags := config.Default()
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the sandbox service on this machine",
		Long: `Run the sandbox service on this machine.

The server needs root. It keeps everything in one data directory, except records
in PostgreSQL (store.url), writes the first API key to DIR/api-key, and runs
until SIGTERM or SIGINT. Sandboxes outlive it: the next server on the same
directory adopts them.

Settings come from the file, then the environment (CAY_LISTEN,
CAY_NETWORK_RANGE, …), then flags.`,
		Example: "  cay server --data-dir /var/lib/cay --listen 127.0.0.1:7070\n  cay server --data-dir /var/lib/cay --purge",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Read(file, os.Environ())
			if err != nil {
				return err
			}
			for _, name := range config.SecretVariables { // no program that the server starts gets them
				if err := os.Unsetenv(name); err != nil {
					return fmt.Errorf("removing %s from the environment: %w", name, err)
				}
			}
			for name, set := range map[string]func(){
				"data-dir":       func() { cfg.DataDir = flags.DataDir },
				"listen":         func() { cfg.Listen = flags.Listen },
				"metrics-listen": func() { cfg.MetricsListen = flags.MetricsListen },
				"log-level":      func() { cfg.LogLevel = flags.LogLevel },
				"log-format":     func() { cfg.LogFormat = flags.LogFormat },
			} {
				if cmd.Flags().Changed(name) {
					set()
				}
			}
			if err := cfg.Check(); err != nil {
				return err
			}
			if !purge {
				return daemon.Run(cmd.Context(), cfg, a.version, acceptRestore)
			}
			left, err := daemon.Purge(cmd.Context(), cfg.DataDir)
			if left {
				fmt.Fprintf(a.err, "%s is left in place: it holds files that are not cay's\n", cfg.DataDir)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "TOML file with settings")
	f.StringVar(&flags.DataDir, "data-dir", flags.DataDir, "directory for everything the server keeps")
	f.StringVar(&flags.Listen, "listen", flags.Listen, "host:port of the API")
	f.StringVar(&flags.MetricsListen, "metrics-listen", "", "host:port that serves /metrics without a key")
	f.StringVar(&flags.LogLevel, "log-level", flags.LogLevel, "debug, info, warn or error")
	f.StringVar(&flags.LogFormat, "log-format", flags.LogFormat, "text or json")
	cmd.AddCommand(a.migrateCommand())
	f.BoolVar(&acceptRestore, "accept-restore", false,
		"accept records in PostgreSQL that were restored from an older backup; sandboxes without a row there are removed")
	f.BoolVar(&purge, "purge", false, "remove the server's sandboxes and data from this machine, and exit")
	return cmd
}
