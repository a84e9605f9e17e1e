package proc

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// The guard's polling periods while any command runs. A check takes some 3 ms of CPU in gVisor
// for waking up alone: shorter periods cost more CPU, longer ones find fork bombs later.
const (
	// quickInterval is the period while the number of tasks grows or just after a call to the
	// agent. A fork bomb makes 100 to 200 processes in that time.
	quickInterval = 100 * time.Millisecond

	// slowInterval is the longest period. The period doubles with each check that finds no
	// growth. A fork bomb that starts by itself is then found at its limit, with half of the
	// memory of the smallest sandbox; with a quarter of it if it leaves zombies.
	slowInterval = 5 * time.Second
)

// hardLimit returns the number of processes and threads of all commands together at
// which the largest command is killed. A single command never has as many.
func hardLimit(limit int) int { return limit + limit/4 + 16 }

// The guard ends a command that it finds at its limit maxStrikes times within strikeTime, each
// time with more new processes than there was room for at the previous time: others have ended
// for them. A command that fills up to its limit and stays there has no new ones. Between the
// strikes a command may have a few processes less, since those of a fork bomb that fail to fork
// end and others take their place. Fewer strikes would end honest commands at their limit; a
// fork bomb leaves too little CPU to check more often.
const (
	maxStrikes = 2
	strikeTime = 30 * time.Second
)

// guard ends commands that make processes without end. It sleeps while no command runs.
// It ends
//
//   - commands that go on forking at their limit, which takes all CPU and leaves more
//     zombies than can be reaped;
//   - commands that do not reap their children: a process leaves its control group when
//     it ends, so that the limit does not count zombies;
//   - the largest command, when all commands together have too many processes.
type guard struct {
	processes *Processes
	groups    *groups
	kick      chan struct{} // receives when the agent is called or given input; capacity 1

	suspect string // group of the command that was near its limit at the last check
	newest  int    // the suspect's highest pid when it was last found at its limit
	room    int    // how many more processes the suspect could have had then
	strikes int
	struck  time.Time // time of the last strike
}

func newGuard(p *Processes, g *groups) *guard {
	return &guard{processes: p, groups: g, kick: make(chan struct{}, 1)}
}

// wake makes the guard check soon.
func (g *guard) wake() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// run guards without end.
func (g *guard) run() {
	for {
		<-g.kick
		g.watch()
	}
}

// watch guards while any command runs.
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
		if !burning { // the count takes seconds during a fork bomb
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

// countLiving ends the largest command if all commands together have too many processes, or
// if it goes on forking at its limit.
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

// tasks returns the number of tasks in the sandbox, with zombies and the agent's threads,
// or 0 if the system call fails.
func (g *guard) tasks() uint16 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return info.Procs
}

// countDead ends the command with most unreaped children if there are more of them than
// all commands may have processes. It counts them only when there are more tasks than
// living processes can account for.
func (g *guard) countDead(tasks uint16) {
	const agentThreads = 64 // more than it ever has
	if int(tasks) <= hardLimit(g.groups.limit)+g.groups.limit+agentThreads {
		return
	}
	parents, zombies := g.census()
	if zombies <= g.groups.limit {
		return
	}
	// Find the command that has most of them, by the groups of their parents.
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

// end kills every process of a command's group. The next check finds those that are
// left.
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

// parseStat parses the state and the parent in /proc/PID/stat: "pid (name) S ppid …",
// where the name may contain any byte.
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
