package webhook

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// Patience limits an attempt, from the lookup of the name to the end of the answer. Part of the contract. With more, a
	// receiver that does not answer holds up its deliveries for longer; with less, slow receivers fail.
	Patience = 15 * time.Second
	// giveUp is the time after which a webhook is disabled whose delivery has failed since. Part of the contract.
	giveUp = 3 * 24 * time.Hour
	// maxDelay limits the time between two attempts, also one that a receiver asks for. Part of the contract.
	maxDelay = 6 * time.Hour
	// jitter is the part by which a delay is made longer or shorter, so that the deliveries of a receiver that was away do
	// not all come at the same moment.
	jitter = 0.2

	// refreshInterval is the time between looks for what is due that this process was not told of. Each takes some
	// milliseconds. sharedInterval is that time if other processes may change webhooks: a longer one delays what they
	// have enabled or queued again.
	refreshInterval = 30 * time.Second
	sharedInterval  = time.Second
	// troublePause is the wait after an error of the store. With a shorter one, a receiver gets the same delivery again
	// and again while its end cannot be written.
	troublePause = 5 * time.Second
	// endPatience limits the time to write the end of an attempt, which goes on when the server stops.
	endPatience = 10 * time.Second

	trimInterval = 10 * time.Minute   // between drops of old deliveries
	keepMade     = 7 * 24 * time.Hour // deliveries that were made, and what is pending of a disabled webhook
	maxMade      = 1000               // made deliveries of a webhook that are kept
)

// delays has the waits after each failed attempt; the last one repeats. Part of the contract.
var delays = []time.Duration{5 * time.Second, 30 * time.Second, 2 * time.Minute, 10 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 4 * time.Hour, maxDelay}

// Run queues and makes deliveries until ctx ends, and waits for the attempts under way, which it breaks off. Of the
// processes with the same store one runs at a time: which lanes have an attempt is in its memory. Run may be called
// again after it has returned.
func (s *Service) Run(ctx context.Context) {
	s.runs.Store(true) // before the store is read, so that no wake falls between
	defer s.runs.Store(false)
	var wg sync.WaitGroup
	wg.Go(func() { s.consume(ctx) })
	wg.Go(func() { s.trim(ctx) })
	s.dispatch(ctx, &wg)
	wg.Wait()
}

// wake makes the service look at a webhook again. A service that does not run would never forget the webhook.
func (s *Service) wake(w Webhook) {
	if !s.runs.Load() {
		return
	}
	s.queues.due(w.ID, w.OrgID, s.cfg.Now())
	select {
	case s.changed <- struct{}{}:
	default: // consume has not looked since the last one
	}
}

// dispatch starts attempts in goroutines of wg until ctx ends.
func (s *Service) dispatch(ctx context.Context, wg *sync.WaitGroup) {
	interval := refreshInterval
	if s.cfg.Shared {
		interval = sharedInterval
	}
	refresh := time.NewTicker(interval)
	defer refresh.Stop()
	s.refresh(ctx)
	for ctx.Err() == nil {
		c, ok, next := s.queues.pick(s.cfg.Now())
		if ok {
			s.start(ctx, wg, c)
			continue
		}
		var due <-chan time.Time
		if !next.IsZero() {
			due = time.After(next.Sub(s.cfg.Now()))
		}
		select {
		case <-s.queues.wake:
		case <-due:
		case <-refresh.C:
			s.refresh(ctx)
		case <-ctx.Done():
		}
	}
}

// refresh asks the store for all webhooks that have something pending.
func (s *Service) refresh(ctx context.Context) {
	all, err := s.store.DueWebhooks(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.cfg.Log.ErrorContext(ctx, "looking for deliveries of webhooks", "error", err)
		}
		return
	}
	for _, d := range all {
		s.queues.due(d.WebhookID, d.OrgID, d.At)
	}
}

// start begins the attempt of a claim, if its webhook has a delivery that is due.
func (s *Service) start(ctx context.Context, wg *sync.WaitGroup, c claim) {
	now := s.cfg.Now()
	w, d, err := s.store.NextDelivery(ctx, c.id, c.busy)
	switch {
	case fault.Is(err, fault.NotFound):
		s.queues.none(c, time.Time{}, true)
		return
	case err != nil:
		if ctx.Err() == nil {
			s.cfg.Log.ErrorContext(ctx, "reading a delivery of a webhook", "webhook", c.id, "error", err)
		}
		s.queues.keepBack(c.id, now.Add(troublePause))
		s.queues.none(c, now, false)
		return
	case d.WebhookID == "":
		s.queues.none(c, time.Time{}, false)
		return
	case d.NextAt.After(now):
		s.queues.none(c, d.NextAt, false)
		return
	case d.Attempts > 0 && s.queues.suspect(c, now):
		return
	}
	s.queues.hold(c, d.Lane, now)
	wg.Go(func() { s.deliver(ctx, c, w, d) })
}

