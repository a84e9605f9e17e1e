package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	cay "github.com/cayhq/cay/sdk/go"
)

const (
	// rejoinFor limits the time for which a shell tries to reconnect. The terminal lives as long without a connection.
	// With less, a restart of the server ends the shell; with more, terminals that were left use the sandbox for longer.
	rejoinFor = time.Minute
	// rejoinPause is the time between two tries. With less, shells burden a server that starts; with more, the user waits.
	rejoinPause = 500 * time.Millisecond
)

// shellCommand returns the verb that opens a terminal in a sandbox.
func (a *app) shellCommand() *cobra.Command {
	var o cay.TerminalOptions
	cmd := &cobra.Command{
		Use:   "shell [flags] ID [flags] [-- COMMAND [ARG...]]",
		Short: "Open a shell in a sandbox",
		Long: `Open a shell, or a command, in a sandbox with a terminal. Keys, sizes and colours pass
through, and its exit status is cay's. If the connection breaks, cay reconnects to the
same shell; a shell without a connection is ended after a minute.

~. at the beginning of a line leaves the shell without ending it. Its number is printed,
and --process reconnects to it within that minute. ~~ sends a ~.`,
		Example:     "  cay sandbox shell sbx_…\n  cay sandbox shell sbx_… -u root -w /srv -- top\n  cay sandbox shell sbx_… --process 7",
		Annotations: map[string]string{runsCommands: "yes"},
		Args:        theArgs("ID", "[COMMAND]..."),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := args[0]
			if err := cmd.Flags().Parse(args[1:]); err != nil {
				return cmd.FlagErrorFunc()(cmd, err)
			}
			if help, err := cmd.Flags().GetBool("help"); err == nil && help {
				return cmd.Help()
			}
			o.Command = shellLine(cmd.Flags().Args())
			if o.Process != "" && (o.Command != "" || o.User != "" || o.Workdir != "") {
				return errors.New("--process: takes up what runs; not together with COMMAND, --user and --workdir")
			}
			if o.Process == "" {
				o.Grace, o.Term = rejoinFor, a.getenv("TERM")
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s := &shell{app: a, client: c, id: id, options: o, keys: escapes{lineStart: true}}
			return s.run(cmd.Context())
		},
		ValidArgsFunction: a.completeSandboxes,
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringVarP(&o.User, "user", "u", "", "name or number of the user")
	f.StringVarP(&o.Workdir, "workdir", "w", "", "working directory")
	f.StringVar(&o.Process, "process", "", "reconnect to the terminal of this process, by number or tag")
	return cmd
}

// shellLine returns a line for a shell that becomes the command, with each argument quoted.
func shellLine(args []string) string {
	var quoted []string
	for _, arg := range args {
		quoted = append(quoted, "'"+strings.ReplaceAll(arg, "'", `'\''`)+"'")
	}
	if len(quoted) == 0 {
		return ""
	}
	return "exec " + strings.Join(quoted, " ")
}

// shell joins the user's terminal to one in a sandbox.
type shell struct {
	app     *app
	client  *cay.Client
	id      string
	options cay.TerminalOptions
	keys    escapes
}

// run opens the terminal, and copies between the two until the command ends or the user leaves.
func (s *shell) run(ctx context.Context) error {
	s.options.Cols, s.options.Rows = s.size()
	t, err := s.client.OpenTerminal(ctx, s.id, s.options)
	if err != nil {
		return err
	}
	restore := s.raw()
	defer restore()
	typed := make(chan []byte)
	go s.read(ctx, typed)
	for {
		err := s.session(ctx, t, typed)
		exit := t.Exit()
		_ = t.Close() // the connection is broken, or the command has ended
		switch {
		case exit != nil:
			restore()
			return status(exit.ExitCode)
		case errors.Is(err, errLeave):
			restore()
			fmt.Fprintf(s.app.err, "cay: left; cay sandbox shell %s --process %d takes it up again within %s\n", s.id, t.PID,
				rejoinFor)
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !canRejoin(err):
			restore()
			return err
		}
		if t, err = s.rejoin(ctx, t, err); err != nil {
			restore()
			return err
		}
	}
}

// canRejoin reports whether the connection broke or the server stopped.
func canRejoin(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || cay.HasCode(err, "stopping")
}

// rejoin connects again to the terminal whose connection broke.
func (s *shell) rejoin(ctx context.Context, t *cay.Terminal, broken error) (*cay.Terminal, error) {
	o := cay.TerminalOptions{Process: strconv.Itoa(t.PID), Offset: new(t.Offset())}
	for deadline := time.Now().Add(rejoinFor); time.Now().Before(deadline); {
		o.Cols, o.Rows = s.size()
		again, err := s.client.OpenTerminal(ctx, s.id, o)
		if err == nil {
			return again, nil
		}
		var refused *cay.Error
		if errors.As(err, &refused) && refused.Status/100 == 4 {
			return nil, fmt.Errorf("coming back to the terminal: %w", err)
		}
		select {
		case <-time.After(rejoinPause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return nil, brokeOff(broken)
}

// errLeave reports that the user typed ~. to leave.
var errLeave = errors.New("left")

// session copies in both directions until one of them ends.
func (s *shell) session(ctx context.Context, t *cay.Terminal, typed <-chan []byte) error {
	sizes := make(chan os.Signal, 1)
	signal.Notify(sizes, syscall.SIGWINCH)
	defer signal.Stop(sizes)
	shown := make(chan error, 1)
	go func() {
		_, err := io.Copy(s.app.out, struct{ io.Reader }{t})
		shown <- err
	}()
	for {
		select {
		case err := <-shown:
			return err
		case <-sizes:
			if cols, rows := s.size(); cols > 0 {
				// The reading goroutine reports a broken connection.
				_ = t.Resize(ctx, cols, rows)
			}
		case b, more := <-typed:
			if !more {
				typed, b = nil, []byte{endOfInput}
			}
			b, leave := s.keys.take(b)
			if len(b) > 0 {
				_, _ = t.Write(b) // as above
			}
			if leave {
				return errLeave
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// endOfInput is the byte that the key Control-D sends.
const endOfInput = 4

// read sends the user's keys to typed until their end or that of ctx.
func (s *shell) read(ctx context.Context, typed chan<- []byte) {
	defer close(typed)
	for {
		b := make([]byte, 4<<10)
		n, err := s.app.in.Read(b)
		if n > 0 {
			select {
			case typed <- b[:n]:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// size returns the size of the user's terminal, zeros without one.
func (s *shell) size() (cols, rows int) {
	for _, v := range []any{s.app.out, s.app.in} {
		if f, ok := v.(*os.File); ok {
			if cols, rows, err := term.GetSize(int(f.Fd())); err == nil && cols > 0 && rows > 0 {
				return cols, rows
			}
		}
	}
	return 0, 0
}

// raw makes the user's terminal pass all keys on until restore is called, which may be more than once.
func (s *shell) raw() (restore func()) {
	if !isTerminal(s.app.in) {
		return func() {}
	}
	fd := int(s.app.in.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return func() {}
	}
	// It fails only for a terminal that does not exist any more.
	return func() { _ = term.Restore(fd, before) }
}

// escapes finds ~. at the beginning of a line, as ssh does.
type escapes struct {
	lineStart bool // the next key begins a line
	tilde     bool // the last key was a ~ at the beginning of a line
}

// take returns the keys to pass on, and whether to leave.
func (e *escapes) take(b []byte) (keys []byte, leave bool) {
	var out bytes.Buffer
	for _, key := range b {
		if e.tilde {
			e.tilde = false
			switch key {
			case '.':
				return out.Bytes(), true
			case '~':
			default:
				out.WriteByte('~')
			}
			out.WriteByte(key)
			e.lineStart = key == '\r' || key == '\n'
			continue
		}
		if e.lineStart && key == '~' {
			e.tilde = true
			continue
		}
		e.lineStart = key == '\r' || key == '\n'
		out.WriteByte(key)
	}
	return out.Bytes(), false
}
