package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// honest is the tenant that is measured.
type honest struct {
	*hostile
}

func newHonest(s *server) *honest {
	h := &honest{&hostile{server: s, attack: attack{name: "honest"}}}
	h.id = s.create(object{"timeout": "24h"})
	return h
}

// phase holds the measurements of the honest tenant in one phase of the test.
type phase struct {
	name string
	measurements
	// server and machine say who used the processors, and who waited for them.
	server, machine schedule
}

// measurements are the durations of operations, by name.
type measurements struct {
	Took  map[string][]time.Duration
	Fails map[string]int
	Why   map[string]string // the last failure of each operation
	// Slowest has the Server-Timing of the slowest answer of each operation.
	Slowest map[string]string
}

// honestVariable names the environment variable that makes this test's program an honestClient,
// given as JSON.
const honestVariable = "CAY_TEST_HONEST"

// honestClient is the honest tenant as a program of its own. In the process of the attacks it would
// measure how long its goroutines wait for those of the attacks.
type honestClient struct {
	URL, Key, ID string
	For          time.Duration
}

// beHonestClient measures and writes the measurements to the standard output, if this process is to
// be an honestClient.
func beHonestClient() (was bool) {
	text, was := os.LookupEnv(honestVariable)
	if !was {
		return false
	}
	var c honestClient
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(c.measure())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

// operation is one measured operation and its rate. do also returns the answer's Server-Timing.
type operation struct {
	name  string
	every time.Duration
	do    func(ctx context.Context) (took time.Duration, parts string, err error)
}

// errUncounted reports that an operation succeeded in a way that is not measured.
var errUncounted = errors.New("not counted")

func (c honestClient) operations(s *server) []operation {
	timed := func(want int, method, path string, body any) func(context.Context) (time.Duration, string, error) {
		return func(ctx context.Context) (time.Duration, string, error) {
			took, parts, _, err := s.timed(ctx, want, method, path, body)
			return took, parts, err
		}
	}
	base := "/v1/sandboxes/" + c.ID
	return []operation{
		{"lookup", 250 * time.Millisecond, timed(200, "GET", base, nil)},
		{"execute true", 250 * time.Millisecond, timed(200, "POST", base+"/execute", object{"args": []string{"true"}})},
		{"PUT egress", 500 * time.Millisecond, timed(200, "PUT", base+"/egress", object{"mode": "deny_all", "allow_cidrs": []string{"203.0.113.0/24"}})},
		{"create, cold", 3 * time.Second, func(ctx context.Context) (time.Duration, string, error) {
			return startAndDestroy(ctx, s, "cold", object{"disk_size_mb": 1000})
		}},
		{"create, warm", 3 * time.Second, func(ctx context.Context) (time.Duration, string, error) {
			return startAndDestroy(ctx, s, "warm", nil)
		}},
	}
}

// timed makes a call, whose status must be want, and measures it.
func (s *server) timed(ctx context.Context, want int, method, path string, body any) (took time.Duration, parts string,
	answer []byte, err error) {
	began := time.Now()
	header, status, answer, err := s.tryHeader(ctx, method, path, body)
	if err == nil && status != want {
		err = fmt.Errorf("%d %.200s", status, answer)
	}
	return time.Since(began), header.Get("Server-Timing"), answer, err
}

// startAndDestroy creates a sandbox and destroys it. A sandbox of another source than wanted is not
// counted.
func startAndDestroy(ctx context.Context, s *server, source string, more object) (took time.Duration, parts string,
	err error) {
	request := object{"template": "python", "timeout": "5m"}
	for k, v := range more {
		request[k] = v
	}
	took, parts, body, err := s.timed(ctx, 201, "POST", "/v1/sandboxes", request)
	if err != nil {
		return took, parts, err
	}
	if status, body, err := s.try(context.WithoutCancel(ctx), "DELETE", "/v1/sandboxes/"+text(body, "id"),
		nil); err != nil || status != 204 {
		return took, parts, errors.Join(err, fmt.Errorf("destroy: %d %.200s", status, body))
	}
	if text(body, "source") != source {
		return took, parts, errUncounted
	}
	return took, parts, nil
}

// measure does all operations at their rates.
func (c honestClient) measure() measurements {
	m := measurements{Took: map[string][]time.Duration{}, Fails: map[string]int{}, Why: map[string]string{},
		Slowest: map[string]string{}}
	ctx, cancel := context.WithTimeout(context.Background(), c.For)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, op := range c.operations(&server{url: c.URL, key: c.Key}) {
		wg.Go(func() {
			tick := time.NewTicker(op.every)
			defer tick.Stop()
			for ctx.Err() == nil {
				// Operations that have begun are waited for: a 99th percentile is about the slowest.
				own, stop := context.WithTimeout(context.WithoutCancel(ctx), patience)
				took, parts, err := op.do(own)
				stop()
				mu.Lock()
				switch {
				case err == nil:
					if all := m.Took[op.name]; len(all) == 0 || took > slices.Max(all) {
						m.Slowest[op.name] = parts
					}
					m.Took[op.name] = append(m.Took[op.name], took)
				case !errors.Is(err, errUncounted):
					m.Fails[op.name]++
					m.Why[op.name] = fmt.Sprintf("after %s: %s", took.Round(time.Millisecond), err)
				}
				mu.Unlock()
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	wg.Wait()
	return m
}

// phase measures for a while, during the attacks that meanwhile makes.
func (h *honest) phase(name string, long time.Duration, meanwhile func(context.Context)) phase {
	t := h.server.t
	t.Helper()
	p := phase{name: name}
	server, machine := h.server.scheduled(), machineScheduled(t)
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	client, err := json.Marshal(honestClient{URL: h.server.url, Key: h.server.key, ID: h.id, For: long})
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A real client is on another machine, so the time that it waits for a processor of this one must
	// not count.
	cmd := exec.Command("chrt", "--fifo", "1", program)
	cmd.Env = append(os.Environ(), honestVariable+"="+string(client))
	cmd.Stderr = os.Stderr
	var wg sync.WaitGroup
	if meanwhile != nil {
		wg.Go(func() { meanwhile(ctx) })
	}
	out, err := cmd.Output()
	cancel()
	wg.Wait()
	if err == nil {
		err = json.Unmarshal(out, &p.measurements)
	}
	if err != nil {
		t.Errorf("measuring the honest tenant: %v", err) // the watch of the server goes on
	}
	p.server, p.machine = h.server.scheduled().since(server), machineScheduled(t).since(machine)
	return p
}

// latencies returns a table of the honest tenant's measurements, which compares each phase with the
// first.
func latencies(phases []phase) string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "honest tenant\tphase\tn\tfailed\tp50\tp99\tp50 ratio\tp99 ratio")
	for _, name := range []string{"lookup", "execute true", "PUT egress", "create, cold", "create, warm"} {
		first := phases[0].Took[name]
		for _, p := range phases {
			took := p.Took[name]
			ratio := func(of float64) string {
				if len(first) == 0 || len(took) == 0 {
					return "-"
				}
				return fmt.Sprintf("%.1f", float64(quantile(took, of))/float64(quantile(first, of)))
			}
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\t%s\n", name, p.name, len(took), p.Fails[name], quantile(took, .5),
				quantile(took, .99), ratio(.5), ratio(.99), p.Why[name])
		}
	}
	_ = w.Flush() // a builder does not fail
	return out.String()
}

// slowest returns the Server-Timing of the slowest answer of each operation and phase.
func slowest(phases []phase) string {
	var out strings.Builder
	for _, p := range phases {
		for _, name := range slices.Sorted(maps.Keys(p.Slowest)) {
			fmt.Fprintf(&out, "slowest, %s, %s: %s: %s\n", p.name, name, slices.Max(p.Took[name]), p.Slowest[name])
		}
	}
	return out.String()
}

func quantile(all []time.Duration, of float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, int(float64(len(sorted))*of))].Round(100 * time.Microsecond)
}
