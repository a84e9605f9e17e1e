package cgroup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Relieve ends processes inside the sandbox until about over bytes are free, and returns how many
// bytes that freed. The number may be a lie: 0 makes the guard give up sooner, and no number makes
// it give up later.
type Relieve func(ctx context.Context, over int64) (freed int64, err error)

// Guard keeps the group's memory at or below Limit without the kernel ever choosing
// a victim, which would be the sentry and with it the whole sandbox.
//
// On v1 the kernel tells the guard when usage comes near the limit. If processes and not page
// cache fill the group, the guard has the agent end the process at fault. While page cache fills
// the group, processes can grow in its place and the kernel reports nothing, so the guard looks
// from time to time. The kernel's own limit is higher by Reserve, and its killer is switched off:
// a process that needs more memory waits, and the guard lends another Reserve. Waiting is the last
// resort and not a safe one: a system call of the sentry that needs kernel memory does not wait
// but fails, and the sentry ends if it cannot make a thread.
//
// v2 has no such switch. memory.high is the limit: beyond it the kernel reclaims, slows down the
// processes that allocate, and tells the guard, which acts as on v1. memory.max is higher by
// Reserve, as the last resort.
//
// Memory that is swapped out counts as if it were not: otherwise the kernel would make room in the
// swap of the machine whenever processes need more, and nothing would end them.
type Guard struct {
	Group   Group
	Limit   int64 // bytes of everything: the sandbox's size plus the need of its kernel
	Reserve int64 // bytes beyond Limit while a process is being ended, and of each loan
	Relieve Relieve
	Log     *slog.Logger
	// Patience limits the time for which the group is over its limit, 0 for the default. Time
	// below the limit makes up for time over it.
	Patience time.Duration
}

const (
	// relieveTimeout bounds one request to the agent. It answers in milliseconds
	// when it gets the CPU and memory; when it got stuck at the limit itself, the
	// next loan sets it free.
	relieveTimeout = 2 * time.Second
	// attempts limits the answers in a row that nothing was freed. After that many the guard
	// gives the sandbox up: its processes do not hold the memory. It also limits the reserves
	// that are lent at once.
	attempts = 8
	// patience limits the time for which the host sees the group over its limit, whatever relief
	// answers: it is the time of all attempts when none is answered. Ending some hundred
	// allocators takes less, also on a busy machine. A shorter time ends sandboxes that would
	// have recovered, a longer one lends memory to agents that lie.
	patience = attempts * relieveTimeout
	// loanEvery is the interval between loans while a process waits for memory and the agent
	// has not answered. Allocators take a reserve in some 20 ms.
	loanEvery = 50 * time.Millisecond
	// growth is the assumed growth of processes, bytes a second: a reserve in 15 ms. Faster
	// growth reaches the kernel's limit before the guard looks.
	growth = 4 << 30
	// near is the distance from the limit at which relief begins, as a divisor of the limit:
	// allocators take that much until relief has begun.
	near = 18
	// margin is the distance below the limit that relief aims at, as a divisor of the limit, so
	// that the next page does not need relief again.
	margin = 16
	// settleTime limits the wait for freed memory to return to the host since the last of it came.
	// The sandbox's kernel returns it in the background, at some GB/s, and slower on a busy machine.
	settleTime = 500 * time.Millisecond
	settlePoll = 2 * time.Millisecond
	// settleMost limits the whole wait, as long as memory comes back.
	settleMost = 2 * time.Second
	// recheck is the pause before the guard looks again when relief freed nothing, or the kernel
	// could not take the loan back yet.
	recheck = 100 * time.Millisecond
)

// ErrHopeless is returned by [Guard.Run] when nothing inside can be ended to get
// below the limit. The sandbox has to go.
var ErrHopeless = errors.New("memory stays over the limit and no process holds it")

// Arm sets the limits. It must be called before [Guard.Run], and before anything
// untrusted runs inside.
func (g *Guard) Arm() error {
	if g.Group.h.unified {
		return errors.Join(
			g.limitSwap("memory.swap.max", g.Limit),
			g.Group.set("memory", "memory.max", strconv.FormatInt(g.Limit+g.Reserve, 10)),
			g.Group.set("memory", "memory.high", strconv.FormatInt(g.Limit, 10)))
	}
	return errors.Join(
		g.Group.set("memory", "memory.oom_control", "1"),
		g.lend(0),
		g.limitSwap("memory.memsw.limit_in_bytes", 2*g.Limit+(1+attempts)*g.Reserve)) // memory and swap together
}

// limitSwap sets a limit for what the group can take of the machine's swap while no guard runs. A kernel that does not
// count swap has no such limit.
func (g *Guard) limitSwap(file string, limit int64) error {
	err := g.Group.set("memory", file, strconv.FormatInt(limit, 10))
	if errors.Is(err, fs.ErrNotExist) && g.Group.Exists() {
		return nil
	}
	return err
}

// lend sets v1's limit to the sum of Limit, Reserve and a loan.
func (g *Guard) lend(loan int64) error {
	return g.Group.set("memory", "memory.limit_in_bytes", strconv.FormatInt(g.Limit+g.Reserve+loan, 10))
}

