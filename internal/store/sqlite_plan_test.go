package store

import (
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/webhook"
)

// TestPlans checks that frequent queries use their indexes. Without it, a scan of a table full of
// destroyed sandboxes would be noticed only on a machine that has run for a week.
func TestPlans(t *testing.T) {
	db := open(t)
	live := []sandbox.State{sandbox.Creating, sandbox.Running}
	list := func(f sandbox.Filter) (string, params) {
		f.OrgID, f.Limit = "o", 50
		q, p, err := listQuery(f)
		if err != nil {
			t.Fatal(err)
		}
		return q, p
	}
	snapshots, ps, err := listSnapshotsQuery(sandbox.SnapshotFilter{OrgID: "o", Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	listing, pl, err := listingQuery("sbx_a", 50, cursor{listEvents, 5, "sbx_a"}.String())
	if err != nil {
		t.Fatal(err)
	}
	page, pp := feedQuery(event.Query{OrgID: "o", After: 5, Limit: 50}, 9)
	filtered, pf := feedQuery(event.Query{OrgID: "o", After: 5, Limit: 50, SandboxID: "sbx_a",
		Types: []event.Type{event.OrgCreated, event.KeyCreated}}, 9)
	back, pb := feedQuery(event.Query{OrgID: "o", After: 5, Before: 50, Limit: 50,
		Types: []event.Type{event.OrgCreated}}, 9)
	q1, p1 := list(sandbox.Filter{States: live})
	q2, p2 := list(sandbox.Filter{States: []sandbox.State{sandbox.Destroyed},
		Cursor: cursor{listSandboxes, 5, "sbx_a"}.String()})
	hooks, ph, err := listWebhooksQuery(webhook.Filter{OrgID: "o", Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	deliveries, pd, err := listDeliveriesQuery(webhook.DeliveryFilter{WebhookID: "w", Made: new(false), Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	made, pm, err := listDeliveriesQuery(webhook.DeliveryFilter{WebhookID: "w", Made: new(true), Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	head, phead := nextDelivery("w", []string{"a", "b"})
	for _, c := range []struct {
		query string
		args  []any
		index string
	}{
		{hooks, ph, "webhooks_page"},
		{deliveries, pd, "sqlite_autoindex_webhook_deliveries"},
		{head, phead, "webhook_due"},
		{dueWebhooks, nil, "webhook_due"},
		{enabledWebhooks, []any{"o"}, "webhooks_enabled"},
		{setHead, []any{"w", "a", 5}, "webhook_lanes"},
		{dropHead, []any{"w", "a"}, "webhook_heads"},
		{dropHead, []any{"w", "a"}, "webhook_lanes"},
		{oldestPending, nil, "sqlite_autoindex_webhook_deliveries"},
		{made, pm, "webhook_made"},
		{surplusMade, []any{"w", 5}, "webhook_made"},
		{q1, p1, "sandboxes_live_page"},
		{q2, p2, "sandboxes_page"},
		{snapshots, ps, "snapshots_page"},
		{findSnapshot, []any{"o", "n", "ready"}, "snapshots_name"},
		{"SELECT id FROM snapshots WHERE node_id = $1 AND state <> 'ready' ORDER BY created_at, id", []any{"n"}, "snapshots_unready"},
		{getNode, []any{"n"}, "sandboxes_live"},
		{lostSandboxes, []any{"n"}, "sandboxes_live"},
		{keyByHash, []any{"x"}, "sqlite_autoindex_api_keys"},
		{keyByID, []any{"x"}, "sqlite_autoindex_api_keys"},
		{keyAndSandbox, []any{"x", "s"}, "sqlite_autoindex_api_keys"},
		{keyAndSandbox, []any{"x", "s"}, "sqlite_autoindex_sandboxes"},
		{liveKeys, []any{"o", 5}, "api_keys_page"},
		{crowded, []any{5}, "sandboxes_over"},
		{purgeMany, []any{"o", 5, 5}, "sandboxes_over"},
		{"SELECT COUNT(*) FROM sandboxes WHERE ended_at IS NULL AND org_id = $1 AND id <> $2 AND state IN ($3, $4)", []any{"o", "i", "s", "t"}, "sandboxes_live_page"},
		{"SELECT id FROM sandboxes WHERE node_id = $1 AND ended_at IS NULL ORDER BY created_at, id", []any{"n"}, "sandboxes_live"},
		{"SELECT id FROM sandboxes WHERE ended_at IS NOT NULL AND ended_at < $1 ORDER BY ended_at LIMIT 5", []any{5}, "sandboxes_ended"},
		{"SELECT COUNT(*) FROM sandboxes WHERE template_id = $1 AND ended_at IS NULL", []any{"t"}, "sandboxes_of_template"},
		{"SELECT id FROM templates WHERE queued_at IS NOT NULL ORDER BY queued_at, id", nil, "templates_queued"},
		{"UPDATE template_tags SET gone = TRUE WHERE image = $1", []any{"x"}, "template_tags_image"},
		{"SELECT port FROM public_ports WHERE sandbox_id = $1 ORDER BY port", []any{"s"}, "sqlite_autoindex_public_ports"},
		{listing, pl, "events_listing"},
		{page, pp, "events_feed"},
		{filtered, pf, "events_feed"},
		{back, pb, "events_feed"},
		{lastEvent, []any{"o"}, "events_feed"},
		{scanEnd, []any{"o", 5, 9, 50}, "events_feed"},
		{scanBegin, []any{"o", 5, 9, 50}, "events_feed"},
		{surplus, []any{"o", 5, 50}, "events_feed"},
		{oldest, []any{"o", 5, 9, 50}, "events_feed"},
		{trim, []any{"o", 5, 9}, "events_feed"},
		{trimmable, nil, "SEARCH events USING INTEGER PRIMARY KEY"}, // reads the last row alone
		{sqliteInsertListed, []any{"o", 5, "t", "s", "", "", "", "", "", 5}, "events_listing"},
		{sqliteInsertEvent, []any{"o", 5, "t", "s", "", "", "", "", "", 5}, "SCAN events"},
		{"DELETE FROM events WHERE number IS NOT NULL AND sandbox_id IN ($1, $2)" + isBeyond, []any{"a", "b"},
			"events_listing"},
		{"SELECT sandbox_id FROM sandbox_metadata WHERE org_id = $1 AND name = $2 AND value = $3", []any{"o", "n", "v"}, "sandbox_metadata_search"},
	} {
		rows, err := db.reader.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+c.query, c.args...)
		if err != nil {
			t.Fatal(err)
		}
		var plan []string
		for rows.Next() {
			var a, b, d int
			var step string
			if err := rows.Scan(&a, &b, &d, &step); err != nil {
				t.Fatal(err)
			}
			plan = append(plan, step)
		}
		if err := rows.Close(); err != nil {
			t.Fatal(err)
		}
		text := strings.Join(plan, "; ")
		if !strings.Contains(text, c.index) || strings.Contains(text, "TEMP B-TREE") {
			t.Errorf("%s\n\tplan %q does not use %s alone", c.query, text, c.index)
		}
	}
}
