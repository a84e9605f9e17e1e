// Command cay is the whole of cay: `cay server` turns this machine into a
// sandbox service, every other verb talks to one through the client package.
//
// Each verb is a file. The files that only the server needs (serve.go, config.go,
// instance.go, purge.go, images.go) wire the rooms together; the others know
// nothing but package client.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func main() { os.Exit(cayMain()) }

// cayMain runs the command of this process and returns its exit status.
func cayMain() int {
	ctx, stop := withSignals(context.Background())
	defer stop()
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv}
	return a.run(ctx, os.Args[1:])
}

// Exit statuses of cay itself. Commands in sandboxes may have any of them too, as
// with docker; what is printed on stderr tells them apart.
const (
	exitFailed    = 1   // anything but exec and run
	exitRunFailed = 125 // exec and run: cay failed, not the command
	exitSignal    = 128 // plus the number of the signal that ended cay
)

// app is one call of cay.
type app struct {
	in     *os.File
	out    io.Writer
	err    io.Writer
	getenv func(string) string

	midLine bool // what a command wrote last to err did not end a line

	// The flags that every command has.
	json   bool
	apiURL string
	apiKey string
	org    string
}

// exitError ends cay with a status, saying nothing: what there is to say has been
// printed.
type exitError struct{ status int }

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.status) }

// signalError is the cause of a context that a signal has ended.
type signalError struct{ signal syscall.Signal }

func (e signalError) Error() string { return e.signal.String() }

// withSignals ends the context when the process is asked to end. Further signals
// do nothing: what goes on then is the tidying up, and that has a time limit.
func withSignals(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case s := <-signals:
			if s, ok := s.(syscall.Signal); ok {
				cancel(signalError{s})
			}
		case <-done:
		}
	}()
	var once sync.Once
	return ctx, func() {
		once.Do(func() { signal.Stop(signals); close(done); cancel(nil) })
	}
}

// run runs one command line.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	var exit exitError
	if errors.As(err, &exit) {
		return exit.status
	}
	var sig signalError
	if errors.As(context.Cause(ctx), &sig) {
		fmt.Fprintf(a.err, "cay: stopped by %s\n", sig)
		return exitSignal + int(sig.signal)
	}
	fmt.Fprintf(a.err, "cay: %s\n", oneLine(explain(err, cmd)))
	if cmd.Annotations[runsCommands] != "" {
		return exitRunFailed
	}
	return exitFailed
}

// runsCommands marks the commands whose exit status is that of a command in a
// sandbox.
const runsCommands = "runs-commands"

// oneLine keeps an error to the one line that scripts look at.
func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "cay",
		Short: "Sandboxes for code you do not trust",
		Long: `Sandboxes for code you do not trust.

cay server turns a Linux machine into a sandbox service; the other commands use one.
They find it by --api-url and --api-key, or else by CAY_API_URL and CAY_API_KEY, or
else by ~/.cay/config.toml (api_url, api_key, org, and the same under [orgs.NAME]).
On the server's own machine they need none of these.`,
		Example:       "  cay run -t python -- python3 -c 'print(6*7)'",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
	}
	f := root.PersistentFlags()
	f.BoolVar(&a.json, "json", false, "print the API's JSON")
	f.StringVar(&a.apiURL, "api-url", "", "URL of the server (CAY_API_URL)")
	f.StringVar(&a.apiKey, "api-key", "", "API key (CAY_API_KEY)")
	f.StringVar(&a.org, "org", "", "organization the key must belong to; chooses [orgs.NAME] of the config file (CAY_ORG)")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		hint := "see " + cmd.CommandPath() + " --help"
		if cmd.Annotations[runsCommands] != "" {
			hint = "put -- before the command to run, and " + hint
		}
		return fmt.Errorf("%w; %s", err, hint)
	})
	root.AddCommand(serverCommand(), a.runCommand(), a.sandboxCommand(), a.templatesCommand(), a.snapshotsCommand(),
		a.feedCommand(), a.keysCommand(), a.orgsCommand(), a.versionCommand(), a.doctorCommand())
	return root
}

// isTerminal reports whether v is a terminal.
func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
