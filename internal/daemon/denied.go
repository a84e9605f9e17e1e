package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/store"
)

const (
	// denyEvery is the time between two lookups of the names whose addresses no sandbox may reach. It bounds the time for
	// which sandboxes reach an address that a name has just got. A shorter time asks the name servers more often.
	denyEvery = 30 * time.Second
	// denyKept is the time for which an address stays denied after a name has lost it. The machine there may still be the
	// old primary of a database, or become it again, and name servers may answer with a part of the addresses each time.
	denyKept = 10 * time.Minute
	// lookupTime bounds a lookup. The system's resolver takes up to 10 seconds with its defaults: two tries of 5 seconds.
	lookupTime = 10 * time.Second
	// maxAddresses bounds the addresses of one name, with those that it has lost lately. An answer over TCP can have some
	// 4,000; a database has a few.
	maxAddresses = 1024
)

// privateRanges are the IPv4 ranges that are not reached over the internet, according to IANA's registry of
// special-purpose addresses, without those that no sandbox ever reaches.
var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
}

// sharedDomains are the domains of Amazon's S3. Every customer's buckets are at the same addresses, which may be
// private ones of the operator's own network.
var sharedDomains = []string{"amazonaws.com", "amazonaws.com.cn"}

// isPrivate reports whether an address is not reached over the internet.
func isPrivate(a netip.Addr) bool {
	return slices.ContainsFunc(privateRanges, func(p netip.Prefix) bool { return p.Contains(a) })
}

// denied knows the destinations that no sandbox may reach because of the settings: network.always_deny, the addresses
// of the database, the private addresses of the bucket's S3 server, and those of a fleet's other servers. It follows
// the names of all three. One goroutine at a time uses it.
type denied struct {
	fixed  []netip.Prefix
	names  []*deniedName
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	log    *slog.Logger
	// applied is the list that was last put in force.
	applied []netip.Prefix
}

// deniedName is a name whose addresses are denied.
type deniedName struct {
	setting, host string
	lookup        func(ctx context.Context) ([]netip.Addr, error)
	which         func(netip.Addr) bool // returns true for an address that is to be denied
	// lost has the known addresses, and when the name lost them; zero if the last answer has them.
	lost map[netip.Addr]time.Time
	// trouble reports that the last lookup failed, which was logged.
	trouble bool
}

// newDenied returns the destinations that the settings deny. It looks up no name.
func newDenied(cfg config.Config, log *slog.Logger) (*denied, error) {
	fixed, err := cfg.Network.AlwaysDenyPrefixes()
	if err != nil {
		return nil, err
	}
	d := &denied{fixed: fixed, log: log, lookup: store.LookupIPv4}
	for _, host := range databaseHosts(string(cfg.Store.URL)) {
		d.add("store.url", host, func(netip.Addr) bool { return true })
	}
	host, err := bucketHost(cfg.Files.URL)
	if err != nil {
		return nil, err
	}
	d.add("files.url", host, isPrivate)
	return d, nil
}

