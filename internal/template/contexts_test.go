package template

import (
	"strings"
	"testing"
	"testing/synctest"
)

// TestContextsOfAnOrganization checks that the contexts that one organization sends are bounded
// in all, even if its requests fail, and do not count for another.
func TestContextsOfAnOrganization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		block := func(text string) string { return strings.Repeat("\x00", 1024) + text }
		one := block("1")
		size := int64(len(one))
		h := life(t, newMemory(), newBuilder(), func(c *Config) { c.ContextLimit, c.ContextTotal = size+10, 3*size+5 })
		release := h.builder.hold()
		defer release()
		create := func(caller Caller, name, context string) error {
			_, err := h.Create(t.Context(), caller, Request{Definition: Definition{Name: name, Dockerfile: "Dockerfile"}},
				strings.NewReader(context))
			return err
		}
		other := Caller{OrgID: "org_other"}
		if err := create(me, "a", one); err != nil {
			t.Fatal(err)
		}
		// This is refused after the context was read.
		again := Request{Definition: Definition{Dockerfile: "Dockerfile"}}
		for _, text := range []string{"2", "3"} {
			if _, err := h.Rebuild(t.Context(), me, "a", &again, strings.NewReader(block(text))); err == nil {
				t.Fatal("a rebuild of what is being built was taken")
			}
		}
		wantCode(t, create(me, "b", block("4")), "quota_exceeded")
		if err := create(other, "b", block("4")); err != nil {
			t.Errorf("another organization: %v", err)
		}
		wantCode(t, create(me, "c", one+strings.Repeat("x", 20)), "quota_exceeded")
		if _, _, err := h.Collect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := create(me, "b", block("4")); err != nil {
			t.Errorf("after a collection: %v", err)
		}
	})
}

// TestContextsAtTheSameTime checks that contexts being sent count with the most that may come.
func TestContextsAtTheSameTime(t *testing.T) {
	b := contextBudget{lately: map[string]map[string]int64{}, putting: map[string]int64{}}
	has := contextSizes{"a": 10}
	for i, want := range []int64{40, 40, 10, 0} {
		if got := b.begin("org", has, 40, 100); got != want {
			t.Errorf("the context %d may have %d bytes, want %d", i, got, want)
		}
	}
	if got := b.begin("other", nil, 40, 100); got != 40 {
		t.Errorf("another organization's may have %d bytes", got)
	}
	b.end("org", 40, "b", 5)
	b.end("org", 40, "", 0)
	if got := b.begin("org", has, 100, 100); got != 75 {
		t.Errorf("then there are %d bytes, want 75", got)
	}
	b.end("org", 75, "a", 10) // known already
	b.gone([]string{"b"})
	if got := b.begin("org", has, 100, 100); got != 80 {
		t.Errorf("then there are %d bytes, want 80", got)
	}
}
