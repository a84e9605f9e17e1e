package api

import (
	"fmt"
	"slices"
	"testing"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/webhook"
)

// texts returns values as texts, sorted.
func texts[T any](all []T) []string {
	out := each(all, func(v T) string { return fmt.Sprint(v) })
	slices.Sort(out)
	return out
}

// TestEnumsAreTheCores fails for a value that the document has and the core does not, or the reverse.
func TestEnumsAreTheCores(t *testing.T) {
	spec := loadSpec(t)
	var statuses []sandbox.Status
	for _, s := range sandbox.States() {
		if !slices.Contains(statuses, s.Status()) {
			statuses = append(statuses, s.Status())
		}
	}
	for name, core := range map[string][]string{
		"SandboxState":  texts(sandbox.States()),
		"SandboxStatus": texts(statuses),
		"FeedEventType": texts(event.Types()),
		"NodeStatus": texts([]fleet.Status{fleet.Ready, fleet.Cordoned, fleet.Draining, fleet.Drained, fleet.Unreachable,
			fleet.Lost}),
		"Scope":          texts(auth.Scopes()),
		"WebhookFormat":  texts([]webhook.Format{webhook.Standard, webhook.E2B}),
		"DisabledReason": texts([]webhook.Reason{webhook.Requested, webhook.Failing, webhook.Gone, webhook.Backlog}),
	} {
		schema := spec.Components.Schemas[name]
		if schema == nil {
			t.Errorf("the document has no %s", name)
			continue
		}
		if document := texts(schema.Value.Enum); !slices.Equal(document, core) {
			t.Errorf("%s is one of %q in the document, %q in the core", name, document, core)
		}
	}
}
