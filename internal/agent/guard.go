package agent

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// How often the guard looks, while anything runs. Looking takes some 3 ms of CPU in gVisor, for
// the wake alone.
const (
	// quickInterval is for as long as there are more at each look, or the agent was just
	// called. A bomb makes a hundred or two processes in that time.
	quickInterval = 100 * time.Millisecond

	// slowInterval is what comes of it, twice as long after each look, when there is
	// nothing to see. A bomb that goes off by itself is at its limit when it is found then, and
	// has taken half of the memory of the smallest sandbox; half of that if it leaves dead.
	slowInterval = 5 * time.Second
)

// hardLimit is at how many processes and threads of all commands together the
// largest command is killed. One alone never has as many.
func hardLimit(limit int) int { return limit + limit/4 + 16 }

// A command is ended that is found at its limit maxStrikes times within strikeTime, each time
// with more new processes than there was room for when it was last found there: others have
// ended for them. One that fills up to its limit and stays there has none. In between it may have a few
// less: those of a bomb that fail to fork end, and others take their place. There is little CPU
// then to look more often.
const (
	maxStrikes = 2
	strikeTime = 30 * time.Second
)

// guard ends commands that make processes without end: those that go on at their
// limit, which takes all CPU and leaves more dead behind than can be reaped; those
// that do not reap their own, since a process leaves its control group when it
// ends, so that the limit does not see those whose parents never wait for them; and
// the largest, when all together are too many. It sleeps while nothing runs.
type guard struct {
	processes *processes
	groups    *groups
	kick      chan struct{} // the agent was called or given input; capacity 1

	suspect string // the command that had nearly as many as it may at the last look
	newest  int    // its youngest process when it was last found at its limit
	room    int    // how many more it could have had then
	strikes int
	struck  time.Time // the last time
}

func newGuard(p *processes, g *groups) *guard {
	return &guard{processes: p, groups: g, kick: make(chan struct{}, 1)}
}

// wake makes the guard look soon.
func (g *guard) wake() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// run guards for ever.
func (g *guard) run() {
	for {
		<-g.kick
		g.watch()
	}
}

// watch guards while anything runs.
func (g *guard) watch() {
	interval, before := quickInterval, uint16(0)
	g.suspect = ""
	timer := time.NewTimer(interval)
	defer timer.Stop()
	for g.groups.busy() {
		select {
		case <-timer.C:
		case <-g.kick:
			if interval > quickInterval {
				interval = quickInterval
				timer.Reset(interval)
			}
			continue
		}
		g.countLiving()
		now := g.tasks()
		burning := time.Since(g.struck) < strikeTime
		if !burning { // while it burns that takes seconds
			g.countDead(now)
		}
		interval = min(2*interval, slowInterval)
		if burning || now > before {
			interval = quickInterval
		}
		before = now
		timer.Reset(interval)
	}
}

// countLiving ends the largest command if all have too many processes, or if it goes on at
// its limit.
func (g *guard) countLiving() {
	total, largest, n := g.groups.total()
	if total >= hardLimit(g.groups.limit) {
		g.end(largest.name)
		return
	}
	limit := g.groups.limit
	if n < limit-limit/4 {
		g.suspect = ""
		return
	}
	if g.suspect != largest.name {
		g.suspect, g.newest, g.room, g.strikes = largest.name, 0, 0, 0
	}
	if n < limit-2 {
		return
	}
	newest, fresh := 0, 0
	largest.members(func(pid int) {
		newest = max(newest, pid)
		if pid > g.newest {
			fresh++
		}
	})
	if fresh > g.room {
		if time.Since(g.struck) > strikeTime {
			g.strikes = 0
		}
		g.strikes++
		g.struck = time.Now()
	}
	g.newest, g.room = newest, limit-n
	if g.strikes >= maxStrikes {
		g.suspect = ""
		g.end(largest.name)
	}
}

// tasks is how many tasks there are in the sandbox, the dead and the agent's threads
// included; 0 if that cannot be told.
func (g *guard) tasks() uint16 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return info.Procs
}

// countDead ends the command that left more children unreaped than all commands
// may have processes. It looks closer only when there are more tasks than the
// living can be.
func (g *guard) countDead(tasks uint16) {
	const agentThreads = 64 // more than it ever has
	if int(tasks) <= hardLimit(g.groups.limit)+g.groups.limit+agentThreads {
		return
	}
	parents, zombies := g.census()
	if zombies <= g.groups.limit {
		return
	}
	// The command that holds most of them, by the groups of their parents.
	held := map[string]int{}
	for ppid, n := range parents {
		if data, err := os.ReadFile("/proc/" + strconv.Itoa(ppid) + "/cgroup"); err == nil && ppid != os.Getpid() {
			held[nameOf(data)] += n
		}
	}
	worst := ""
	for name, n := range held {
		if name != "" && n > held[worst] {
			worst = name
		}
	}
	if worst != "" {
		g.end(worst)
	}
}

// end kills everything in a command's group. What is left, if anything, is found
// again at the next check.
func (g *guard) end(name string) {
	if c := g.processes.inGroup(name); c != nil {
		_ = c.stop(false)
		return
	}
	if gr := g.groups.takeLingering(name); gr != nil {
		_ = gr.kill(killPatience)
		g.groups.give(gr)
	}
}

// census counts zombies by parent.
func (g *guard) census() (parents map[int]int, zombies int) {
	parents = map[int]int{}
	fd, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return parents, 0
	}
	defer unix.Close(fd)
	buf := make([]byte, entriesBuffer)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n <= 0 {
			return parents, zombies
		}
		eachPID(buf[:n], func(pid int) {
			data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
			if err != nil {
				return
			}
			if state, ppid := parseStat(data); state == 'Z' {
				parents[ppid]++
				zombies++
			}
		})
	}
}

// parseStat reads state and parent out of /proc/PID/stat: "pid (name) S ppid …",
// where the name may hold anything.
func parseStat(data []byte) (state byte, ppid int) {
	i := bytes.LastIndexByte(data, ')')
	if i < 0 {
		return 0, 0
	}
	f := bytes.Fields(data[i+1:])
	if len(f) < 2 || len(f[0]) != 1 {
		return 0, 0
	}
	ppid, err := strconv.Atoi(string(f[1]))
	if err != nil {
		return 0, 0
	}
	return f[0][0], ppid
}
