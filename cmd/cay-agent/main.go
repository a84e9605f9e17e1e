// Command cay-agent is PID 1 of a sandbox. It takes no arguments; the environment variable
// CAY_PIDS_MAX limits the processes and threads of all commands together. It never ends by
// itself. If it cannot serve, it prints the reason on standard error and exits with status 1,
// which ends the sandbox.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/cayhq/cay/internal/agent"
	"github.com/cayhq/cay/internal/gctune"
)

const cgroupRoot = "/sys/fs/cgroup"

func main() {
	gctune.Rest(0)
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "cay-agent:", err)
		os.Exit(1)
	}
}

func run() error {
	if err := agent.IgnoreSignals(); err != nil {
		return err
	}
	syscall.Umask(0o022)
	limit, err := pidsMax(os.Getenv("CAY_PIDS_MAX"))
	if err != nil {
		return err
	}
	// After a boot with the files of an earlier one, the files have their attributes.
	if os.Getenv("CAY_REBOOTED") == "" {
		if err := agent.SetAttributes("/", agent.AttributesPath); err != nil {
			return err
		}
	}
	a, err := agent.New(agent.Config{MaxProcesses: limit})
	if err != nil {
		return err
	}
	if err := agent.Harden(cgroupRoot); err != nil {
		return err
	}
	l, err := agent.Listen(context.Background())
	if err != nil {
		return err
	}
	return a.Serve(l)
}

func pidsMax(s string) (int, error) {
	if s == "" {
		return agent.DefaultMaxProcesses, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("CAY_PIDS_MAX=%q is not a positive number", s)
	}
	return n, nil
}
