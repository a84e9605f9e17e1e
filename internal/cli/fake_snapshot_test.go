package cli

import (
	"encoding/json"
	"net/http"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

func aSnapshot() cay.Snapshot {
	return cay.Snapshot{ID: "snap_00000000000000000001", Name: new("after-setup"),
		SandboxID: "sbx_00000000000000000001", Template: "python", TemplateVersion: 2,
		Size: "shared-cpu-1x", VCPUs: 1, MemoryMB: 512, DiskMB: 2048, Env: cay.Env{"A": "1"}, Egress: cay.Egress{Mode: cay.EgressModeAllowAll},
		Memory: true, SizeBytes: 2_200_000, CreatedAt: time.Now().Add(-5 * time.Minute)}
}

func (f *fakeAPI) snapshot(w http.ResponseWriter, s *cay.Sandbox, body []byte) {
	var in struct{ Name *string }
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	out := aSnapshot()
	out.SandboxID, out.Name = s.ID, in.Name
	answer(w, 201, out)
}

func (f *fakeAPI) snapshots(w http.ResponseWriter, r *http.Request, _ []byte) {
	nameless := aSnapshot()
	nameless.ID, nameless.Name = "snap_00000000000000000002", nil
	if r.URL.Query().Get("name") == "none" {
		answer(w, 200, cay.SnapshotList{Snapshots: []cay.Snapshot{}})
		return
	}
	answer(w, 200, cay.SnapshotList{Snapshots: []cay.Snapshot{nameless, aSnapshot()}})
}

// fork makes at most two children, and refuses the others.
func (f *fakeAPI) fork(w http.ResponseWriter, s *cay.Sandbox, body []byte) {
	var in cay.ForkRequest
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	var children []cay.ForkChild
	for i := range *in.Count {
		child := *s
		child.ID = []string{"sbx_child0", "sbx_child1", ""}[min(i, 2)]
		if child.ID == "" {
			children = append(children, cay.ForkChild{Error: &cay.ForkError{Status: 429, Code: "quota_exceeded",
				Detail: "too many"}})
		} else {
			children = append(children, cay.ForkChild{Sandbox: &child})
		}
	}
	answer(w, 201, map[string]any{"children": children})
}
