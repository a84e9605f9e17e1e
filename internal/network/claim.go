package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// lockDir holds a locked file for each instance and each block in use. The kernel releases a
	// lock with the process, so a crash needs no cleaning up.
	lockDir       = "/run/cay/network"
	instancePart  = "instance-"
	blockPart     = "block-"
	claimLockName = "claims"

	// lockPoll is the time between two attempts to take a lock that another process holds for
	// some milliseconds. A shorter one costs CPU, a longer one delays a start.
	lockPoll = 10 * time.Millisecond
)

// Candidates returns the blocks tried in turn when no range is configured: the 64 /18 of
// 10.64.0.0/12, which the defaults of Docker, Kubernetes distributions and cloud networks do not
// use, and for hosts that route all of 10.0.0.0/8 somewhere, the eight of 198.18.0.0/15, which is
// reserved for test networks and is no real destination.
func Candidates() []netip.Prefix {
	const bits = 18
	var out []netip.Prefix
	for _, block := range []string{"10.64.0.0/12", "198.18.0.0/15"} {
		p := netip.MustParsePrefix(block)
		for i := range 1 << (bits - p.Bits()) {
			b := p.Addr().As4()
			n := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(i)<<(32-bits)
			out = append(out, netip.PrefixFrom(addrOf(n), bits))
		}
	}
	return out
}

// claim is a process's hold on an instance's name and its block. It ends with the process.
type claim struct {
	instance, block *os.File
}

// Choose returns the block that an instance would get: want if it is valid and free, or the first
// free candidate if want is the zero value. It claims nothing; Open does.
func Choose(ctx context.Context, instance string, want netip.Prefix) (netip.Prefix, error) {
	c, block, err := take(ctx, instance, want)
	if err != nil {
		return netip.Prefix{}, err
	}
	unlock, err := lockClaims(ctx)
	if err != nil {
		return netip.Prefix{}, errors.Join(err, c.close())
	}
	defer unlock()
	return block, c.release()
}

// take claims the instance's name and a block. One that another process or anything on the host
// uses gives Conflict, code "instance_in_use" or "range_in_use".
func take(ctx context.Context, instance string, want netip.Prefix) (*claim, netip.Prefix, error) {
	if err := checkInstance(instance); err != nil {
		return nil, netip.Prefix{}, err
	}
	if want.IsValid() {
		if err := checkRange(want); err != nil {
			return nil, netip.Prefix{}, err
		}
	}
	unlock, err := lockClaims(ctx)
	if err != nil {
		return nil, netip.Prefix{}, err
	}
	defer unlock()
	owner, err := tryLock(instancePart + instance)
	if err != nil {
		return nil, netip.Prefix{}, err
	}
	if owner == nil {
		return nil, netip.Prefix{}, instanceInUse(instance)
	}
	block, file, err := takeBlock(instance, want)
	if err != nil {
		return nil, netip.Prefix{}, errors.Join(err, unlink(owner))
	}
	return &claim{instance: owner, block: file}, block, nil
}

// takeBlock claims a block. The caller holds the lock of the claims.
func takeBlock(instance string, want netip.Prefix) (netip.Prefix, *os.File, error) {
	host, err := surveyHost(instance)
	if err != nil {
		return netip.Prefix{}, nil, err
	}
	if host.claimed, err = claimedBlocks(); err != nil {
		return netip.Prefix{}, nil, err
	}
	if want.IsValid() {
		if reason := host.refuses(want, false); reason != "" {
			return netip.Prefix{}, nil, fault.New(fault.Conflict, fault.CodeRangeInUse, "the range %s cannot be used: %s", want,
				reason)
		}
		return lockBlock(want)
	}
	// A block in which the instance still has slots comes first, since its running sandboxes have
	// their addresses there.
	var reasons []string
	for _, own := range []bool{true, false} {
		for _, p := range Candidates() {
			if own != host.ownIn(p) {
				continue
			}
			reason := host.refuses(p, true)
			if reason == "" {
				return lockBlock(p)
			}
			reasons = append(reasons, p.String()+": "+reason)
		}
	}
	return netip.Prefix{}, nil, fault.New(fault.Conflict, fault.CodeRangeInUse,
		"no block for sandboxes' addresses is free; configure network.range (%s, and %d more)", reasons[0], len(reasons)-1)
}

func lockBlock(p netip.Prefix) (netip.Prefix, *os.File, error) {
	f, err := tryLock(blockPart + blockName(p))
	if err == nil && f == nil {
		err = fault.New(fault.Conflict, fault.CodeRangeInUse, "another process has claimed %s", p)
	}
	return p, f, err
}

// survey lists the addresses, routes and claims that a block may collide with.
type survey struct {
	addrs   []netip.Addr // the host's addresses
	own     []netip.Addr // the addresses of the instance's own links
	routes  []netip.Prefix
	claimed []netip.Prefix // blocks claimed by live processes
}

