package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	cay "github.com/cayhq/cay/sdk/go"
)

// jsonTimeout is the default timeout of a command whose output comes at its end. The API refuses a longer one.
const jsonTimeout = 5 * time.Minute

// commandFlags holds the flags of the verbs that run a command: exec and run.
type commandFlags struct {
	timeout time.Duration
	workdir string
	env     []string
	user    string
	noStdin bool
}

// add adds the flags to those of a verb.
func (c *commandFlags) add(f *pflag.FlagSet) {
	f.DurationVar(&c.timeout, "timeout", 0,
		"kill the command after this time, at most 24h, 0 for never; with --json at most 5m, and 5m if not given")
	f.StringVarP(&c.workdir, "workdir", "w", "", "working directory of the command")
	f.StringArrayVarP(&c.env, "env", "e", nil,
		"environment variable NAME=VALUE; NAME alone passes your own value (repeatable)")
	f.StringVarP(&c.user, "user", "u", "", "name or number of the user to run the command as")
	f.BoolVarP(&c.noStdin, "no-stdin", "n", false, "do not pass standard input, even if it is a pipe or a file")
}

// executeRequest returns the call that runs the command in args.
func (a *app) executeRequest(c commandFlags, env map[string]string, args []string) (cay.ExecuteRequest, error) {
	if len(args) == 0 {
		return cay.ExecuteRequest{}, errors.New("COMMAND: there is none; write it after --")
	}
	for i, arg := range args {
		if strings.ToValidUTF8(arg, "") != arg {
			return cay.ExecuteRequest{}, fmt.Errorf("COMMAND: argument %d is not UTF-8", i+1)
		}
	}
	if c.timeout < 0 {
		return cay.ExecuteRequest{}, errors.New("--timeout: must be more than 0, or 0 for none")
	}
	var timeout *string
	if c.timeout > 0 {
		timeout = new(c.timeout.String())
	}
	return cay.ExecuteRequest{Args: args, Timeout: timeout, Workdir: given(c.workdir),
		User: given(c.user), Env: env}, nil
}

// pairs returns the values of NAME=VALUE flags. With lookup, NAME alone takes the value that lookup returns.
func pairs(flag string, texts []string, lookup func(string) string) (map[string]string, error) {
	if len(texts) == 0 {
		return nil, nil
	}
	m := make(map[string]string)
	for _, text := range texts {
		name, value, ok := strings.Cut(text, "=")
		if name == "" || !ok && lookup == nil {
			return nil, fmt.Errorf("%s: %q is not NAME=VALUE", flag, text)
		}
		if !ok {
			if value = lookup(name); value == "" {
				return nil, fmt.Errorf("%s: %s is not set here, so it cannot be passed on; write %s=VALUE", flag, name, name)
			}
		}
		if strings.ToValidUTF8(text, "") != text {
			return nil, fmt.Errorf("%s: %s is not UTF-8", flag, name)
		}
		m[name] = value
	}
	return m, nil
}

// execute runs r in the sandbox. With --json the result has the output. Without, the output goes to cay's own streams
// as it comes, and the result has none of it.
func (a *app) execute(ctx context.Context, c *cay.Client, id string, r cay.ExecuteRequest,
	stdin []byte) (result *cay.ExecuteResult, err error) {
	err = withStdin(ctx, c, id, r, stdin, func(r cay.ExecuteRequest) error {
		if a.json {
			if r.Timeout == nil {
				r.Timeout = new(jsonTimeout.String())
			}
			result, err = c.Execute(ctx, id, r)
			return err
		}
		r.AllOutput = new(true)
		exit, err := c.ExecuteStream(ctx, id, r, func(o cay.Output) error {
			to := a.out
			if o.Stream == cay.StreamStderr {
				to = a.err
				a.midLine = len(o.Data) > 0 && o.Data[len(o.Data)-1] != '\n'
			}
			if _, err := to.Write(o.Data); err != nil {
				return &outputError{err}
			}
			return nil
		})
		if err != nil {
			return brokeOff(err)
		}
		result = &cay.ExecuteResult{ExitCode: exit.ExitCode, Signal: exit.Signal, TimedOut: exit.TimedOut,
			OOMKilled: exit.OOMKilled, StdoutTruncated: deref(exit.StdoutTruncated),
			StderrTruncated: deref(exit.StderrTruncated)}
		return nil
	})
	var lost *outputError
	if errors.As(err, &lost) {
		if errors.Is(err, syscall.EPIPE) {
			// Any program ends like this when its output is no longer read.
			return nil, exitError{exitSignal + int(syscall.SIGPIPE)}
		}
		return nil, fmt.Errorf("writing the command's output: %w", lost.error)
	}
	return result, err
}

