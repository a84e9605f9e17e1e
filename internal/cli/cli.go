// Package cli runs the command line of cay. The verbs, a file for each or for a group of them, talk to a server
// through the public package client. Three files do more: server.go runs or purges a server with package daemon,
// doctor.go checks this machine with it, and connect.go finds the servers of this machine by their records.
//
// The package owns the texts, flags and exit statuses of the verbs, and makes what comes from sandboxes and other users
// harmless for a terminal. It runs one command line for each process.
package cli

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

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/daemon"
)

// Main runs the command line of this process, which is of the version, and returns its exit status.
func Main(version string) int { return newApp(version).main() }

// newApp returns an app that uses the streams and the environment of this process, and the servers of this machine.
func newApp(version string) *app {
	return &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv, version: version,
		runDir: daemon.RunDir, dataDir: config.Default().DataDir}
}

// main runs the arguments of this process until they end or a signal ends them.
func (a *app) main() int {
	ctx, stop := withSignals(context.Background())
	defer stop()
	return a.run(ctx, os.Args[1:])
}

// Exit statuses of cay itself. As with docker, commands in sandboxes may have any of them too; the text on standard
// error tells them apart.
const (
	exitFailed    = 1   // a verb failed that runs no command
	exitRunFailed = 125 // cay failed in a verb that runs a command, and not the command
	exitSignal    = 128 // plus the number of the signal that ended cay
)

// app holds one call of cay.
type app struct {
	in      *os.File
	out     io.Writer
	err     io.Writer
	getenv  func(string) string
	version string
	runDir  string // where the servers of this machine leave their records
	dataDir string // where a server with default settings keeps its first key

	midLine bool // the last output of a command on err did not end its line

	// The flags that every verb has.
	json   bool
	apiURL string
	apiKey string
	org    string
}

// exitError ends cay with a status and without a text, which has been printed already.
type exitError struct{ status int }

// Error implements error.
func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.status) }

// signalError reports, as the cause of a context, the signal that ended it.
type signalError struct{ signal syscall.Signal }

// Error implements error.
func (e signalError) Error() string { return e.signal.String() }

// withSignals returns a context that ends with the first SIGINT or SIGTERM. Further signals do nothing, since only the
// cleaning up is left, which has a time limit.
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

// runsCommands marks, as an annotation, the verbs that exit with the status of a command in a sandbox.
const runsCommands = "runs-commands"

// oneLine joins the lines of an error's text, since scripts read one line.
func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// root returns the command with all verbs.
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
	root.AddCommand(a.serverCommand(), a.runCommand(), a.sandboxCommand(), a.templatesCommand(), a.snapshotsCommand(),
		a.feedCommand(), a.webhooksCommand(), a.keysCommand(), a.orgsCommand(), a.nodesCommand(), a.versionCommand(),
		a.doctorCommand())
	return root
}

// isTerminal reports whether v is a terminal.
func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
