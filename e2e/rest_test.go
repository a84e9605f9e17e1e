package e2e

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// clocksProgram sleeps longer than a sandbox takes to become idle, and then writes the time and the
// difference of both clocks at the moment of its wake-up. It ends when the monotonic clock goes
// back.
const clocksProgram = `
import time
last = 0
while True:
    time.sleep(7)
    while True: # until nothing came between
        at, now, end = time.monotonic(), time.time(), time.monotonic()
        if end - at < 0.005: break
    print(now, now - at, file=open("/tmp/clocks", "a"))
    for _ in range(20000):
        assert at >= last
        last, at = at, time.monotonic()
`

// TestRest checks that a sandbox in which everything sleeps uses no CPU, also after a restore, and
// that its clocks are right when a program wakes up.
func TestRest(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.create(object{"mode": "persistent", "timeout": nil})
	defer s.destroy(id)
	s.rests(id)
	s.clocksOf(id)
	if _, err := s.api().Suspend(t.Context(), id); err != nil {
		t.Fatalf("suspend: %v", err)
	}
	s.clocksOf(id)
	s.rests(id)
	s.clocksOf(id)

	if _, err := s.api().StartProcess(t.Context(), id,
		cay.StartProcessRequest{Args: []string{"python3", "-c", clocksProgram}}); err != nil {
		t.Fatalf("start: %v", err)
	}
	time.Sleep(24 * time.Second) // three times the program's sleep; an earlier look would keep the sandbox busy
	var out string
	s.settles("the program that reads clocks", func() bool {
		out = s.want(id, "cat /tmp/clocks")
		return strings.Count(out, "\n") >= 2
	})
	s.runs(id, "python3", 1)
	var first float64
	for i, line := range strings.Split(out, "\n") {
		var now, apart float64
		if _, err := fmt.Sscan(line, &now, &apart); err != nil {
			t.Fatalf("%q: %v in\n%s", line, err, out)
		}
		if i == 0 {
			first = apart
		}
		// The limit is far above the difference of two clocks of one machine, and far below a missed
		// update of one second.
		if math.Abs(apart-first) > 0.02 {
			t.Errorf("the clocks differ by %.4f s:\n%s", apart-first, out)
		}
	}
}

// rests waits for one and a half seconds in which no process of a sandbox used the CPU. A program
// that polls once a second prevents that.
func (s *server) rests(id string) {
	s.t.Helper()
	var seen string
	var since time.Time
	s.settles("the sandbox", func() bool {
		if now := s.ran(id); now != seen {
			seen, since = now, time.Now()
		}
		return time.Since(since) > 1500*time.Millisecond
	})
}

// ran returns the CPU time of each thread of the sandbox, as text.
func (s *server) ran(id string) string {
	s.t.Helper()
	var all strings.Builder
	for _, pid := range s.groupProcesses(id) {
		threads, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/schedstat")
		if err != nil {
			s.t.Fatal(err)
		}
		for _, thread := range threads {
			data, err := os.ReadFile(thread)
			if err != nil {
				continue // the thread has ended meanwhile
			}
			on, _, _ := strings.Cut(string(data), " ")
			fmt.Fprintln(&all, thread, on)
		}
	}
	if all.Len() == 0 {
		s.t.Fatalf("%s has no thread", id)
	}
	return all.String()
}

// clocksOf compares the clock inside with the host's.
func (s *server) clocksOf(id string) {
	s.t.Helper()
	const slack = 0.02 // seconds
	before := float64(time.Now().UnixNano()) / 1e9
	out := s.want(id, `python3 -c "import time; print(time.time())"`)
	after := float64(time.Now().UnixNano()) / 1e9
	inside, err := strconv.ParseFloat(out, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	if inside < before-slack || inside > after+slack {
		s.t.Errorf("the clock inside says %.4f, the host's %.4f to %.4f", inside, before, after)
	}
}
