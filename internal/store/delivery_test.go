package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/webhook"
)

// next returns the place of the next delivery, 0 if there is none.
func next(t *testing.T, st webhook.Store, id string, busy ...string) event.Seq {
	t.Helper()
	w, d, err := st.NextDelivery(t.Context(), id, busy)
	if err != nil || w.ID != id || d.WebhookID != id && d.WebhookID != "" {
		t.Fatalf("the next is %+v, %v", d, err)
	}
	return d.Seq
}

func mustMake(t *testing.T, st webhook.Store, id string, s event.Seq, at time.Time) {
	t.Helper()
	if err := st.EndAttempt(t.Context(), webhook.Result{WebhookID: id, Seq: s, Made: true,
		Attempt: webhook.Attempt{At: at, Took: time.Second, Status: 204}}); err != nil {
		t.Fatal(err)
	}
}

// deliveryOrder checks that deliveries of a lane come one after the other, and that other lanes do not wait.
func deliveryOrder(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := t.Context()
	w := mustHook(t, st, 1)
	other := mustHook(t, st, 2)
	if got := next(t, st, w.ID); got != 0 {
		t.Errorf("without deliveries the next is %d", got)
	}
	mustEnqueue(t, st, w.ID, start, some(w.ID, 10, "a", "a", "b", ""))
	mustEnqueue(t, st, w.ID, start.Add(time.Second), some(w.ID, 20, "b", "a"))
	mustEnqueue(t, st, other.ID, start, some(other.ID, 10, "a"))
	if n, err := st.Enqueue(ctx, w.ID, some(w.ID, 10, "a", "a", "b", ""), roomy, start); n != 0 || err != nil {
		t.Errorf("a repetition added %d, %v", n, err)
	}
	var got []event.Seq
	for {
		s := next(t, st, w.ID)
		if s == 0 {
			break
		}
		got = append(got, s)
		// The attempt fails, and the lane waits.
		if err := st.EndAttempt(ctx, webhook.Result{WebhookID: w.ID, URL: w.URL, EnabledAt: w.EnabledAt, Seq: s,
			NextAt:  start.Add(time.Hour),
			Attempt: webhook.Attempt{At: start, Error: "no"}}); err != nil {
			t.Fatal(err)
		}
		if len(got) == 3 {
			break
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, []event.Seq{10, 12, 13}) {
		t.Errorf("the heads were %d", got)
	}
	if got := next(t, st, w.ID, "a", ""); got != 12 {
		t.Errorf("with two lanes busy the next is %d", got)
	}
	if got := next(t, st, w.ID, "a", "", "b"); got != 0 {
		t.Errorf("with all lanes busy the next is %d", got)
	}
	for i, s := range []event.Seq{10, 11, 21} {
		_, d, err := st.NextDelivery(ctx, w.ID, []string{"b", ""})
		if err != nil || d.Seq != s || d.Body != fmt.Sprint("body ", s) {
			t.Errorf("delivery %d of a lane is %+v, %v", i, d, err)
		}
		mustMake(t, st, w.ID, s, start.Add(time.Minute))
		mustMake(t, st, w.ID, s, start.Add(time.Hour)) // once more, which changes nothing
	}
	if n, oldest, err := st.PendingDeliveries(ctx); err != nil || n != 4 || !oldest.Equal(start) {
		t.Errorf("%d are pending, the oldest since %s, %v", n, oldest, err)
	}
	due, err := st.DueWebhooks(ctx)
	slices.SortFunc(due, func(a, b webhook.Due) int { return strings.Compare(a.WebhookID, b.WebhookID) })
	if diff := cmp.Diff([]webhook.Due{{WebhookID: w.ID, OrgID: "org_a", At: start.Add(time.Hour)},
		{WebhookID: other.ID, OrgID: "org_a", At: start}}, due); diff != "" || err != nil {
		t.Errorf("due (-want +got), %v:\n%s", err, diff)
	}
	if got, err := st.GetWebhook(ctx, "org_a", w.ID); err != nil || got.Pending != 3 || got.Bytes != 3*7 {
		t.Errorf("it has %d deliveries of %d bytes pending, %v", got.Pending, got.Bytes, err)
	}
	for _, id := range []string{w.ID, other.ID} { // a result for one that is gone
		if err := st.DeleteWebhook(ctx, "org_a", id, start); err != nil {
			t.Fatal(err)
		}
		mustMake(t, st, id, 12, start)
	}
}

// deliveryRace queues deliveries and makes them at the same time. No lane may be left without a head.
func deliveryRace(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := context.Background()
	w := mustHook(t, st, 1)
	const rounds, lanes = 40, 3
	var wg sync.WaitGroup
	queued := make(chan struct{})
	wg.Go(func() {
		defer close(queued)
		for i := range rounds {
			all := some(w.ID, 1+i*lanes, "a", "b", "c")
			if _, err := st.Enqueue(ctx, w.ID, all, roomy, start); err != nil {
				t.Error(err)
			}
		}
	})
	for lane := range lanes {
		wg.Go(func() {
			var busy []string
			for other := range lanes {
				if other != lane {
					busy = append(busy, string(rune('a'+other)))
				}
			}
			last, made := event.Seq(0), 0
			for deadline := time.Now().Add(time.Minute); made < rounds; {
				over := false
				select {
				case <-queued:
					over = true
				default:
				}
				_, d, err := st.NextDelivery(ctx, w.ID, busy)
				if err != nil || time.Now().After(deadline) {
					t.Errorf("lane %d has made %d, %v", lane, made, err)
					return
				}
				if d.WebhookID == "" {
					if over { // what is queued has a head
						t.Errorf("lane %d has no head after %d", lane, made)
						return
					}
					continue
				}
				if d.Seq <= last {
					t.Errorf("delivery %d came after %d", d.Seq, last)
				}
				last = d.Seq
				if err := st.EndAttempt(ctx, webhook.Result{WebhookID: w.ID, Seq: d.Seq, Made: true,
					Attempt: webhook.Attempt{At: start}}); err != nil {
					t.Error(err)
					return
				}
				made++
			}
		})
	}
	wg.Wait()
	if got, err := st.GetWebhook(ctx, "org_a", w.ID); err != nil || got.Pending != 0 || got.Bytes != 0 {
		t.Errorf("in the end %d deliveries of %d bytes are pending, %v", got.Pending, got.Bytes, err)
	}
}

// deliveryAttempts checks that every field of a delivery is kept, and what a disabling attempt does.
func deliveryAttempts(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := t.Context()
	w := mustHook(t, st, 1)
	mustEnqueue(t, st, w.ID, start, some(w.ID, 5, "a", "a"))
	var a webhook.Attempt
	caytest.Fill(&a, 9)
	a.Took = 9 * time.Microsecond
	fail := webhook.Result{WebhookID: w.ID, URL: w.URL, EnabledAt: w.EnabledAt, Seq: 5, Attempt: a,
		NextAt: start.Add(time.Minute)}
	other, earlier := fail, fail // of attempts that began before the webhook was changed
	other.URL, earlier.EnabledAt = "http://192.0.2.1/", w.EnabledAt.Add(-time.Second)
	other.Disable, earlier.Disable = webhook.Gone, webhook.Gone
	for _, r := range []webhook.Result{other, earlier} {
		if err := st.EndAttempt(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := st.EndAttempt(ctx, fail); err != nil {
			t.Fatal(err)
		}
	}
	want := webhook.Delivery{WebhookID: w.ID, Seq: 5, Lane: "a", Type: "sandbox.running", Body: "body 5",
		QueuedAt: start, Attempts: 2, FailedAt: a.At, NextAt: start.Add(time.Minute), Last: a}
	_, got, err := st.NextDelivery(ctx, w.ID, nil)
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("(-want +got), %v:\n%s", err, diff)
	}
	// A head that a replay put behind another one stays there, also if its attempt fails.
	if n, err := st.Requeue(ctx, w.ID, some(w.ID, 4, "a"), roomy, start); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if err := st.EndAttempt(ctx, fail); err != nil {
		t.Fatal(err)
	}
	if got := next(t, st, w.ID); got != 4 {
		t.Errorf("the head is %d, want the replayed one", got)
	}
	mustMake(t, st, w.ID, 4, start)
	fail.Disable = webhook.Gone
	for range 2 { // another attempt was under way
		if err := st.EndAttempt(ctx, fail); err != nil {
			t.Fatal(err)
		}
	}
	hook, err := st.GetWebhook(ctx, "org_a", w.ID)
	if err != nil || hook.Enabled || hook.Reason != webhook.Gone || !hook.DisabledAt.Equal(a.At) || hook.Pending != 2 {
		t.Errorf("the webhook is %+v, %v", hook, err)
	}
	mustMake(t, st, w.ID, 5, a.At)
	if n, _, err := st.PendingDeliveries(ctx); n != 0 || err != nil {
		t.Errorf("%d deliveries of enabled webhooks are pending, %v", n, err)
	}
	if hook, err = st.GetWebhook(ctx, "org_a", w.ID); err != nil || hook.Pending != 1 || hook.Enabled {
		t.Errorf("after an attempt that was under way it is %+v, %v", hook, err)
	}
	all, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 50,
		Types: []event.Type{event.WebhookDisabled}})
	if len(all) != 1 || all[0].Reason != "gone" {
		t.Errorf("the events are %+v", all)
	}
}

