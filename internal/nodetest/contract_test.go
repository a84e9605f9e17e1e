package nodetest_test

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
)

var _ sandbox.Node = (*nodetest.Fake)(nil)

// fakeInside implements nodetest.Inside.
type fakeInside struct{ *nodetest.Fake }

func (f fakeInside) Write(_ *testing.T, spec sandbox.Spec, text string) { f.Fake.Write(spec.ID, text) }

func (f fakeInside) Read(_ *testing.T, spec sandbox.Spec) string {
	text, _, _ := f.Contents(spec.ID)
	return text
}

func (f fakeInside) ReadFile(t *testing.T, spec sandbox.Spec) string { return f.Read(t, spec) }

func (f fakeInside) Command(_ *testing.T, spec sandbox.Spec, variable string) (value, workdir string) {
	_, env, workdir := f.Contents(spec.ID)
	return env[variable], workdir
}

func (f fakeInside) Work(_ *testing.T, spec sandbox.Spec) { f.Fake.Work(spec.ID) }

func (f fakeInside) Send(_ *testing.T, spec sandbox.Spec, to netip.AddrPort) {
	go f.Refuse(sandbox.Denial{ID: spec.ID, Protocol: "tcp", Destination: to, Count: 1})
}

func TestFake(t *testing.T) {
	nodetest.Contract(t, func(*testing.T) nodetest.Fixture {
		n := nodetest.NewFake()
		return nodetest.Fixture{Node: n, Inside: fakeInside{n},
			Spec: func() sandbox.Spec {
				return sandbox.Spec{ID: sandbox.NewID(), Run: "run", Token: "secret",
					Shape: sandbox.Shape{Egress: sandbox.Egress{Mode: sandbox.AllowAll}}}
			},
			SetMost: n.SetMost, SetDiskFull: n.SetDiskFull,
			Kill: func(_ *testing.T, id sandbox.ID) { go n.Die(id) },
		}
	})
}

func TestContractCallsEveryMethod(t *testing.T) {
	missing := caytest.Uncalled(t, reflect.TypeFor[sandbox.Node](), "s.Node",
		"contract.go", "contract_instance.go", "contract_checkpoint.go", "contract_pool.go",
		"contract_capacity.go")
	if missing != nil {
		t.Errorf("the contract calls none of %q", missing)
	}
}