// outputError reports that cay's own output could not be written.
type outputError struct{ error }

// Unwrap returns the cause.
func (e *outputError) Unwrap() error { return e.error }

// brokeOff returns an error in plain words for a stream that broke off, and other errors unchanged.
func brokeOff(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the connection to the server broke off")
	}
	return err
}

// deliver prints the result of a command, except for the output that execute has printed. The error that it returns
// makes cay exit with the command's status.
func (a *app) deliver(r *cay.ExecuteResult, timeout time.Duration) error {
	if a.json {
		if err := quiet(a.printJSON(r)); err != nil {
			return err
		}
		return status(r.ExitCode)
	}
	a.note(r, timeout)
	return status(r.ExitCode)
}

// note prints the parts of a result that neither the output nor the status shows.
func (a *app) note(r *cay.ExecuteResult, timeout time.Duration) {
	var notes []string
	if r.StdoutTruncated {
		notes = append(notes, "standard output was cut off at 8 MiB")
	}
	if r.StderrTruncated {
		notes = append(notes, "standard error was cut off at 8 MiB")
	}
	if r.TimedOut {
		notes = append(notes, fmt.Sprintf("the command was killed after %s, see --timeout", timeout))
	}
	if r.OOMKilled {
		notes = append(notes, "the command was killed because the sandbox's memory was used up; a larger --size has more")
	}
	if len(notes) > 0 && a.midLine {
		fmt.Fprintln(a.err)
	}
	for _, n := range notes {
		fmt.Fprintln(a.err, "cay: "+n)
	}
}

// quiet drops the error of writing to a reader that has gone away, as head does when it has enough.
func quiet(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}

// status returns the error that makes cay exit with the status, nil for 0.
func status(code int) error {
	if code == 0 {
		return nil
	}
	return exitError{code}
}

// completeSandboxes offers the ids of sandboxes for the first argument.
func (a *app) completeSandboxes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.complete(cmd.Context(), func(ctx context.Context, c *cay.Client) ([]string, error) {
		all, err := c.ListSandboxes(ctx, cay.ListSandboxesOptions{})
		if err != nil {
			return nil, err
		}
		var ids []string
		for _, s := range all.Sandboxes {
			ids = append(ids, s.ID+"\t"+s.Template+", "+string(s.Status))
		}
		return ids, nil
	})
}

// completeTemplates offers the names of templates.
func (a *app) completeTemplates(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *cay.Client) ([]string, error) {
		all, err := c.ListTemplates(ctx, cay.ListOptions{})
		if err != nil {
			return nil, err
		}
		var names []string
		for _, t := range all.Templates {
			names = append(names, t.Name+"\t"+t.Description)
		}
		return names, nil
	})
}

// complete returns the completions that ask gets from the server.
func (a *app) complete(ctx context.Context,
	ask func(context.Context, *cay.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	// patience limits the time for an answer, since the shell of the user hangs meanwhile. With less, a busy server
	// offers nothing.
	const patience = 2 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, err := a.client(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	offer, err := ask(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return offer, cobra.ShellCompDirectiveNoFileComp
}
