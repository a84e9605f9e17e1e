package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// orgsCommand returns the verbs for organizations.
func (a *app) orgsCommand() *cobra.Command {
	cmd := group("orgs", "Manage the server's organizations", "  cay orgs create acme\n  cay orgs list")
	cmd.Aliases = []string{"org"}
	cmd.AddCommand(a.orgsCreateCommand(), a.orgsListCommand())
	return cmd
}

// orgsCreateCommand returns the verb that creates an organization.
func (a *app) orgsCreateCommand() *cobra.Command {
	var quota struct{ sandboxes, vcpus, memoryMB int }
	cmd := &cobra.Command{
		Use:     "create NAME",
		Short:   "Create an organization and print its first API key",
		Long:    "Create an organization and print the secret of its first API key. It is not stored and cannot be shown again. This command needs a key of the server's first organization.",
		Example: "  cay orgs create acme --quota-sandboxes 50",
		Args:    theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := cay.CreateOrgRequest{Name: args[0]}
			q := cay.QuotaRequest{}
			for _, set := range []struct {
				flag string
				v    *int
				into **int
			}{
				{"quota-sandboxes", &quota.sandboxes, &q.Sandboxes},
				{"quota-vcpus", &quota.vcpus, &q.VCPUs},
				{"quota-memory-mb", &quota.memoryMB, &q.MemoryMB},
			} {
				if cmd.Flags().Changed(set.flag) {
					*set.into = set.v
					r.Quota = &q
				}
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			o, err := c.CreateOrg(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.show(o, func() error { return a.showSecret(o.APIKey, "organization "+o.ID+" with its first key") })
		},
	}
	cmd.Flags().IntVar(&quota.sandboxes, "quota-sandboxes", 0,
		"number of sandboxes it may have at once, 0 for no limit (default the server's)")
	cmd.Flags().IntVar(&quota.vcpus, "quota-vcpus", 0,
		"number of vCPUs its running sandboxes may have, 0 for no limit (default the server's)")
	cmd.Flags().IntVar(&quota.memoryMB, "quota-memory-mb", 0,
		"memory its running sandboxes may have, in MiB, 0 for no limit (default the server's)")
	return cmd
}

// orgsListCommand returns the verb that lists organizations.
func (a *app) orgsListCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List organizations, newest first",
		Example: "  cay orgs list",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := collect(c.Orgs(cmd.Context(), cay.ListOptions{Limit: pageSize(limit)}), limit)
			if err != nil {
				return err
			}
			return a.show(cay.OrgList{Orgs: all}, func() error {
				var rows [][]string
				for _, o := range all {
					rows = append(rows, []string{o.ID, o.Name, limitText(o.Quota.Sandboxes), limitText(o.Quota.VCPUs),
						limitText(o.Quota.MemoryMB), age(o.CreatedAt)})
				}
				return a.table([]string{"ID", "NAME", "SANDBOXES", "VCPUS", "MEMORY MiB", "CREATED"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// limitText returns a limit as text.
func limitText(n int) string {
	if n == 0 {
		return "no limit"
	}
	return fmt.Sprint(n)
}
