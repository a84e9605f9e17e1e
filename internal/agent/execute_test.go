package agent_test

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

func TestExecuteResults(t *testing.T) {
	s := startSandbox(t, options{})
	binary := bytes.Repeat([]byte{0, 0xff, 1, '\n'}, 50_000) // more than a pipe holds
	for name, c := range map[string]struct {
		give agentapi.ExecuteRequest
		want agentapi.ExecuteResult
	}{
		"shell":            {agentapi.ExecuteRequest{Command: "echo out; echo err >&2; exit 3"}, agentapi.ExecuteResult{ExitCode: 3, Stdout: []byte("out\n"), Stderr: []byte("err\n")}},
		"no shell":         {agentapi.ExecuteRequest{Args: []string{"echo", "$HOME", "a b"}}, agentapi.ExecuteResult{Stdout: []byte("$HOME a b\n")}},
		"binary both ways": {agentapi.ExecuteRequest{Args: []string{"cat"}, Stdin: binary}, agentapi.ExecuteResult{Stdout: binary}},
		"no input":         {agentapi.ExecuteRequest{Args: []string{"cat"}}, agentapi.ExecuteResult{}},
		"input not read":   {agentapi.ExecuteRequest{Args: []string{"true"}, Stdin: binary}, agentapi.ExecuteResult{}},
		"own signal":       {agentapi.ExecuteRequest{Command: "kill -9 $$"}, agentapi.ExecuteResult{ExitCode: 137, Signal: 9}},
		"signal of child":  {agentapi.ExecuteRequest{Command: "sh -c 'kill -9 $$'; exit $?"}, agentapi.ExecuteResult{ExitCode: 137, Stderr: []byte("Killed\n")}},
		"no such program":  {agentapi.ExecuteRequest{Args: []string{"nosuch"}}, agentapi.ExecuteResult{ExitCode: 127, Stderr: []byte("nosuch: no such file or directory\n")}},
		"not executable":   {agentapi.ExecuteRequest{Args: []string{"/etc/passwd"}}, agentapi.ExecuteResult{ExitCode: 126, Stderr: []byte("/etc/passwd: permission denied\n")}},
		"user":             {agentapi.ExecuteRequest{Command: "id; pwd; echo $HOME $USER $LOGNAME", User: "user"}, agentapi.ExecuteResult{Stdout: []byte("uid=1000(user) gid=1000(user) groups=1000(user),2000(extra),2001(more)\n/home/user\n/home/user user user\n")}},
		"user by number":   {agentapi.ExecuteRequest{Command: "id; pwd", User: "4711:2000"}, agentapi.ExecuteResult{Stdout: []byte("uid=4711 gid=2000(extra) groups=2000(extra)\n/\n")}},
		"home is missing":  {agentapi.ExecuteRequest{Command: "pwd", User: "nohome"}, agentapi.ExecuteResult{Stdout: []byte("/\n")}},
		"env":              {agentapi.ExecuteRequest{Command: "echo $FROM_SANDBOX $A", Env: map[string]string{"A": "x y", "FROM_SANDBOX": "no"}}, agentapi.ExecuteResult{Stdout: []byte("no x y\n")}},
		"workdir":          {agentapi.ExecuteRequest{Command: "pwd", Workdir: "/tmp"}, agentapi.ExecuteResult{Stdout: []byte("/tmp\n")}},
		"umask":            {agentapi.ExecuteRequest{Command: "umask"}, agentapi.ExecuteResult{Stdout: []byte("0022\n")}},
		"own path":         {agentapi.ExecuteRequest{Args: []string{"nosuch"}, Env: map[string]string{"PATH": "/nowhere"}}, agentapi.ExecuteResult{ExitCode: 127, Stderr: []byte("nosuch: no such file or directory\n")}},
		"signals are not ignored": {
			agentapi.ExecuteRequest{Command: "sh -c 'kill -TERM $$'; echo $?; sh -c 'kill -HUP $$'; echo $?"},
			agentapi.ExecuteResult{Stdout: []byte("143\n129\n"), Stderr: []byte("Terminated\nHangup\n")},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			start := time.Now()
			got := s.exec(c.give)
			if most := time.Since(start); got.Duration <= 0 || got.Duration > most {
				t.Errorf("duration %s, of %s that the call took", got.Duration, most)
			}
			ignore := cmpopts.IgnoreFields(agentapi.ExecuteResult{}, "Duration")
			if diff := cmp.Diff(c.want, got, ignore, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExecuteRefused(t *testing.T) {
	s := startSandbox(t, options{})
	for name, c := range map[string]struct {
		give  agentapi.ExecuteRequest
		code  string
		field string
	}{
		"missing workdir":   {agentapi.ExecuteRequest{Command: "true", Workdir: "/nosuch"}, fault.CodeWorkdirNotFound, "workdir"},
		"workdir is a file": {agentapi.ExecuteRequest{Command: "true", Workdir: "/etc/passwd"}, fault.CodeWorkdirNotFound, "workdir"},
		"unknown user":      {agentapi.ExecuteRequest{Command: "true", User: "nobody-we-know"}, fault.CodeUnknownUser, "user"},
		"environment name":  {agentapi.ExecuteRequest{Command: "true", Env: map[string]string{"A=B": ""}}, fault.CodeInvalidEnv, "env"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.client.Execute(t.Context(), s.target, c.give)
			f := fault.As(err)
			if f == nil || f.Kind != fault.Invalid || f.Code != c.code || f.Field != c.field {
				t.Errorf("got %v, want Invalid %s in %s", err, c.code, c.field)
			}
		})
	}
}

// TestTimeoutReachesEveryDescendant lets a command's time limit pass. The command dies with all its descendants, also
// those in other sessions.
func TestTimeoutReachesEveryDescendant(t *testing.T) {
	s := startSandbox(t, options{})
	res := s.exec(agentapi.ExecuteRequest{
		Command: "setsid sleep 1000 & (sleep 1001 &) & nohup sleep 1002 & trap '' TERM HUP; echo begun; probe daemon; sleep 1003",
		Timeout: 2 * time.Second,
	})
	if !res.TimedOut || res.ExitCode != agentapi.ExitTimedOut || !strings.HasPrefix(string(res.Stdout), "begun\n") {
		t.Errorf("got %+v, want timed out with output", res)
	}
	lines := strings.Fields(string(res.Stdout))
	if len(lines) != 2 {
		t.Fatalf("the daemon did not print its pid: %q", res.Stdout)
	}
	if got := s.sh("kill -0 " + lines[1] + " 2>/dev/null && echo alive || echo gone"); got != "gone" {
		t.Errorf("the daemon is %s", got)
	}
	if left := s.sh("ps | grep -E '[s]leep|[d]aemon' || true"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}

// TestCancelKills cancels a call, which kills its command.
func TestCancelKills(t *testing.T) {
	s := startSandbox(t, options{})
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan error)
	go func() {
		_, err := s.client.Execute(ctx, s.target, agentapi.ExecuteRequest{Command: "setsid sleep 4242 & sleep 4242"})
		over <- err
	}()
	s.eventually("the command runs", func() bool {
		return s.sh("ps | grep -c '[s]leep 4242' || true") == "2" || s.sh("ps | grep -c '[s]leep 4242' || true") == "3"
	})
	cancel()
	if err := <-over; err == nil || ctx.Err() == nil {
		t.Errorf("a cancelled execute returned %v", err)
	}
	s.eventually("the command is gone", func() bool { return s.sh("ps | grep -c '[s]leep 4242' || true") == "0" })
}

// TestBackgroundJobSurvives leaves a background job that has the output open. The job lives on
// and does not delay the answer.
func TestBackgroundJobSurvives(t *testing.T) {
	s := startSandbox(t, options{})
	res := s.exec(agentapi.ExecuteRequest{Command: "(while :; do echo tick; sleep 0.05; done) & echo $!"})
	if res.TimedOut {
		t.Error("the answer waited for the job")
	}
	pid := strings.Fields(string(res.Stdout))[0]
	if pid == "tick" {
		pid = strings.Fields(string(res.Stdout))[1]
	}
	// The job still writes to the pipe after the answer.
	s.sh("sleep 1; kill -0 " + pid)
	s.sh("kill -9 " + pid)
}

func TestOutputFlood(t *testing.T) {
	s := startSandbox(t, options{})
	res := s.exec(agentapi.ExecuteRequest{Command: "yes | head -c 100000000; echo done >&2"})
	if len(res.Stdout) != agentapi.DefaultMaxOutput || !res.StdoutTruncated {
		t.Errorf("%d bytes, truncated %v; want %d, true", len(res.Stdout), res.StdoutTruncated, agentapi.DefaultMaxOutput)
	}
	if string(res.Stderr) != "done\n" || res.StderrTruncated || res.ExitCode != 0 {
		t.Errorf("stderr %q, truncated %v, exit code %d", res.Stderr, res.StderrTruncated, res.ExitCode)
	}
	t.Logf("100 MB through both pipes, 8 MiB kept: %s", res.Duration)

	res = s.exec(agentapi.ExecuteRequest{Command: "yes", Timeout: time.Second, MaxOutput: 1000})
	if len(res.Stdout) != 1000 || !res.StdoutTruncated || !res.TimedOut {
		t.Errorf("endless: %d bytes, truncated %v, timed out %v", len(res.Stdout), res.StdoutTruncated, res.TimedOut)
	}
	res = s.exec(agentapi.ExecuteRequest{Command: "printf 0123456789", MaxOutput: 10})
	if string(res.Stdout) != "0123456789" || res.StdoutTruncated {
		t.Errorf("exactly the limit: %q, truncated %v", res.Stdout, res.StdoutTruncated)
	}
}

func TestManyAtOnce(t *testing.T) {
	s := startSandbox(t, options{})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			res, err := s.client.Execute(t.Context(), s.target, agentapi.ExecuteRequest{
				Command: fmt.Sprintf("sleep 0.2; cat; echo %d >&2; exit %d", i, i), Stdin: []byte(strconv.Itoa(i)), Timeout: 30 * time.Second,
			})
			if err != nil || res.ExitCode != i || string(res.Stdout) != strconv.Itoa(i) ||
				string(res.Stderr) != strconv.Itoa(i)+"\n" {
				t.Errorf("command %d: %+v, %v", i, res, err)
			}
		})
	}
	wg.Wait()
}

