package cli

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// keysCommand returns the verbs for API keys.
func (a *app) keysCommand() *cobra.Command {
	cmd := group("keys", "Manage the organization's API keys",
		"  cay keys create ci --scope sandboxes:write --scope exec\n  cay keys list")
	cmd.Aliases = []string{"key"}
	cmd.AddCommand(a.keysCreateCommand(), a.keysListCommand(), a.keysRevokeCommand())
	return cmd
}

// formatE2B names the format of keys for E2B's clients.
const formatE2B = "e2b"

// keysCreateCommand returns the verb that creates a key.
func (a *app) keysCreateCommand() *cobra.Command {
	var scopes []string
	var expiresIn time.Duration
	var format string
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create an API key and print its secret",
		Long: `Create an API key and print its secret. It is not stored and cannot be shown again.

With --format e2b the secret begins with e2b_, as E2B's clients want it, and has
the scopes that they need unless others are given.`,
		Example: "  cay keys create ci --scope sandboxes:write --scope exec --scope files\n  CAY_API_KEY=$(cay keys create short --scope admin --expires-in 1h)\n  E2B_API_KEY=$(cay keys create sdk --format e2b)",
		Args:    theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(scopes) == 0 && format != formatE2B { // the server knows the scopes that E2B's clients need
				return errors.New("--scope: at least one is needed, of sandboxes:read, sandboxes:write, exec, files, " +
					"templates:read, templates:write, admin")
			}
			r := cay.CreateAPIKeyRequest{Name: args[0], Scopes: scopes}
			if cmd.Flags().Changed("expires-in") {
				r.ExpiresIn = new(expiresIn.String())
			}
			if cmd.Flags().Changed("format") {
				r.Format = &format
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			k, err := c.CreateAPIKey(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.show(k, func() error { return a.showSecret(k.APIKey, "key "+k.ID) })
		},
	}
	cmd.Flags().StringSliceVar(&scopes, "scope", nil, "scope of the key: sandboxes:read, sandboxes:write, exec, "+
		"files, templates:read, templates:write or admin (repeatable)")
	cmd.Flags().StringVar(&format, "format", "cay", "prefix of the secret: cay, or e2b for E2B's clients")
	cmd.Flags().DurationVar(&expiresIn, "expires-in", 0, "time for which it is valid, at least 1s (default no limit)")
	return cmd
}

// showSecret prints a secret alone on standard output, for scripts, and tells a user at a terminal that it is not shown
// again.
func (a *app) showSecret(secret, what string) error {
	if isTerminal(a.err) {
		fmt.Fprintf(a.err, "%s; its secret is shown this once:\n", what)
	}
	_, err := fmt.Fprintln(a.out, secret)
	return err
}

// keysListCommand returns the verb that lists keys.
func (a *app) keysListCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List API keys, newest first",
		Example: "  cay keys list",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := collect(c.APIKeys(cmd.Context(), cay.ListOptions{Limit: pageSize(limit)}), limit)
			if err != nil {
				return err
			}
			return a.show(cay.APIKeyList{APIKeys: all}, func() error {
				var rows [][]string
				for _, k := range all {
					var scopes []string
					for _, s := range k.Scopes {
						scopes = append(scopes, string(s))
					}
					rows = append(rows, []string{k.ID, k.Name, k.Prefix + "…", strings.Join(scopes, ","), keyState(k),
						age(k.CreatedAt), age(deref(k.LastUsedAt))})
				}
				return a.table([]string{"ID", "NAME", "SECRET", "SCOPES", "STATE", "CREATED", "LAST USED"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// keyState returns a text about the validity of a key.
func keyState(k cay.APIKey) string {
	switch {
	case k.RevokedAt != nil:
		return "revoked " + age(*k.RevokedAt)
	case k.ExpiresAt == nil:
		return "valid"
	case time.Until(*k.ExpiresAt) <= 0:
		return "expired " + age(*k.ExpiresAt)
	default:
		return "expires " + until(k.ExpiresAt)
	}
}

// keysRevokeCommand returns the verb that revokes a key.
func (a *app) keysRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "revoke ID",
		Short:   "Revoke an API key",
		Long:    "Revoke an API key for good, from the next call on. It is safe to repeat.",
		Example: "  cay keys revoke key_…",
		Args:    theArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if err := c.RevokeAPIKey(cmd.Context(), args[0]); err != nil {
				return err
			}
			if !a.json {
				fmt.Fprintln(a.out, args[0])
			}
			return nil
		},
	}
}
