package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestHide hides in a small package everything that its one exported method does not need.
func TestHide(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("client.go", `package p

type Client struct{ last Unused }

func (c *Client) Get(id string) (*Thing, error) { return nil, nil }
func (c *Client) get(p APIParams) {}
`)
	write("models.gen.go", `package p

// Defines values for Kind.
const KindBig Kind = "big"

// Defines values for Unused.
const UnusedOne Unused = "one"

// Kind The kind of a thing.
type Kind string

// Unused A word.
type Unused string

// Thing A thing.
type Thing struct {
	// Kind The kind.
	Kind Kind
	// Unused URL of nothing.
	Unused string
}

// APIParams defines parameters for Get.
type APIParams struct{ Unused *Unused }

func (a APIParams) Valid() bool { return a.Unused == nil || APIParams{Unused: a.Unused}.Valid() }

// NewAPIParams makes parameters.
func NewAPIParams(Unused string) APIParams { return APIParams{} }
`)
	if err := hide(dir); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "models.gen.go"))
	if err != nil {
		t.Fatal(err)
	}
	want := `package p

// Values of Kind.
const KindBig Kind = "big"

// Values of unused.
const unusedOne unused = "one"

// Kind describes the kind of a thing.
type Kind string

// unused describes a word.
type unused string

// Thing describes a thing.
type Thing struct {
	// The kind.
	Kind Kind
	// URL of nothing.
	Unused string
}

// apiParams defines parameters for Get.
type apiParams struct{ Unused *unused }

func (a apiParams) Valid() bool { return a.Unused == nil || apiParams{Unused: a.Unused}.Valid() }

// newAPIParams makes parameters.
func newAPIParams(Unused string) apiParams { return apiParams{} }
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}