// Run guards until ctx ends or the group is gone, or gives up with [ErrHopeless]. It
// costs nothing while there is memory: it sleeps in the kernel.
func (g *Guard) Run(ctx context.Context) error {
	watch, err := g.watch()
	if err != nil {
		return err
	}
	defer watch.Close()
	stop := context.AfterFunc(ctx, func() { watch.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 4096) // eventfd wants 8 bytes, inotify a page
	most := cmp.Or(g.Patience, patience)
	allowed := credit{most: most, left: most, last: time.Now()}
	for {
		// Look first, then wait: the watch reports nothing from before it was set.
		held, err := g.check(ctx, &allowed)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		next, err := g.next(held)
		if err == nil {
			err = watch.SetReadDeadline(next)
		}
		if ctx.Err() != nil { // looked at last, since the deadline set here may undo the one of stop
			return nil
		}
		if err == nil {
			_, err = watch.Read(buf)
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return fmt.Errorf("waiting for memory pressure in %s: %w", g.Group.path, err)
		}
	}
}

// next returns the time to look again although the kernel reports nothing, zero for never. The group held
// as many bytes when it was looked at last.
func (g *Guard) next(held int64) (time.Time, error) {
	if g.Group.h.unified { // v2 reports each reclaim, and no growth in the place of memory that was swapped out
		swapped, err := g.Group.swapped()
		if err != nil || swapped == 0 || held < g.near()-g.unreported() {
			return time.Time{}, err
		}
	} else if used, err := g.Group.value("memory", g.Group.usageFile()); err != nil || used < g.near()-g.unreported() {
		return time.Time{}, err
	}
	room := max(g.Limit-held, g.Reserve/2)
	return time.Now().Add(time.Duration(float64(room) / growth * float64(time.Second))), nil
}

// unreported returns by how many bytes usage may fall below v1's threshold and rise again without
// a report: the kernel compares after every 128 pages of each CPU, whose counters lag by 64 pages.
func (g *Guard) unreported() int64 {
	return max(g.Limit/32, int64(runtime.NumCPU())<<20)
}

// Near returns the usage in bytes at which the guard of a group with the limit acts.
func Near(limit int64) int64 { return limit - limit/near }

func (g *Guard) near() int64 { return Near(g.Limit) }

// credit counts down the time for which the group may be over its limit. Time below the limit
// adds to it.
type credit struct {
	most, left time.Duration
	last       time.Time // of the last spend
}

// spend takes a duration that has just ended, and reports whether any credit is left.
func (c *credit) spend(d time.Duration) bool {
	now := time.Now()
	c.left = min(c.most, c.left+max(0, now.Sub(c.last)-d)) - d
	c.last = now
	return c.left > 0
}

// check acts until the group is below its limit and the loan is paid back, both by the host's
// numbers, and returns the memory that the group holds. It gives up when the credit is spent, or when
// relief says again and again that it freed nothing.
func (g *Guard) check(ctx context.Context, c *credit) (held int64, err error) {
	lent, idle := int64(0), 0
	for ctx.Err() == nil {
		began := time.Now()
		held, over, waiting, err := g.look()
		switch {
		case err != nil:
			return 0, err
		case over > 0 || waiting:
			freed, err := g.act(ctx, over, &lent)
			if err != nil {
				return 0, err
			}
			if freed > 0 {
				idle = 0
				g.settle(ctx)
			} else if idle++; idle == attempts {
				return 0, ErrHopeless
			} else {
				pause(ctx)
			}
			if !c.spend(time.Since(began)) && ctx.Err() == nil {
				return 0, ErrHopeless
			}
		case lent == 0:
			return held, nil
		default:
			// The kernel refuses while it can reclaim too little. A process that needs memory
			// meanwhile must not wait for that.
			if err := g.lend(0); errors.Is(err, unix.EBUSY) {
				pause(ctx)
			} else if err != nil {
				return 0, err
			} else {
				lent = 0
			}
		}
	}
	return 0, ctx.Err()
}

// act has the agent end a process. The agent and that process need memory for it while others take
// all there is, so on v1 the loan grows for as long as a process waits.
func (g *Guard) act(ctx context.Context, over int64, lent *int64) (freed int64, err error) {
	grow := func(waiting bool) error {
		if g.Group.h.unified || *lent > 0 && !waiting || *lent >= attempts*g.Reserve {
			return nil
		}
		*lent += g.Reserve
		return g.lend(*lent)
	}
	if err := grow(true); err != nil {
		return 0, err
	}
	done := make(chan int64, 1)
	go func() { done <- g.relieve(ctx, max(over, g.Limit/margin)) }()
	tick := time.NewTicker(loanEvery)
	defer tick.Stop()
	for {
		select {
		case freed := <-done:
			return freed, nil
		case <-tick.C:
			_, _, waiting, err := g.look()
			if err == nil {
				err = grow(waiting)
			}
			if err != nil {
				<-done // relieveTimeout bounds it
				return 0, err
			}
		}
	}
}

func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(recheck):
	}
}

