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

// startDetached starts the command of exec --detach and prints its number.
func (a *app) startDetached(cmd *cobra.Command, c *cay.Client, id string, r cay.ExecuteRequest, detach bool,
	tag string) error {
	if !detach {
		return errors.New("--tag: is for a command with --detach")
	}
	start := cay.StartProcessRequest{Args: r.Args, Env: r.Env, Workdir: r.Workdir, User: r.User, Tag: given(tag)}
	if cmd.Flags().Changed("timeout") {
		start.Timeout = r.Timeout
	}
	p, err := c.StartProcess(cmd.Context(), id, start)
	if err != nil {
		return err
	}
	return a.show(p, func() error {
		_, err := fmt.Fprintln(a.out, p.PID)
		return err
	})
}

// psCommand returns the verb that lists processes.
func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ps ID",
		Short: "List the processes that were started in a sandbox",
		Long: `List the running processes that were started in a sandbox: detached commands, terminals,
commands of exec, and the template's start command, but not their child processes. The
last 32 detached commands that have ended are listed too, for 15 minutes.`,
		Example:           "  cay sandbox ps sbx_…",
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.ListProcesses(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(map[string]any{"processes": all}, func() error {
				var rows [][]string
				for _, p := range all {
					output := "-"
					if p.OutputTo != nil {
						output = bytesText(*p.OutputTo)
					}
					rows = append(rows, []string{strconv.Itoa(p.PID), first(deref(p.Tag), "-"), first(deref(p.User), "-"),
						processState(&p), age(p.StartedAt), output, strings.Join(p.Args, " ")})
				}
				return a.table([]string{"PID", "TAG", "USER", "STATUS", "STARTED", "OUTPUT", "COMMAND"}, rows)
			})
		},
	}
}

// processState returns the status of a process with its exit code.
func processState(p *cay.Process) string {
	if p.Exit == nil {
		return string(p.Status)
	}
	return "exited (" + strconv.Itoa(p.Exit.ExitCode) + ")"
}

// logsCommand returns the verb that prints the output of a process.
func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var offset int64
	cmd := &cobra.Command{
		Use:   "logs ID PROCESS",
		Short: "Print the output of a detached process",
		Long: `Print the output of a process that was started with --detach. The last MiB is kept.
PROCESS is its number or its tag. With --follow, print new output too, until it ends.`,
		Example:           "  cay sandbox logs sbx_… web\n  cay sandbox logs sbx_… 7 -f",
		Args:              theArgs("ID", "PROCESS"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if follow {
				if a.json {
					return errors.New("--json: not together with --follow")
				}
				_, err := c.FollowProcess(cmd.Context(), args[0], args[1], offset, a.printOutput)
				return quiet(brokeOff(err))
			}
			out, err := c.ProcessOutput(cmd.Context(), args[0], args[1], offset)
			if err != nil {
				return err
			}
			return a.show(out, func() error { return quiet(a.printKept(out)) })
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "print new output until the process ends")
	cmd.Flags().Int64Var(&offset, "offset", 0, "begin with this byte of the output")
	return cmd
}

// printOutput prints output as it comes.
func (a *app) printOutput(o cay.Output) error {
	to := a.out
	switch {
	case o.Lost > 0:
		_, err := fmt.Fprintf(a.err, "cay: %d bytes of output are not kept any more\n", o.Lost)
		return err
	case o.Stream == cay.StreamStderr:
		to = a.err
	}
	_, err := to.Write(o.Data)
	return err
}

// printKept prints the output that is kept of a process.
func (a *app) printKept(out *cay.ProcessOutput) error {
	if out.Lost > 0 {
		if err := a.printOutput(cay.Output{Lost: out.Lost}); err != nil {
			return err
		}
	}
	for _, piece := range out.Output {
		data, err := piece.Bytes()
		if err != nil {
			return fmt.Errorf("decoding the output: %w", err)
		}
		if err := a.printOutput(cay.Output{Stream: string(deref(piece.Stream)), Data: data}); err != nil {
			return err
		}
	}
	return nil
}

// waitCommand returns the verb that waits for the end of a process.
func (a *app) waitCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "wait ID PROCESS",
		Short:             "Wait until a process has ended and print its exit code",
		Long:              "Wait until a process has ended, and print its exit code. PROCESS is its number or its tag. The sandbox is in use meanwhile.",
		Example:           "  pid=$(cay sandbox exec sbx_… -d -- make)\n  cay sandbox wait sbx_… $pid",
		Args:              theArgs("ID", "PROCESS"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			const each = 2 * time.Minute // for one call, since proxies end calls that take longer
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			for {
				p, err := c.WaitProcess(cmd.Context(), args[0], args[1], each)
				if err != nil {
					return err
				}
				if p.Exit != nil {
					return a.show(p, func() error {
						_, err := fmt.Fprintln(a.out, p.Exit.ExitCode)
						return err
					})
				}
			}
		},
	}
}

// killCommand returns the verb that kills or signals a process.
func (a *app) killCommand() *cobra.Command {
	var signal string
	cmd := &cobra.Command{
		Use:   "kill ID PROCESS",
		Short: "Kill a process, or send it a signal",
		Long: `Kill a process with all its descendants, and remove it from the list. With --signal,
send it and its process group a signal instead. PROCESS is its number or its tag.`,
		Example:           "  cay sandbox kill sbx_… web\n  cay sandbox kill sbx_… 7 -s INT",
		Args:              theArgs("ID", "PROCESS"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if signal != "" {
				return c.SignalProcess(cmd.Context(), args[0], args[1], signal)
			}
			return c.KillProcess(cmd.Context(), args[0], args[1])
		},
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "", "name or number of the signal")
	return cmd
}
