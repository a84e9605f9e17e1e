package sandbox_test

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestRequestIsResolved fails for a field of a request, also for one that is added later, that makes
// no difference to the sandbox. Such a field would be accepted and ignored.
func TestRequestIsResolved(t *testing.T) {
	cfg := sandbox.Config{Sizes: []sandbox.Size{{Name: "small"}, {Name: "big"}}, DefaultSize: "small", DefaultDisk: 100,
		MaxDisk: 1000}
	version := sandbox.TemplateVersion{Builtin: true}
	now := time.Now()
	valid := map[string]any{ // where the value of caytest.Fill is none
		"Mode": "persistent", "Size": "big", "AtEnd": sandbox.EndSuspends, "DiskSizeMB": new(200), "Timeout": new(time.Minute),
		"IdleTimeout": new(time.Minute), "RecoveryInterval": new(2 * time.Minute),
		"Egress": &sandbox.Egress{Mode: sandbox.DenyAll},
	}
	persistent := map[string]bool{"IdleTimeout": true, "RecoveryInterval": true}
	elsewhere := map[string]bool{"Template": true, "Snapshot": true} // Create finds what they name
	for i := range reflect.TypeFor[sandbox.Request]().NumField() {
		name := reflect.TypeFor[sandbox.Request]().Field(i).Name
		if elsewhere[name] {
			continue
		}
		base := sandbox.Request{Template: "python"}
		if persistent[name] {
			base.Mode = string(sandbox.Persistent)
		}
		r := base
		field := reflect.ValueOf(&r).Elem().Field(i)
		if v, ok := valid[name]; ok {
			field.Set(reflect.ValueOf(v))
		} else {
			caytest.Fill(field.Addr().Interface(), 7)
		}
		without, err := sandbox.Resolve(base, cfg, version, now)
		if err != nil {
			t.Fatal(err)
		}
		with, err := sandbox.Resolve(r, cfg, version, now)
		if err != nil {
			t.Errorf("%s: %v; this test needs a valid value for it", name, err)
			continue
		}
		if cmp.Equal(without, with, cmpopts.EquateComparable(netip.Prefix{}),
			cmpopts.IgnoreFields(sandbox.Sandbox{}, "ID", "Run", "Token")) {
			t.Errorf("a sandbox is the same with another %s", name)
		}
	}
}