func surveyHost(instance string) (*survey, error) {
	s := &survey{}
	links, err := listLinks()
	if err != nil {
		return nil, err
	}
	own := map[int]bool{}
	for _, l := range links {
		if name, _, ok := parseLink(l.Attrs().Name); ok && name == instance {
			own[l.Attrs().Index] = true
		}
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("listing the host's addresses: %w", err)
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		switch {
		case !ok:
		case own[a.LinkIndex]:
			s.own = append(s.own, ip)
		default:
			s.addrs = append(s.addrs, ip)
		}
	}
	all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, all, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("listing the host's routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || own[r.LinkIndex] {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		if bits, _ := r.Dst.Mask.Size(); ok && bits > 0 {
			s.routes = append(s.routes, netip.PrefixFrom(ip, bits))
		}
	}
	return s, nil
}

// refuses returns the reason why p cannot be used, "" if it can. A route to a network that
// contains p speaks against a block that was chosen automatically; an operator who configures the
// block knows that it is free there.
func (s *survey) refuses(p netip.Prefix, strict bool) string {
	for _, a := range s.addrs {
		if p.Contains(a) {
			return fmt.Sprintf("the host has the address %s", a)
		}
	}
	for _, r := range s.routes {
		if p.Overlaps(r) && (strict || r.Bits() >= p.Bits()) {
			return fmt.Sprintf("the host has a route to %s", r)
		}
	}
	for _, c := range s.claimed {
		if p.Overlaps(c) {
			return fmt.Sprintf("another process has claimed %s", c)
		}
	}
	return ""
}

func (s *survey) ownIn(p netip.Prefix) bool {
	for _, a := range s.own {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// claimedBlocks returns the blocks of live processes, and removes the files of dead ones. The
// caller holds the lock of the claims.
func claimedBlocks() ([]netip.Prefix, error) {
	entries, err := os.ReadDir(lockDir)
	if err != nil {
		return nil, fmt.Errorf("listing claims: %w", err)
	}
	var out []netip.Prefix
	for _, e := range entries {
		p, ok := parseBlockName(e.Name())
		if !ok {
			continue
		}
		f, err := tryLock(e.Name())
		if err != nil {
			return nil, err
		}
		if f == nil {
			out = append(out, p)
		} else if err := unlink(f); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// blockName returns a prefix as a file name.
func blockName(p netip.Prefix) string { return p.Addr().String() + "-" + strconv.Itoa(p.Bits()) }

func parseBlockName(name string) (netip.Prefix, bool) {
	text, found := strings.CutPrefix(name, blockPart)
	if !found {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(strings.Replace(text, "-", "/", 1))
	return p, err == nil && blockPart+blockName(p) == name
}

// release gives the claim up and removes its files. The caller holds the lock of the claims.
func (c *claim) release() error { return errors.Join(unlink(c.block), unlink(c.instance)) }

// close gives the claim up and leaves its files.
func (c *claim) close() error { return errors.Join(c.block.Close(), c.instance.Close()) }

// lockClaims takes the lock of the claims, which everything that reads several locks, or removes
// one, holds.
func lockClaims(ctx context.Context) (unlock func(), err error) {
	for {
		// This is inside the loop because a purge may remove the directory meanwhile.
		if err := os.MkdirAll(lockDir, 0o700); err != nil {
			return nil, fmt.Errorf("making the directory of claims: %w", err)
		}
		f, err := tryLock(claimLockName)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if f != nil {
			return func() {
				removeLastLock(f)
				_ = f.Close() // unlocks; nothing was written that could be lost
			}, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the lock of the claims: %w", ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// tryLock opens and locks a file of lockDir. It returns nil if another process holds the lock.
// Programs that the process starts do not inherit the file.
func tryLock(name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(lockDir, name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		// The last holder may have removed the file; a lock on a removed file excludes no
		// process.
		mine, err := f.Stat()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("looking at a lock: %w", err), f.Close())
		}
		if there, err := os.Stat(f.Name()); err == nil && os.SameFile(mine, there) {
			return f, nil
		}
		return nil, f.Close()
	}
	if closeErr := f.Close(); closeErr != nil {
		return nil, fmt.Errorf("closing lock: %w", closeErr)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
}

// removeLastLock removes the lock of the claims, which the caller holds, and the directory if it
// is empty, so that looking for claims leaves nothing. A process that waits for the lock finds
// the file gone and makes another. An error leaves an empty file, which the next one to unlock
// removes.
func removeLastLock(f *os.File) {
	entries, err := os.ReadDir(lockDir)
	if err != nil || len(entries) != 1 || entries[0].Name() != claimLockName {
		return
	}
	mine, err := f.Stat()
	if err != nil {
		return
	}
	if there, err := os.Stat(f.Name()); err != nil || !os.SameFile(mine, there) {
		return // the file was removed, and this one belongs to another process
	}
	_ = os.Remove(f.Name())
	for _, dir := range []string{lockDir, filepath.Dir(lockDir)} {
		_ = os.Remove(dir) // fails if another process has put something there
	}
}

// unlink removes a locked file and then unlocks it. Processes that wait for the lock of the
// claims do not see it in between.
func unlink(f *os.File) error {
	err := os.Remove(f.Name())
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, f.Close())
}
