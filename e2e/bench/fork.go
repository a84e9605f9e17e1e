package main

import (
	"context"
	"fmt"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of snapshots and forks of a sandbox with a process that has filled some
// memory.
const (
	forkOf       = "fork of %d, all answer a command"
	forkAnswered = "fork of %d"
	snapshotMade = "snapshot of one that runs"
	fromSnapshot = "create from a snapshot"
	fromFirst    = "create from a snapshot until the first command answered"

	// forkMemory is the memory that the process fills with random bytes, MiB. It is about that of a
	// Python process with some libraries loaded.
	forkMemory = 64
)

// measureFork takes snapshots and forks of one sandbox again and again.
func measureFork(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	program := fmt.Sprintf("import os, time\nb = os.urandom(%d << 20)\nopen('/dev/shm/filled', 'w').close(); "+
		"time.sleep(1e6)", forkMemory)
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"sh", "-c",
		`python3 -c "$0" >/dev/null 2>&1 & until [ -e /dev/shm/filled ]; do kill -0 $! && sleep 0.1 || exit 1; done`, program}}); err != nil {
		return err
	}
	for i := range max(3, o.starts/3) + 1 {
		into := r
		if i == 0 { // the first round warms the page cache
			into = &results{}
		}
		for _, count := range []int{1, 10} {
			if err := s.forkOnce(ctx, id, count, into); err != nil {
				return err
			}
		}
		if err := s.snapshotOnce(ctx, id, into); err != nil {
			return err
		}
	}
	return s.api.DestroySandbox(ctx, id)
}

func (s *server) forkOnce(ctx context.Context, id string, count int, r *results) error {
	began := time.Now()
	children, err := s.api.Fork(ctx, id, cay.ForkRequest{Count: &count})
	if err != nil {
		return fmt.Errorf("forking: %w", err)
	}
	r.took(fmt.Sprintf(forkAnswered, count), began)
	for _, c := range children {
		if c.Error != nil {
			return fmt.Errorf("forking: a child: %s", c.Error.Detail)
		}
		if _, err := s.execute(ctx, c.Sandbox.ID, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
			return err
		}
	}
	r.took(fmt.Sprintf(forkOf, count), began)
	for _, c := range children {
		if err := s.api.DestroySandbox(ctx, c.Sandbox.ID); err != nil {
			return fmt.Errorf("destroying a child: %w", err)
		}
	}
	return nil
}

func (s *server) snapshotOnce(ctx context.Context, id string, r *results) error {
	began := time.Now()
	snap, err := s.api.CreateSnapshot(ctx, id, "")
	if err != nil {
		return fmt.Errorf("making a snapshot: %w", err)
	}
	r.took(snapshotMade, began)
	began = time.Now()
	sandbox, err := s.api.CreateSandbox(ctx, cay.CreateSandboxRequest{Snapshot: snap.ID}, cay.CreateOptions{})
	if err != nil {
		return fmt.Errorf("creating from a snapshot: %w", err)
	}
	r.took(fromSnapshot, began)
	if _, err := s.execute(ctx, sandbox.ID, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
		return err
	}
	r.took(fromFirst, began)
	if err := s.api.DestroySandbox(ctx, sandbox.ID); err != nil {
		return fmt.Errorf("destroying: %w", err)
	}
	return s.api.DeleteSnapshot(ctx, snap.ID)
}
