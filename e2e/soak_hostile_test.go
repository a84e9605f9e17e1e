package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"
)

// What TestSoakHostile does. The defaults are for `make test`; `make soak-hostile` does more.
var (
	hostileTime    = flag.Duration("hostile.time", 5*time.Second, "how long the hostile tenants attack")
	hostileTenants = flag.Int("hostile.tenants", len(attacks), "how many hostile tenants there are")
	hostileOnly    = flag.String("hostile.only", "", "the kinds of attack, separated by commas; all of them by default")
	hostileSpin    = flag.Bool("hostile.spin", false, "first let the sandboxes of the hostile tenants only keep the processors busy")
)

// TestSoakHostile lets hostile tenants of every kind attack together beside an honest one. It
// measures the honest tenant alone, with -hostile.spin beside sandboxes that only compute, and
// beside the attacks. Latencies are printed; what the server and the host have in use must stay
// within its bounds, and nothing may be left behind.
func TestSoakHostile(t *testing.T) {
	o := newOutside(t)
	queries := inNamespace(t, o.name, func() (net.PacketConn, error) { return net.ListenPacket("udp4", ":53") })
	t.Cleanup(func() { queries.Close() })
	go answerNames(queries, [4]byte{198, 51, 100, 77})
	s := newServer(t, "CAY_POOL_ENABLED=true", "CAY_POOL_TARGET=1", "CAY_TEMPLATES_PREPARE=python", "CAY_NETWORK_NAMESERVERS="+o.address,
		"CAY_CAPACITY_MAX_SANDBOXES=300", "CAY_BUILD_DISK_MB=512", "CAY_BUILD_MEMORY_MB=512", "CAY_BUILD_CPUS=1", "CAY_BUILD_CACHE_MB=512")
	s.args = append(s.args, "--log-level", "info")
	s.start()
	s.needTemplate("python")
	before := hostNow(s)
	// The tenants' own machines would be others.
	runBeforeOthers(t)

	honest := newHonest(s.tenant("honest", object{"sandboxes": 10, "vcpus": 20, "memory_mb": 10 << 10}))
	tenants := newHostiles(s, o)
	w := s.watch(before)
	alone := honest.phase("alone", max(5*time.Second, *hostileTime/5), nil)
	phases := []phase{alone}
	if *hostileSpin {
		phases = append(phases, honest.phase("busy", *hostileTime/5, func(ctx context.Context) { spin(ctx, tenants) }))
	}
	phases = append(phases, honest.phase("hostile", *hostileTime, func(ctx context.Context) { attackAll(ctx, tenants) }))
	peak := w.stop()
	t.Logf("\n%s\n%s\n%s\n%s", latencies(phases), processors(phases), rounds(tenants), peak)
	peak.check(t, before)

	for _, tenant := range append(tenants, honest.hostile) {
		tenant.destroyAll()
	}
	// Those of the pool are nobody's, and go with the server.
	s.stop(syscall.SIGTERM)
	s.env = append(s.env, "CAY_POOL_ENABLED=false")
	s.start()
	s.agree(time.Now())
}

// tenant makes an organization with a quota and returns the server as its admin sees it.
func (s *server) tenant(name string, quota object) *server {
	s.t.Helper()
	status, body := s.call("POST", "/v1/orgs", object{"name": name, "quota": quota})
	if status != 201 {
		s.t.Fatalf("making the organization %s: %d %s", name, status, body)
	}
	own := *s
	own.key = text(body, "api_key")
	return &own
}

// honest is the tenant that is measured.
type honest struct {
	*hostile
}

func newHonest(s *server) *honest {
	h := &honest{&hostile{server: s, attack: attack{name: "honest"}}}
	h.id = s.create(object{"timeout": "24h"})
	return h
}

// phase is what the honest tenant saw for a while.
type phase struct {
	name  string
	took  map[string][]time.Duration
	fails map[string]int
	why   map[string]string // the last failure
	// server and machine are what had the processors, and what wanted them.
	server, machine schedule
}

// operation is one that is measured, and how often it is done.
type operation struct {
	name  string
	every time.Duration
	do    func(ctx context.Context) (took time.Duration, err error)
}

// errUncounted says that an operation was done and is not what was to be measured.
var errUncounted = errors.New("not counted")

func (h *honest) operations() []operation {
	timed := func(want int, method, path string, body any) func(context.Context) (time.Duration, error) {
		return func(ctx context.Context) (time.Duration, error) {
			began := time.Now()
			status, answer, err := h.server.try(ctx, method, path, body)
			if err == nil && status != want {
				err = fmt.Errorf("%d %.200s", status, answer)
			}
			return time.Since(began), err
		}
	}
	box := "/v1/sandboxes/" + h.id
	return []operation{
		{"lookup", 250 * time.Millisecond, timed(200, "GET", box, nil)},
		{"execute true", 250 * time.Millisecond, timed(200, "POST", box+"/execute", object{"args": []string{"true"}})},
		{"PUT egress", 500 * time.Millisecond, timed(200, "PUT", box+"/egress", object{"mode": "deny_all", "allow_cidrs": []string{"203.0.113.0/24"}})},
		{"create, cold", 3 * time.Second, func(ctx context.Context) (time.Duration, error) {
			return h.start(ctx, "cold", object{"disk_size_mb": 1000})
		}},
		{"create, warm", 3 * time.Second, func(ctx context.Context) (time.Duration, error) { return h.start(ctx, "warm", nil) }},
	}
}

