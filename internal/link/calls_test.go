package link

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestBurst makes 500 calls at once over few connections, all of which are under way at the same time.
func TestBurst(t *testing.T) {
	const calls = 500
	var together sync.WaitGroup
	together.Add(calls)
	hub := pair(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		together.Done()
		together.Wait() // so that each call needs a connection of its own
		_, _ = io.Copy(w, r.Body)
	}))
	burst(t, hub, calls)
}

// TestMaxConns makes more calls at once than a node may have connections.
func TestMaxConns(t *testing.T) {
	const most = 20
	for name, limits := range map[string][2]int{"the hub's limit": {most, 2000}, "the node's limit": {2000, most}} {
		t.Run(name, func(t *testing.T) {
			a := caytest.NewAuthority(t)
			hub := newHub(t, a, func(c *HubConfig) { c.MaxConns = limits[0] })
			address, _ := startHub(t, hub)
			n := newNode(t, a, "n1")
			n.cfg.MaxConns = limits[1]
			var over atomic.Int64
			startNode(t, n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if all, _ := hub.count("n1"); all > most {
					over.Store(int64(all))
				}
				_, _ = io.Copy(w, r.Body)
			}), address)
			linked(t, hub, "n1")
			burst(t, hub, 300)
			if n := over.Load(); n > 0 {
				t.Errorf("there were %d connections, over %d", n, most)
			}
		})
	}
}

func burst(t *testing.T, hub *Hub, calls int) {
	t.Helper()
	var all sync.WaitGroup
	for i := range calls {
		all.Go(func() {
			if err := call(hub, "n1", fmt.Sprint("call ", i)); err != nil {
				t.Errorf("call %d: %v", i, err)
			}
		})
	}
	all.Wait()
}

// TestNoHeadOfLine makes calls while other answers are read as fast as they come and more are not read at all.
func TestNoHeadOfLine(t *testing.T) {
	hub := pair(t, nodeHandler())
	ctx, cancel := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	open := func() io.ReadCloser {
		resp, err := hub.Transport("n1").RoundTrip(must(http.NewRequestWithContext(ctx, "GET", "http://node/endless", nil)))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Body
	}
	var stalled []io.ReadCloser
	for range 100 {
		stalled = append(stalled, open())
	}
	var read [8]atomic.Int64
	for i := range read {
		body := open()
		readers.Go(func() {
			for b := make([]byte, 64<<10); ; {
				n, err := body.Read(b)
				read[i].Add(int64(n))
				if err != nil {
					if ctx.Err() == nil {
						t.Errorf("a fast stream broke: %v", err)
					}
					return
				}
			}
		})
	}
	for i := range 200 {
		if err := call(hub, "n1", fmt.Sprint("call ", i)); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	for i := range read {
		before := read[i].Load()
		eventually(t, "a fast stream goes on", func() bool { return read[i].Load() > before })
	}
	for i, body := range stalled { // what is read now was sent before, or follows it
		if _, err := io.CopyN(io.Discard, body, 1<<20); err != nil {
			t.Fatalf("stalled answer %d broke: %v", i, err)
		}
	}
}

// TestIdle checks what 100 spare connections hold in this process, both ends of them.
func TestIdle(t *testing.T) {
	const conns, most = 100, 32 << 10
	a := caytest.NewAuthority(t)
	hub := newHub(t, a, nil)
	address, _ := startHub(t, hub)
	pulse := dialAs(t, address, must(a.ClientConfig("n1", replicaName)), pulseProtocol, "s1")
	eventually(t, "the pulse is taken", func() bool { all, _ := hub.count("n1"); return all == 0 })
	before := held(t)
	cfg := must(a.ClientConfig("n1", replicaName))
	for range conns {
		dialAs(t, address, cfg, dataProtocol, "s1")
	}
	eventually(t, "all connections wait", func() bool { _, spare := hub.count("n1"); return spare == conns })
	each := (held(t) - before) / conns
	t.Logf("a spare connection holds %d bytes, both ends together", each)
	if each > most {
		t.Errorf("a spare connection holds %d bytes, over %d", each, most)
	}
	runtime.KeepAlive(pulse)
}

// held returns the bytes that the process holds, stacks included, once that has stopped to change.
func held(t testing.TB) (now int64) {
	t.Helper()
	eventually(t, "the memory settles", func() bool {
		last := now
		time.Sleep(50 * time.Millisecond)
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		now = int64(m.HeapAlloc + m.StackInuse)
		return now-last < 128<<10 && last-now < 128<<10
	})
	return now
}
