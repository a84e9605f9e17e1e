package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// insideLink is the name of the sandbox's end, which the sandbox's kernel takes over.
	insideLink = "eth0"
	// sysctlDir has the settings of the network namespace of the thread that opens a file in it.
	sysctlDir = "/proc/sys/net"
)

// All links have the same two hardware addresses. A link has no third end that could confuse
// them; a sandbox cannot learn its slot from them, and one that is restored in another slot finds
// its gateway under the same address. They are locally administered and unicast.
var (
	hostMAC    = net.HardwareAddr{0x02, 0xca, 0x79, 0, 0, 0x01}
	sandboxMAC = net.HardwareAddr{0x02, 0xca, 0x79, 0, 0, 0x02}
)

// hostSettings are the settings of a slot's link on the host, by path below sysctlDir, with %s
// for the link. The rules do not rely on them; they spare the rules work and keep the kernel from
// answering on its own.
var hostSettings = []struct{ path, value string }{
	{"ipv6/conf/%s/disable_ipv6", "1"},
	{"ipv4/conf/%s/forwarding", "1"},
	{"ipv4/conf/%s/rp_filter", "1"},
	{"ipv4/conf/%s/accept_local", "0"},
	{"ipv4/conf/%s/accept_redirects", "0"},
	{"ipv4/conf/%s/accept_source_route", "0"},
	{"ipv4/conf/%s/send_redirects", "0"},
	{"ipv4/conf/%s/proxy_arp", "0"},
}

// insideSettings are the settings of a new namespace, written before it has a link. It inherits
// IPv4 settings from the host, which forwards.
var insideSettings = []struct{ path, value string }{
	{"ipv6/conf/all/disable_ipv6", "1"},
	{"ipv6/conf/default/disable_ipv6", "1"},
	{"ipv4/conf/all/forwarding", "0"},
	{"ipv4/conf/default/forwarding", "0"},
}

// setting writes a sysctl. A kernel without IPv6 lacks its files, and needs no settings there.
func setting(path, value string) error {
	err := os.WriteFile(filepath.Join(sysctlDir, path), []byte(value), 0)
	if errors.Is(err, os.ErrNotExist) && strings.HasPrefix(path, "ipv6/") {
		return nil
	}
	if err != nil {
		return fmt.Errorf("setting %s to %s: %w", path, value, err)
	}
	return nil
}

// build makes namespace, links and addresses of s, and sets the links up. None of it may exist.
// After an error the caller removes the slot.
func (s *Slot) build(mtu int) error {
	if err := s.makeNamespace(mtu); err != nil {
		return err
	}
	return s.configureHost()
}

// makeNamespace makes and names the namespace, and in it the pair of links, with the host's end
// in the host's namespace.
func (s *Slot) makeNamespace(mtu int) error {
	host, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the host's network namespace: %w", err)
	}
	defer unix.Close(host)
	file, err := os.OpenFile(s.Namespace, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("naming namespace: %w", err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("naming namespace: %w", err)
	}
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", s.Namespace, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting namespace %s: %w", s.Namespace, err)
		}
		for _, v := range insideSettings {
			if err := setting(v.path, v.value); err != nil {
				return err
			}
		}
		return s.makeLinks(host, mtu)
	})
}

// makeLinks runs inside the namespace.
func (s *Slot) makeLinks(host, mtu int) error {
	inside := netlink.NewLinkAttrs()
	inside.Name, inside.MTU, inside.HardwareAddr = insideLink, mtu, sandboxMAC
	pair := netlink.NewVeth(inside)
	pair.PeerName, pair.PeerHardwareAddr, pair.PeerMTU = s.Link, hostMAC, uint32(mtu)
	pair.PeerNamespace = netlink.NsFd(host)
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("adding link pair %s: %w", s.Link, err)
	}
	return s.configureInside()
}

// configureInside configures the sandbox's end. It runs inside the namespace, and may run again.
func (s *Slot) configureInside() error {
	// gVisor has a loopback of its own only if the namespace's is up.
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding the loopback in %s: %w", s.Namespace, err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("setting the loopback in %s up: %w", s.Namespace, err)
	}
	link, err := netlink.LinkByName(insideLink)
	if err != nil {
		return fmt.Errorf("finding %s in %s: %w", insideLink, s.Namespace, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s in %s up: %w", insideLink, s.Namespace, err)
	}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: pairNet(s.Addr)}); err != nil {
		return fmt.Errorf("giving %s to %s: %w", s.Addr, insideLink, err)
	}
	if err := permanentNeighbour(link, s.Gateway, hostMAC); err != nil {
		return err
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: s.Gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("adding the default route of %s: %w", s.Namespace, err)
	}
	return nil
}