// databaseHosts returns the hosts that a URL of PostgreSQL names, without directories of sockets. It returns none for a
// URL that leaves the host to the environment; see [denied.open].
func databaseHosts(text string) []string {
	u, err := url.Parse(text)
	if err != nil {
		return nil
	}
	list := u.Host
	if in := u.Query()["host"]; len(in) > 0 {
		list = in[len(in)-1]
	}
	var hosts []string
	for host := range strings.SplitSeq(list, ",") {
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		if host = strings.Trim(host, "[]"); host != "" && !filepath.IsAbs(host) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}

// bucketHost returns the host to which requests for the bucket of a URL go, "" if there is none or if it is a service
// that all customers of Amazon share.
func bucketHost(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	l, err := objects.ParseURL(text)
	if err != nil {
		return "", fmt.Errorf("files.url: %w", err)
	}
	if l.Endpoint == "" {
		return "", nil // the bucket is a directory
	}
	endpoint, err := url.Parse(l.Endpoint)
	if err != nil {
		return "", fmt.Errorf("files.url: its endpoint: %w", err)
	}
	host := endpoint.Hostname()
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if slices.ContainsFunc(sharedDomains, func(d string) bool { return strings.HasSuffix(name, "."+d) }) {
		return "", nil
	}
	if _, err := netip.ParseAddr(host); err != nil && !l.PathStyle {
		host = l.Bucket + "." + host
	}
	return host, nil
}

// add adds the addresses of a host, which are denied if which returns true. A name is followed, except one of this
// machine's loopback.
func (d *denied) add(setting, host string, which func(netip.Addr) bool) {
	if a, err := netip.ParseAddr(host); err == nil {
		if a = a.Unmap(); reachable(a) && which(a) {
			d.fixed = append(d.fixed, netip.PrefixFrom(a, a.BitLen()))
		}
		return
	}
	if host == "" || strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		return
	}
	if slices.ContainsFunc(d.names, func(n *deniedName) bool { return n.setting == setting && n.host == host }) {
		return
	}
	lookup := func(ctx context.Context) ([]netip.Addr, error) { return d.lookup(ctx, host) }
	d.names = append(d.names, &deniedName{setting: setting, host: host, lookup: lookup, which: which,
		lost: map[netip.Addr]time.Time{}})
}

// addServers denies the addresses of the other servers of a fleet, which nodes returns with this one, self.
func (d *denied) addServers(self string, nodes func(context.Context) ([]fleet.Node, error)) {
	lookup := func(ctx context.Context) (all []netip.Addr, err error) {
		list, err := nodes(ctx)
		errs := []error{err}
		for _, n := range list {
			host, _, err := net.SplitHostPort(n.Address)
			if n.ID == self || err != nil {
				continue
			}
			if a, err := netip.ParseAddr(host); err == nil {
				all = append(all, a)
				continue
			}
			of, err := d.lookup(ctx, host)
			all, errs = append(all, of...), append(errs, err)
		}
		return all, errors.Join(errs...)
	}
	d.names = append(d.names, &deniedName{setting: "fleet.advertise", host: "the other servers", lookup: lookup,
		which: func(netip.Addr) bool { return true }, lost: map[netip.Addr]time.Time{}})
}

// reachable reports whether sandboxes could reach an address without a rule: they have no IPv6, and never reach the
// loopback.
func reachable(a netip.Addr) bool { return a.Is4() && !a.IsLoopback() }

// open looks the names up for the first time and returns what is denied. A name of the database that has no address
// fails; the bucket is not needed for a start. Addresses to which the store connects and that no followed name has stay
// denied: those of a host that the environment names.
func (d *denied) open(ctx context.Context, database string) ([]netip.Prefix, error) {
	all, err := store.PostgresAddresses(ctx, database)
	if err != nil {
		return nil, err
	}
	d.lookUp(ctx)
	known := d.list()
	for _, a := range all {
		if p := netip.PrefixFrom(a, a.BitLen()); !slices.Contains(known, p) {
			d.fixed = append(d.fixed, p)
		}
	}
	d.applied = d.list()
	return d.applied, nil
}

