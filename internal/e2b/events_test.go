package e2b

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/sandbox"
)

// TestEvents reads the events of a sandbox and of its organization, in both orders, in parts and by type.
func TestEvents(t *testing.T) {
	h := newHarness(t)
	id, _ := h.create(`{"templateID":"base","metadata":{"a":"b"}}`)
	other, _ := h.create(`{"templateID":"mine"}`)
	for _, call := range [][3]string{
		{"PUT", "/network", `{"allow_internet_access":false}`}, {"POST", "/pause", ``}, {"POST", "/connect", `{"timeout":60}`},
		{"POST", "/snapshots", `{}`}, {"DELETE", "", ``},
	} {
		if r := h.control(call[0], "/sandboxes/"+id+call[1], call[2]); r.status/100 != 2 {
			t.Fatalf("%s: %d %s", call, r.status, r.body)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); h.row(id).State != sandbox.Destroyed; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatalf("the sandbox is %s", h.row(id).State)
		}
	}

	read := func(path string) (all []eventBody) {
		t.Helper()
		r := h.control("GET", path, "")
		if err := json.Unmarshal([]byte(r.body), &all); r.status != http.StatusOK || err != nil {
			t.Fatalf("%s: %d %s", path, r.status, r.body)
		}
		return all
	}
	kinds := func(all []eventBody) (out []string) {
		for _, e := range all {
			out = append(out, strings.TrimPrefix(e.Type, "sandbox.lifecycle."))
		}
		return out
	}
	one := read("/events/sandboxes/" + id)
	if diff := cmp.Diff([]string{"killed", "checkpointed", "resumed", "paused", "updated", "created"},
		kinds(one)); diff != "" {
		t.Errorf("the events of one (-want +got):\n%s", diff)
	}
	ids := map[string]bool{}
	for _, e := range one {
		if e.SandboxID != id || e.SandboxTemplateID != h.row(id).TemplateID || e.SandboxTeamID != h.org.Org.ID ||
			e.Version != "v2" || e.Timestamp.IsZero() || len(e.ID) != 36 || ids[e.ID] ||
			fmt.Sprint(e.EventData) != "map[sandbox_metadata:map[a:b]]" {
			t.Errorf("an event is %+v", e)
		}
		ids[e.ID] = true
	}

	all := read("/events/sandboxes")
	if diff := cmp.Diff([]string{"killed", "checkpointed", "resumed", "paused", "updated", "created", "created"},
		kinds(all)); diff != "" {
		t.Errorf("the events of all (-want +got):\n%s", diff)
	}
	if all[5].SandboxID != other || all[5].EventData != nil {
		t.Errorf("another sandbox's event is %+v", all[5])
	}
	for path, want := range map[string][]eventBody{
		"/events/sandboxes/" + id: slices.Delete(slices.Clone(all), 5, 6), "/events/sandboxes": all,
	} {
		asc := read(path + "?orderAsc=true")
		slices.Reverse(asc)
		if diff := cmp.Diff(want, asc); diff != "" {
			t.Errorf("%s, oldest first, reversed (-want +got):\n%s", path, diff)
		}
		if diff := cmp.Diff(want[2:4], read(path+"?offset=2&limit=2")); diff != "" {
			t.Errorf("%s, in part (-want +got):\n%s", path, diff)
		}
		if got := read(path + "?offset=50"); len(got) != 0 {
			t.Errorf("%s, beyond the end: %v", path, got)
		}
		got := kinds(read(path + "?types=sandbox.lifecycle.killed&types=sandbox.lifecycle.paused&orderAsc=True"))
		if !slices.Equal(got, []string{"paused", "killed"}) {
			t.Errorf("%s, by type: %s", path, got)
		}
		for _, query := range []string{"offset=-1", "offset=10001", "limit=0", "limit=101", "limit=x", "orderAsc=2",
			"types=sandbox.lifecycle.born"} {
			if r := h.control("GET", path+"?"+query, ""); r.status != http.StatusBadRequest {
				t.Errorf("%s?%s: %d %s", path, query, r.status, r.body)
			}
		}
	}
	if r := h.send("GET", "/events/sandboxes", "", "X-API-Key", h.other); r.body != "[]\n" && r.body != "[]" {
		t.Errorf("another organization sees %s", r.body)
	}
}
