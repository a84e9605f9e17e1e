package cli

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// templatesCommand returns the verbs for templates.
func (a *app) templatesCommand() *cobra.Command {
	cmd := group("templates", "Make and manage what sandboxes are made from",
		"  cay templates list\n  cay templates create my-app --dockerfile Dockerfile\n  cay templates logs -f my-app")
	cmd.Aliases = []string{"template"}
	cmd.AddCommand(a.templatesListCommand(), a.templatesShowCommand(), a.templatesLogsCommand(),
		a.templatesCreateCommand(), a.templatesRebuildCommand(), a.templatesCancelCommand(), a.templatesDeleteCommand())
	return cmd
}

// buildErrorText returns the error of a build in one line.
func buildErrorText(e *cay.BuildError) string {
	if e == nil {
		return ""
	}
	text := oneLine(e.Message)
	if e.Step != nil {
		text = *e.Step + ": " + text
	}
	return text
}

// readyText returns a ready check as text.
func readyText(r *cay.ReadyCheck) string {
	if r == nil {
		return ""
	}
	within := " within " + deref(r.Timeout)
	switch {
	case r.Port != nil:
		return fmt.Sprintf("port %d%s", *r.Port, within)
	case r.HTTP != nil:
		return fmt.Sprintf("GET http://localhost:%d%s%s", r.HTTP.Port, r.HTTP.Path, within)
	}
	return deref(r.Command) + within
}

// templatesListCommand returns the verb that lists templates.
func (a *app) templatesListCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List templates, newest first",
		Example: "  cay templates list",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := collect(c.Templates(cmd.Context(), cay.ListOptions{Limit: pageSize(limit)}), limit)
			if err != nil {
				return err
			}
			return a.show(cay.TemplateList{Templates: all}, func() error {
				var rows [][]string
				for _, t := range all {
					status := string(t.Status)
					if t.Progress != nil {
						status += ": " + *t.Progress
					}
					size := "-"
					if t.ImageSizeBytes != nil {
						size = bytesText(*t.ImageSizeBytes)
					}
					rows = append(rows, []string{t.Name, status, fmt.Sprint(t.Version), size, first(deref(t.Source), "-"),
						t.Description})
				}
				return a.table([]string{"NAME", "STATUS", "VERSION", "IMAGE", "SOURCE", "DESCRIPTION"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "print at most this many (default all)")
	return cmd
}

// templatesShowCommand returns the verb that shows a template.
func (a *app) templatesShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "show NAME",
		Short:             "Show a template",
		Example:           "  cay templates show python",
		Args:              theArgs("NAME"),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			t, err := c.GetTemplate(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(t, func() error {
				builtin, image, disk := "", "", ""
				if t.Builtin {
					builtin = "yes"
				}
				if t.ImageSizeBytes != nil {
					image = bytesText(*t.ImageSizeBytes)
				}
				if t.DiskSizeMB != nil {
					disk = fmt.Sprintf("%d MiB", *t.DiskSizeMB)
				}
				created, updated := t.CreatedAt, t.UpdatedAt
				return a.details("name", t.Name, "id", t.ID, "description", t.Description, "built in", builtin,
					"status", string(t.Status), "progress", deref(t.Progress), "build error", buildErrorText(t.BuildError),
					"version", fmt.Sprint(t.Version), "source", deref(t.Source), "image", image,
					"user", deref(t.User), "workdir", deref(t.Workdir), "env", labelsText(t.Env),
					"start command", deref(t.StartCommand), "ready", readyText(t.Ready),
					"size", deref(t.Size), "disk", disk, "egress", egressText(t.Egress),
					"created", moment(&created), "updated", moment(&updated), "built", moment(t.BuiltAt))
			})
		},
	}
}

// templatesLogsCommand returns the verb that prints the log of a build.
func (a *app) templatesLogsCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:               "logs NAME",
		Short:             "Print the log of a template's newest build",
		Example:           "  cay templates logs python\n  cay templates logs -f my-app",
		Args:              theArgs("NAME"),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if follow {
				_, err := followTemplate(cmd.Context(), c, args[0], a.printLogLine)
				return quiet(err)
			}
			lines, err := c.TemplateLogs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if lines == nil {
				lines = []cay.TemplateLogLine{}
			}
			return a.show(map[string]any{"lines": lines}, func() error {
				for _, l := range lines {
					if err := a.printLogLine(l); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false,
		"print new lines until the build is over; with --json each line is a JSON object")
	return cmd
}

// printLogLine prints a line of a log, as a JSON object with --json.
func (a *app) printLogLine(l cay.TemplateLogLine) error {
	if a.json {
		return json.NewEncoder(a.out).Encode(l)
	}
	_, err := fmt.Fprintf(a.out, "%s  %s\n", l.Time.Local().Format("15:04:05"), printable(l.Text))
	return err
}

// templatesCancelCommand returns the verb that cancels a build.
func (a *app) templatesCancelCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cancel NAME",
		Short: "Cancel the waiting or running build of a template",
		Long: `Cancel the waiting or running build of a template. The template's last ready version, if
there is one, stays in use.`,
		Example:           "  cay templates cancel my-app",
		Args:              theArgs("NAME"),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			t, err := c.CancelTemplateBuild(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(t, func() error { return nil })
		},
	}
}

// templatesDeleteCommand returns the verb that deletes templates.
func (a *app) templatesDeleteCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "delete NAME...",
		Short: "Delete templates",
		Long: `Delete templates, with their builds and logs. A template with sandboxes that are not
destroyed is kept, unless you give --force; these sandboxes continue without it.`,
		Example:           "  cay templates delete my-app\n  cay templates delete --force old-app",
		Args:              theArgs("NAME..."),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				if err := c.DeleteTemplate(cmd.Context(), name, force); err != nil {
					if len(args) > 1 {
						err = fmt.Errorf("deleting %s: %w", name, err)
					}
					errs = append(errs, err)
				}
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "delete it even if sandboxes of it are not destroyed")
	return cmd
}
