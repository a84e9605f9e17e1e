package sandbox

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

const (
	// inUseFor sets how long a template counts as in use after its last create. A longer time keeps
	// memory for unused templates; a shorter one makes the first create after a break a cold one.
	inUseFor = 4 * time.Hour
	// demandOver and demandAhead set how the target follows creates: it is the number of creates
	// expected within demandAhead, at the average rate of the last demandOver. A longer demandOver
	// reacts later; a longer demandAhead keeps more pooled sandboxes.
	demandOver  = time.Minute
	demandAhead = 10 * time.Second
)

// demand holds the requests for a template at one size, and the number of pooled sandboxes that they
// justify.
type demand struct {
	orgID   string
	version TemplateVersion // newest known version
	kind    Kind
	fixed   bool // the target is the operator's; it remains without use
	target  int
	used    time.Time
	taken   [6]int    // creates in each sixth of demandOver, as a ring
	slot    int64     // the sixth that was counted last
	claimed int       // creates from the pool since the server's start
	paused  time.Time // end of the pause after a failed preparation
	share   int       // its part of the allowed pooled sandboxes; see share
}

const sixth = demandOver / 6

// roll forgets creates older than demandOver.
func (d *demand) roll(now time.Time) {
	slot := now.UnixNano() / int64(sixth)
	for i := max(d.slot+1, slot-int64(len(d.taken))+1); i <= slot; i++ {
		d.taken[i%int64(len(d.taken))] = 0
	}
	d.slot = slot
}

func (d *demand) use(now time.Time) {
	d.roll(now)
	d.taken[d.slot%int64(len(d.taken))]++
	d.used = now
}

// wants returns the number of pooled sandboxes that the demand justifies now.
func (d *demand) wants(now time.Time) int {
	d.roll(now)
	if d.target == 0 || d.kind.TemplateID == "" || !d.fixed && now.Sub(d.used) > inUseFor {
		return 0
	}
	sum := 0
	for _, n := range d.taken {
		sum += n
	}
	share := int(demandOver / demandAhead)
	return max(d.target, (sum+share-1)/share)
}

// demandKey identifies a demand.
type demandKey struct{ templateID, size string }

// share divides the allowed number of pooled sandboxes, most, among the demands. In each round every demand
// gets one until it has its target. Demands with a target of the operator come first, then those
// used last.
func share(demands map[demandKey]*demand, most int, now time.Time) []*demand {
	order := slices.SortedFunc(maps.Values(demands), func(a, b *demand) int {
		if a.fixed != b.fixed {
			if a.fixed {
				return -1
			}
			return 1
		}
		return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.kind.TemplateID, b.kind.TemplateID),
			cmp.Compare(a.kind.Size, b.kind.Size))
	})
	for _, d := range order {
		d.share = 0
	}
	for given := true; given; {
		given = false
		for _, d := range order {
			if most > 0 && d.share < d.wants(now) {
				d.share++
				most--
				given = true
			}
		}
	}
	return order
}

// plain returns the sandbox of a request that gives only a template and a size.
func (p *pool) plain(orgID string, v TemplateVersion, size string) (Sandbox, error) {
	return Request{Size: size}.resolve(p.cfg, orgID, v, time.Now())
}

func (p *pool) defaultSize(v TemplateVersion) string {
	sbx, err := p.plain("", v, "")
	if err != nil {
		return ""
	}
	return sbx.Size.Name
}
