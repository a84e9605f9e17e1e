package span_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/span"
)

func TestTrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, trace := span.New(t.Context())
		end := span.Start(ctx, "outer")
		work := span.Carry(context.Background(), ctx)
		inner := span.Start(work, "inner")
		time.Sleep(1500 * time.Microsecond)
		inner()
		time.Sleep(time.Second)
		end()
		span.Add(work, "told", 2*time.Millisecond)
		if got, want := span.ServerTiming(trace.Spans()), "inner;dur=1.5, outer;dur=1001.5, told;dur=2"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		for range 100 {
			span.Add(ctx, "more", 0)
		}
		if n := len(trace.Spans()); n != 64 {
			t.Errorf("it keeps %d spans", n)
		}
	})
}

func TestNobodyAsks(t *testing.T) {
	ctx := span.Carry(t.Context(), context.Background())
	span.Start(ctx, "x")()
	span.Add(ctx, "y", time.Second)
	if got := span.ServerTiming(nil); got != "" {
		t.Errorf("nothing is %q", got)
	}
}
