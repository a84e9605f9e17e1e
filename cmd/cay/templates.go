package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cayhq/cay/client"
)

func (a *app) templatesCommand() *cobra.Command {
	cmd := group("templates", "See what sandboxes are made from", "  cay templates list\n  cay templates logs python")
	cmd.Aliases = []string{"template"}
	cmd.AddCommand(a.templatesListCommand(), a.templatesShowCommand(), a.templatesLogsCommand())
	return cmd
}

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
			all, err := collect(c.Templates(cmd.Context(), client.ListOptions{Limit: pageSize(limit)}), limit)
			if err != nil {
				return err
			}
			return a.show(client.TemplateList{Templates: all}, func() error {
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
					rows = append(rows, []string{t.Name, status, fmt.Sprint(t.Version), size, first(deref(t.Source), "-"), t.Description})
				}
				return a.table([]string{"NAME", "STATUS", "VERSION", "IMAGE", "SOURCE", "DESCRIPTION"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "print so many at most (default all)")
	return cmd
}

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
				return a.details("name", t.Name, "id", t.ID, "description", t.Description, "built in", builtin, "status", string(t.Status),
					"progress", deref(t.Progress), "build error", deref(t.BuildError), "version", fmt.Sprint(t.Version), "source", deref(t.Source), "image", image,
					"user", deref(t.User), "workdir", deref(t.Workdir), "env", labelsText(t.Env), "start command", deref(t.StartCommand), "size", deref(t.Size),
					"disk", disk, "egress", egressText(t.Egress), "created", moment(&created), "updated", moment(&updated), "built", moment(t.BuiltAt))
			})
		},
	}
}

func (a *app) templatesLogsCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "logs NAME",
		Short:             "Print the log of a template's newest build",
		Example:           "  cay templates logs python",
		Args:              theArgs("NAME"),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			lines, err := c.TemplateLogs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if lines == nil {
				lines = []client.TemplateLogLine{}
			}
			return a.show(client.TemplateLogs{Lines: lines}, func() error {
				for _, l := range lines {
					if _, err := fmt.Fprintf(a.out, "%s  %s\n", l.Time.Local().Format("15:04:05"), printable(l.Text)); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}
