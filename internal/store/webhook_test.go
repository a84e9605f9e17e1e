package store

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/webhook"
)

// aWebhook returns an enabled webhook of org_a with a value in every field that an enabled one has.
func aWebhook(i int) webhook.Webhook {
	var w webhook.Webhook
	caytest.Fill(&w, 7)
	w.ID, w.OrgID = fmt.Sprintf("whk_%03d", i), "org_a"
	w.CreatedAt = start.Add(time.Duration(i) * time.Second)
	w.Enabled, w.Reason, w.DisabledAt, w.Pending, w.Bytes, w.After = true, "", time.Time{}, 0, 0, 0
	return w
}

func mustHook(t *testing.T, st webhook.Store, i int) webhook.Webhook {
	t.Helper()
	w := aWebhook(i)
	if err := st.AddWebhook(t.Context(), w, 0); err != nil {
		t.Fatal(err)
	}
	return w
}

// some returns deliveries of a webhook with rising places from first on, one for each lane that is named.
func some(id string, first int, lanes ...string) (all []webhook.Delivery) {
	for i, lane := range lanes {
		all = append(all, webhook.Delivery{WebhookID: id, Seq: event.Seq(first + i), Lane: lane, Type: "sandbox.running",
			Body: fmt.Sprint("body ", first+i)})
	}
	return all
}

// roomy are bounds that no test reaches without meaning to.
var roomy = webhook.Bounds{Deliveries: 1000, Bytes: 1 << 20}

func mustEnqueue(t *testing.T, st webhook.Store, id string, now time.Time, all []webhook.Delivery) {
	t.Helper()
	if n, err := st.Enqueue(t.Context(), id, all, roomy, now); err != nil || n != len(all) {
		t.Fatalf("%d of %d deliveries were added, %v", n, len(all), err)
	}
}

// testWebhookStore tests the contract of webhook.Store, which every implementation must keep.
func testWebhookStore(t *testing.T, open func(t *testing.T) *DB) {
	for name, f := range map[string]func(*testing.T, *DB){
		"every field":        webhookFieldsAreKept,
		"listing":            webhookListing,
		"changing":           webhookChanging,
		"the consumer":       webhookConsumer,
		"order of a lane":    deliveryOrder,
		"lanes in a race":    deliveryRace,
		"every attempt":      deliveryAttempts,
		"bounds":             deliveryBounds,
		"replaying":          deliveryReplay,
		"listing deliveries": deliveryListing,
		"trimming":           deliveryTrims,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, open(t))
		})
	}
}

