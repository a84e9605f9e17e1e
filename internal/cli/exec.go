package cli

import (
	"github.com/spf13/cobra"
)

// execCommand returns the verb that runs a command in a sandbox.
func (a *app) execCommand() *cobra.Command {
	var flags commandFlags
	var detach bool
	var tag string
	cmd := &cobra.Command{
		Use:   "exec [flags] ID [flags] -- COMMAND [ARG...]",
		Short: "Run a command in a sandbox",
		Long: `Run a command in a sandbox. The command gets cay's standard input if that is a pipe or
a file; its output comes on cay's own streams, and its exit status is cay's. The command
ends when cay ends, or when its output is no longer read. Status 124 means that the
command was killed at its timeout, 128+N that signal N killed it, 125 that cay itself
failed. A suspended sandbox is woken first.

With --detach the command continues without cay, and without a time limit unless you
give --timeout. Its number is printed: see cay sandbox ps, logs, wait and kill.`,
		Example: `  cay sandbox exec sbx_… -- python3 -c 'print(6*7)'
  echo hello | cay sandbox exec sbx_… -- tr a-z A-Z
  cay sandbox exec sbx_… -- tar -czf - -C /work . > work.tar.gz
  cay sandbox exec sbx_… -d --tag web -- python3 -m http.server
  cay sandbox exec sbx_… --timeout 2m -u user -w /tmp -- sh -c 'ls | wc -l'`,
		Annotations: map[string]string{runsCommands: "yes"},
		Args:        theArgs("ID", "COMMAND..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			// Flags may stand before and after the id. Those after the beginning of the command belong to the command.
			id := args[0]
			if err := cmd.Flags().Parse(args[1:]); err != nil {
				return cmd.FlagErrorFunc()(cmd, err)
			}
			if help, err := cmd.Flags().GetBool("help"); err == nil && help {
				return cmd.Help()
			}
			args = cmd.Flags().Args()
			env, err := pairs("--env", flags.env, a.getenv)
			if err != nil {
				return err
			}
			r, err := a.executeRequest(flags, env, args)
			if err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if detach || tag != "" {
				return a.startDetached(cmd, c, id, r, detach, tag)
			}
			var stdin []byte
			if !flags.noStdin {
				if stdin, err = a.readStdin(cmd.Context()); err != nil {
					return err
				}
			}
			result, err := a.execute(cmd.Context(), c, id, r, stdin)
			if err != nil {
				return err
			}
			return a.deliver(result, flags.timeout)
		},
		ValidArgsFunction: a.completeSandboxes,
	}
	cmd.Flags().SetInterspersed(false)
	flags.add(cmd.Flags())
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "let the command continue without cay, and print its number")
	cmd.Flags().StringVar(&tag, "tag", "", "with --detach, a name to find it by")
	return cmd
}
