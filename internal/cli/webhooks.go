package cli

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// webhooksCommand returns the verbs for webhooks.
func (a *app) webhooksCommand() *cobra.Command {
	cmd := group("webhooks", "Manage URLs that events are posted to",
		"  cay webhooks create https://example.com/hook --type sandbox.failed\n  cay webhooks deliveries whk_…")
	cmd.Aliases = []string{"webhook"}
	cmd.AddCommand(a.webhooksCreateCommand(), a.webhooksListCommand(), a.webhooksShowCommand(), a.webhooksUpdateCommand(),
		a.webhooksDeleteCommand(), a.webhooksTestCommand(), a.webhooksDeliveriesCommand(), a.webhooksReplayCommand())
	return cmd
}

// webhooksCreateCommand returns the verb that creates a webhook.
func (a *app) webhooksCreateCommand() *cobra.Command {
	var r cay.CreateWebhookRequest
	var name string
	var ownSecret bool
	cmd := &cobra.Command{
		Use:   "create URL",
		Short: "Create a webhook and print its secret",
		Long: `Create a webhook: each event of the organization, or those of the given types, are
posted to the URL from now on. The secret verifies them. It cannot be shown again.`,
		Example: "  cay webhooks create https://example.com/hook\n" +
			"  cay webhooks create https://example.com/hook --type sandbox.failed --type template.build_failed",
		Args: theArgs("URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.URL = args[0]
			if name != "" {
				r.Name = &name
			}
			if ownSecret {
				secret, err := a.readSecret("the secret")
				if err != nil {
					return err
				}
				r.Secret = &secret
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			w, err := c.CreateWebhook(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.show(w, func() error {
				if ownSecret {
					_, err := fmt.Fprintln(a.out, w.ID)
					return err
				}
				return a.showSecret(deref(w.Secret), "webhook "+w.ID)
			})
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&r.Types, "type", nil, "only events of this type, such as sandbox.failed (repeatable)")
	f.StringVar(&name, "name", "", "name of the webhook, for people")
	f.BoolVar(&ownSecret, "secret-stdin", false, "read a secret of your own from standard input, whsec_ and base64;\n"+
		"the id is printed")
	return cmd
}

// webhooksListCommand returns the verb that lists webhooks.
func (a *app) webhooksListCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List webhooks, newest first",
		Example: "  cay webhooks list",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := collect(c.Webhooks(cmd.Context(), cay.ListOptions{Limit: pageSize(limit)}), limit)
			if err != nil {
				return err
			}
			return a.show(cay.WebhookList{Webhooks: all}, func() error {
				var rows [][]string
				for _, w := range all {
					rows = append(rows, []string{w.ID, first(deref(w.Name), "-"), w.URL, typesText(w), webhookState(w),
						strconv.Itoa(w.Pending), age(w.CreatedAt)})
				}
				return a.table([]string{"ID", "NAME", "URL", "TYPES", "STATE", "PENDING", "CREATED"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// typesText returns a text about the events that a webhook receives.
func typesText(w cay.Webhook) string { return first(strings.Join(w.Types, ","), "all") }

// webhookState returns a text about whether a webhook is enabled.
func webhookState(w cay.Webhook) string {
	if w.Enabled {
		return "enabled"
	}
	return fmt.Sprintf("disabled %s: %s", age(deref(w.DisabledAt)), deref(w.DisabledReason))
}

// webhooksShowCommand returns the verb that shows a webhook.
func (a *app) webhooksShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show ID",
		Short:   "Show a webhook",
		Example: "  cay webhooks show whk_…",
		Args:    theArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			w, err := c.GetWebhook(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showWebhook(*w)
		},
	}
}

func (a *app) showWebhook(w cay.Webhook) error {
	return a.show(w, func() error {
		return a.details("id", w.ID, "name", deref(w.Name), "url", w.URL, "types", typesText(w), "format", string(w.Format),
			"state", webhookState(w), "pending", strconv.Itoa(w.Pending), "created", moment(&w.CreatedAt),
			"secret", deref(w.Secret))
	})
}

// webhooksUpdateCommand returns the verb that changes a webhook.
func (a *app) webhooksUpdateCommand() *cobra.Command {
	var url, name string
	var types []string
	var allTypes, ownSecret, rotate, enable, disable bool
	cmd := &cobra.Command{
		Use:   "update ID",
		Short: "Change, enable or disable a webhook",
		Long: `Change a webhook. What you do not give stays as it is. With --enable, what is pending
is tried at once; events from the time in which it was disabled need cay webhooks replay.
With --rotate-secret the new secret is shown, this once.`,
		Example: "  cay webhooks update whk_… --url https://example.com/other --type sandbox.failed\n" +
			"  cay webhooks update whk_… --enable",
		Args: theArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var r cay.UpdateWebhookRequest
			set := cmd.Flags().Changed
			if set("url") {
				r.URL = &url
			}
			if set("name") {
				r.Name = &name
			}
			if ownSecret {
				secret, err := a.readSecret("the secret")
				if err != nil {
					return err
				}
				r.Secret = &secret
			}
			if rotate {
				r.RotateSecret = &rotate
			}
			if set("type") || allTypes {
				r.Types = &types
			}
			if enable || disable {
				r.Enabled = &enable
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			w, err := c.UpdateWebhook(cmd.Context(), args[0], r)
			if err != nil {
				return err
			}
			return a.showWebhook(*w)
		},
	}
	f := cmd.Flags()
	f.StringVar(&url, "url", "", "another URL")
	f.StringVar(&name, "name", "", "another name")
	f.StringSliceVar(&types, "type", []string{}, "only events of this type (repeatable)") // a list in JSON, not null
	f.BoolVar(&allTypes, "all-types", false, "events of all types")
	f.BoolVar(&ownSecret, "secret-stdin", false, "another secret, of your own, which is read from standard input")
	f.BoolVar(&rotate, "rotate-secret", false, "another secret, which the server makes")
	f.BoolVar(&enable, "enable", false, "deliver events again")
	f.BoolVar(&disable, "disable", false, "deliver no events")
	cmd.MarkFlagsMutuallyExclusive("enable", "disable")
	cmd.MarkFlagsMutuallyExclusive("type", "all-types")
	cmd.MarkFlagsMutuallyExclusive("secret-stdin", "rotate-secret")
	return cmd
}

// webhooksDeleteCommand returns the verb that deletes webhooks.
func (a *app) webhooksDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "delete ID...",
		Short:   "Delete webhooks with what is pending",
		Example: "  cay webhooks delete whk_…",
		Args:    theArgs("ID..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			var errs []error
			for _, id := range args {
				if err := c.DeleteWebhook(cmd.Context(), id); err != nil {
					if len(args) > 1 {
						err = fmt.Errorf("deleting %s: %w", id, err)
					}
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		},
	}
}

// webhooksTestCommand returns the verb that tests a webhook.
func (a *app) webhooksTestCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "test ID",
		Short: "Send a test request to a webhook",
		Long: `Send a request of the type webhook.test to a webhook and print what came of it. The exit
status is 1 if the receiver did not answer 2xx.`,
		Example: "  cay webhooks test whk_…",
		Args:    theArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			got, err := c.TestWebhook(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := a.show(got, func() error {
				return a.details("result", attemptText(got), "took", attemptTook(got), "answer", deref(got.Answer))
			}); err != nil || got.Delivered {
				return err
			}
			return exitError{exitFailed}
		},
	}
}

// attemptText returns a text about what came of an attempt.
func attemptText(got *cay.WebhookAttempt) string {
	switch {
	case got == nil:
		return "-"
	case got.Delivered:
		return fmt.Sprintf("delivered: the receiver answered %d", deref(got.StatusCode))
	}
	return "failed: " + deref(got.Error)
}

func attemptTook(got *cay.WebhookAttempt) string {
	return (time.Duration(got.DurationMs) * time.Millisecond).String()
}

// webhooksDeliveriesCommand returns the verb that lists the deliveries of a webhook.
func (a *app) webhooksDeliveriesCommand() *cobra.Command {
	var o cay.ListDeliveriesOptions
	var status string
	var limit int
	cmd := &cobra.Command{
		Use:     "deliveries ID",
		Short:   "List what a webhook receives, the newest event first",
		Example: "  cay webhooks deliveries whk_… --status pending",
		Args:    theArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			o.Status, o.Limit = cay.DeliveryStatus(status), pageSize(limit)
			all, err := collect(c.Deliveries(cmd.Context(), args[0], o), limit)
			if err != nil {
				return err
			}
			return a.show(cay.DeliveryList{Deliveries: all}, func() error {
				var rows [][]string
				for _, d := range all {
					rows = append(rows, []string{d.EventID, d.Type, string(d.Status), strconv.Itoa(d.Attempts), age(d.QueuedAt),
						until(d.NextAttemptAt), attemptText(d.LastAttempt)})
				}
				return a.table([]string{"EVENT", "TYPE", "STATUS", "ATTEMPTS", "QUEUED", "NEXT", "LAST ATTEMPT"}, rows)
			})
		},
	}
	cmd.Flags().StringVar(&status, "status", "", "only those that are pending or delivered")
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// webhooksReplayCommand returns the verb that delivers events again.
func (a *app) webhooksReplayCommand() *cobra.Command {
	var after string
	cmd := &cobra.Command{
		Use:   "replay ID --after EVENT",
		Short: "Deliver events again",
		Long: `Deliver the events after the one with the given id again, as far as the webhook's types
have them. Their webhook-id is the same as the first time.`,
		Example: "  cay webhooks replay whk_… --after evt_…",
		Args:    theArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if after == "" {
				return errors.New("--after: missing")
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			done := &cay.Replayed{Through: after, More: true}
			for queued := 0; done.More; {
				if done, err = c.ReplayWebhook(cmd.Context(), args[0], done.Through); err != nil {
					return err
				}
				queued += done.Queued
				done.Queued = queued
			}
			return a.show(done, func() error {
				_, err := fmt.Fprintf(a.out, "%d deliveries queued\n", done.Queued)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&after, "after", "", "id of the event after which to begin")
	return cmd
}
