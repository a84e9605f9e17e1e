package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// nodesCommand returns the verbs for the machines that have sandboxes.
func (a *app) nodesCommand() *cobra.Command {
	cmd := group("nodes", "Show machines, and empty them before a reboot",
		"  cay nodes list\n  cay nodes drain host-1\n  cay nodes uncordon host-1")
	cmd.Long = cmd.Short + ".\n\nThese commands need a key of the server's first organization with the scope admin."
	cmd.Aliases = []string{"node"}
	cmd.AddCommand(a.nodesListCommand(), a.nodesShowCommand(), a.nodesDrainCommand(),
		a.nodesTokenCommand(), a.nodesRemoveCommand(),
		a.nodeVerb("cordon", "Let a machine take no more sandboxes", cordonText, (*cay.Client).CordonNode),
		a.nodeVerb("uncordon", "Let a machine take sandboxes again",
			"Let a machine take sandboxes again, and end its drain. Suspended sandboxes wake at their next use.",
			(*cay.Client).UncordonNode))
	return cmd
}

const cordonText = `Let a machine take no more sandboxes: creates and wakes there are refused. Sandboxes
that run can be used until they end. The cordon holds, also over reboots, until
cay nodes uncordon.`

// nodesListCommand returns the verb that lists nodes.
func (a *app) nodesListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List machines, by name",
		Example: "  cay nodes list",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.ListNodes(cmd.Context())
			if err != nil {
				return err
			}
			if all == nil {
				all = []cay.Node{}
			}
			return a.show(map[string]any{"nodes": all}, func() error {
				var rows [][]string
				for _, n := range all {
					rows = append(rows, []string{first(n.Name, n.ID), string(n.Status), fmt.Sprint(n.Sandboxes), fmt.Sprint(n.Active),
						fmt.Sprint(n.VCPUs), fmt.Sprintf("%d MiB", n.MemoryMB), freeText(n), n.Version, age(n.StartedAt)})
				}
				return a.table([]string{"NAME", "STATUS", "SANDBOXES", "ACTIVE", "CPUS", "MEMORY", "FREE", "VERSION", "STARTED"},
					rows)
			})
		},
	}
}

// freeText returns the free memory of a machine, "-" if it has not said it.
func freeText(n cay.Node) string {
	if n.MemoryFreeMB == nil {
		return "-"
	}
	return fmt.Sprintf("%d MiB", *n.MemoryFreeMB)
}

// nodesShowCommand returns the verb that shows a node.
func (a *app) nodesShowCommand() *cobra.Command {
	return a.nodeVerb("show", "Show a machine", "Show a machine, by name or id.", (*cay.Client).GetNode)
}

// nodeVerb returns a verb that makes a call about a node and shows the node.
func (a *app) nodeVerb(verb, short, long string,
	call func(*cay.Client, context.Context, string) (*cay.Node, error)) *cobra.Command {
	return &cobra.Command{
		Use:     verb + " NAME",
		Short:   short,
		Long:    long,
		Example: "  cay nodes " + verb + " host-1",
		Args:    theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			n, err := call(c, cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showNode(n)
		},
	}
}

func (a *app) showNode(n *cay.Node) error {
	return a.show(n, func() error {
		return a.details("name", n.Name, "id", n.ID, "status", string(n.Status),
			"sandboxes", fmt.Sprintf("%d, %d of them not suspended", n.Sandboxes, n.Active), "labels", labelsText(n.Labels),
			"machine", fmt.Sprintf("%d CPUs, %d MiB", n.VCPUs, n.MemoryMB),
			"limit", fmt.Sprintf("%d sandboxes", n.MaxSandboxes), "version", n.Version, "started", moment(&n.StartedAt),
			"joined", moment(n.JoinedAt), "seen", moment(n.SeenAt),
			"lost", moment(n.LostAt), "free", freeText(*n),
			"cordoned", moment(n.CordonedAt), "drain ends", moment(n.DrainBy))
	})
}

// drainPoll is the time between two looks at a node that is drained. A drain takes seconds to hours; a shorter time
// asks the server needlessly, a longer one reports the end later.
const drainPoll = time.Second

// nodesDrainCommand returns the verb that empties a node.
func (a *app) nodesDrainCommand() *cobra.Command {
	var timeout time.Duration
	var detach bool
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Suspend a machine's persistent sandboxes, and wait for the others to end",
		Long: `Cordon a machine, suspend its persistent sandboxes with their memory, each when no
call uses it, and wait for ephemeral ones to end. No sandbox is destroyed: those that are
left at the end of --timeout run on, and the command fails. The server goes on if you
interrupt the command; cay nodes uncordon ends the drain.`,
		Example: "  cay nodes drain host-1 --timeout 10m",
		Args:    theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			n, err := c.DrainNode(cmd.Context(), args[0], timeout)
			if err == nil && !detach {
				n, err = a.awaitDrain(cmd.Context(), c, n)
			}
			if err != nil {
				return err
			}
			return a.showNode(n)
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "how long to wait for sandboxes, at most 168h (default 1h)")
	cmd.Flags().BoolVar(&detach, "no-wait", false, "begin the drain and return")
	return cmd
}

// awaitDrain waits until no sandbox is left on a node that is not suspended, and returns an error if some are left at
// the end of the drain.
func (a *app) awaitDrain(ctx context.Context, c *cay.Client, n *cay.Node) (*cay.Node, error) {
	p := a.progress()
	defer p.done()
	for n.Status == cay.NodeStatusDraining {
		p.say("draining %s: %d sandboxes left", first(n.Name, n.ID), n.Active)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(drainPoll):
		}
		var err error
		if n, err = c.GetNode(ctx, n.ID); err != nil {
			return nil, err
		}
	}
	switch {
	case n.Status == cay.NodeStatusDrained:
		return n, nil
	case n.CordonedAt == nil:
		return nil, fmt.Errorf("the cordon of %s was ended before it was drained", first(n.Name, n.ID))
	}
	return nil, fmt.Errorf("%d sandboxes are left on %s, which stays cordoned", n.Active, first(n.Name, n.ID))
}

// nodesTokenCommand returns the verb that makes a token for a machine.
func (a *app) nodesTokenCommand() *cobra.Command {
	var r cay.CreateNodeTokenRequest
	var name, rejoin string
	var labels []string
	var expiresIn time.Duration
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Create a token with which one machine can join",
		Long: `Create a token with which one machine can join the cluster, once, and print it. It is
not stored and cannot be shown again. The server must have fleet.listen.`,
		Example: "  cay nodes token --name host-2 --label zone=a",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if r.Labels, err = pairs("--label", labels, nil); err != nil {
				return err
			}
			r.Name, r.Rejoin = given(name), given(rejoin)
			if expiresIn != 0 {
				r.ExpiresIn = new(expiresIn.String())
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			t, err := c.CreateNodeToken(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.show(t, func() error { return a.showSecret(t.Token, "token for one machine, "+until(&t.ExpiresAt)) })
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the node (default its host's name)")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "label of the node, KEY=VALUE (repeatable)")
	cmd.Flags().StringVar(&rejoin, "rejoin", "", "let this node join again with another key")
	cmd.Flags().DurationVar(&expiresIn, "expires-in", 0, "how long the token can be used, at most 15m (default 15m)")
	return cmd
}

// nodesRemoveCommand returns the verb that removes a node.
func (a *app) nodesRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "remove NAME",
		Short:   "Remove a machine without sandboxes and snapshots from the cluster",
		Example: "  cay nodes remove host-2",
		Args:    theArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			return c.RemoveNode(cmd.Context(), args[0])
		},
	}
}