// TestForkBomb runs a fork bomb. The guard ends it at its limit, and the agent answers all the time.
func TestForkBomb(t *testing.T) {
	s := startSandbox(t, options{pidsMax: 64})
	res := s.exec(agentapi.ExecuteRequest{Command: "b() { b | b & b; }; b"})
	if res.ExitCode == 0 {
		t.Errorf("the bomb ended with %+v", res)
	}
	// The bomb's first process may have failed to fork and ended; the others are killed too.
	s.eventually("nothing of the bomb is left", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		processes := 0
		err := s.client.List(ctx, s.target, "/proc", "", 1, func(e agentapi.Entry) error {
			if _, err := strconv.Atoi(e.Name); err == nil {
				processes++
			}
			return nil
		})
		// The bomb leaves the agent little CPU, so that a call may fail.
		return err == nil && processes == 1
	})
	s.sh("for i in $(seq 40); do sleep 1 & done; wait")
}

// TestProcessLimit makes more processes than the limit. No fork beyond it succeeds, however often it is tried.
func TestProcessLimit(t *testing.T) {
	const limit, threads = 64, 20 // the program that forks is one of Go, with at most so many threads
	s := startSandbox(t, options{pidsMax: limit})
	res := s.exec(agentapi.ExecuteRequest{Args: []string{"probe", "processes", "300"}})
	n, err := strconv.Atoi(strings.TrimSpace(string(res.Stdout)))
	if err != nil || res.ExitCode != 0 || n >= limit || n < limit-threads {
		t.Errorf("of a limit of %d: %+v, %v", limit, res, err)
	}
	s = startSandbox(t, options{pidsMax: limit}) // a new one, since processes left by the first command count
	res = s.exec(agentapi.ExecuteRequest{Command: "for i in $(seq 200); do sleep 100 & done; wait"})
	if res.ExitCode == 0 || !strings.Contains(string(res.Stderr), "fork") {
		t.Errorf("200 processes were possible: %+v", res)
	}
}

