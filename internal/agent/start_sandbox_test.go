package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// server is a start command that answers after a moment. It logs its user and its working directory.
const server = "id -un; pwd; echo $FROM_SANDBOX; mkdir -p /tmp/www; echo hello >/tmp/www/index.html; sleep 0.3; " +
	"exec httpd -f -p 8080 -h /tmp/www"

func ready(r agentapi.Ready) *agentapi.Ready {
	r.TimeoutMs = 60_000
	return &r
}

func TestStartReady(t *testing.T) {
	for name, c := range map[string]struct {
		command string
		ready   agentapi.Ready
	}{
		"port":        {server, agentapi.Ready{Port: 8080}},
		"http":        {server, agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: 8080, Path: "/index.html"}}},
		"command":     {server, agentapi.Ready{Command: "wget -q -O /dev/null http://127.0.0.1:8080/"}},
		"own address": {strings.Replace(server, "8080", "ADDRESS:8080", 1), agentapi.Ready{Port: 8080}},
		// The command exits with 0, and the process that it left becomes ready.
		"daemon": {strings.Replace(server, "exec httpd -f", "setsid httpd", 1) + "; (sleep 0.5; touch /tmp/up; sleep 1000) & ", agentapi.Ready{Command: "test -e /tmp/up"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSandbox(t, options{})
			address, _, _ := strings.Cut(s.addr, ":")
			command := strings.Replace(c.command, "ADDRESS", address, 1)
			if err := s.client.Start(t.Context(), s.target,
				agentapi.StartRequest{Command: command, Ready: ready(c.ready)}); err != nil {
				t.Fatalf("%v, log: %s", err, s.sh("cat "+agentapi.StartLog))
			}
			if got := s.sh("wget -q -O - http://" + address + ":8080/index.html"); got != "hello" {
				t.Errorf("the server answers %q", got)
			}
			if got := s.sh("cat " + agentapi.StartLog); !strings.HasPrefix(got, "root\n/root\nyes") {
				t.Errorf("the log has %q", got)
			}
			err := s.client.Start(t.Context(), s.target, agentapi.StartRequest{Command: c.command})
			if err == nil || !strings.Contains(err.Error(), "started before") {
				t.Errorf("started twice: %v", err)
			}
		})
	}
}

// TestStartGoesOn checks that a start command belongs to no call and is otherwise a command like all others.
func TestStartGoesOn(t *testing.T) {
	s := startSandbox(t, options{})
	init := agentapi.InitRequest{DefaultUser: "user", DefaultWorkdir: "/tmp", Env: map[string]string{"GREETING": "hello"}}
	if err := s.client.Init(t.Context(), s.target, init); err != nil {
		t.Fatal(err)
	}
	// No shell reads the arguments, and without a check the call does not wait.
	const script = `id -un; pwd; echo "$GREETING $1"; cat; while :; do sleep 0.1; done`
	err := s.client.Start(t.Context(), s.target,
		agentapi.StartRequest{Args: []string{"sh", "-c", script, "x", "$HOME"}})
	if err != nil {
		t.Fatal(err)
	}
	s.client.Drop(s.target.SandboxID)
	s.eventually("the log", func() bool { return s.sh("cat "+agentapi.StartLog) == "user\n/tmp\nhello $HOME" })
	if res := s.exec(agentapi.ExecuteRequest{Command: "sleep 60", Timeout: 100 * time.Millisecond}); !res.TimedOut {
		t.Errorf("the command beside it ended with %+v", res)
	}
	if busy, err := s.client.Busy(t.Context(), s.target); !busy || err != nil {
		t.Errorf("busy: %v, %v", busy, err)
	}
	var list struct {
		Processes []struct{ Tag string }
	}
	if _, err := s.rpc("/process.Process/List", "", struct{}{}, &list); err != nil || len(list.Processes) != 1 ||
		list.Processes[0].Tag != "start_command" {
		t.Errorf("the list is %+v, %v", list, err)
	}
	// Relieving memory kills it like all others. Its end is logged, and it is not started again.
	if _, killed, err := s.client.RelieveMemory(t.Context(), s.target, 1<<40); err != nil || killed < 1 {
		t.Errorf("killed %d, %v", killed, err)
	}
	s.eventually("the end in the log", func() bool {
		return strings.HasSuffix(s.sh("cat "+agentapi.StartLog),
			"\ncay: the start command was ended by signal 9 (killed), out of memory")
	})
	s.sh("! ps | grep '[G]REETING'")
}

