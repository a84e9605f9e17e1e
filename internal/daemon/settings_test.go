package daemon

import (
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/config"
)

// TestLimitsAreHandedOver fails for a setting of quota or rate_limit, also for one that is added later,
// that is ignored.
func TestLimitsAreHandedOver(t *testing.T) {
	full := func() (l struct {
		Quota     config.Quota
		RateLimit config.RateLimit
	}) {
		caytest.Fill(&l, 7)
		return l
	}
	caytest.EachWithout(full, func(name string, l struct {
		Quota     config.Quota
		RateLimit config.RateLimit
	}) {
		cfg := limitsOf(config.Config{Quota: l.Quota, RateLimit: l.RateLimit})
		zero := 0
		for _, field := range caytest.ZeroFields(cfg) {
			if !slices.Contains([]string{"Log", "Now", "Alone"}, field) { // these are no settings
				zero++
			}
		}
		if zero != 1 {
			t.Errorf("without %s package auth is given %+v", strings.ToLower(name), cfg)
		}
	})
}