func deliveryBounds(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := t.Context()
	for i, most := range []webhook.Bounds{{Deliveries: 3, Bytes: 1 << 20}, {Deliveries: 100, Bytes: 21}} {
		w := mustHook(t, st, i)
		add := func(first int) webhook.Webhook {
			t.Helper()
			if n, err := st.Enqueue(ctx, w.ID, some(w.ID, first, "a", "b", "c"), most, start); err != nil || n != 3 {
				t.Fatal(n, err)
			}
			got, err := st.GetWebhook(ctx, "org_a", w.ID)
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		if got := add(10); !got.Enabled {
			t.Errorf("at the bound the webhook is %+v", got)
		}
		_, err := st.Requeue(ctx, w.ID, some(w.ID, 7, "a"), most, start)
		wantFault(t, err, fault.Exhausted, fault.CodeQuotaExceeded)
		if got := add(20); got.Enabled || got.Reason != webhook.Backlog || got.Pending != 6 {
			t.Errorf("beyond the bound the webhook is %+v", got)
		}
		_, err = st.Requeue(ctx, w.ID, some(w.ID, 7, "a"), roomy, start)
		wantFault(t, err, fault.Conflict, fault.CodeWebhookDisabled)
	}
	all, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 50,
		Types: []event.Type{event.WebhookDisabled}})
	if len(all) != 2 || all[0].Reason != "backlog" {
		t.Errorf("the events are %+v", all)
	}
	for _, call := range []func(context.Context, string, []webhook.Delivery, webhook.Bounds, time.Time) (int, error){
		st.Enqueue, st.Requeue} {
		n, err := call(ctx, "whk_none", some("whk_none", 1, "a"), roomy, start)
		if n != 0 || err != nil && !fault.Is(err, fault.NotFound) {
			t.Errorf("a webhook that does not exist got %d, %v", n, err)
		}
	}
}