// start creates a sandbox and destroys it. One that came another way than wanted is not counted.
func (h *honest) start(ctx context.Context, source string, more object) (took time.Duration, err error) {
	request := object{"template": "python", "timeout": "5m"}
	for k, v := range more {
		request[k] = v
	}
	began := time.Now()
	status, body, err := h.server.try(ctx, "POST", "/v1/sandboxes", request)
	took = time.Since(began)
	if err != nil || status != 201 {
		return took, errors.Join(err, fmt.Errorf("%d %.200s", status, body))
	}
	if status, body, err := h.server.try(context.WithoutCancel(ctx), "DELETE", "/v1/sandboxes/"+text(body, "id"), nil); err != nil || status != 204 {
		return took, errors.Join(err, fmt.Errorf("destroy: %d %.200s", status, body))
	}
	if text(body, "source") != source {
		return took, errUncounted
	}
	return took, nil
}

// phase does all operations at their rates for a while, beside what runs meanwhile.
func (h *honest) phase(name string, long time.Duration, meanwhile func(context.Context)) phase {
	p := phase{name: name, took: map[string][]time.Duration{}, fails: map[string]int{}, why: map[string]string{}}
	server, machine := h.server.scheduled(), machineScheduled(h.server.t)
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, op := range h.operations() {
		wg.Go(func() {
			tick := time.NewTicker(op.every)
			defer tick.Stop()
			for ctx.Err() == nil {
				// What was begun in time is waited for: the slowest are what a 99th percentile is about.
				own, stop := context.WithTimeout(context.WithoutCancel(ctx), patience)
				took, err := op.do(own)
				stop()
				mu.Lock()
				switch {
				case err == nil:
					p.took[op.name] = append(p.took[op.name], took)
				case !errors.Is(err, errUncounted):
					p.fails[op.name]++
					p.why[op.name] = fmt.Sprintf("after %s: %s", took.Round(time.Millisecond), err)
				}
				mu.Unlock()
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	if meanwhile != nil {
		wg.Go(func() { meanwhile(ctx) })
	}
	wg.Wait()
	p.server, p.machine = h.server.scheduled().since(server), machineScheduled(h.server.t).since(machine)
	return p
}

// latencies is the table of what the honest tenant saw, with each phase beside the first.
func latencies(phases []phase) string {
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "honest tenant\tphase\tn\tfailed\tp50\tp99\tp50 ratio\tp99 ratio")
	for _, name := range []string{"lookup", "execute true", "PUT egress", "create, cold", "create, warm"} {
		first := phases[0].took[name]
		for _, p := range phases {
			took := p.took[name]
			ratio := func(of float64) string {
				if len(first) == 0 || len(took) == 0 {
					return "-"
				}
				return fmt.Sprintf("%.1f", float64(quantile(took, of))/float64(quantile(first, of)))
			}
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\t%s\n", name, p.name, len(took), p.fails[name], quantile(took, .5), quantile(took, .99), ratio(.5), ratio(.99), p.why[name])
		}
	}
	_ = w.Flush() // into a builder
	return out.String()
}

func quantile(all []time.Duration, of float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[min(len(sorted)-1, int(float64(len(sorted))*of))].Round(100 * time.Microsecond)
}

// spin keeps the processors busy in all sandboxes, and does nothing else to anybody.
func spin(ctx context.Context, tenants []*hostile) {
	var wg sync.WaitGroup
	for _, h := range tenants {
		if h.id == "" {
			continue
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				h.call(ctx, "POST", h.box("/execute"), object{"command": "while :; do :; done", "timeout": "5m"})
			}
		})
	}
	wg.Wait()
}

// hostileShare is the part of the machine's processors that the sandboxes of all hostile tenants together
// are paced to use. With all of it an honest tenant would be late for the lack of processors alone.
const hostileShare = 0.5

// attackAll lets all tenants attack until ctx ends, and returns when they are through.
func attackAll(ctx context.Context, tenants []*hostile) {
	var wg sync.WaitGroup
	deadline, _ := ctx.Deadline()
	for i, h := range tenants {
		wg.Go(func() {
			// Not all in the same moment, but each at least once.
			h.rest(ctx, min(10*time.Second, time.Until(deadline)/4)*time.Duration(i)/time.Duration(len(tenants)))
			for ctx.Err() == nil {
				before := h.computed()
				h.attack.round(ctx, h)
				h.did("rounds")
				used := h.computed() - before
				h.mu.Lock()
				h.used += used
				h.mu.Unlock()
				h.rest(ctx, max(h.attack.pause, used*time.Duration(len(tenants))/time.Duration(hostileShare*float64(runtime.NumCPU()))))
			}
		})
	}
	wg.Wait()
}

// computed is how long the tenant's first sandbox had a processor, 0 for none.
func (h *hostile) computed() time.Duration {
	for path, unit := range map[string]time.Duration{
		"/sys/fs/cgroup/cpuacct/cay-" + h.server.instance() + "/" + h.id + "/cpuacct.usage": time.Nanosecond,
		"/sys/fs/cgroup/cay-" + h.server.instance() + "/" + h.id + "/cpu.stat":              time.Microsecond,
	} {
		data, err := os.ReadFile(path)
		if h.id == "" || err != nil {
			continue
		}
		var n int64
		if _, err := fmt.Sscan(strings.TrimPrefix(string(data), "usage_usec "), &n); err == nil {
			return time.Duration(n) * unit
		}
	}
	return 0
}

// hostile is a tenant that attacks.
type hostile struct {
	server *server
	attack attack
	out    *outside
	id     string // of its sandbox, "" for an attack that needs none
	client *http.Client

	mu      sync.Mutex
	counted map[string]int
	used    time.Duration // of a processor, by its sandbox in the rounds
}

// newHostiles makes the tenants and their sandboxes.
func newHostiles(s *server, o *outside) []*hostile {
	s.t.Helper()
	var kinds []attack
	for _, a := range attacks {
		if *hostileOnly == "" || slices.Contains(strings.Split(*hostileOnly, ","), a.name) {
			kinds = append(kinds, a)
		}
	}
	if len(kinds) == 0 {
		s.t.Fatalf("there is no attack %q", *hostileOnly)
	}
	var all []*hostile
	for i := range *hostileTenants {
		a := kinds[i%len(kinds)]
		h := &hostile{server: s.tenant(fmt.Sprintf("hostile-%d", i), object{"sandboxes": 3, "vcpus": 3, "memory_mb": 1536}), attack: a, out: o, counted: map[string]int{}}
		h.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
		s.t.Cleanup(h.client.CloseIdleConnections)
		if a.box != nil {
			if a.persistent {
				h.id = h.server.persistent(a.box)
			} else {
				a.box["timeout"] = "24h"
				h.id = h.server.create(a.box)
			}
		}
		if a.prepare != nil {
			a.prepare(h)
		}
		all = append(all, h)
	}
	return all
}

// box is a path of the tenant's sandbox.
func (h *hostile) box(path string) string { return "/v1/sandboxes/" + h.id + path }

// did counts what a tenant did or was answered.
func (h *hostile) did(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counted[what]++
}

// rest waits, at the longest until ctx ends.
func (h *hostile) rest(ctx context.Context, long time.Duration) {
	select {
	case <-time.After(long):
	case <-ctx.Done():
	}
}

// call makes one request and throws the answer away, which is nobody's concern but the server's.
func (h *hostile) call(ctx context.Context, method, path string, body any) (status int, answer []byte) {
	status, answer, err := h.server.try(ctx, method, path, body)
	switch {
	case err != nil && ctx.Err() == nil:
		h.did("broken")
	case err == nil:
		h.did(fmt.Sprintf("%dxx", status/100))
	}
	return status, answer
}

// sip makes a request and reads the answer a piece at a time.
func (h *hostile) sip(ctx context.Context, r *http.Request, piece int, every time.Duration) {
	if r.Header.Get("Authorization") == "" {
		r.Header.Set("Authorization", "Bearer "+h.server.key)
	}
	resp, err := h.client.Do(r.WithContext(ctx))
	if err != nil {
		if ctx.Err() == nil {
			h.did("broken")
		}
		return
	}
	defer resp.Body.Close()
	h.did(fmt.Sprintf("%dxx", resp.StatusCode/100))
	for ctx.Err() == nil {
		if _, err := io.CopyN(io.Discard, resp.Body, int64(piece)); err != nil {
			return // it is over, or was ended
		}
		h.rest(ctx, every)
	}
}

// destroyAll destroys what the tenant still has.
func (h *hostile) destroyAll() {
	for _, status := range []string{"running", "creating", "suspended"} {
		for _, id := range h.server.sandboxes(status) {
			h.server.destroy(id)
		}
	}
}

// rounds is the table of what the tenants did, by kind.
func rounds(tenants []*hostile) string {
	var order []string
	counts, of, used := map[string]map[string]int{}, map[string]int{}, map[string]time.Duration{}
	for _, h := range tenants {
		if counts[h.attack.name] == nil {
			counts[h.attack.name] = map[string]int{}
			order = append(order, h.attack.name)
		}
		of[h.attack.name]++
		h.mu.Lock()
		used[h.attack.name] += h.used
		for what, n := range h.counted {
			counts[h.attack.name][what] += n
		}
		h.mu.Unlock()
	}
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "hostile tenants\tof them\trounds\tcomputed\t2xx\t4xx\t5xx\tbroken")
	for _, kind := range order {
		c := counts[kind]
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%d\t%d\t%d\t%d\n", kind, of[kind], c["rounds"], used[kind].Round(100*time.Millisecond), c["2xx"], c["4xx"], c["5xx"], c["broken"])
	}
	_ = w.Flush() // into a builder
	return out.String()
}