// settle waits until the host sees that memory was freed, so that no process is ended for memory
// that is being returned. It returns at once when a process waits for memory, but sleeps at least
// once: otherwise relief that lies would keep a CPU busy.
func (g *Guard) settle(ctx context.Context) {
	began := time.Now()
	end, least := began.Add(settleTime), int64(math.MaxInt64)
	for time.Now().Before(end) && ctx.Err() == nil {
		time.Sleep(settlePoll)
		held, over, waiting, err := g.look()
		if err != nil || waiting || over <= 0 {
			return
		}
		if held < least {
			least = held
			end = time.Now().Add(min(settleTime, settleMost-time.Since(began)))
		}
	}
}

func (g *Guard) relieve(ctx context.Context, over int64) int64 {
	ctx, cancel := context.WithTimeout(ctx, relieveTimeout)
	defer cancel()
	freed, err := g.Relieve(ctx, over)
	if err != nil {
		g.Log.WarnContext(ctx, "relieving a sandbox of memory", "group", g.Group.path, "over_bytes", over, "error", err)
	}
	return freed
}

// look returns how many bytes the group holds, how many of them must be freed, 0 for none, and whether a
// process waits for memory.
func (g *Guard) look() (held, over int64, waiting bool, err error) {
	if held, err = g.Group.MemoryHeld(); err != nil {
		return 0, 0, false, err
	}
	if !g.Group.h.unified {
		control, err := g.Group.stat("memory", "memory.oom_control")
		if err != nil {
			return 0, 0, false, err
		}
		waiting = control["under_oom"] == 1
	}
	if waiting || held > g.near() {
		over = max(0, held-(g.Limit-g.Limit/margin))
	}
	return held, over, waiting, nil
}

// MemoryHeld returns the number of bytes of the group that the kernel cannot drop: memory of
// processes, shared memory (in a sandbox: all memory of its processes), also where it is swapped out,
// and the kernel's own memory for the group. Page cache of files on disk does not count.
func (g Group) MemoryHeld() (int64, error) {
	stat, err := g.stat("memory", "memory.stat")
	if err != nil {
		return 0, err
	}
	if g.h.unified {
		swapped, err := g.swapped()
		// A page that was read back from swap may count in both places.
		return stat["anon"] + stat["shmem"] + max(0, swapped-stat["swapcached"]) +
			stat["kernel_stack"] + stat["pagetables"] + stat["slab_unreclaimable"], err
	}
	kernel, err := g.value("memory", "memory.kmem.usage_in_bytes")
	return stat["total_rss"] + stat["total_shmem"] + max(0, stat["total_swap"]-stat["total_swapcached"]) + kernel, err
}

// swapped returns the number of bytes of the group that are swapped out (v2), 0 where the kernel does not count them.
func (g Group) swapped() (int64, error) {
	n, err := g.value("memory", "memory.swap.current")
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return n, err
}

// usageFile returns the name of v1's file with the usage of memory and, where the kernel counts it, of swap.
func (g Group) usageFile() string {
	const withSwap = "memory.memsw.usage_in_bytes"
	if _, err := os.Stat(g.dir("memory") + "/" + withSwap); err == nil {
		return withSwap
	}
	return "memory.usage_in_bytes"
}

// watch returns a file that becomes readable when the group is at its limit. A read waits in the
// runtime's poller and holds no thread.
func (g *Guard) watch() (*os.File, error) {
	if g.Group.h.unified {
		return g.watchEvents()
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("making an eventfd: %w", err)
	}
	watch := os.NewFile(uintptr(fd), "memory pressure")
	control, err := os.Open(g.Group.dir("memory") + "/memory.oom_control")
	if err != nil {
		watch.Close()
		return nil, fmt.Errorf("watching the memory of %s: %w", g.Group.path, err)
	}
	defer control.Close()
	usage, err := os.Open(g.Group.dir("memory") + "/" + g.Group.usageFile())
	if err != nil {
		watch.Close()
		return nil, fmt.Errorf("watching the memory of %s: %w", g.Group.path, err)
	}
	defer usage.Close()
	if err := errors.Join(
		g.Group.set("memory", "cgroup.event_control", fmt.Sprintf("%d %d", fd, control.Fd())),
		g.Group.set("memory", "cgroup.event_control", fmt.Sprintf("%d %d %d", fd, usage.Fd(), g.near())),
	); err != nil {
		watch.Close()
		return nil, fmt.Errorf("watching the memory of %s: %w", g.Group.path, err)
	}
	return watch, nil
}

// watchEvents implements watch on v2, where the kernel marks memory.events as modified.
func (g *Guard) watchEvents() (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("making an inotify watch: %w", err)
	}
	watch := os.NewFile(uintptr(fd), "memory pressure")
	if _, err := unix.InotifyAddWatch(fd, g.Group.dir("memory")+"/memory.events", unix.IN_MODIFY); err != nil {
		watch.Close()
		return nil, fmt.Errorf("watching the memory of %s: %w", g.Group.path, err)
	}
	return watch, nil
}