// deliveryReplay makes made deliveries pending again, among pending ones and new ones, in their order.
func deliveryReplay(t *testing.T, db *DB) {
	var st webhook.Store = db
	w := mustHook(t, st, 1)
	const many = insertBatch + 10 // more than one statement adds
	var lanes []string
	for i := range many {
		lanes = append(lanes, fmt.Sprint("lane", i%2))
	}
	mustEnqueue(t, st, w.ID, start, some(w.ID, 100, lanes...))
	for _, s := range []event.Seq{100, 101, 102, 103} {
		mustMake(t, st, w.ID, s, start)
	}
	later := start.Add(time.Hour)
	replayed := some(w.ID, 98, append([]string{"lane0", "lane1"}, lanes...)...)
	if n, err := st.Requeue(t.Context(), w.ID, replayed, webhook.Bounds{Deliveries: 2 * many, Bytes: 1 << 20},
		later); err != nil || n != 6 {
		t.Errorf("%d were added or are pending again, %v", n, err)
	}
	if got, err := st.GetWebhook(t.Context(), "org_a", w.ID); err != nil || got.Pending != many+2 {
		t.Errorf("%d are pending, %v", got.Pending, err)
	}
	for i, want := range []event.Seq{98, 100, 102, 104, 106} {
		_, d, err := st.NextDelivery(t.Context(), w.ID, []string{"lane1"})
		if err != nil || d.Seq != want || d.Body != fmt.Sprint("body ", want) || d.Attempts != 0 {
			t.Fatalf("delivery %d is %+v, %v, want %d", i, d, err, want)
		}
		if isNew := want < 104; isNew != d.QueuedAt.Equal(later) {
			t.Errorf("delivery %d was queued at %s", want, d.QueuedAt)
		}
		mustMake(t, st, w.ID, want, later)
	}
}