// configureHost configures the host's end and sets it up. It may run again.
func (s *Slot) configureHost() error {
	link, err := netlink.LinkByName(s.Link)
	if err != nil {
		return fmt.Errorf("finding link %s: %w", s.Link, err)
	}
	for _, v := range hostSettings {
		if err := setting(fmt.Sprintf(v.path, s.Link), v.value); err != nil {
			return err
		}
	}
	// Without ARP a sandbox can neither ask for addresses nor fill the neighbour table that all
	// namespaces of the machine share.
	if err := netlink.LinkSetARPOff(link); err != nil {
		return fmt.Errorf("turning ARP off on %s: %w", s.Link, err)
	}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: pairNet(s.Gateway)}); err != nil {
		return fmt.Errorf("giving %s to %s: %w", s.Gateway, s.Link, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", s.Link, err)
	}
	return permanentNeighbour(link, s.Addr, sandboxMAC)
}

func permanentNeighbour(link netlink.Link, a netip.Addr, mac net.HardwareAddr) error {
	n := &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: a.AsSlice(), HardwareAddr: mac}
	if err := netlink.NeighSet(n); err != nil {
		return fmt.Errorf("adding neighbour %s to %s: %w", a, link.Attrs().Name, err)
	}
	return nil
}

// pairNet returns an address with the mask of its pair.
func pairNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(31, 32)}
}

// Restore puts address, route and neighbour back into the namespace. A sandbox's kernel removes
// them when it starts; they must be there again before a kernel is started or restored there.
// With one running there, two kernels would answer for the address.
func (s *Slot) Restore() error { return inNamespace(s.Namespace, s.configureInside) }

// elsewhere reports whether the link has an address, but not the slot's.
func (s *Slot) elsewhere() (bool, error) {
	link, err := netlink.LinkByName(s.Link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("finding link %s: %w", s.Link, err)
	}
	addrs, err := s.addresses(link)
	return len(addrs) > 0 && !slices.Contains(addrs, s.Gateway), err
}

func (s *Slot) addresses(link netlink.Link) ([]netip.Addr, error) {
	list, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("listing addresses of %s: %w", s.Link, err)
	}
	var out []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok {
			out = append(out, ip)
		}
	}
	return out, nil
}

// whole checks that a slot of a predecessor is complete, and repairs what can be lost without
// ending the sandbox.
func (s *Slot) whole() error {
	link, err := netlink.LinkByName(s.Link)
	if err != nil {
		return fmt.Errorf("finding link %s: %w", s.Link, err)
	}
	addrs, err := s.addresses(link)
	if err != nil {
		return err
	}
	if !slices.Contains(addrs, s.Gateway) {
		return fmt.Errorf("%s does not have the address %s", s.Link, s.Gateway)
	}
	if err := inNamespace(s.Namespace, func() error {
		_, err := netlink.LinkByName(insideLink)
		return err
	}); err != nil {
		return fmt.Errorf("looking into %s: %w", s.Namespace, err)
	}
	return s.configureHost()
}

// demolish removes namespace and links of a slot whose address is unknown.
func demolish(instance string, index int) error {
	l := layout{instance: instance}
	return removeParts(l.link(index), filepath.Join(netnsDir, l.namespace(index)))
}

// removeParts deletes the link and the namespace. The link goes first: it goes at once, with both
// ends, while a namespace lives as long as a dying process is in it. Missing parts are no error.
// After an error it goes on, and returns all errors joined.
func removeParts(link, namespace string) error {
	return errors.Join(deleteLink(link), deleteNamespace(namespace))
}

func deleteLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("finding link %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("deleting link %s: %w", name, err)
	}
	return nil
}

func deleteNamespace(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH)
	// EINVAL: the file exists, but nothing is mounted on it.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmounting namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing namespace %s: %w", path, err)
	}
	return nil
}
