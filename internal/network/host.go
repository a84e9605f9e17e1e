package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// listAttempts is the number of times that a listing is repeated that the kernel reports as
// changed meanwhile. Links come and go all the time on a busy host; each attempt takes
// milliseconds.
const listAttempts = 20

// complete repeats a listing until it was not interrupted.
func complete[T any](list func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range listAttempts {
		out, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return out, err
}

func listLinks() ([]netlink.Link, error) {
	links, err := complete(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	return links, nil
}

// remains returns the slots that have a link or a namespace on the host, by instance.
func remains() (map[string]map[int]bool, error) {
	out := map[string]map[int]bool{}
	add := func(instance string, index int, ok bool) {
		if !ok {
			return
		}
		if out[instance] == nil {
			out[instance] = map[int]bool{}
		}
		out[instance][index] = true
	}
	links, err := listLinks()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		add(parseLink(l.Attrs().Name))
	}
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listing namespaces: %w", err)
	}
	for _, e := range entries {
		add(parseNamespace(e.Name()))
	}
	return out, nil
}

// defaultMTU returns the MTU of the default route's link, so that packets of sandboxes fit
// without fragmentation, or ethernetMTU without a default route.
func defaultMTU() (int, error) {
	const ethernetMTU = 1500
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return 0, fmt.Errorf("listing routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		index := r.LinkIndex
		if index == 0 && len(r.MultiPath) > 0 {
			index = r.MultiPath[0].LinkIndex
		}
		link, err := netlink.LinkByIndex(index)
		if err != nil {
			return 0, fmt.Errorf("finding the default route's link: %w", err)
		}
		return link.Attrs().MTU, nil
	}
	return ethernetMTU, nil
}

// shareDir makes dir a shared mount of its own, as iproute2 does when it first names a namespace.
// If iproute2 did it later, with namespaces of this package there, it would mount a copy of each
// over it, and none could be removed any more.
func shareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	// It is not a mount yet.
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
}
