package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of streams and terminals.
const (
	liveFirst    = "streamed execute: first byte of echo"
	liveWhole    = "  the plain answer of the same"
	liveEcho     = "terminal: echo of a key"
	liveOutput   = "streamed execute: 8 MiB of output"
	liveFollowed = "process: output as it is followed, of which at most 1 MiB is kept"
)

// followedSize is the output of the followed process, bytes: seconds at 10 MB/s.
const followedSize = 32 << 20

// measureLive streams output and types into a terminal of one sandbox.
func measureLive(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	for i := range o.commands() + 1 {
		into := r
		if i == 0 { // the first round warms up and is not counted
			into = &results{}
		}
		if err := s.firstByte(ctx, id, into); err != nil {
			return err
		}
	}
	if err := s.echoes(ctx, id, 4*o.commands(), r); err != nil {
		return err
	}
	for range 5 {
		if err := s.output(ctx, id, r); err != nil {
			return err
		}
	}
	return s.api.DestroySandbox(ctx, id)
}

func (s *server) firstByte(ctx context.Context, id string, r *results) error {
	request := cay.ExecuteRequest{Command: new("echo x")}
	began := time.Now()
	first := time.Duration(0)
	_, err := s.api.ExecuteStream(ctx, id, request, func(o cay.Output) error {
		if first == 0 && len(o.Data) > 0 {
			first = time.Since(began)
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.add(liveFirst, unitMS, milliseconds(first))
	began = time.Now()
	if _, err := s.execute(ctx, id, request); err != nil {
		return err
	}
	r.took(liveWhole, began)
	return nil
}

// echoes types keys, one at a time, into a program that echoes each.
func (s *server) echoes(ctx context.Context, id string, keys int, r *results) error {
	t, err := s.api.OpenTerminal(ctx, id, cay.TerminalOptions{Command: "stty raw -echo; echo ready; exec cat"})
	if err != nil {
		return err
	}
	defer t.Close()
	b := make([]byte, 1<<10)
	var shown []byte
	for !bytes.Contains(shown, []byte("ready")) {
		n, err := t.Read(b)
		if err != nil {
			return err
		}
		shown = append(shown, b[:n]...)
	}
	if i := bytes.IndexByte(shown, '\n'); i < 0 { // the end of the program's line
		if _, err := t.Read(b); err != nil {
			return err
		}
	}
	for range keys {
		began := time.Now()
		if _, err := t.Write([]byte("k")); err != nil {
			return err
		}
		if n, err := t.Read(b); err != nil || string(b[:n]) != "k" {
			return fmt.Errorf("the terminal shows %q: %w", b[:n], err)
		}
		r.took(liveEcho, began)
	}
	return s.api.KillProcess(ctx, id, fmt.Sprint(t.PID))
}

// output streams as many bytes as one execution returns, and follows a process with more output
// than is kept.
func (s *server) output(ctx context.Context, id string, r *results) error {
	const streamed = 8 << 20
	n := int64(0)
	count := func(o cay.Output) error { n += int64(len(o.Data)) + o.Lost; return nil }
	began := time.Now()
	if _, err := s.api.ExecuteStream(ctx, id,
		cay.ExecuteRequest{Command: new(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", streamed))}, count); err != nil {
		return err
	}
	if n != streamed {
		return fmt.Errorf("got %d bytes, want %d", n, streamed)
	}
	r.add(liveOutput, unitMBps, float64(n)/1e6/time.Since(began).Seconds())
	n = 0
	began = time.Now()
	p, err := s.api.StartProcess(ctx, id,
		cay.StartProcessRequest{Command: new(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x", followedSize))})
	if err != nil {
		return err
	}
	if _, err := s.api.FollowProcess(ctx, id, fmt.Sprint(p.PID), 0, count); err != nil {
		return err
	}
	if n != followedSize {
		return fmt.Errorf("got or lost %d bytes, want %d", n, int64(followedSize))
	}
	r.add(liveFollowed, unitMBps, float64(n)/1e6/time.Since(began).Seconds())
	return s.api.KillProcess(ctx, id, fmt.Sprint(p.PID))
}
