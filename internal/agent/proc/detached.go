package proc

import (
	"cmp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

// hangupTime is the time between the hangup of a process that no client follows and its kill. A
// shell writes its history in it; a shorter time may lose the history.
const hangupTime = 2 * time.Second

// detached holds the additional state of a command that outlives its call: one call starts it, and
// others list, follow, write to and end it.
type detached struct {
	history *history
	workdir string
	user    string
	grace   time.Duration // how long it lives without followers; 0 means without end

	group *group // the command's group
	taken int    // the group's taken when the command got it

	mu sync.Mutex
	// +checklocks:mu
	followers int
	// +checklocks:mu
	lonely *time.Timer // ends the command; nil while it has followers
	// +checklocks:mu
	endedAt time.Time
	// +checklocks:mu
	expiry *time.Timer // removes the command from the list; nil while it runs
}

// keeper starts and serves the processes that outlive their calls.
type keeper struct {
	processes *Processes
	starting  sync.Mutex // held from the check of a tag to the start, so that tags are unique
}

// start starts a process that outlives the call.
func (k *keeper) start(req agentapi.StartProcess) (*command, error) {
	who, err := k.processes.userOf(nil, req.User)
	if err != nil {
		return nil, err
	}
	if len(req.Args) == 0 {
		return nil, answer.New(fault.CodeInvalidCommand, "the command is empty")
	}
	start := &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: req.Args[0], Args: req.Args[1:], Envs: req.Env},
		Stdin:   new(req.OpenInput || len(req.Input) > 0),
	}
	if req.Workdir != "" {
		start.Process.Cwd = &req.Workdir
	}
	if req.Tag != "" {
		start.Tag = &req.Tag
	}
	if t := req.Terminal; t != nil {
		start.Pty = &process.PTY{Size: &process.PTY_Size{Cols: uint32(t.Cols), Rows: uint32(t.Rows)}}
	}
	l, err := k.processes.prepare(start, who)
	if err != nil {
		return nil, err
	}
	l.detached = &detached{
		history: &history{}, workdir: l.dir, user: cmp.Or(who.Name, strconv.Itoa(int(who.UID))),
		grace: time.Duration(req.GraceMs) * time.Millisecond,
	}

	k.starting.Lock()
	defer k.starting.Unlock()
	if err := k.processes.room(req.Tag); err != nil {
		return nil, err
	}
	c, streams, err := k.processes.launch(l)
	if err != nil {
		return nil, startProblem(l, err)
	}
	l.detached.group, l.detached.taken = c.groupTaken()
	k.processes.shareHistory()
	c.subscribe(l.detached.history.take)
	k.processes.run(c, streams, nil)
	c.feed(req.Input, !req.OpenInput && req.Terminal == nil)
	if req.TimeoutMs > 0 {
		go c.stopAt(c.started.Add(time.Duration(req.TimeoutMs) * time.Millisecond))
	}
	c.leave(0)
	return c, nil
}

// feed writes a process's first input before any other. It returns at once; a goroutine writes the
// input.
func (c *command) feed(input []byte, end bool) {
	to := cmp.Or(c.pty, c.stdin)
	c.input <- struct{}{}
	go func() {
		if len(input) > 0 {
			// A process need not read its input to the end.
			_, _ = to.Write(input)
		}
		<-c.input
		if end && c.stdin != nil {
			_ = c.closeStdin()
		}
	}()
}

// room returns an error if too many processes run already or the tag is in use.
func (p *Processes) room(tag string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	running := 0
	for _, c := range p.commands {
		if !c.running() {
			continue
		}
		if c.detached != nil {
			running++
		}
		if tag != "" && c.tag != nil && *c.tag == tag {
			return answer.New(fault.CodeTagInUse, "process %d has the tag %q and runs", c.pid, tag)
		}
	}
	if running >= agentapi.MaxDetached {
		return answer.New(fault.CodeTooManyProcesses, "%d processes run detached, which is the limit", running)
	}
	return nil
}

// shareHistory divides the memory for output among the detached processes.
func (p *Processes) shareHistory() {
	all := p.detachedOnes()
	limit := max(leastHistory, min(agentapi.HistorySize, agentapi.MaxHistory/max(1, len(all))))
	for _, c := range all {
		c.detached.history.setLimit(limit)
	}
}

// detachedOnes returns the detached processes that run and those that are kept after their end.
func (p *Processes) detachedOnes() []*command {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*command
	for _, c := range p.commands {
		if c.detached != nil {
			all = append(all, c)
		}
	}
	return all
}

