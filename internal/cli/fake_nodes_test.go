package cli

import (
	"net/http"
	"sync"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// fakeNodes is the fake server's machine, "host-1". A drain of it ends after three looks: with all sandboxes suspended,
// or with two left if its timeout is "2s".
type fakeNodes struct {
	mu     sync.Mutex
	status cay.NodeStatus
	looks  int
	left   int
}

// node returns the machine.
func (f *fakeNodes) node() cay.Node {
	n := cay.Node{ID: "k3x7qa", Name: "host-1", Status: f.status, Labels: map[string]string{"zone": "a\x1b[2J"},
		Version: "v1", VCPUs: 4, MemoryMB: 8192, MaxSandboxes: 1000, Sandboxes: 7, Active: f.left,
		StartedAt: time.Now().Add(-5 * time.Minute)}
	if f.status != cay.NodeStatusReady {
		n.CordonedAt = new(time.Now().Add(-time.Minute))
	}
	return n
}

// nodeRoutes returns the calls about nodes.
func nodeRoutes() map[string]fakeHandler {
	f := &fakeNodes{status: cay.NodeStatusReady, left: 5}
	to := func(change func(body []byte)) fakeHandler {
		return func(w http.ResponseWriter, r *http.Request, body []byte) {
			if name := r.PathValue("node"); name != "host-1" && name != "k3x7qa" && name != "" {
				refuse(w, 404, "node_not_found", "", `there is no node "none"`)
				return
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			change(body)
			if r.PathValue("node") == "" {
				answer(w, 200, map[string]any{"nodes": []cay.Node{f.node()}})
				return
			}
			answer(w, 200, f.node())
		}
	}
	return map[string]fakeHandler{
		"GET /v1/nodes": to(func([]byte) {}),
		"GET /v1/nodes/{node}": to(func([]byte) {
			if f.status != cay.NodeStatusDraining {
				return
			}
			if f.looks--; f.looks > 0 {
				return
			}
			if f.status = cay.NodeStatusDrained; f.left > 0 {
				f.status = cay.NodeStatusCordoned
			}
		}),
		"POST /v1/nodes/tokens": func(w http.ResponseWriter, _ *http.Request, _ []byte) {
			answer(w, 201, cay.NodeToken{Token: "cayn_secret.sum", ExpiresAt: time.Now().Add(10 * time.Minute)})
		},
		"DELETE /v1/nodes/{node}": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			if r.PathValue("node") == "host-1" {
				refuse(w, 409, "node_in_use", "", "node host-1 has 7 sandboxes")
				return
			}
			w.WriteHeader(204)
		},
		"POST /v1/nodes/{node}/cordon":   to(func([]byte) { f.status = cay.NodeStatusCordoned }),
		"POST /v1/nodes/{node}/uncordon": to(func([]byte) { f.status = cay.NodeStatusReady }),
		"POST /v1/nodes/{node}/drain": to(func(body []byte) {
			f.status, f.looks, f.left = cay.NodeStatusDraining, 2, 0
			if string(body) == `{"timeout":"2s"}` {
				f.left = 2
			}
		}),
	}
}