// TestFilledUp runs a command that slowly fills up to its limit and stays there. The guard does not end it.
func TestFilledUp(t *testing.T) {
	const limit, threads = 64, 20
	s := startSandbox(t, options{pidsMax: limit})
	res := s.exec(agentapi.ExecuteRequest{Args: []string{"probe", "fill", strconv.Itoa(limit - threads)}})
	n, err := strconv.Atoi(strings.TrimSpace(string(res.Stdout)))
	if err != nil || res.ExitCode != 0 || n < limit-threads {
		t.Errorf("ended with %+v, %v", res, err)
	}
}

// TestZombieHoarder makes zombies, which the limit does not count. The guard ends the command before they take the
// sandbox's memory.
func TestZombieHoarder(t *testing.T) {
	s := startSandbox(t, options{pidsMax: 100})
	res := s.exec(agentapi.ExecuteRequest{Args: []string{"probe", "hoard"}})
	if res.Signal != 9 || res.TimedOut {
		t.Errorf("the hoarder ended with %+v, want killed", res)
	}
	s.eventually("zombies are gone", func() bool {
		return s.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z ' || true") == "0"
	})
}

func TestOrphansAreReaped(t *testing.T) {
	s := startSandbox(t, options{})
	s.sh("probe zombies 1000")
	s.eventually("zombies are gone", func() bool {
		return s.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z ' || true") == "0"
	})
	// Reaping orphans takes no command's end from its waiter.
	for i := range 20 {
		res := s.exec(agentapi.ExecuteRequest{Command: fmt.Sprintf("(exit 1 &) ; (exit 2 &); exit %d", i)})
		if res.ExitCode != i {
			t.Errorf("command %d: exit code %d", i, res.ExitCode)
		}
	}
}

