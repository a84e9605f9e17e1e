package agent

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// aliveInterval is how often processes are counted while a command runs. A bomb
	// makes a hundred or two in that time. Counting costs a system call per command.
	aliveInterval = 100 * time.Millisecond

	// deadInterval is how often the dead are counted, and anything is while only
	// background jobs live. A process that leaves its children unreaped makes a few
	// hundred in that time, some 50 MB of the sandbox kernel's memory.
	deadInterval = 500 * time.Millisecond
)

// hardLimit is at how many processes and threads of all commands together the
// largest command is killed: enough above the limit, from where on forks begin to
// fail, that only what takes no notice gets there.
func hardLimit(limit int) int { return limit + limit/4 + 16 }

// guard ends commands that make processes without end, alive (see [groups] for why
// their limit does not) or dead: a process leaves its control group when it
// ends, not when it is reaped, so the limit does not see those whose parents
// never wait for them. It sleeps while nothing runs.
type guard struct {
	processes *processes
	groups    *groups
	kick      chan struct{} // a command was started; capacity 1
}

func newGuard(p *processes, g *groups) *guard {
	return &guard{processes: p, groups: g, kick: make(chan struct{}, 1)}
}

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
	var checked time.Time
	for {
		commands, anything := g.groups.busy()
		if !anything {
			return
		}
		if commands {
			time.Sleep(aliveInterval)
		} else {
			time.Sleep(deadInterval)
		}
		if n, largest := g.groups.total(); n >= hardLimit(g.groups.limit) {
			g.end(largest)
		}
		if time.Since(checked) >= deadInterval {
			checked = time.Now()
			g.countDead()
		}
	}
}

// countDead ends the command that left more children unreaped than all commands
// may have processes. It looks closer only when there are more tasks than the
// living can be.
func (g *guard) countDead() {
	const agentThreads = 64 // more than it ever has
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil || int(info.Procs) <= hardLimit(g.groups.limit)+g.groups.limit+agentThreads {
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
