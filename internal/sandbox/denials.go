package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Denial reports that a sandbox's policy, or a limit, blocked traffic that would have left it.
type Denial struct {
	ID          ID
	Protocol    string         // tcp, udp, icmp, …, or dns for a name that was not resolved
	Destination netip.AddrPort // the zero value when only the name was known
	Name        string         // set if the decision was made by name
	Count       int            // occurrences since the previous report of the same denial
	Excess      bool           // the policy allows it, but a limit on concurrent use was exceeded
}

const (
	// denialsPerMinute limits the events that the denials of one sandbox make. They come within
	// flushEvery, since a user may be waiting to see why nothing connects. A higher value floods the
	// events of a sandbox; a lower one hides destinations.
	denialsPerMinute = 6
	// denialsKept limits the destinations of one sandbox that are counted separately until their
	// events are written. A higher value costs memory; a lower one merges more destinations.
	denialsKept = 64
)

// denials counts the denials of one sandbox that no event has recorded yet.
type denials struct {
	count  map[Denial]int // by denial, with Count 0
	others int            // of destinations beyond denialsKept
	since  time.Time      // when the present minute began
	told   int            // events in the present minute
}

// denialLog gathers denials until flush records them as events.
type denialLog struct {
	mu sync.Mutex
	// +checklocks:mu
	of map[ID]*denials
}

// add counts a denial.
func (l *denialLog) add(d Denial) {
	n := max(d.Count, 1)
	d.Name = plain(d.Name)
	d.Count = 0
	l.mu.Lock()
	defer l.mu.Unlock()
	of := l.of[d.ID]
	if of == nil {
		of = &denials{count: map[Denial]int{}}
		l.of[d.ID] = of
	}
	if _, known := of.count[d]; !known && len(of.count) >= denialsKept {
		of.others += n
		return
	}
	of.count[d] += n
}

// flush records events for the denials that are due, all in one transaction.
func (l *denialLog) flush(ctx context.Context, store EventStore) error {
	events := l.due(time.Now().UTC())
	if len(events) == 0 {
		return nil
	}
	return store.Note(ctx, events)
}

// due removes the denials that are due and returns events for them.
func (l *denialLog) due(now time.Time) (events []Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, of := range l.of {
		if now.Sub(of.since) >= time.Minute {
			if len(of.count) == 0 {
				delete(l.of, id)
				continue
			}
			of.since, of.told = now, 0
		}
		if room := denialsPerMinute - of.told; room > 0 && len(of.count) > 0 {
			more := of.events(id, now, room)
			events = append(events, more...)
			of.count, of.others, of.told = map[Denial]int{}, 0, of.told+len(more)
		}
	}
	return events
}

// events returns the denials in at most room events: the most frequent ones, and one for the rest.
func (of *denials) events(id ID, at time.Time, room int) []Event {
	all := make([]Denial, 0, len(of.count))
	for d, n := range of.count {
		d.Count = n
		all = append(all, d)
	}
	slices.SortFunc(all, func(a, b Denial) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.String(), b.String()))
	})
	if len(all) > room || of.others > 0 {
		room-- // keeps an event for the rest
	}
	var events []Event
	rest := of.others
	for i, d := range all {
		if i >= room {
			rest += d.Count
			continue
		}
		events = append(events, Event{SandboxID: id, At: at, Reason: reasonEgressDenied, Detail: d.String()})
	}
	if rest > 0 {
		events = append(events, Event{SandboxID: id, At: at, Reason: reasonEgressDenied,
			Detail: "other destinations " + times(rest)})
	}
	return events
}

// String returns the text of the denial for its event: tcp 203.0.113.5:443 (example.org) 3 times.
func (d Denial) String() string {
	parts := []string{d.Protocol}
	switch {
	case !d.Destination.IsValid():
		parts = append(parts, d.Name)
	case d.Destination.Port() == 0:
		parts = append(parts, d.Destination.Addr().String())
	default:
		parts = append(parts, d.Destination.String())
	}
	if d.Destination.IsValid() && d.Name != "" {
		parts = append(parts, "("+d.Name+")")
	}
	parts = append(parts, times(d.Count))
	if d.Excess {
		parts = append(parts, "over a limit")
	}
	return strings.Join(parts, " ")
}

// plain returns a printable form of a name that a program inside made up. It cuts the name to the
// length of a domain name and quotes characters that are not printable.
func plain(name string) string {
	name = name[:min(len(name), maxDomain)]
	if strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return strconv.QuoteToASCII(name)
	}
	return name
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}
