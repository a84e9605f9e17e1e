package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// poolCommand returns the verb that shows the warm pool.
func (a *app) poolCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pool",
		Short:   "Show the sandboxes that are booted in advance",
		Long:    "Show the sandboxes that are booted in advance, by template and size. Needs a key of the server's first organization with the scope admin.",
		Example: "  cay sandbox pool",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.Pool(cmd.Context())
			if err != nil {
				return err
			}
			if all == nil {
				all = []cay.PoolEntry{}
			}
			return a.show(map[string]any{"pool": all}, func() error {
				var rows [][]string
				for _, p := range all {
					rows = append(rows, []string{p.Template, fmt.Sprint(p.TemplateVersion), p.Size, fmt.Sprint(p.Ready),
						fmt.Sprint(p.Target), fmt.Sprint(p.Claimed)})
				}
				return a.table([]string{"TEMPLATE", "VERSION", "SIZE", "READY", "TARGET", "CLAIMED"}, rows)
			})
		},
	}
}
