package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Finding is the result of one check of the host.
type Finding struct {
	Name   string // what was checked, e.g. "nftables"
	OK     bool
	Detail string // the result
	Fix    string // what to do about it; "" if OK
}

// Probe checks whether this host can do what the package needs. It changes nothing that outlives
// it. It needs root; without it the only finding says so.
func Probe() []Finding {
	if os.Geteuid() != 0 {
		return []Finding{{Name: "root", Detail: "not running as root",
			Fix: "run as root: namespaces, links and rules need it"}}
	}
	return append([]Finding{probeNamespaces(), probeTables(), probeConntrack(), probeForwarding()}, probeForeignDrops()...)
}

// finding returns a Finding that is OK with the detail, or carries the error and the fix.
func finding(name, detail string, err error, fix string) Finding {
	if err != nil {
		return Finding{Name: name, Detail: err.Error(), Fix: fix}
	}
	return Finding{Name: name, OK: true, Detail: detail}
}

func probeNamespaces() Finding {
	err := onThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	return finding("network namespaces", "can be made", err,
		"a kernel with CONFIG_NET_NS is needed, and in a container the capability SYS_ADMIN")
}

// probeTables makes a table with each kind of expression that the rules need, and removes it.
func probeTables() Finding {
	// No instance can have this name.
	t := newTable(layout{instance: "probe-" + fmt.Sprint(os.Getpid()), block: Candidates()[0]},
		Config{AgentPort: 1, Services: Services{DNS: 1, Proxy: 1, Metadata: 1}})
	err := t.install(nil, counts{})
	err = errors.Join(err, t.remove(), t.sockets.close())
	return finding("nftables", "tables with fib, conntrack with limits and timeouts, masquerade and redirect can be made",
		err, "a kernel with nf_tables is needed (CONFIG_NF_TABLES_INET, NFT_FIB_INET, NFT_CT, NFT_CONNLIMIT, "+
			"NF_CONNTRACK_TIMEOUT, NFT_MASQ, NFT_REDIR, NFT_LIMIT; modprobe nf_tables)")
}

func probeConntrack() Finding {
	// No connection can have this address, so the listing finds nothing.
	var s sockets
	err := errors.Join(forgetConnections(context.Background(), &s, netip.IPv4Unspecified()), s.close())
	return finding("connection tracking", "can be read and cleaned", err,
		"a kernel with CONFIG_NF_CT_NETLINK is needed (modprobe nf_conntrack_netlink)")
}

func probeForwarding() Finding {
	path := filepath.Join(sysctlDir, forwardingFile)
	now, err := os.ReadFile(path)
	if err != nil {
		return finding("ip_forward", "", err, "mount /proc, writable")
	}
	if strings.TrimSpace(string(now)) == "1" {
		return Finding{Name: "ip_forward", OK: true, Detail: "on"}
	}
	return finding("ip_forward", "off; the server turns it on", unix.Access(path, unix.W_OK),
		"make /proc/sys writable, or set net.ipv4.ip_forward=1 before the server starts")
}

// legacyTablesFile lists the tables of the older packet filter, if it is in use.
const legacyTablesFile = "/proc/net/ip_tables_names"

// foreignDrops are the hooks where a firewall that drops unknown packets blocks sandboxes, as
// Docker and most firewalls set it up. Verdicts of this package cannot accept what another chain
// drops.
var foreignDrops = []struct {
	name   string
	hook   nftables.ChainHook
	detail string // the dropped packets
	breaks string // what does not work then
	fix    string
}{
	{"other firewalls, forwarding", *nftables.ChainHookForward, "forwarded packets", "sandboxes may reach nothing outside",
		"accept packets of sandboxes' links there; for Docker: iptables -I DOCKER-USER -i 'cay+' -j ACCEPT && " +
			"iptables -I DOCKER-USER -o 'cay+' -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"},
	{"other firewalls, input", *nftables.ChainHookInput, "packets to this machine",
		"sandboxes may not reach cay's resolver, its proxy for allow_domains and the metadata service",
		"accept packets that cay redirected to itself; all others from sandboxes stay dropped: " +
			"iptables -I INPUT -i 'cay+' -m conntrack --ctstate DNAT -j ACCEPT"},
}

// probeForeignDrops looks for other programs' base chains that drop packets by default.
func probeForeignDrops() []Finding {
	c, err := nftables.New()
	if err != nil {
		return []Finding{finding("other firewalls", "", err, "see nftables")}
	}
	chains, err := c.ListChains()
	if err != nil {
		return []Finding{finding("other firewalls", "", err, "see nftables")}
	}
	var out []Finding
	for _, d := range foreignDrops {
		var found []string
		for _, ch := range chains {
			ipv4 := ch.Table.Family == nftables.TableFamilyIPv4 || ch.Table.Family == nftables.TableFamilyINet
			if ipv4 && ch.Hooknum != nil && *ch.Hooknum == d.hook && ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
				found = append(found, ch.Table.Name+" "+ch.Name)
			}
		}
		if len(found) > 0 {
			out = append(out, Finding{Name: d.name, Fix: d.fix,
				Detail: "dropping " + d.detail + " by default: " + strings.Join(found, ", ") + "; " + d.breaks})
			continue
		}
		detail := "none drops " + d.detail + " by default"
		if names, err := os.ReadFile(legacyTablesFile); err == nil && len(names) > 0 {
			detail += "; this check cannot see the rules of iptables-legacy, which also exist"
		}
		out = append(out, Finding{Name: d.name, OK: true, Detail: detail})
	}
	return out
}