func deliveryListing(t *testing.T, db *DB) {
	var st webhook.Store = db
	w := mustHook(t, st, 1)
	mustEnqueue(t, st, w.ID, start, some(w.ID, 1, "a", "b", "c", "d", "e"))
	for _, s := range []event.Seq{2, 4} {
		mustMake(t, st, w.ID, s, start)
	}
	read := func(made *bool) (got []event.Seq) {
		t.Helper()
		for f := (webhook.DeliveryFilter{WebhookID: w.ID, Made: made, Limit: 2}); ; {
			page, next, err := st.ListDeliveries(t.Context(), f)
			if err != nil || len(page) > 2 {
				t.Fatal(len(page), err)
			}
			for _, d := range page {
				if got = append(got, d.Seq); d.Body != "" {
					t.Errorf("a listed delivery has the body %q", d.Body)
				}
			}
			if f.Cursor = next; next == "" {
				return got
			}
		}
	}
	for _, c := range []struct {
		made *bool
		want []event.Seq
	}{{nil, []event.Seq{5, 4, 3, 2, 1}}, {new(true), []event.Seq{4, 2}}, {new(false), []event.Seq{5, 3, 1}}} {
		if got := read(c.made); !slices.Equal(got, c.want) {
			t.Errorf("the list is %d, want %d", got, c.want)
		}
	}
	_, cursor, err := st.ListDeliveries(t.Context(), webhook.DeliveryFilter{WebhookID: w.ID, Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []webhook.DeliveryFilter{{WebhookID: "whk_other", Limit: 1, Cursor: cursor},
		{WebhookID: w.ID, Limit: 1, Cursor: "x"}} {
		_, _, err := st.ListDeliveries(t.Context(), f)
		wantFault(t, err, fault.Invalid, fault.CodeInvalidCursor)
	}
	if _, _, err := st.ListDeliveries(t.Context(), webhook.DeliveryFilter{WebhookID: w.ID}); err == nil {
		t.Error("listed with limit 0")
	}
}

func deliveryTrims(t *testing.T, db *DB) {
	var st webhook.Store = db
	ctx := t.Context()
	places := func(id string) (got []event.Seq) {
		t.Helper()
		all, _, err := st.ListDeliveries(ctx, webhook.DeliveryFilter{WebhookID: id, Limit: 2 * dropBatch})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range all {
			got = append(got, d.Seq)
		}
		return got
	}
	trim := func(before time.Time, most, want int) {
		t.Helper()
		if n, err := st.TrimDeliveries(ctx, before, most); err != nil || n != want {
			t.Errorf("%d were dropped, %v, want %d", n, err, want)
		}
	}
	w := mustHook(t, st, 1)
	mustEnqueue(t, st, w.ID, start, some(w.ID, 1, "a", "b", "c", "d", "e", "e"))
	for _, s := range []event.Seq{1, 2, 3, 4} {
		mustMake(t, st, w.ID, s, start.Add(time.Duration(s)*time.Hour))
	}
	trim(start, 10, 0)
	trim(start.Add(90*time.Minute), 10, 1)
	if got := places(w.ID); !slices.Equal(got, []event.Seq{6, 5, 4, 3, 2}) {
		t.Errorf("after the old ones went there are %d", got)
	}
	trim(start, 2, 1)
	if got := places(w.ID); !slices.Equal(got, []event.Seq{6, 5, 4, 3}) {
		t.Errorf("after those beyond the number went there are %d", got)
	}
	if _, err := st.ChangeWebhook(ctx, "org_a", w.ID, start, func(w *webhook.Webhook) error {
		w.Disable(webhook.Requested, start)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	trim(start, 10, 0)
	trim(start.Add(time.Minute), 10, 2)
	if got, err := st.GetWebhook(ctx, "org_a", w.ID); err != nil || got.Pending != 0 || got.Bytes != 0 {
		t.Errorf("after its pending ones went it has %d of %d bytes, %v", got.Pending, got.Bytes, err)
	}
	if got := places(w.ID); !slices.Equal(got, []event.Seq{4, 3}) {
		t.Errorf("after its pending ones went there are %d", got)
	}

	// A deleted one with more than one transaction drops.
	gone := mustHook(t, st, 2)
	var lanes []string
	for range dropBatch + 5 {
		lanes = append(lanes, "a")
	}
	mustEnqueue(t, st, gone.ID, start, some(gone.ID, 1, lanes...))
	mustMake(t, st, gone.ID, 1, start)
	if err := st.DeleteWebhook(ctx, "org_a", gone.ID, start); err != nil {
		t.Fatal(err)
	}
	trim(start.Add(-time.Hour), 10, dropBatch+5)
	for _, table := range []string{"webhooks WHERE id", "webhook_deliveries WHERE webhook_id"} {
		var n int
		if err := db.reader.QueryRow("SELECT COUNT(*) FROM " + table + " = 'whk_002'").Scan(&n); err != nil || n != 0 {
			t.Errorf("%d rows of %s are left, %v", n, table, err)
		}
	}
	trim(start.Add(-time.Hour), 10, 0)
}
