package template

import "github.com/cayhq/cay/internal/event"

// Facts returns the events of a change of a template's row; before is the zero Template for one
// that is new. A store writes them with the row.
func Facts(before, after Template) []event.Type {
	var facts []event.Type
	if before.ID == "" {
		facts = append(facts, event.TemplateCreated)
	}
	if !before.Queued() && after.Queued() {
		facts = append(facts, event.TemplateBuildQueued)
	}
	if before.Status != Building && after.Status == Building {
		facts = append(facts, event.TemplateBuildStarted)
	}
	if (before.Queued() || before.Status == Building) && !after.Queued() {
		switch after.Status {
		case Ready:
			facts = append(facts, event.TemplateBuildReady)
		case Failed:
			facts = append(facts, event.TemplateBuildFailed)
		}
	}
	return facts
}