// list returns what is denied now.
func (d *denied) list() []netip.Prefix {
	var addrs []netip.Prefix
	for _, n := range d.names {
		for a := range n.lost {
			addrs = append(addrs, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	slices.SortFunc(addrs, netip.Prefix.Compare)
	return append(slices.Clone(d.fixed), slices.Compact(addrs)...)
}

// lookUp looks all names up, at once, and forgets the addresses that they lost long ago. What is known of a name stays
// if its lookup fails.
func (d *denied) lookUp(ctx context.Context) {
	limited, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	answers, errs := make([][]netip.Addr, len(d.names)), make([]error, len(d.names))
	var group sync.WaitGroup
	for i, n := range d.names {
		group.Go(func() { answers[i], errs[i] = n.lookup(limited) })
	}
	group.Wait()
	if ctx.Err() != nil {
		return // the lookups were ended by the caller
	}
	for i, n := range d.names {
		log := d.log.With("setting", n.setting, "name", n.host)
		if errs[i] == nil || len(answers[i]) > 0 {
			errs[i] = errors.Join(errs[i], n.learn(answers[i], errs[i] == nil, time.Now(), log))
		}
		n.forget(time.Now(), log)
		switch {
		case errs[i] != nil && !n.trouble:
			log.WarnContext(ctx, "looking up a name whose addresses no sandbox may reach; those that are known stay denied",
				"error", errs[i])
		case errs[i] == nil && n.trouble:
			log.InfoContext(ctx, "the name is looked up again")
		}
		n.trouble = errs[i] != nil
	}
}

// learn takes the addresses of an answer. With a whole one, the name has lost those that are not in it.
func (n *deniedName) learn(answer []netip.Addr, whole bool, now time.Time, log *slog.Logger) (err error) {
	has := map[netip.Addr]bool{}
	for _, a := range answer {
		if a = a.Unmap(); reachable(a) && n.which(a) {
			if len(has) == maxAddresses && !has[a] {
				err = fmt.Errorf("an answer has more than %d addresses", maxAddresses)
				continue
			}
			has[a] = true
		}
	}
	for a, lost := range n.lost {
		if whole && lost.IsZero() && !has[a] {
			n.lost[a] = now
		}
	}
	for a := range has {
		if _, known := n.lost[a]; !known {
			log.Info("no sandbox may reach an address any more", "address", a)
		}
		n.lost[a] = time.Time{}
	}
	return err
}

// forget forgets addresses that were lost long ago, and those lost first if there are too many.
func (n *deniedName) forget(now time.Time, log *slog.Logger) {
	gone := slices.DeleteFunc(slices.Collect(maps.Keys(n.lost)), func(a netip.Addr) bool { return n.lost[a].IsZero() })
	slices.SortFunc(gone, func(a, b netip.Addr) int {
		return cmp.Or(n.lost[a].Compare(n.lost[b]), a.Compare(b))
	})
	for _, a := range gone {
		if now.Sub(n.lost[a]) < denyKept && len(n.lost) <= maxAddresses {
			return
		}
		delete(n.lost, a)
		log.Info("an address is no longer denied, which the name has lost", "address", a)
	}
}

// follow looks the names up until ctx ends, and calls apply with what is denied when that has changed, or when the call
// before failed.
func (d *denied) follow(ctx context.Context, apply func(context.Context, []netip.Prefix) error) {
	tick := time.NewTicker(denyEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		d.update(ctx, apply)
	}
}

// update looks the names up once, as follow does.
func (d *denied) update(ctx context.Context, apply func(context.Context, []netip.Prefix) error) {
	d.lookUp(ctx)
	all := d.list()
	if ctx.Err() != nil || slices.Equal(all, d.applied) {
		return
	}
	if err := apply(ctx, all); err != nil {
		d.log.ErrorContext(ctx, "denying addresses to sandboxes; trying again", "error", err, "after", denyEvery)
		d.applied = nil // a part of it may be in force
		return
	}
	d.applied = all
}

// followDenied follows the names of what is denied until the server is closed. Without names it does nothing.
func (s *server) followDenied() {
	if len(s.denied.names) == 0 {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.denied.follow(ctx, s.deny)
	}()
	s.onClose(func(closing context.Context) error {
		stop()
		select {
		case <-done:
			return nil
		case <-closing.Done():
			return closing.Err()
		}
	})
}

// deny puts a list of denied destinations in force, for packets and for the connections that the proxy has made.
func (s *server) deny(ctx context.Context, all []netip.Prefix) error {
	err := s.slots.Deny(ctx, all)
	for _, slot := range s.slots.Slots() {
		s.egress.Recheck(slot.Addr)
	}
	return err
}
