package sandbox_test

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
)

// shapedTemplate serves one template, whose shape has a value in every field.
type shapedTemplate struct{ shape sandbox.Shape }

func newShapedTemplate() shapedTemplate {
	var s sandbox.Shape
	caytest.Fill(&s, 7)
	s.Size = sandbox.Size{Name: "big"} // the server has the rest
	s.Start.User = ""                  // templates do not set it
	return shapedTemplate{s}
}

func (t shapedTemplate) Ready(context.Context, string, string) (sandbox.TemplateVersion, error) {
	return sandbox.TemplateVersion{ID: "tpl_aaaaaaaaaaaaaaaaaaaa", Name: "python", Version: 1, Shape: t.shape.Clone()}, nil
}

// TestShapeIsCarried fails if a field of the shape, also one that is added later, is lost between a
// template and what a machine is given: by a create, a pooled sandbox and its claim, a row, a wake, a
// snapshot, a restore or a fork.
func TestShapeIsCarried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		template := newShapedTemplate()
		want := template.shape
		want.Size = sandbox.Size{Name: "big", VCPUs: 4, MemoryMB: 8192, Dedicated: true}
		h.crash()
		h.what = template
		h.start()
		specs := map[string]sandbox.Spec{}
		remember := func(what string) func(context.Context, sandbox.Spec) error {
			return func(_ context.Context, spec sandbox.Spec) error {
				specs[what] = spec
				return nil
			}
		}
		h.node.OnCreate, h.node.OnWake = remember("create"), remember("wake")
		h.node.OnPrepare, h.node.OnClaim = remember("prepare"), remember("claim")
		check := func(what string, got sandbox.Shape, started bool) {
			t.Helper()
			want := want
			if !started {
				want.Start = sandbox.Start{}
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
				t.Errorf("%s lost (-template +got):\n%s", what, diff)
			}
		}

		sbx := h.mustCreate(sandbox.Request{Mode: "persistent"})
		check("a create", specs["create"].Shape, true)
		check("a row", h.get(sbx.ID).Shape, true)
		if _, err := h.Suspend(t.Context(), org, sbx.ID, sandbox.KeepAll); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Wake(t.Context(), h.caller(), sbx.ID); err != nil {
			t.Fatal(err)
		}
		check("a wake", specs["wake"].Shape, false)
		snap, err := h.SaveSnapshot(t.Context(), org, sbx.ID, "")
		if err != nil {
			t.Fatal(err)
		}
		check("a snapshot", snap.Shape, true)
		restored := h.mustCreate(sandbox.Request{Snapshot: string(snap.ID)})
		check("a restore", specs["create"].Shape, false)
		check("a restored row", h.get(restored.ID).Shape, true)
		children, err := h.Fork(t.Context(), h.caller(), sbx.ID, sandbox.ForkRequest{Count: 1})
		if err != nil || children[0].Err != nil {
			t.Fatal(err, children)
		}
		check("a fork", specs["create"].Shape, false)
		check("a forked row", children[0].Sandbox.Shape, true)

		h.crash()
		h.pool = fixed(1)
		h.pool.Templates[0].Size = "big"
		h.start()
		h.mustCreate(sandbox.Request{})
		h.settled()
		check("a pooled sandbox", specs["prepare"].Shape, true)
		if sbx := h.mustCreate(sandbox.Request{}); sbx.Source != sandbox.Warm {
			t.Fatalf("the pool did not serve a plain create: %+v", sbx)
		}
		check("a claim", specs["claim"].Shape, true)
	})
}

// TestPoolTellsShapesApart gives a template another value of each field of the shape, also of one
// that is added later: no pooled sandbox of before may serve a create then. What a claim sets anew
// makes no difference to a sandbox without a start command.
func TestPoolTellsShapesApart(t *testing.T) {
	claimed := map[string]bool{"Env": true, "User": true, "Workdir": true, "Egress": true}
	for _, started := range []bool{true, false} {
		base := newShapedTemplate().shape
		if !started {
			base.Start = sandbox.Start{}
		}
		for i := range reflect.TypeFor[sandbox.Shape]().NumField() {
			field := reflect.TypeFor[sandbox.Shape]().Field(i)
			other := base.Clone()
			if field.Name == "Size" {
				other.Size.Name = "small"
			} else {
				caytest.Fill(reflect.ValueOf(&other).Elem().Field(i).Addr().Interface(), 8)
			}
			t.Run(field.Name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					h := newFixture(t)
					h.crash()
					h.what, h.pool = shapedTemplate{base}, fixed(1)
					h.pool.Templates[0].Size = base.Size.Name
					h.start()
					h.mustCreate(sandbox.Request{})
					h.settled()
					if sbx := h.mustCreate(sandbox.Request{}); sbx.Source != sandbox.Warm {
						t.Fatalf("the pool did not serve the same shape: %+v", sbx)
					}
					before := h.settled()
					h.crash()
					h.what = shapedTemplate{other}
					h.start()
					h.settled()
					sbx := h.mustCreate(sandbox.Request{Size: other.Size.Name})
					same := !started && claimed[field.Name]
					old := slices.ContainsFunc(before, func(p sandbox.Pooled) bool { return p.ID == sbx.ID })
					if old != same {
						t.Errorf("with another %s and a start command %v a pooled sandbox of before serves a create: %v",
							field.Name, started, old)
					}
				})
			})
		}
	}
}

// TestShapeClone fails for a map, a list or a pointer that a copy of a shape shares, also one in a
// field that is added later.
func TestShapeClone(t *testing.T) {
	var s sandbox.Shape
	caytest.Fill(&s, 7)
	clone := s.Clone()
	if diff := cmp.Diff(s, clone, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("(-shape +clone):\n%s", diff)
	}
	if path := caytest.Shared(s, clone); path != "" {
		t.Errorf("a copy shares %s", path)
	}
}

// TestEgressEqual gives a policy another value of each field, also of one that is added later. A
// field that Equal lacks would never be put in force again after a crash, and one that the summary
// lacks would be in no event.
func TestEgressEqual(t *testing.T) {
	var e sandbox.Egress
	caytest.Fill(&e, 7)
	if !e.Equal(e.Clone()) {
		t.Error("a policy differs from its copy")
	}
	for i := range reflect.TypeFor[sandbox.Egress]().NumField() {
		name := reflect.TypeFor[sandbox.Egress]().Field(i).Name
		other, without := e.Clone(), e.Clone()
		caytest.Fill(reflect.ValueOf(&other).Elem().Field(i).Addr().Interface(), 8)
		reflect.ValueOf(&without).Elem().Field(i).SetZero()
		if e.Equal(other) || other.Equal(e) {
			t.Errorf("policies with another %s are equal", name)
		}
		if sandbox.Summary(e) == sandbox.Summary(without) {
			t.Errorf("the summary does not tell of %s", name)
		}
	}
}
