package cgroup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Relieve is asked to end processes inside the sandbox until about over bytes are
// free, and says how many bytes that freed. What it says may be a lie: 0 makes the guard
// give up sooner, and nothing makes it give up later.
type Relieve func(ctx context.Context, over int64) (freed int64, err error)

// Guard keeps the group's memory at or below Limit without the kernel ever choosing
// a victim, which would be the sentry and with it the whole sandbox.
//
// v1: the guard hears when usage comes near the limit, and acts if page cache is not what fills
// it: it has the agent end the process at fault. While page cache does fill the group, processes
// can grow in its place and the kernel reports nothing, so the guard looks from time to time. The
// kernel's own limit stands Reserve above, and its killer is switched off: a process that needs
// memory beyond that waits, and the guard lends another Reserve. Waiting is the last line and not
// a safe one: a system call of the sentry that needs kernel memory does not wait, it fails. When
// it was to make a thread, the sentry ends.
//
// v2 has no such switch. memory.high stands at the limit: beyond it the kernel
// reclaims and slows down who allocates, and tells the guard, which acts as above. memory.max stands
// Reserve above it, as the last line.
type Guard struct {
	Group   Group
	Limit   int64 // bytes of everything: the sandbox's promise plus what its kernel needs
	Reserve int64 // bytes beyond it while somebody is being ended, and of each loan
	Relieve Relieve
	Log     *slog.Logger
	// Patience is how long the group may be over its limit, 0 for the default. Time in which it
	// is not makes up for time in which it was.
	Patience time.Duration
}

const (
	// relieveTimeout bounds one request to the agent. It answers in milliseconds
	// when it gets the CPU and memory; when it got stuck at the limit itself, the
	// next loan sets it free.
	relieveTimeout = 2 * time.Second
	// attempts is how often in a row relief may say that it freed nothing before the sandbox
	// is given up: the memory is then not its processes' to give back. It is also how
	// many reserves may be lent at once.
	attempts = 8
	// patience is how long the host may see the group over its limit before the sandbox is given
	// up, whatever relief says: as long as all attempts take when none is answered. What it
	// takes to end some hundred allocators is less, also on a busy machine. A shorter time ends
	// sandboxes that would have come to rest, a longer one lends memory to those that lie.
	patience = attempts * relieveTimeout
	// loanEvery is how soon more is lent while somebody waits for memory and the agent
	// has not answered: allocators take a reserve in some 20 ms.
	loanEvery = 50 * time.Millisecond
	// growth is the most bytes a second by which processes are taken to grow: a reserve in 15 ms.
	growth = 4 << 30
	// near is how far below the limit relief begins, as a part of it: what allocators
	// take until it has begun.
	near = 18
	// margin is how far below the limit relief aims, as a part of the limit, so that
	// the next page does not call for it again.
	margin = 16
	// settleTime is how long freed memory may take to be given back to the host: the
	// sandbox's kernel does that in the background, at some GB/s.
	settleTime = 500 * time.Millisecond
	settlePoll = 2 * time.Millisecond
	// recheck is how soon the guard looks again when relief freed nothing, or the
	// kernel could not take the loan back yet.
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
			g.Group.set("memory", "memory.max", strconv.FormatInt(g.Limit+g.Reserve, 10)),
			g.Group.set("memory", "memory.high", strconv.FormatInt(g.Limit, 10)))
	}
	return errors.Join(
		g.Group.set("memory", "memory.oom_control", "1"),
		g.lend(0))
}

