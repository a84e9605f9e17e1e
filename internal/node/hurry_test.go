package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
)

func TestHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var weights []int64
		var used time.Duration
		h := hurry{weigh: func(times int64) error {
			weights = append(weights, times)
			return nil
		}, used: func() time.Duration { return used }}
		want := func(what string, want ...int64) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(weights, want) {
				t.Fatalf("%s: the weights are %v, want %v", what, weights, want)
			}
			weights = nil
		}
		h.begin()
		h.end()
		want("calls during a boot")
		h.settle()
		want("the end of the boot", 1)
		h.settle()
		want("the second step that ends it")

		h.begin()
		h.begin()
		h.end()
		want("one of two calls is over", hurried)
		h.end()
		want("both are over", 1)

		h.begin()
		time.Sleep(hurryMost + time.Millisecond)
		want("a long call", hurried, 1)
		h.end()
		want("its end")

		calls := func(each time.Duration) (raised time.Duration) { // calls without a pause
			for range 100 {
				h.begin()
				time.Sleep(50 * time.Millisecond)
				used += each
				synctest.Wait()
				if len(weights) == 1 {
					raised += 50 * time.Millisecond
				}
				h.end()
				weights = nil
			}
			return raised
		}
		if raised := calls(5 * time.Millisecond); raised != 5*time.Second {
			t.Errorf("calls that use a tenth of a CPU hurried it for %s of 5 s", raised)
		}
		time.Sleep(hurryPart * hurryBurst)
		if raised, most := calls(50*time.Millisecond), hurryBurst+5*time.Second/hurryPart+hurryMost; raised > most ||
			raised < hurryBurst/2 {
			t.Errorf("calls that use a whole CPU hurried it for %s, at most it is %s", raised, most)
		}

		time.Sleep(hurryPart * hurryBurst)
		h.weigh = func(int64) error { return errors.New("the group is gone") }
		h.begin()
		h.end()
		want("a group that is gone")
	})
}

// TestCallsHurry checks the weight of a sandbox that keeps the CPUs busy: it is higher for a while
// during a call and at no other time, also when the server ended during a call.
func TestCallsHurry(t *testing.T) {
	m := newMachine(t)
	spec := m.spec()
	weight := func() string {
		t.Helper()
		paths, err := filepath.Glob("/sys/fs/cgroup/*/cay-" + m.instance + "/" + string(spec.ID) + "/cpu.shares")
		if unified, _ := filepath.Glob("/sys/fs/cgroup/cay-" + m.instance + "/" + string(spec.ID) +
			"/cpu.weight"); len(unified) > 0 {
			paths = unified
		}
		if err != nil || len(paths) == 0 {
			t.Fatalf("the sandbox has no weight: %v", err)
		}
		data, err := os.ReadFile(paths[0])
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	await := func(what string, is func(weight string) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !is(weight()); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s the weight stays %s", what, weight())
			}
		}
	}
	booting := ""
	m.node.after = func(step string) error {
		if step == "agent" {
			booting = weight()
		}
		return nil
	}
	if err := m.node.Create(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	if booting != "65536" && booting != "6400" {
		t.Errorf("during a boot the weight is %s", booting)
	}
	own := weight()
	if own != "1024" && own != "100" {
		t.Fatalf("after a boot the weight is %s", own)
	}
	m.sh(spec, fmt.Sprintf("for i in $(seq %d); do (while :; do :; done) >/dev/null 2>&1 & done", runtime.NumCPU()+2))
	call := func() (over chan error) {
		over = make(chan error, 1)
		go func() {
			_, err := m.node.Agents().Execute(m.ctx(), target(spec), agentapi.ExecuteRequest{
				Command: "sleep 1", Timeout: time.Minute})
			over <- err
		}()
		return over
	}
	over := call()
	await("during calls", func(w string) bool {
		if len(over) > 0 { // the CPUs were not seen to be busy when it began
			if err := <-over; err != nil {
				t.Fatal(err)
			}
			over = call()
		}
		return w != own
	})
	if err := <-over; err != nil {
		t.Error(err)
	}
	await("after a call", func(w string) bool { return w == own })

	group := m.node.groups.Group(m.node.groupPath(spec.ID))
	if used, err := group.CPUTime(); err != nil || used < 10*time.Millisecond {
		t.Errorf("a sandbox that keeps the CPUs busy used %s, %v", used, err)
	}
	if err := group.SetCPUWeight(hurried * weightPerCPU); err != nil {
		t.Fatal(err)
	}
	m.close()
	m.open()
	if got := weight(); got != own {
		t.Errorf("after an adoption the weight is %s", got)
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}

// TestManyCPUs boots a sandbox of more CPUs than the highest weight of a group stands for.
func TestManyCPUs(t *testing.T) {
	m := newMachine(t)
	spec := m.spec()
	spec.Size.VCPUs = 16
	if err := m.node.Create(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	m.works(spec)
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}
