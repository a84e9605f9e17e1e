package proc

import (
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/agent/account"
)

func TestProcParsers(t *testing.T) {
	if got := residentPages([]byte("1000 250 30 1 0 1 0\n")); got != 250 {
		t.Errorf("statm: %d", got)
	}
	if state, ppid := parseStat([]byte("12 (a) Z) R) Z 7 12 12 0")); state != 'Z' || ppid != 7 {
		t.Errorf("stat: %c %d", state, ppid)
	}
	if got := nameOf([]byte("7:pids:/cay-12\n6:memory:/\n")); got != "cay-12" {
		t.Errorf("cgroup: %q", got)
	}
	if got := nameOf([]byte("7:pids:/\n6:memory:/cay-1\n")); got != "" {
		t.Errorf("not one of the agent's groups: %q", got)
	}
	if busy, idle := parseCPU("cpu  10 1 5 100 20 3 0\ncpu0 1 1 1\n"); busy != 19 || idle != 120 {
		t.Errorf("stat: %d busy, %d idle", busy, idle)
	}
}

func FuzzProcParsers(f *testing.F) {
	f.Add([]byte("12 (a) Z 7"))
	f.Add([]byte("7:pids:/cay-1\n"))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 4, '1', '2', 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		parseStat(data)
		nameOf(data)
		residentPages(data)
		parseCPU(string(data))
		eachPID(data, func(pid int) {
			if pid <= 0 {
				t.Errorf("pid %d", pid)
			}
		})
	})
}

func TestLargestFirst(t *testing.T) {
	m := newMemory(nil)
	for i := range 200 {
		m.considerLocked(victim{pid: i + 1, rss: int64(i * 37 % 200)})
	}
	if len(m.victims) != maxVictims || m.victims[0].rss != 199 ||
		!slices.IsSortedFunc(m.victims, func(a, b victim) int { return int(b.rss - a.rss) }) {
		t.Errorf("kept %v", m.victims)
	}
}

func TestCommandEnv(t *testing.T) {
	who := &account.User{Name: "ann", Home: "/home/ann"}
	env, err := commandEnv(who, false, map[string]string{"A": "sandbox", "B": "sandbox"},
		map[string]string{"B": "call", "HOME": "/x"})
	slices.Sort(env)
	got, want := strings.Join(env, " "), "A=sandbox B=call HOME=/x LOGNAME=ann PATH="+defaultPath+" USER=ann"
	if err != nil || got != want {
		t.Errorf("got %s, %v\nwant %s", got, err, want)
	}
	for _, bad := range []map[string]string{{"": "x"}, {"A=B": "x"}, {"A": "\x00"}} {
		if _, err := commandEnv(who, false, nil, bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