// deliver makes one attempt at a delivery and writes what came of it.
func (s *Service) deliver(ctx context.Context, c claim, w Webhook, d Delivery) {
	a, answer, err := s.attempt(ctx, w, DeliveryID(w.ID, d.Seq), []byte(d.Body))
	if err != nil && ctx.Err() != nil {
		s.queues.done(c, d.Lane, false, false, s.cfg.Now()) // the next server makes it
		return
	}
	r := s.judge(w, d, a, answer)
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), endPatience)
	defer cancel()
	if err := s.store.EndAttempt(ending, r); err != nil {
		s.cfg.Log.ErrorContext(ctx, "writing the end of a delivery, which is made again", "webhook", w.ID, "error", err)
		s.queues.keepBack(w.ID, s.cfg.Now().Add(troublePause))
	}
	if r.Disable != "" {
		s.cfg.Log.WarnContext(ctx, "a webhook is disabled", "webhook", w.ID, "org", w.OrgID, "reason", r.Disable)
	}
	s.queues.done(c, d.Lane, r.Made, a.Took > slowAttempt, s.cfg.Now())
}

// attempt sends one request. It returns an error, which is in the Attempt too, if there was no answer.
func (s *Service) attempt(ctx context.Context, w Webhook, deliveryID string, body []byte) (Attempt, Answer, error) {
	began, now := time.Now(), s.now()
	header := s.wires[w.Format].Header(w, deliveryID, now, body)
	answer, err := s.sender.Send(ctx, w.URL, header, body)
	a := Attempt{At: now, Took: time.Since(began), Status: answer.Status, Answer: answer.Text}
	outcome := Delivered
	switch {
	case errors.Is(err, ErrDenied):
		outcome, a.Error = Forbidden, err.Error()
	case err != nil:
		outcome, a.Error = Unreachable, err.Error()
	case a.Status/100 == 3:
		outcome, a.Error = Refused, fmt.Sprintf("the receiver answered %d, and redirects are not followed", a.Status)
	case a.Status/100 != 2:
		outcome, a.Error = Refused, fmt.Sprintf("the receiver answered %d", a.Status)
	}
	s.cfg.Observe(outcome, a.Took)
	return a, answer, err
}

// judge decides what follows from an attempt.
func (s *Service) judge(w Webhook, d Delivery, a Attempt, answer Answer) Result {
	r := Result{WebhookID: w.ID, URL: w.URL, EnabledAt: w.EnabledAt, Seq: d.Seq, Attempt: a, Made: a.Error == ""}
	if r.Made {
		return r
	}
	end := a.At.Add(giveUp)
	if !d.FailedAt.IsZero() {
		end = d.FailedAt.Add(giveUp)
	}
	switch {
	case a.Status == 410:
		r.Disable, r.NextAt = Gone, a.At
	case !a.At.Before(end):
		r.Disable, r.NextAt = Failing, a.At
	default:
		r.NextAt = a.At.Add(a.Took).Add(delayAfter(d.Attempts+1, answer))
		if r.NextAt.After(end) {
			r.NextAt = end
		}
	}
	return r
}

// delayAfter returns the wait after a number of failed attempts, the last of which had the answer.
func delayAfter(attempts int, answer Answer) time.Duration {
	delay := delays[min(attempts, len(delays))-1]
	delay = time.Duration(float64(delay) * (1 - jitter + 2*jitter*rand.Float64()))
	if answer.Status == 429 || answer.Status == 503 {
		delay = max(delay, answer.RetryAfter)
	}
	return min(delay, maxDelay)
}

// trim drops old deliveries until ctx ends.
func (s *Service) trim(ctx context.Context) {
	tick := time.NewTicker(trimInterval)
	defer tick.Stop()
	for {
		n, err := s.store.TrimDeliveries(ctx, s.cfg.Now().Add(-keepMade), maxMade)
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.ErrorContext(ctx, "dropping old deliveries of webhooks", "error", err)
		} else if n > 0 {
			s.cfg.Log.InfoContext(ctx, "dropped old deliveries of webhooks", "count", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-s.dropped:
		}
	}
}