// TestStartAsAnother runs a start command and its check as another user than the sandbox's default.
func TestStartAsAnother(t *testing.T) {
	s := startSandbox(t, options{})
	if err := s.client.Init(t.Context(), s.target, agentapi.InitRequest{DefaultUser: "user"}); err != nil {
		t.Fatal(err)
	}
	err := s.client.Start(t.Context(), s.target, agentapi.StartRequest{
		Command: "id -un; echo up >/root/up; sleep 1000", User: "root",
		Ready: ready(agentapi.Ready{Command: "test -e /root/up"}),
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.sh("id -un"); got != "user" {
		t.Errorf("other commands run as %s", got)
	}
	res := s.exec(agentapi.ExecuteRequest{Command: "head -1 " + agentapi.StartLog, User: "root"})
	if string(res.Stdout) != "root\n" {
		t.Errorf("the start command ran as %+v", res)
	}
}

func TestStartFails(t *testing.T) {
	port := &agentapi.Ready{Port: 8080, TimeoutMs: 60_000}
	for name, c := range map[string]struct {
		give agentapi.StartRequest
		init agentapi.InitRequest
		want string
	}{
		"ends":            {give: agentapi.StartRequest{Command: "echo starting; printf '\\033[31mno config\\000\\n' >&2; exit 3", Ready: port}, want: "the start command ended with exit code 3 before it was ready; its last output:\nstarting\n[31mno config"},
		"ends well":       {give: agentapi.StartRequest{Command: "true", Ready: port}, want: "the start command ended with exit code 0 before it was ready; it wrote nothing"},
		"is killed":       {give: agentapi.StartRequest{Command: "kill -9 $$", Ready: port}, want: "the start command was ended by signal 9 (killed) before it was ready; it wrote nothing"},
		"never listens":   {give: agentapi.StartRequest{Command: "echo waiting; sleep 1000", Ready: &agentapi.Ready{Port: 8080, TimeoutMs: 1500}}, want: "the start command was not ready within 1.5s: nothing listens on port 8080; its last output:\nwaiting"},
		"check fails":     {give: agentapi.StartRequest{Command: "sleep 1000", Ready: &agentapi.Ready{Command: "exit 7", TimeoutMs: 1500}}, want: "the start command was not ready within 1.5s: its check ended with exit code 7; it wrote nothing"},
		"check hangs":     {give: agentapi.StartRequest{Command: "sleep 1000", Ready: &agentapi.Ready{Command: "sleep 77", TimeoutMs: 1500}}, want: "the start command was not ready within 1.5s: its check did not end; it wrote nothing"},
		"no such program": {give: agentapi.StartRequest{Args: []string{"nosuch"}}, want: `the start command could not be started: starting "nosuch": no such file or directory`},
		"no directory":    {give: agentapi.StartRequest{Command: "true"}, init: agentapi.InitRequest{DefaultWorkdir: "/nosuch"}, want: `the start command could not be started: working directory "/nosuch" does not exist`},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSandbox(t, options{})
			if err := s.client.Init(t.Context(), s.target, c.init); err != nil {
				t.Fatal(err)
			}
			err := s.client.Start(t.Context(), s.target, c.give)
			f := fault.As(err)
			if f == nil || f.Kind != fault.Conflict || f.Code != fault.CodeStartFailed || f.Detail != c.want {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
			if name == "check hangs" {
				s.sh("! ps | grep 'sleep [7]7'")
			}
		})
	}
}

// TestStartCallerGoesAway cancels a call during the check. The check is killed and the start command runs on.
func TestStartCallerGoesAway(t *testing.T) {
	s := startSandbox(t, options{})
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error, 1)
	go func() {
		over <- s.client.Start(ctx, s.target,
			agentapi.StartRequest{Command: "sleep 1000", Ready: ready(agentapi.Ready{Command: "touch /tmp/checked; sleep 77"})})
	}()
	s.eventually("the check runs", func() bool { return s.sh("ls /tmp") == "checked" })
	cancel()
	if err := <-over; err == nil {
		t.Error("the call succeeded")
	}
	s.eventually("the check is gone", func() bool { return s.sh("ps | grep 'sleep [7]7' || true") == "" })
	s.sh("ps | grep 'sleep [1]000'")
}
