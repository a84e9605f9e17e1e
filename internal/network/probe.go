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
	Name   string // what was looked at, e.g. "nftables"
	OK     bool
	Detail string // what was found
	Fix    string // what to do about it; "" when OK
}

// Probe checks whether this host can do what the package needs. It changes
// nothing that outlives it. Root is needed; without it the first finding says so
// and is the only one.
func Probe() []Finding {
	if os.Geteuid() != 0 {
		return []Finding{{Name: "root", Detail: "not running as root", Fix: "run as root: namespaces, links and rules need it"}}
	}
	return []Finding{probeNamespaces(), probeTables(), probeConntrack(), probeForwarding(), probeForeignDrops()}
}

// finding is OK with the detail, or carries the error and what to do.
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

// probeTables makes a table with one of each kind of expression the rules need,
// and removes it.
func probeTables() Finding {
	// The name is not one an instance can have.
	t := newTable(layout{instance: "probe-" + fmt.Sprint(os.Getpid()), block: Candidates()[0]},
		Config{AgentPort: 1, Services: Services{DNS: 1, Proxy: 1, Metadata: 1}})
	err := t.install(nil, counts{})
	err = errors.Join(err, t.remove(), t.sockets.close())
	return finding("nftables", "tables with fib, conntrack, masquerade and redirect can be made", err,
		"a kernel with nf_tables is needed (CONFIG_NF_TABLES_INET, NFT_FIB_INET, NFT_CT, NFT_MASQ, NFT_REDIR, NFT_LIMIT; modprobe nf_tables)")
}

func probeConntrack() Finding {
	// No connection can have this address: it is listed and nothing is found.
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

// legacyTablesFile names the tables of the older packet filter, if it is in use.
const legacyTablesFile = "/proc/net/ip_tables_names"

// probeForeignDrops looks for chains of others that drop forwarded packets
// unless a rule of theirs accepts them, as Docker and some firewalls set up.
func probeForeignDrops() Finding {
	const name = "other firewalls"
	c, err := nftables.New()
	if err != nil {
		return finding(name, "", err, "see nftables")
	}
	chains, err := c.ListChains()
	if err != nil {
		return finding(name, "", err, "see nftables")
	}
	var found []string
	for _, ch := range chains {
		routes := ch.Table.Family == nftables.TableFamilyIPv4 || ch.Table.Family == nftables.TableFamilyINet
		if !routes || ch.Hooknum == nil || ch.Policy == nil {
			continue
		}
		if *ch.Hooknum == *nftables.ChainHookForward && *ch.Policy == nftables.ChainPolicyDrop {
			found = append(found, ch.Table.Name+" "+ch.Name)
		}
	}
	if len(found) == 0 {
		detail := "none drops forwarded packets by default"
		if names, err := os.ReadFile(legacyTablesFile); err == nil && len(names) > 0 {
			detail += "; rules of iptables-legacy are there too and cannot be seen from here"
		}
		return Finding{Name: name, OK: true, Detail: detail}
	}
	return Finding{Name: name,
		Detail: "dropping forwarded packets by default: " + strings.Join(found, ", ") + "; sandboxes may reach nothing outside",
		Fix: "let sandboxes' links through there; for Docker: iptables -I DOCKER-USER -i 'cay+' -j ACCEPT && " +
			"iptables -I DOCKER-USER -o 'cay+' -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"}
}
