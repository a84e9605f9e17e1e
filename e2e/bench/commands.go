package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/node"
	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of commands.
const (
	commandTrue   = "execute args [true]"
	commandDirect = "  the same asked of the agent itself"
	commandAdded  = "  what the API adds (difference, pair by pair)"
	commandInside = "  the command's own time inside"
	commandSpawn  = "  the same start inside, by a program that runs there"
	commandShell  = `execute command "true" (by /bin/sh)`
	commandPython = "execute python3 -c 'print(1)'"
	commandLine   = "cay sandbox exec … true"
	dockerTrue    = "docker exec … true"
	dockerShell   = `docker exec … sh -c "true"`
	dockerPython  = "docker exec … python3 -c 'print(1)'"
)

var python = []string{"python3", "-c", "print(1)"}

// row limits how often each starter starts true in a row. The first start is slower everywhere,
// after the work of others has filled the processor's caches, and must not be compared with a later
// one.
const row = 5

// spawn starts true several times in a row, as glibc does it, and prints the milliseconds from each
// start to the end of its wait.
const spawn = `
import os, sys, time
for i in range(int(sys.argv[1])):
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
    print((time.perf_counter() - began) * 1000)
`

// measureCommands runs commands in one sandbox and one container, one at a time.
func measureCommands(ctx context.Context, o options, s *server, d *docker, r *results) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	direct, err := s.agent(ctx, id)
	if err != nil {
		return err
	}
	defer direct.close()
	container := ""
	if d != nil {
		if container, err = d.run(ctx); err != nil {
			return err
		}
	}
	for i := range o.commands() + 1 {
		into := r
		if i == 0 { // the first round warms up and is not counted
			into = &results{}
		}
		if err := s.commandsOnce(ctx, id, direct, into); err != nil {
			return err
		}
		if d != nil {
			if err := d.commandsOnce(ctx, container, into); err != nil {
				return err
			}
		}
	}
	if d != nil {
		if _, err := d.do(ctx, "rm", "--force", container); err != nil {
			return err
		}
	}
	return s.api.DestroySandbox(ctx, id)
}

func (s *server) commandsOnce(ctx context.Context, id string, direct *agent, r *results) error {
	for i := range row {
		if err := s.trueOnce(ctx, id, direct, i%2 == 1, r); err != nil {
			return err
		}
	}
	spawned, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"python3", "-c", spawn, strconv.Itoa(row)}})
	if err != nil {
		return err
	}
	for line := range strings.Lines(spawned.Stdout) {
		took, err := strconv.ParseFloat(strings.TrimSpace(line), 64)
		if err != nil {
			return fmt.Errorf("starting programs inside: %w", err)
		}
		r.add(commandSpawn, unitMS, took)
	}
	began := time.Now()
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Command: new("true")}); err != nil {
		return err
	}
	r.took(commandShell, began)
	began = time.Now()
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: python}); err != nil {
		return err
	}
	r.took(commandPython, began)
	began = time.Now()
	if err := s.line(ctx, "sandbox", "exec", id, "--", "true"); err != nil {
		return err
	}
	r.took(commandLine, began)
	return nil
}

// trueOnce runs true through the API and directly by the agent, the latter first if directFirst is
// set.
func (s *server) trueOnce(ctx context.Context, id string, direct *agent, directFirst bool, r *results) error {
	var whole, asked, inside time.Duration
	calls := []func() error{
		func() error {
			began := time.Now()
			_, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}})
			whole = time.Since(began)
			return err
		},
		func() (err error) {
			began := time.Now()
			inside, err = direct.execute(ctx, "true")
			asked = time.Since(began)
			return err
		},
	}
	if directFirst {
		slices.Reverse(calls)
	}
	for _, call := range calls {
		if err := call(); err != nil {
			return err
		}
	}
	r.add(commandTrue, unitMS, milliseconds(whole))
	r.add(commandDirect, unitMS, milliseconds(asked))
	r.add(commandAdded, unitMS, milliseconds(whole-asked))
	r.add(commandInside, unitMS, milliseconds(inside))
	return nil
}

func (d *docker) commandsOnce(ctx context.Context, container string, r *results) error {
	for _, c := range []struct {
		name  string
		args  []string
		times int
	}{
		{dockerTrue, []string{"true"}, row},
		{dockerShell, []string{"sh", "-c", "true"}, 1},
		{dockerPython, python, 1},
	} {
		for range c.times {
			began := time.Now()
			if _, err := d.do(ctx, append([]string{"exec", container}, c.args...)...); err != nil {
				return err
			}
			r.took(c.name, began)
		}
	}
	return nil
}

// agent calls a sandbox's agent without the server in between. The difference to a call through the
// API is the cost of the API.
type agent struct {
	calls  *agentapi.Client
	target agentapi.Target
}

func (s *server) agent(ctx context.Context, id string) (*agent, error) {
	res, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"python3", "-c",
		"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9)); print(s.getsockname()[0])"}})
	if err != nil {
		return nil, fmt.Errorf("asking a sandbox for its address: %w", err)
	}
	address := net.JoinHostPort(strings.TrimSpace(res.Stdout), strconv.Itoa(node.AgentPort))
	// The node's own record of the sandbox has the secret.
	data, err := os.ReadFile(filepath.Join(s.dataDir(), "sandboxes", id, "life.json"))
	if err != nil {
		return nil, fmt.Errorf("reading the record of a sandbox: %w", err)
	}
	var record struct{ Run, Token string }
	if err := json.Unmarshal(data, &record); err != nil {
		return nil, fmt.Errorf("reading the record of a sandbox: %w", err)
	}
	var dialer net.Dialer
	return &agent{
		calls: agentapi.NewClient(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, "tcp4", address)
			if err != nil {
				return nil, err
			}
			return agentapi.Authenticate(ctx, conn, record.Token)
		}),
		target: agentapi.Target{SandboxID: id, Run: record.Run},
	}, nil
}

// execute runs a command and returns the duration that the agent reports.
func (a *agent) execute(ctx context.Context, args ...string) (time.Duration, error) {
	res, err := a.calls.Execute(ctx, a.target, agentapi.ExecuteRequest{Args: args, Timeout: 30 * time.Second})
	if err != nil {
		return 0, fmt.Errorf("asking the agent: %w", err)
	}
	if res.ExitCode != 0 {
		return 0, fmt.Errorf("a command ended with %d: %s", res.ExitCode, res.Stderr)
	}
	return res.Duration, nil
}

func (a *agent) close() { a.calls.CloseIdle() }
