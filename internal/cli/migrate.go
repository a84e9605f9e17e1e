package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/daemon"
)

// migrateCommand returns the verb that moves the records of a server to PostgreSQL.
func (a *app) migrateCommand() *cobra.Command {
	var file, from, to string
	cmd := &cobra.Command{
		Use:   "migrate --from sqlite:DIR --to postgres://USER@HOST/DATABASE",
		Short: "Copy a stopped server's records from SQLite to PostgreSQL",
		Long: `Copy the records of a stopped server from SQLite to PostgreSQL.

The command copies all rows in one transaction and compares their number and
digests before it commits. After an error PostgreSQL has what it had before.
Afterwards start the server with store.url set to the same database. Until
then the command can be repeated. It leaves DIR/cay.db as it is.

The settings of the connection, such as store.password_file, come from the
file and the environment of the server; --to overrides store.url.`,
		Example: "  cay server migrate --from sqlite:/var/lib/cay --to 'postgres://cay@db.example.com/cay?sslmode=verify-full'",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Read(file, os.Environ())
			if err != nil {
				return err
			}
			if to != "" {
				cfg.Store.URL = config.Secret(to)
			}
			if err := cfg.Check(); err != nil {
				return err
			}
			dir, isSQLite := strings.CutPrefix(from, "sqlite:")
			if !isSQLite || dir == "" || cfg.Store.URL == "" {
				return errors.New("--from must be sqlite:DIR, and --to or store.url must name PostgreSQL")
			}
			if dir, err = filepath.Abs(dir); err != nil {
				return fmt.Errorf("finding %q: %w", dir, err)
			}
			copied, err := daemon.MoveRecords(cmd.Context(), dir, cfg.Store)
			if err != nil {
				return err
			}
			for _, c := range copied {
				fmt.Fprintf(a.err, "%8d rows of %s\n", c.Rows, c.Table)
			}
			fmt.Fprintln(a.err, "all rows are in PostgreSQL; start the server with store.url set to it")
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "TOML file with the settings of the server")
	f.StringVar(&from, "from", "", "sqlite: and the data directory of the server")
	f.StringVar(&to, "to", "", "address of the database in PostgreSQL")
	return cmd
}
