package cli

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// portNumber parses a port from least to 65535. name is that of the argument.
func portNumber(name, text string, least int) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > 65535 {
		return 0, fmt.Errorf("%s: %q is no port from %d to 65535", name, text, least)
	}
	return n, nil
}

// portURLCommand returns the verb that makes a URL for a port.
func (a *app) portURLCommand() *cobra.Command {
	var expires time.Duration
	var public, private bool
	cmd := &cobra.Command{
		Use:   "port-url ID PORT",
		Short: "Make a URL for a port of a sandbox",
		Long: `Make a URL that opens a port of a sandbox for some time. Anybody who has the URL can
use it. With --public anybody can reach the port without a signature, until you run this
again with --private.`,
		Example:           "  cay sandbox port-url sbx_… 8080 --expires-in 15m\n  curl $(cay sandbox port-url sbx_… 8080)\n  cay sandbox port-url sbx_… 8080 --public",
		Args:              theArgs("ID", "PORT"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := portNumber("PORT", args[1], 1)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("expires-in") && expires <= 0 {
				return fmt.Errorf("--expires-in: must be at least 1s, not %s", expires)
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if public || private {
				p, err := c.SetPortPublic(cmd.Context(), args[0], port, public)
				if err != nil {
					return err
				}
				return a.show(p, func() error { return a.printLine(p.URL) })
			}
			u, err := c.PortURL(cmd.Context(), args[0], port, expires)
			if err != nil {
				return err
			}
			return a.show(u, func() error { return a.printLine(u.URL) })
		},
	}
	f := cmd.Flags()
	f.DurationVar(&expires, "expires-in", 0, "time for which the URL is valid, 1s to 24h (default 1h)")
	f.BoolVar(&public, "public", false, "let anybody reach the port")
	f.BoolVar(&private, "private", false, "require a key or a signed URL for the port again")
	cmd.MarkFlagsMutuallyExclusive("expires-in", "public", "private")
	return cmd
}

// printLine prints a line.
func (a *app) printLine(text string) error {
	_, err := fmt.Fprintln(a.out, text)
	return err
}

// portForwardCommand returns the verb that forwards local ports to those of a sandbox.
func (a *app) portForwardCommand() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:   "port-forward ID LOCAL[:PORT]...",
		Short: "Forward local ports to ports of a sandbox",
		Long: `Listen on local ports and forward each TCP connection to a port of the sandbox, until
cay is stopped. LOCAL 0 is any free port. The first connection wakes the sandbox, and
each one keeps it awake while it is open.`,
		Example:           "  cay sandbox port-forward sbx_… 8080\n  cay sandbox port-forward sbx_… 8080:80 15432:5432\n  cay sandbox port-forward sbx_… 0:5432 --address 0.0.0.0",
		Args:              theArgs("ID", "LOCAL[:PORT]..."),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			var all []forward
			for _, text := range args[1:] {
				f, err := parseForward(text)
				if err != nil {
					return err
				}
				all = append(all, f)
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			// A sandbox that does not exist is better reported now than with each connection.
			if _, err := c.GetSandbox(cmd.Context(), args[0]); err != nil {
				return err
			}
			return a.forwardAll(cmd, c, args[0], address, all)
		},
	}
	cmd.Flags().StringVar(&address, "address", "127.0.0.1",
		"local address to listen on; with any other the port is open to the network")
	return cmd
}

// forward maps a local port to a port of the sandbox.
type forward struct{ local, remote int }

// parseForward parses LOCAL[:PORT].
func parseForward(text string) (forward, error) {
	here, there, both := strings.Cut(text, ":")
	local, err := portNumber("LOCAL", here, 0)
	if err != nil {
		return forward{}, err
	}
	if !both {
		there = here
	}
	remote, err := portNumber("PORT", there, 1)
	return forward{local, remote}, err
}

// forwardAll listens and forwards connections until ctx ends. Then it closes them, and waits for their end.
func (a *app) forwardAll(cmd *cobra.Command, c *cay.Client, id, address string, all []forward) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	failed := make(chan error, len(all))
	for _, f := range all {
		l, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(f.local)))
		if err != nil {
			return fmt.Errorf("LOCAL: %w", err)
		}
		defer context.AfterFunc(ctx, func() { l.Close() })()
		defer l.Close()
		fmt.Fprintf(a.out, "forwarding %s to port %d of %s\n", l.Addr(), f.remote, id)
		wg.Go(func() {
			failed <- accept(&wg, l, func(conn net.Conn) {
				defer conn.Close() // a caller that sees the end finds the message printed
				if err := carry(ctx, conn, c, id, f.remote); err != nil && ctx.Err() == nil {
					fmt.Fprintf(a.err, "cay: %s\n", oneLine(explain(err, cmd)))
				}
			})
		})
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case err := <-failed:
		return err
	}
}

// accept calls take with each connection, in a goroutine of wg, until the listener is closed.
func accept(wg *sync.WaitGroup, l net.Listener, take func(net.Conn)) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return fmt.Errorf("listening: %w", err)
		}
		wg.Go(func() { take(conn) })
	}
}

// carry copies between a local connection and one to the port until both directions have ended. The
// caller closes local.
func carry(ctx context.Context, local net.Conn, c *cay.Client, id string, port int) error {
	remote, err := c.DialPort(ctx, id, port)
	if err != nil {
		return err
	}
	defer remote.Close()
	defer context.AfterFunc(ctx, func() { _, _ = local.Close(), remote.Close() })()
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{local, remote}, {remote, local}} {
		wg.Go(func() {
			from, to := way[0], way[1]
			half, ok := to.(interface{ CloseWrite() error })
			if _, err := io.Copy(to, from); err == nil && ok && half.CloseWrite() == nil {
				return
			}
			_, _ = from.Close(), to.Close() // one direction alone is of no use
		})
	}
	wg.Wait()
	return nil
}