// lend sets v1's limit to Limit, what is always there to act in, and a loan.
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
		// First look, then wait: what happened before the watch was set counts too.
		if err := g.check(ctx, &allowed); err != nil {
			if ctx.Err() != nil || errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		next, err := g.next()
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

// next is when to look again though the kernel reports nothing, zero for never.
func (g *Guard) next() (time.Time, error) {
	if g.Group.h.unified { // where each reclaim is reported
		return time.Time{}, nil
	}
	used, err := g.Group.value("memory", "memory.usage_in_bytes")
	if err != nil || used < g.near()-g.unreported() {
		return time.Time{}, err
	}
	held, err := g.Group.MemoryHeld()
	room := max(g.Limit-held, g.Reserve/2)
	return time.Now().Add(time.Duration(float64(room) / growth * float64(time.Second))), err
}

// unreported is how far usage may fall below v1's threshold and rise again without a report: the
// kernel compares after every 128 pages of each processor, whose counters lag by 64 pages.
func (g *Guard) unreported() int64 {
	return max(g.Limit/32, int64(runtime.NumCPU())<<20)
}

// Near is the usage in bytes at which the guard of a group with the limit acts.
func Near(limit int64) int64 { return limit - limit/near }

func (g *Guard) near() int64 { return Near(g.Limit) }

// credit is the time for which the group may be over its limit. It comes back as it passes.
type credit struct {
	most, left time.Duration
	last       time.Time // when it was looked at
}

// spend takes a time that has just ended, and reports whether there is any left.
func (c *credit) spend(d time.Duration) bool {
	now := time.Now()
	c.left = min(c.most, c.left+max(0, now.Sub(c.last)-d)) - d
	c.last = now
	return c.left > 0
}

// check acts until the group is below its limit and the loan is paid back. Both are what the
// host sees. It gives up when its credit is spent, or when relief admits that there is none.
func (g *Guard) check(ctx context.Context, c *credit) error {
	lent, idle := int64(0), 0
	for ctx.Err() == nil {
		began := time.Now()
		over, waiting, err := g.over()
		switch {
		case err != nil:
			return err
		case over > 0 || waiting:
			freed, err := g.act(ctx, over, &lent)
			if err != nil {
				return err
			}
			if freed > 0 {
				idle = 0
				g.settle(ctx)
			} else if idle++; idle == attempts {
				return ErrHopeless
			} else {
				pause(ctx)
			}
			if !c.spend(time.Since(began)) && ctx.Err() == nil {
				return ErrHopeless
			}
		case lent == 0:
			return nil
		default:
			// Refused while too little can be reclaimed; who needs memory meanwhile
			// must not wait for that.
			if err := g.lend(0); errors.Is(err, unix.EBUSY) {
				pause(ctx)
			} else if err != nil {
				return err
			} else {
				lent = 0
			}
		}
	}
	return ctx.Err()
}

// act has the agent end somebody. The agent needs memory for that, and so does who
// is being ended, while others take what there is: on v1 the loan grows for as
// long as somebody waits.
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
			_, waiting, err := g.over()
			if err == nil {
				err = grow(waiting)
			}
			if err != nil {
				<-done // bounded by its own time
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

// settle waits until what was freed inside shows outside, so that nobody is ended for
// memory that is on its way back. Who runs into the loan's end ends the wait, which is never
// nothing: relief that lies would keep a processor busy.
func (g *Guard) settle(ctx context.Context) {
	for end := time.Now().Add(settleTime); time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(settlePoll)
		if over, waiting, err := g.over(); err != nil || waiting || over <= 0 {
			return
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

// over says how much must go, 0 if nothing, and whether somebody waits for memory.
func (g *Guard) over() (over int64, waiting bool, err error) {
	used, err := g.Group.MemoryHeld()
	if err != nil {
		return 0, false, err
	}
	if !g.Group.h.unified {
		control, err := g.Group.stat("memory", "memory.oom_control")
		if err != nil {
			return 0, false, err
		}
		waiting = control["under_oom"] == 1
	}
	if waiting || used > g.near() {
		over = max(0, used-(g.Limit-g.Limit/margin))
	}
	return over, waiting, nil
}

// MemoryHeld is how many bytes the group holds that no reclaim gives back: process
// memory, shared memory (in a sandbox: everything its processes have) and the
// kernel's own for it. Page cache of files on disk does not count.
func (g Group) MemoryHeld() (int64, error) {
	stat, err := g.stat("memory", "memory.stat")
	if err != nil {
		return 0, err
	}
	if g.h.unified {
		return stat["anon"] + stat["shmem"] + stat["kernel_stack"] + stat["pagetables"] + stat["slab_unreclaimable"], nil
	}
	kernel, err := g.value("memory", "memory.kmem.usage_in_bytes")
	return stat["total_rss"] + stat["total_shmem"] + kernel, err
}

// watch returns a file that becomes readable when the group is at its limit. It
// waits in the runtime's poller and holds no thread.
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
	usage, err := os.Open(g.Group.dir("memory") + "/memory.usage_in_bytes")
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

// watchEvents is watch on v2, where the kernel marks memory.events as modified.
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
