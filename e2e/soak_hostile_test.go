package e2e

import (
	"context"
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

// Settings of TestSoakHostile. The defaults are for `make test`; `make soak-hostile` does more.
var (
	hostileTime    = flag.Duration("hostile.time", 5*time.Second, "how long the hostile tenants attack")
	hostileTenants = flag.Int("hostile.tenants", len(attacks), "how many hostile tenants there are")
	hostileOnly    = flag.String("hostile.only", "", "the kinds of attack, separated by commas; all of them by default")
	hostileSpin    = flag.Bool("hostile.spin", false,
		"first let the sandboxes of the hostile tenants only keep the processors busy")
)

// TestSoakHostile lets hostile tenants of every kind attack together while an honest one works. It
// measures the honest tenant alone, with -hostile.spin beside sandboxes that only compute, and
// during the attacks. It prints latencies. The resources that the server and the host have in use
// must stay within limits, and nothing may be left behind.
func TestSoakHostile(t *testing.T) {
	onOneStore(t)
	o := newOutside(t)
	queries := inNamespace(t, o.name, func() (net.PacketConn, error) { return net.ListenPacket("udp4", ":53") })
	t.Cleanup(func() { queries.Close() })
	go answerNames(queries, [4]byte{198, 51, 100, 77})
	s := newServer(t, "CAY_POOL_ENABLED=true", "CAY_POOL_TARGET=1", "CAY_TEMPLATES_PREPARE=python",
		"CAY_NETWORK_NAMESERVERS="+o.address,
		"CAY_CAPACITY_MAX_SANDBOXES=300", "CAY_BUILD_DISK_MB=512", "CAY_BUILD_MEMORY_MB=512", "CAY_BUILD_CPUS=1",
		"CAY_BUILD_CACHE_MB=512")
	s.args = append(s.args, "--log-level", "info")
	s.start()
	s.needTemplate("python")
	before := hostNow(s)
	// Real clients would be on other machines and take no CPU from this one. The honest tenant's client is
	// a process of its own, which runs before all others.
	runAfterOthers(t)

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
	t.Logf("\n%s\n%s\n%s\n%s\n%s", latencies(phases), slowest(phases), processors(phases), rounds(tenants), peak)
	peak.check(t, before)

	for _, tenant := range append(tenants, honest.hostile) {
		tenant.destroyAll()
	}
	// The sandboxes of the pool have no tenant, and end with the server.
	s.stop(syscall.SIGTERM)
	s.env = append(s.env, "CAY_POOL_ENABLED=false")
	s.start()
	s.agree(time.Now())
}

// spin keeps the processors busy in all sandboxes, and does nothing else.
func spin(ctx context.Context, tenants []*hostile) {
	var wg sync.WaitGroup
	for _, h := range tenants {
		if h.id == "" {
			continue
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				h.call(ctx, "POST", h.path("/execute"), object{"command": "while :; do :; done", "timeout": "5m"})
			}
		})
	}
	wg.Wait()
}

// hostileShare is the part of the machine's processors that the sandboxes of all hostile tenants
// together are paced to use. If they used all, an honest tenant would be slow for lack of
// processors alone.
const hostileShare = 0.5

// attackAll lets all tenants attack until ctx ends, and returns after their last round.
func attackAll(ctx context.Context, tenants []*hostile) {
	var wg sync.WaitGroup
	deadline, _ := ctx.Deadline()
	for i, h := range tenants {
		wg.Go(func() {
			// The tenants begin at different moments, but each attacks at least once.
			h.rest(ctx, min(10*time.Second, time.Until(deadline)/4)*time.Duration(i)/time.Duration(len(tenants)))
			for ctx.Err() == nil {
				before := h.computed()
				h.attack.round(ctx, h)
				h.did("rounds")
				used := h.computed() - before
				h.mu.Lock()
				h.used += used
				h.mu.Unlock()
				h.rest(ctx, max(h.attack.pause,
					used*time.Duration(len(tenants))/time.Duration(hostileShare*float64(runtime.NumCPU()))))
			}
		})
	}
	wg.Wait()
}

// computed returns the CPU time of the tenant's first sandbox, 0 if there is none.
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
	id     string // id of its sandbox, "" for an attack that needs none
	client *http.Client

	mu      sync.Mutex
	counted map[string]int
	used    time.Duration // CPU time of its sandbox in the rounds
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
		h := &hostile{server: s.tenant(fmt.Sprintf("hostile-%d", i), object{"sandboxes": 3, "vcpus": 3, "memory_mb": 1536}),
			attack: a, out: o, counted: map[string]int{}}
		h.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
		s.t.Cleanup(h.client.CloseIdleConnections)
		if a.request != nil {
			if a.persistent {
				h.id = h.server.persistent(a.request)
			} else {
				a.request["timeout"] = "24h"
				h.id = h.server.create(a.request)
			}
		}
		if a.prepare != nil {
			a.prepare(h)
		}
		all = append(all, h)
	}
	return all
}

// path returns a path of the API below the tenant's sandbox.
func (h *hostile) path(path string) string { return "/v1/sandboxes/" + h.id + path }

// did counts an action of a tenant or an answer to it.
func (h *hostile) did(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counted[what]++
}

// rest waits, at most until ctx ends.
func (h *hostile) rest(ctx context.Context, long time.Duration) {
	select {
	case <-time.After(long):
	case <-ctx.Done():
	}
}

// call makes one request and returns the answer, which the caller may ignore: the test watches the
// server.
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
			return // the answer has ended or was cut
		}
		h.rest(ctx, every)
	}
}

// destroyAll destroys all sandboxes of the tenant.
func (h *hostile) destroyAll() {
	for _, status := range []string{"running", "creating", "suspended"} {
		for _, id := range h.server.sandboxes(status) {
			h.server.destroy(id)
		}
	}
}

// rounds returns a table of what the tenants did, by kind.
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
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%d\t%d\t%d\t%d\n", kind, of[kind], c["rounds"],
			used[kind].Round(100*time.Millisecond), c["2xx"], c["4xx"], c["5xx"], c["broken"])
	}
	_ = w.Flush() // a builder does not fail
	return out.String()
}
