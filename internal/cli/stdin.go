package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/cayhq/cay/client"
)

const (
	// maxInlineStdin is how much standard input goes along in the call itself, in
	// bytes. JSON can make six bytes of one, and the API takes 8 MiB; more goes as
	// a file first.
	maxInlineStdin = 1 << 20
	// stdinPatience is how long to wait for standard input before saying so: a
	// pipe that somebody forgot to close looks like a hang.
	stdinPatience = 5 * time.Second
)

// readStdin reads what is piped into cay, to its end. A terminal or a device is
// nobody's input: nothing is read from it, and nobody waits.
func (a *app) readStdin(ctx context.Context) ([]byte, error) {
	info, err := a.in.Stat()
	if err != nil || info.Mode()&fs.ModeCharDevice != 0 {
		return nil, nil // closed, a terminal or /dev/null
	}
	type result struct {
		data []byte
		err  error
	}
	done := make(chan result, 1)
	go func() { // ends with the process when the pipe never does
		data, err := io.ReadAll(io.LimitReader(a.in, client.MaxFile+1))
		done <- result{data, err}
	}()
	patience := time.NewTimer(stdinPatience)
	defer patience.Stop()
	for {
		select {
		case r := <-done:
			switch {
			case errors.Is(r.err, syscall.EISDIR):
				return nil, nil
			case r.err != nil:
				return nil, fmt.Errorf("reading standard input: %w", r.err)
			case len(r.data) > client.MaxFile:
				return nil, fmt.Errorf("standard input: more than %d MB; upload it as a file", client.MaxFile/1_000_000)
			}
			return r.data, nil
		case <-patience.C:
			fmt.Fprintln(a.err, "cay: waiting for the end of standard input; -n goes without it")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// withStdin makes call with r and stdin, whatever its size and bytes. What does not fit
// into the call is uploaded; a shell then opens and removes the file before it becomes the
// command.
func withStdin(ctx context.Context, c *client.Client, id string, r client.ExecuteRequest, stdin []byte, call func(client.ExecuteRequest) error) error {
	if len(stdin) <= maxInlineStdin && utf8.Valid(stdin) {
		if len(stdin) > 0 {
			r.Stdin = new(string(stdin))
		}
		return call(r)
	}
	path := "/tmp/.cay-stdin-" + strings.ToLower(rand.Text())
	mode := fs.FileMode(0o600)
	if err := c.WriteFile(ctx, id, path, bytes.NewReader(stdin), client.WriteFileOptions{Mode: &mode, Owner: deref(r.User), Size: int64(len(stdin))}); err != nil {
		return fmt.Errorf("uploading standard input: %w", err)
	}
	r.Args = append([]string{"/bin/sh", "-c", `exec <"$0" && rm -f -- "$0" && exec "$@"`, path}, r.Args...)
	err := call(r)
	if err != nil {
		// The shell may not have come to it. If this fails too, the first error is
		// the one to tell, and the file is only in the way of the sandbox's own user.
		_ = c.RemoveFile(context.WithoutCancel(ctx), id, path, false)
	}
	return err
}
