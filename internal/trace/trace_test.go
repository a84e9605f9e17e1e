package trace_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/trace"
)

func TestTrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, tr := trace.New(t.Context())
		end := trace.Start(ctx, "outer")
		work := trace.Carry(context.Background(), ctx)
		inner := trace.Start(work, "inner")
		time.Sleep(1500 * time.Microsecond)
		inner()
		time.Sleep(time.Second)
		end()
		trace.Add(work, "told", 2*time.Millisecond)
		if got, want := trace.ServerTiming(tr.Spans()), "inner;dur=1.5, outer;dur=1001.5, told;dur=2"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		for range 100 {
			trace.Add(ctx, "more", 0)
		}
		if n := len(tr.Spans()); n != 64 {
			t.Errorf("it keeps %d spans", n)
		}
	})
}

func TestWithoutTrace(t *testing.T) {
	ctx := trace.Carry(t.Context(), context.Background())
	trace.Start(ctx, "x")()
	trace.Add(ctx, "y", time.Second)
	if got := trace.ServerTiming(nil); got != "" {
		t.Errorf("nothing is %q", got)
	}
}