// shelve keeps an ended command for EndedKept. Of more than MaxEnded commands it forgets the
// oldest.
func (p *Processes) shelve(c *command) {
	c.detached.mu.Lock()
	c.detached.endedAt = time.Now()
	c.detached.stopLonelyLocked()
	c.detached.expiry = time.AfterFunc(agentapi.EndedKept, func() { p.forget(c) })
	c.detached.mu.Unlock()
	var ended []*command
	for _, other := range p.detachedOnes() {
		if !other.detached.ended().IsZero() {
			ended = append(ended, other)
		}
	}
	slices.SortFunc(ended, func(a, b *command) int { return a.detached.ended().Compare(b.detached.ended()) })
	for ; len(ended) > agentapi.MaxEnded; ended = ended[1:] {
		p.forget(ended[0])
	}
}

// forget removes a command from the list. After that only its followers hold its output.
func (p *Processes) forget(c *command) {
	if k := c.detached; k != nil {
		k.mu.Lock()
		if k.expiry != nil {
			k.expiry.Stop()
		}
		k.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.commands[c.pid] == c { // another command may have the pid by now
		delete(p.commands, c.pid)
	}
}

func (k *detached) ended() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.endedAt
}

// +checklocks:k.mu
func (k *detached) stopLonelyLocked() {
	if k.lonely != nil {
		k.lonely.Stop()
		k.lonely = nil
	}
}

// attend adds a follower of the command, until leave(1).
func (c *command) attend() {
	k := c.detached
	k.mu.Lock()
	defer k.mu.Unlock()
	k.followers++
	k.stopLonelyLocked()
}

// leave removes n followers of the command. A command without followers is ended after its
// grace.
func (c *command) leave(n int) {
	k := c.detached
	k.mu.Lock()
	defer k.mu.Unlock()
	k.followers -= n
	if k.followers > 0 || k.grace == 0 || !k.endedAt.IsZero() {
		return
	}
	k.stopLonelyLocked()
	k.lonely = time.AfterFunc(k.grace, c.hangUp)
}

// hangUp ends a command unless it has a follower again.
func (c *command) hangUp() {
	c.detached.mu.Lock()
	followed := c.detached.followers > 0
	c.detached.mu.Unlock()
	if followed {
		return // a client has come in the last moment
	}
	// A stopped process gets SIGHUP only after SIGCONT. Errors do not matter: the kill follows.
	_ = c.signal(syscall.SIGHUP)
	_ = c.signal(syscall.SIGCONT)
	select {
	case <-c.exited:
	case <-time.After(hangupTime):
	}
	_ = c.stop(false)
}

const (
	// maxShownArgs limits the shown part of a command's arguments, in bytes, so that a list
	// of all processes stays small.
	maxShownArgs = 1 << 10
	ellipsis     = "…"
)

// about describes a command for clients.
func (c *command) about() agentapi.Process {
	out := agentapi.Process{PID: c.pid, StartedAt: c.started.UTC(), Terminal: c.pty != nil, Workdir: c.config.GetCwd(),
		Args: shownArgs(append([]string{c.config.GetCmd()}, c.config.GetArgs()...))}
	if c.tag != nil {
		out.Tag = *c.tag
	}
	if k := c.detached; k != nil {
		out.Kept, out.Workdir, out.User = true, k.workdir, k.user
		out.First, out.Next = k.history.bounds()
	}
	out.Input = c.running() && (c.pty != nil || c.stdin != nil && c.stdinOpen())
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		out.End = &agentapi.ProcessExit{
			At:       c.started.Add(time.Duration(c.end.GetDurationUs()) * time.Microsecond).UTC(),
			ExitCode: int(c.end.GetExitCode()), Signal: int(c.end.GetSignal()),
			TimedOut: c.end.GetTimedOut(), OOMKilled: c.end.GetOomKilled(), DurationUs: c.end.GetDurationUs(),
		}
	}
	return out
}

// stdinOpen reports whether the input has not been closed.
func (c *command) stdinOpen() bool {
	raw, err := c.stdin.SyscallConn()
	return err == nil && raw.Control(func(uintptr) {}) == nil
}

func shownArgs(args []string) []string {
	room := maxShownArgs
	for i, arg := range args {
		if len(arg) > room {
			cut := arg[:room]
			cut = cut[:len(cut)-agentapi.IncompleteTail([]byte(cut))]
			return append(args[:i:i], cut+ellipsis)
		}
		room -= len(arg)
	}
	return args
}