func webhookFieldsAreKept(t *testing.T, db *DB) {
	var st webhook.Store = db
	w := aWebhook(1)
	w.Enabled, w.Reason, w.DisabledAt, w.After, w.Pending, w.Bytes = false, webhook.Requested, start, 3, 4, 5
	if err := st.AddWebhook(t.Context(), w, 0); err != nil {
		t.Fatal(err)
	}
	got, err := st.GetWebhook(t.Context(), "org_a", w.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(w, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, who := range [][2]string{{"org_b", w.ID}, {"org_a", "whk_none"}} {
		_, err := st.GetWebhook(t.Context(), who[0], who[1])
		wantFault(t, err, fault.NotFound, fault.CodeWebhookNotFound)
		_, err = st.ChangeWebhook(t.Context(), who[0], who[1], start, func(*webhook.Webhook) error { return nil })
		wantFault(t, err, fault.NotFound, fault.CodeWebhookNotFound)
		wantFault(t, st.DeleteWebhook(t.Context(), who[0], who[1], start), fault.NotFound, fault.CodeWebhookNotFound)
	}
	for i := 2; i < 4; i++ {
		if err := st.AddWebhook(t.Context(), aWebhook(i), 3); err != nil {
			t.Fatal(err)
		}
	}
	wantFault(t, st.AddWebhook(t.Context(), aWebhook(4), 3), fault.Exhausted, fault.CodeQuotaExceeded)
	if err := st.DeleteWebhook(t.Context(), "org_a", "whk_002", start); err != nil {
		t.Fatal(err)
	}
	if err := st.AddWebhook(t.Context(), aWebhook(4), 3); err != nil {
		t.Errorf("after one is deleted: %v", err)
	}
	wantFault(t, st.DeleteWebhook(t.Context(), "org_a", "whk_002", start), fault.NotFound, fault.CodeWebhookNotFound)
	_, err = st.GetWebhook(t.Context(), "org_a", "whk_002")
	wantFault(t, err, fault.NotFound, fault.CodeWebhookNotFound)
	var kinds []string
	all, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 50})
	for _, e := range all {
		kinds = append(kinds, fmt.Sprint(e.Type, " ", e.WebhookID, " ", e.Name, e.Reason))
	}
	want := []string{"webhook.created whk_001 text7", "webhook.created whk_002 text7", "webhook.created whk_003 text7",
		"webhook.deleted whk_002 text7", "webhook.created whk_004 text7"}
	if diff := cmp.Diff(want, kinds); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

func webhookListing(t *testing.T, db *DB) {
	var st webhook.Store = db
	var want []string
	for i := range 5 {
		w := aWebhook(i)
		if w.Format = webhook.Standard; i%2 == 1 {
			w.Format = webhook.E2B
		}
		w.Enabled = i != 3
		if err := st.AddWebhook(t.Context(), w, 0); err != nil {
			t.Fatal(err)
		}
		want = append([]string{w.ID}, want...)
	}
	other := aWebhook(9)
	other.OrgID = "org_b"
	if err := st.AddWebhook(t.Context(), other, 0); err != nil {
		t.Fatal(err)
	}
	read := func(f webhook.Filter) (ids []string) {
		t.Helper()
		for f.OrgID, f.Limit = "org_a", 2; ; {
			page, next, err := st.ListWebhooks(t.Context(), f)
			if err != nil || len(page) > 2 {
				t.Fatal(len(page), err)
			}
			for _, w := range page {
				ids = append(ids, w.ID)
			}
			if f.Cursor = next; next == "" {
				return ids
			}
		}
	}
	if got := read(webhook.Filter{}); !slices.Equal(got, want) {
		t.Errorf("all are %q", got)
	}
	if got := read(webhook.Filter{Format: webhook.E2B}); !slices.Equal(got, []string{"whk_003", "whk_001"}) {
		t.Errorf("those of a format are %q", got)
	}
	_, _, err := st.ListWebhooks(t.Context(), webhook.Filter{OrgID: "org_a", Limit: 1, Cursor: "x"})
	wantFault(t, err, fault.Invalid, fault.CodeInvalidCursor)
	enabled, err := st.EnabledWebhooks(t.Context(), "org_a")
	if err != nil || len(enabled) != 4 ||
		slices.ContainsFunc(enabled, func(w webhook.Webhook) bool { return w.ID == "whk_003" }) {
		t.Errorf("%d are enabled, %v", len(enabled), err)
	}
}

// headsOf describes the heads of the lanes of a webhook.
func headsOf(t *testing.T, st webhook.Store, id string) (out string) {
	t.Helper()
	all, _, err := st.ListDeliveries(t.Context(), webhook.DeliveryFilter{WebhookID: id, Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		if !d.NextAt.IsZero() {
			out += fmt.Sprintf("%d after %d at %s; ", d.Seq, d.Attempts, d.NextAt.Sub(start))
			if (d.Attempts == 0) != d.FailedAt.IsZero() {
				t.Errorf("%d attempts failed, the first at %s", d.Attempts, d.FailedAt)
			}
		}
	}
	return out
}

func webhookChanging(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := t.Context()
	w := mustHook(t, st, 1)
	refused := fault.InvalidField("url", "no")
	if _, err := st.ChangeWebhook(ctx, "org_a", w.ID, start, func(w *webhook.Webhook) error {
		w.Name = "lost"
		return refused
	}); err != error(refused) {
		t.Errorf("the error of the change is %v", err)
	}
	mustEnqueue(t, st, w.ID, start, some(w.ID, 1, "a", "a", "b"))
	later := start.Add(time.Hour)
	for seq := range event.Seq(3) {
		if seq+1 == 2 {
			continue // it waits for the first
		}
		if err := st.EndAttempt(ctx, webhook.Result{WebhookID: w.ID, URL: w.URL, EnabledAt: w.EnabledAt, Seq: seq + 1,
			NextAt: later.Add(time.Hour), Attempt: webhook.Attempt{At: start, Error: "no"}}); err != nil {
			t.Fatal(err)
		}
	}
	heads := func() string { return headsOf(t, st, w.ID) }
	change := func(f func(*webhook.Webhook)) webhook.Webhook {
		t.Helper()
		got, err := st.ChangeWebhook(ctx, "org_a", w.ID, later, func(w *webhook.Webhook) error { f(w); return nil })
		if err != nil {
			t.Fatal(err)
		}
		read, err := st.GetWebhook(ctx, "org_a", w.ID)
		if diff := cmp.Diff(read, got); diff != "" || err != nil {
			t.Errorf("the returned one differs (-read +returned), %v:\n%s", err, diff)
		}
		return got
	}
	change(func(w *webhook.Webhook) { w.Name, w.Types, w.Secret = "n", nil, "s" })
	if got := heads(); got != "3 after 1 at 2h0m0s; 1 after 1 at 2h0m0s; " {
		t.Errorf("after another name the heads are %s", got)
	}
	change(func(w *webhook.Webhook) { w.Disable(webhook.Requested, later) })
	if due, err := st.DueWebhooks(ctx); err != nil || len(due) != 0 {
		t.Errorf("a disabled webhook is due: %v, %v", due, err)
	}
	_, _, err := st.NextDelivery(ctx, w.ID, nil)
	wantFault(t, err, fault.NotFound, fault.CodeWebhookNotFound)
	if n, err := st.Enqueue(ctx, w.ID, some(w.ID, 4, "a"), roomy, start); n != 0 || err != nil {
		t.Errorf("a disabled webhook got %d deliveries, %v", n, err)
	}
	addEvents(t, db, 3, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning})
	settle(t, db)
	last, err := db.LastEvent(ctx, "org_a")
	if err != nil {
		t.Fatal(err)
	}
	got := change(func(w *webhook.Webhook) { w.Enabled, w.Reason, w.DisabledAt = true, "", time.Time{} })
	if got.After != last || got.Pending != 3 || got.Name != "n" {
		t.Errorf("enabled again it is %+v, and the last event is %d", got, last)
	}
	if got := heads(); got != "3 after 0 at 1h0m0s; 1 after 0 at 1h0m0s; " {
		t.Errorf("after it was enabled the heads are %s", got)
	}
	change(func(w *webhook.Webhook) { w.URL = "https://example.net" })
	all, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 50,
		Types: []event.Type{event.WebhookDisabled}})
	if len(all) != 1 || all[0].Reason != "requested" || all[0].WebhookID != w.ID || !all[0].At.Equal(later) {
		t.Errorf("the events are %+v", all)
	}
}

