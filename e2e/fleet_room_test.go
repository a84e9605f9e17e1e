package e2e

import (
	"maps"
	"sync"
	"testing"

	cay "github.com/cayhq/cay/sdk/go"
)

// TestFleetIsFull creates more sandboxes at once than two machines have room for, through both servers.
func TestFleetIsFull(t *testing.T) {
	onOneStore(t) // it always uses PostgreSQL
	t.Parallel()  // it has its own servers
	const room = 3
	f := newFleet(t, "CAY_CAPACITY_MAX_SANDBOXES=3", "CAY_POOL_ENABLED=false")
	for _, node := range []string{"host-a", "host-b"} { // both have the image, and are linked
		for _, through := range []*server{f.a, f.b} {
			id := f.needing(t, through, object{"host": node})
			f.has(node, id)
			f.a.destroy(id)
			f.a.waitState(id, "destroyed") // else it still takes room
		}
	}
	_, err := f.a.api().CreateSandbox(t.Context(), requestOf[cay.CreateSandboxRequest](t, object{"template": "python",
		"placement": object{"require": object{"host": "host-c"}}}), cay.CreateOptions{})
	if !isRefused(err, 400, "invalid_placement") {
		t.Errorf("a label that no machine has: %v", err)
	}

	var mu sync.Mutex
	made := map[string]bool{}
	var all sync.WaitGroup
	for i := range 40 {
		through := []*server{f.a, f.b}[i%2]
		all.Go(func() {
			s, err := through.api().CreateSandbox(t.Context(),
				requestOf[cay.CreateSandboxRequest](t, object{"template": "python", "timeout": "10m"}), cay.CreateOptions{})
			switch {
			case err == nil:
				mu.Lock()
				defer mu.Unlock()
				made[s.ID] = true
			case !isRefused(err, 503, "no_capacity"):
				t.Errorf("a create: %v", err)
			}
		})
	}
	all.Wait()
	if a, b := f.sandboxes("host-a"), f.sandboxes("host-b"); len(made) != 2*room || a != room || b != room {
		t.Errorf("%d were made, %d and %d are there, want %d on each machine", len(made), a, b, room)
	}
	for id := range maps.Keys(made) {
		f.b.alive(id)
		f.a.destroy(id)
	}
}

// needing makes a sandbox that needs labels, through a server.
func (f *fleetOfTwo) needing(t *testing.T, through *server, labels object) (id string) {
	t.Helper()
	request := requestOf[cay.CreateSandboxRequest](t, object{"template": "python", "timeout": "10m",
		"placement": object{"require": labels}})
	through.becomes("a machine with the labels takes a sandbox", func() bool {
		s, err := through.api().CreateSandbox(t.Context(), request, cay.CreateOptions{})
		switch {
		case isRefused(err, 503, "image_unavailable"), isRefused(err, 503, "no_capacity"),
			isRefused(err, 503, "node_unreachable"):
			return false // its image comes to the bucket, and the servers are linked, within seconds
		case err != nil:
			t.Fatal(err)
		}
		id = s.ID
		return true
	})
	return id
}
