package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// DefaultFirstUID begins the range of user ids of a server without a setting for it. The range
	// lies above the ids that distributions, systemd's containers, /etc/subuid and SSSD hand out (the
	// last ends at 2,000,200,000), and below those that systemd keeps for foreign images (from
	// 2,147,352,576).
	DefaultFirstUID = 2_005_000_000
	// UIDs is the length of the range: half the number of values in the lower 28 bits of an address,
	// so that all ranges for private use (10/8, 172.16/12, 192.168/16, 100.64/10, 198.18/15) get
	// different ids in it.
	UIDs = 1 << 27
)

// uidOf returns the user id on the host for the sandbox with the address. No two slots of a machine
// share an address, whatever server they belong to, and a slot has two addresses: so no two
// sandboxes share an id. Servers whose ranges differ only in the first four bits of the address
// need a FirstUID each.
func (n *Node) uidOf(addr netip.Addr) uint32 {
	a := addr.As4()
	return n.cfg.FirstUID + binary.BigEndian.Uint32(a[:])/2%UIDs
}

// takeUID gives the sandbox the user id of its slot. Another sandbox has that id only if it was
// started when the server had another FirstUID or range.
func (n *Node) takeUID(b *instance) error {
	uid := n.uidOf(b.slot.Addr)
	n.mu.Lock()
	defer n.mu.Unlock()
	if other := n.uids[uid]; other != nil {
		return fault.New(fault.Unavailable, fault.CodeNoCapacity,
			"this machine has no user id for a sandbox").After(retryRoom).
			Because(fmt.Errorf("user id %d is that of sandbox %s, which was started with other settings", uid, other.record.ID))
	}
	n.uids[uid] = b
	b.record.UID = uid
	return nil
}

// giveUID frees the user id of a sandbox that has no processes left. The sandbox must still have
// its slot.
func (n *Node) giveUID(b *instance) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.uids[b.record.UID] == b {
		delete(n.uids, b.record.UID)
	}
}

// unlimitProcesses raises the server's limit on the processes of a user as far as it may. Sandboxes
// inherit the limit. The host's root is exempt from it; the kernel of a sandbox, whose user is not,
// ends when it cannot start another process. Its control group and its agent bound it instead.
func (n *Node) unlimitProcesses() error {
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	err := unix.Setrlimit(unix.RLIMIT_NPROC, &unlimited)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	// The server has no CAP_SYS_RESOURCE, as in a container.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &limit); err != nil {
		return err
	}
	if most := uint64(n.cfg.MaxPIDs*hostPIDs + hostPIDsBase); limit.Max < most {
		n.log.Warn("a sandbox with many processes may end: the server may not lift the limit of processes of a user",
			"limit", limit.Max, "wanted", most)
	}
	limit.Cur = limit.Max
	return unix.Setrlimit(unix.RLIMIT_NPROC, &limit)
}