// webhookConsumer checks that the consumer of the feed exists while a webhook is enabled, and begins with new events.
func webhookConsumer(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := t.Context()
	addEvents(t, db, 3, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning})
	settle(t, db)
	last, err := db.LastEvent(ctx, "org_a")
	if err != nil {
		t.Fatal(err)
	}
	idle := func(want bool) {
		t.Helper()
		if got, err := st.EndIdle(ctx); err != nil || got != want {
			t.Errorf("idle is %v, %v, want %v", got, err, want)
		}
	}
	consumed := func(want event.Seq, there bool) {
		t.Helper()
		if got, found, err := db.Consumed(ctx, webhook.Consumer); err != nil || got != want || found != there {
			t.Errorf("the consumer is at %d, %v, %v, want %d, %v", got, found, err, want, there)
		}
	}
	idle(true)
	disabled := aWebhook(0)
	disabled.Enabled = false
	if err := st.AddWebhook(ctx, disabled, 0); err != nil {
		t.Fatal(err)
	}
	consumed(0, false)
	w := mustHook(t, st, 1)
	settle(t, db)
	first, err := st.GetWebhook(ctx, "org_a", w.ID)
	if err != nil || first.After < last {
		t.Errorf("the first webhook begins after %d, %v, and the last event is %d", first.After, err, last)
	}
	consumed(first.After, true)
	mustHook(t, st, 2)
	consumed(first.After, true)
	idle(false)
	for _, id := range []string{w.ID, "whk_002"} {
		if err := st.DeleteWebhook(ctx, "org_a", id, start); err != nil {
			t.Fatal(err)
		}
	}
	idle(true)
	consumed(0, false)
	writes := db.writes.Load()
	idle(true)
	if n := db.writes.Load() - writes; n != 0 {
		t.Errorf("a server without webhooks has written %d times", n)
	}
}
