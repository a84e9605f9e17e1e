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

	cay "github.com/cayhq/cay/sdk/go"
)

const (
	// maxInlineStdin limits the standard input that the call itself carries, in bytes. More is uploaded as a file first.
	// JSON can make six bytes of one, and the API takes 8 MiB, so that with more than 1.3 MiB it refuses some calls.
	maxInlineStdin = 1 << 20
	// stdinPatience is the time after which cay says that it waits for standard input, since a pipe that stays open looks
	// like a hang. With less, it says so of programs that are merely slow.
	stdinPatience = 5 * time.Second
)

// readStdin returns standard input if it is a pipe or a file, read to its end. It reads nothing from a terminal or a
// device.
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
	go func() { // ends with the process if the pipe stays open
		data, err := io.ReadAll(io.LimitReader(a.in, cay.MaxFile+1))
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
			case len(r.data) > cay.MaxFile:
				return nil, fmt.Errorf("standard input: more than %d MB; upload it as a file", cay.MaxFile/1_000_000)
			}
			return r.data, nil
		case <-patience.C:
			fmt.Fprintln(a.err, "cay: waiting for the end of standard input; -n goes without it")
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// withStdin calls call with a request that gives stdin to the command of r. It uploads input that does not fit into the
// call, and makes the command a shell that opens and removes the file before it becomes the command of r.
func withStdin(ctx context.Context, c *cay.Client, id string, r cay.ExecuteRequest, stdin []byte,
	call func(cay.ExecuteRequest) error) error {
	if len(stdin) <= maxInlineStdin && utf8.Valid(stdin) {
		if len(stdin) > 0 {
			r.Stdin = new(string(stdin))
		}
		return call(r)
	}
	path := "/tmp/.cay-stdin-" + strings.ToLower(rand.Text())
	mode := fs.FileMode(0o600)
	if err := c.WriteFile(ctx, id, path, bytes.NewReader(stdin),
		cay.WriteFileOptions{Mode: &mode, Owner: deref(r.User), Size: int64(len(stdin))}); err != nil {
		return fmt.Errorf("uploading standard input: %w", err)
	}
	r.Args = append([]string{"/bin/sh", "-c", `exec <"$0" && rm -f -- "$0" && exec "$@"`, path}, r.Args...)
	err := call(r)
	if err != nil {
		// The shell may not have removed the file. If this fails too, the first error says more, and the file takes only
		// the sandbox's own disk.
		_ = c.RemoveFile(context.WithoutCancel(ctx), id, path, false)
	}
	return err
}

// readSecret returns what standard input has, without the end of its last line. No flag has a secret, since other users
// of this machine can read command lines.
func (a *app) readSecret(what string) (string, error) {
	const most = 64 << 10 // bytes; the server takes less
	b, err := io.ReadAll(io.LimitReader(a.in, most))
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", what, err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}