func TestReliefKillsTheLargest(t *testing.T) {
	s := startSandbox(t, options{})
	type end struct {
		res agentapi.ExecuteResult
		err error
	}
	run := func(command string) chan end {
		over := make(chan end, 1)
		go func() {
			res, err := s.client.Execute(t.Context(), s.target,
				agentapi.ExecuteRequest{Command: command, Timeout: 3 * time.Minute})
			over <- end{res, err}
		}()
		return over
	}
	large, small := run("probe alloc 200 > /tmp/large"), run("probe alloc 20 >/tmp/small & wait $!; echo ended")
	s.eventually("memory is held", func() bool {
		return s.sh("cat /tmp/large /tmp/small 2>/dev/null | wc -l") == "2"
	})
	freed, killed, err := s.client.RelieveMemory(t.Context(), s.target, 100<<20)
	if err != nil || killed != 1 || freed < 200<<20 || freed > 300<<20 {
		t.Fatalf("freed %d MiB, killed %d, %v; want 200, 1", freed>>20, killed, err)
	}
	e := <-large
	if e.err != nil || !e.res.OOMKilled || e.res.ExitCode != 137 || e.res.TimedOut {
		t.Errorf("the large one: %+v, %v; want OOM killed, 137", e.res, e.err)
	}
	if got := s.sh("ps | grep -c '[p]robe alloc 20$'"); got == "0" {
		t.Error("the small one is gone too")
	}
	// Relieving more memory than there is kills everything but the agent.
	freed, killed, err = s.client.RelieveMemory(t.Context(), s.target, 1<<40)
	if err != nil || killed < 1 || freed < 20<<20 {
		t.Errorf("freed %d MiB, killed %d, %v", freed>>20, killed, err)
	}
	if e := <-small; e.err != nil || !e.res.OOMKilled {
		t.Errorf("the small one: %+v, %v", e.res, e.err)
	}
	if res := s.exec(agentapi.ExecuteRequest{Command: "echo alive"}); res.OOMKilled || string(res.Stdout) != "alive\n" {
		t.Errorf("afterwards: %+v", res)
	}
}

