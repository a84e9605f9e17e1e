package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/cayhq/cay/internal/daemon"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cay": func() {
		a := newApp("dev")
		// The directories in which a server on this machine would leave its records and its first key.
		if dir := os.Getenv("CAY_TEST_HOST"); dir != "" {
			a.runDir, a.dataDir = filepath.Join(dir, "run"), filepath.Join(dir, "data")
		}
		os.Exit(a.main())
	}})
}

// TestScripts runs testdata/script/*.txtar, each with a fake server of its own.
// Scripts have these commands beyond testscript's:
//
//	status N cmd [args...]   run a program, which must exit with N
//	calls                    print the calls the server got, and forget them
//	until N words...         wait until a call contains the words N times
//	executing N              wait until N commands are in flight
//	servers url...           leave the records of servers that run on this machine
//	bytes N file             write N bytes that are not UTF-8
//	json file                check that the file is one JSON value
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			api := newFakeAPI()
			e.Defer(api.Close)
			e.Values["api"] = api
			e.Setenv("CAY_TEST_HOST", filepath.Join(e.WorkDir, "host"))
			e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
			e.Setenv("API", api.URL)
			e.Setenv("KEY", fakeKey)
			e.Setenv("CAY_API_URL", api.URL)
			e.Setenv("CAY_API_KEY", fakeKey)
			return os.Mkdir(filepath.Join(e.WorkDir, "home"), 0o755)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": scriptStatus, "calls": scriptCalls, "until": scriptUntil, "executing": scriptExecuting,
			"servers": scriptServers, "bytes": scriptBytes, "json": scriptJSON,
		},
	})
}

// scriptStatus runs a program that must exit with a status.
func scriptStatus(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	if err != nil || neg {
		ts.Fatalf("usage: status N cmd [args...]")
	}
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		// testscript returns the text of the error of os/exec.
		text, found := strings.CutPrefix(err.Error(), "exit status ")
		if got, err = strconv.Atoi(text); err != nil || !found {
			ts.Fatalf("running %v: %v", args[1:], err)
		}
	}
	if got != want {
		ts.Fatalf("%v exited with %d, want %d", args[1:], got, want)
	}
}

// scriptAPI returns the fake server of a script.
func scriptAPI(ts *testscript.TestScript) *fakeAPI { return ts.Value("api").(*fakeAPI) }

// scriptCalls prints the calls that the fake server got, and forgets them.
func scriptCalls(ts *testscript.TestScript, _ bool, _ []string) {
	f := scriptAPI(ts)
	f.mu.Lock()
	defer f.mu.Unlock()
	fmt.Fprintln(ts.Stdout(), strings.Join(f.calls, "\n"))
	f.calls = nil
}

// poll waits until ok returns true, which a process in the background causes.
func poll(ts *testscript.TestScript, what string, ok func() bool) {
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			ts.Fatalf("waiting for %s: not within 30s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// scriptUntil waits until a call contains words a number of times.
func scriptUntil(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	words := strings.Join(args[1:], " ")
	f := scriptAPI(ts)
	poll(ts, "the call "+words, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		n := 0
		for _, c := range f.calls {
			if strings.Contains(c, words) {
				n++
			}
		}
		return n >= want
	})
}

// scriptExecuting waits until a number of commands are in flight.
func scriptExecuting(ts *testscript.TestScript, _ bool, args []string) {
	f := scriptAPI(ts)
	poll(ts, args[0]+" commands in flight", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return strconv.Itoa(f.executing) == args[0]
	})
}

// scriptServers leaves the records of servers that run on this machine.
func scriptServers(ts *testscript.TestScript, _ bool, urls []string) {
	dir := ts.MkAbs("host/run/servers")
	ts.Check(os.RemoveAll(dir))
	ts.Check(os.MkdirAll(dir, 0o755))
	for i, url := range urls {
		name := fmt.Sprintf("inst%d", i)
		record, err := json.Marshal(daemon.ServerRecord{Instance: name, URL: url, KeyFile: ts.MkAbs("host/key"),
			DataDir: "/nowhere", PID: os.Getpid()})
		ts.Check(err)
		ts.Check(os.WriteFile(filepath.Join(dir, name+".json"), record, 0o644))
	}
}

// scriptBytes writes a file that is not UTF-8.
func scriptBytes(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), bytes.Repeat([]byte{0xff}, n), 0o644))
}

// scriptJSON checks that a file is one JSON value.
func scriptJSON(ts *testscript.TestScript, _ bool, args []string) {
	var v any
	if err := json.Unmarshal([]byte(ts.ReadFile(args[0])), &v); err != nil {
		ts.Fatalf("%s is not JSON: %v", args[0], err)
	}
}

// TestEveryCommand checks that each verb has a short text, an example with its name, and the flags of all verbs.
func TestEveryCommand(t *testing.T) {
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Example == "" || !strings.Contains(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s: short text %q, example %q", cmd.CommandPath(), cmd.Short, cmd.Example)
		}
		for _, flag := range []string{"json", "api-url", "api-key", "org"} {
			if cmd.InheritedFlags().Lookup(flag) == nil && cmd.PersistentFlags().Lookup(flag) == nil {
				t.Errorf("%s has no --%s", cmd.CommandPath(), flag)
			}
		}
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit((&app{getenv: os.Getenv}).root())
}

func TestCallable(t *testing.T) {
	for in, want := range map[string]string{
		"http://127.0.0.1:7070": "http://127.0.0.1:7070",
		"http://0.0.0.0:7070":   "http://127.0.0.1:7070",
		"http://:7070":          "http://127.0.0.1:7070",
		"http://[::]:7070":      "http://[::1]:7070",
		"http://10.1.2.3:80":    "http://10.1.2.3:80",
		"http://host.example:1": "http://host.example:1",
	} {
		if got, err := callable(in); err != nil || got != want {
			t.Errorf("%s is called at %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 90 * time.Second: "90s", 2 * time.Minute: "2m", 119 * time.Minute: "119m", 47 * time.Hour: "47h", 49 * time.Hour: "2d",
	} {
		if got := span(d); got != want {
			t.Errorf("%s is %q, want %q", d, got, want)
		}
	}
}

func FuzzPairs(f *testing.F) {
	for _, seed := range []string{"A=b", "A=", "=b", "A", "", "A=b=c", "\xff=1", "A=\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := pairs("--env", []string{text}, nil)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "--env: ") {
				t.Fatalf("%q: the error %q does not name the flag", text, err)
			}
			return
		}
		for name, value := range m {
			if name == "" || strings.Contains(name, "=") || name+"="+value != text {
				t.Fatalf("%q became %q = %q", text, name, value)
			}
		}
		if len(m) != 1 {
			t.Fatalf("%q gave %d pairs", text, len(m))
		}
	})
}