// TestHardening tries as root what Harden forbids.
func TestHardening(t *testing.T) {
	s := startSandbox(t, options{})
	const docker = "00000000a80405fb"
	want := "CapInh:\t0000000000000000\nCapPrm:\t" + docker + "\nCapEff:\t" + docker + "\nCapBnd:\t" + docker
	if got := s.sh("probe status CapInh CapPrm CapEff CapBnd"); got != want {
		t.Errorf("root's capabilities:\n%s\nwant:\n%s", got, want)
	}
	res := s.exec(agentapi.ExecuteRequest{Command: "probe status CapEff; suidprobe id; suidprobe status CapEff",
		User: "user"})
	if want := "CapEff:\t0000000000000000\n1000 0\nCapEff:\t" + docker + "\n"; string(res.Stdout) != want {
		t.Errorf("user and set-uid: %q %q, want %q", res.Stdout, res.Stderr, want)
	}
	for name, command := range map[string]string{
		"cgroup mounts":       "ls /sys/fs/cgroup/pids",
		"mounting":            "mkdir -p /tmp/m && mount -t cgroup -o pids none /tmp/m",
		"the agent's files":   "cat /proc/1/fd/* >/dev/null || ls /proc/1/fd/3/",
		"the agent's memory":  "dd if=/proc/1/mem of=/dev/null bs=1 count=1",
		"the agent's environ": "cat /proc/1/environ | grep -q PATH",
	} {
		if res := s.exec(agentapi.ExecuteRequest{Command: command}); res.ExitCode == 0 {
			t.Errorf("%s: root could: %s", name, res.Stdout)
		}
	}
	// Send signals that end other programs, so fast that many are pending for one thread.
	s.sh("probe signals 1 2 3 6 10 12 13 14 15 20 21 22 $(seq 34 64); sleep 0.2")
	s.waitHealthy()
}

// BenchmarkExecute measures the time that the agent adds to making a process.
func BenchmarkExecute(b *testing.B) {
	s := startSandbox(b, options{})
	for name, r := range map[string]agentapi.ExecuteRequest{
		"args=true":    {Args: []string{"true"}},
		"command=true": {Command: "true"},
	} {
		b.Run(name, func(b *testing.B) {
			inside := time.Duration(0)
			for b.Loop() {
				res, err := s.client.Execute(b.Context(), s.target, r)
				if err != nil || res.ExitCode != 0 {
					b.Fatal(res, err)
				}
				inside += res.Duration
			}
			b.ReportMetric(float64(inside.Microseconds())/float64(b.N), "µs-inside/op")
		})
	}
	b.Run("health", func(b *testing.B) {
		for b.Loop() {
			if err := s.client.Health(b.Context(), s.target); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// TestSignalsAreAsUsual checks the signal actions that commands inherit. The agent catches
// nearly every signal, and ignores some for a moment.
func TestSignalsAreAsUsual(t *testing.T) {
	s := startSandbox(t, options{})
	for signal, want := range map[int]int{1: 129, 2: 130, 10: 138, 13: 141, 15: 143, 17: 0, 28: 0, 34: 162, 64: 192} {
		res := s.exec(agentapi.ExecuteRequest{Command: fmt.Sprintf("kill -%d $$; exit 0", signal)})
		if res.ExitCode != want {
			t.Errorf("signal %d: exit code %d, want %d: %s", signal, res.ExitCode, want, res.Stderr)
		}
	}
}

// TestStoppedJob runs a script whose programs end beside a job that the script has stopped.
func TestStoppedJob(t *testing.T) {
	s := startSandbox(t, options{})
	const script = "sleep 100 & kill -STOP $!; true; /bin/true; /bin/true; echo still here; kill -KILL $!"
	r := s.exec(agentapi.ExecuteRequest{Command: script})
	if r.ExitCode != 0 || string(r.Stdout) != "still here\n" {
		t.Errorf("%+v", r)
	}
}

// TestProcessorIsAskedItself compares CPUID inside and on the host. On processors where CPUID
// faults, gVisor answers from a table that lacks some features.
func TestProcessorIsAskedItself(t *testing.T) {
	s := startSandbox(t, options{})
	built, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	want, err := exec.Command(built["probe"], "cpuid").Output()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), s.sh("probe cpuid")+"\n"); diff != "" {
		t.Errorf("on the host (-) and inside (+):\n%s", diff)
	}
}
