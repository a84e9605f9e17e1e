// Package proc runs the commands of a sandbox: it starts them in control groups of their own, carries
// their input and output, ends them with all their descendants, and keeps those that outlive their
// calls. It also limits the number of processes, ends the largest ones when memory runs out, and reaps
// orphans.
//
// Everything is safe for concurrent use. A flood of output, a lack of processes or of memory ends one
// call and never the agent.
package proc

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// endKept is the time for which the end of a command stays available to a
	// client that was not connected when it came.
	endKept = 30 * time.Second

	// exitCannotRun and exitNotFound are a shell's exit codes for a program that
	// could not be started.
	exitCannotRun = 126
	exitNotFound  = 127
)

// Processes implements the service process.Process.
type Processes struct {
	process.UnimplementedProcessHandler

	settings *account.Settings
	users    *account.Users
	spawner  *spawner
	guard    *guard
	memory   *memory
	starter  *starter
	keeper   *keeper
	// null is /dev/null, the input of commands without one. It stays open, since root inside may
	// replace the file.
	null *os.File

	mu sync.Mutex
	// +checklocks:mu
	commands map[int]*command // by pid; ended ones stay for endKept
}

// New returns the processes of this sandbox, at most limit at once, and starts to reap children. It
// mounts control groups below mountPoint for a moment. The agent can have only one Processes, and
// nothing else in it may wait for children.
func New(settings *account.Settings, accounts *account.Users, mountPoint string, limit int) (*Processes, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("opening the input of commands that have none: %w", err)
	}
	g, err := openGroups(mountPoint, limit)
	if err != nil {
		return nil, err
	}
	r := newReaper()
	s := newSpawner(g, r)
	go r.run()
	p := &Processes{settings: settings, users: accounts, spawner: s, null: null, commands: map[int]*command{}}
	p.memory = newMemory(p)
	p.starter = &starter{processes: p, logPath: agentapi.StartLog}
	p.keeper = &keeper{processes: p}
	p.guard = newGuard(p, g)
	go p.guard.run()
	return p, nil
}

// Routes adds the calls for processes and memory.
func (p *Processes) Routes(mux *http.ServeMux, opts []connect.HandlerOption) {
	mux.HandleFunc("POST /start", p.starter.start)
	p.keeper.routes(mux)
	mux.HandleFunc("GET /metrics", p.memory.metrics)
	mux.HandleFunc("POST /memory/relieve", p.memory.relieve)
	mux.HandleFunc("GET /busy", func(w http.ResponseWriter, _ *http.Request) {
		answer.JSON(w, http.StatusOK, agentapi.BusyReply{Busy: p.spawner.groups.busy()})
	})
	path, calls := process.NewProcessHandler(p, opts...)
	mux.Handle(path, gathering(calls))
}

// Wake has the guard count the processes soon, since any request may start some.
func (p *Processes) Wake() { p.guard.wake() }

// Start runs a command and streams its events.
func (p *Processes) Start(
	ctx context.Context, req *connect.Request[process.StartRequest], out *connect.ServerStream[process.StartResponse],
) error {
	send := func(ev *process.ProcessEvent) error { return out.Send(&process.StartResponse{Event: ev}) }
	if req.Msg.GetExecute().GetGather() {
		gather(ctx)
	}
	who, err := p.userOf(req.Header(), req.Msg.GetExecute().GetUser())
	if err != nil {
		return answer.Connect(err)
	}
	l, err := p.prepare(req.Msg, who)
	if err != nil {
		return answer.Connect(err)
	}
	started := time.Now()
	c, streams, err := p.launch(l)
	if err != nil {
		if ev := notStarted(req.Msg, err, time.Since(started)); ev != nil {
			for _, e := range ev {
				if err := send(e); err != nil {
					return err
				}
			}
			return nil
		}
		return answer.Connect(startProblem(l, err))
	}
	sub, _ := c.subscribe(send)
	defer c.unsubscribe(sub)
	sub.deliver(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.StartEvent{Pid: uint32(c.pid)}}})
	p.run(c, streams, req.Msg.GetExecute())
	return p.follow(ctx, c, sub, answer.Keepalive(req.Header()), req.Msg.GetExecute())
}

// run starts the goroutines that read from, write to and wait for a command.
func (p *Processes) run(c *command, streams []*stream, opts *process.ExecuteOptions) {
	for _, s := range streams {
		go c.pump(s)
	}
	if in := opts.GetStdin(); len(in) > 0 {
		c.feed(in, opts.GetCloseStdin())
	}
	go c.supervise(streams, func() { p.retire(c, opts == nil) })
}

// follow serves the stream of the client that started the command until the command
// has ended. The client's time limit kills the command. If the command belongs to the
// call, the client's disconnecting kills it too.
func (p *Processes) follow(
	ctx context.Context, c *command, sub *subscriber, keepalive time.Duration, opts *process.ExecuteOptions,
) error {
	if opts == nil {
		err := p.listen(ctx, c, sub, keepalive)
		end, limited := ctx.Deadline()
		switch {
		case connect.CodeOf(err) == connect.CodeDeadlineExceeded:
			err = errors.Join(err, c.stop(true))
		case err != nil && limited:
			// The limit applies to the command even without a client. A client's clock
			// is a little ahead, so that it has mostly gone when its limit comes.
			go c.stopAt(end)
		}
		return err
	}
	var limit <-chan time.Time
	if ms := opts.GetTimeoutMs(); ms > 0 {
		timer := time.NewTimer(time.Duration(ms)*time.Millisecond - time.Since(c.started))
		defer timer.Stop()
		limit = timer.C
	}
	for {
		select {
		case <-c.done:
			return nil
		case <-limit:
			if err := c.stop(true); err != nil {
				return connect.NewError(connect.CodeInternal, err)
			}
		case <-ctx.Done():
			return errors.Join(answer.Ended(ctx), c.stop(false))
		}
	}
}

// listen serves a client's stream until the command has ended or the client has gone.
func (p *Processes) listen(ctx context.Context, c *command, sub *subscriber, keepalive time.Duration) error {
	ticker := time.NewTicker(keepalive)
	defer ticker.Stop()
	for {
		select {
		case <-c.done:
			return nil
		case <-ticker.C:
			sub.deliver(&process.ProcessEvent{Event: &process.ProcessEvent_Keepalive{Keepalive: &process.KeepAlive{}}})
		case <-ctx.Done():
			return answer.Ended(ctx)
		}
	}
}

// userOf returns the user that a call acts as: the name in its Authorization header,
// else the fallback, else the sandbox's default.
func (p *Processes) userOf(h http.Header, fallback string) (*account.User, error) {
	return account.OfCall(p.users, p.settings, h, fallback)
}

// launchSpec describes a checked command that can be started.
type launchSpec struct {
	argv     []string
	env      []string
	dir      string
	user     *account.User
	req      *process.StartRequest
	detached *detached // nil for commands of one call and of E2B's clients
}

// prepare checks a request and fills in defaults for its missing fields.
func (p *Processes) prepare(req *process.StartRequest, who *account.User) (*launchSpec, error) {
	cfg := req.GetProcess()
	l := &launchSpec{user: who, req: req, argv: append([]string{cfg.GetCmd()}, cfg.GetArgs()...)}
	if cfg.GetCmd() == "" {
		return nil, answer.New(fault.CodeInvalidCommand, "the command is empty")
	}
	for i, a := range l.argv {
		switch {
		case strings.IndexByte(a, 0) >= 0:
			return nil, answer.New(fault.CodeInvalidCommand, "the command contains a NUL")
		case len(a) > agentapi.MaxArgument:
			return nil, answer.New(fault.CodeInvalidCommand,
				"argument %d of the command has %d bytes, and may have %d", i, len(a), agentapi.MaxArgument)
		}
	}
	sandboxEnv, workdir := p.settings.CommandDefaults()
	var err error
	if l.env, err = commandEnv(who, req.GetPty() != nil, sandboxEnv, cfg.GetEnvs()); err != nil {
		return nil, err
	}
	if err := checkLength(l.argv, l.env); err != nil {
		return nil, err
	}
	if l.dir, err = p.workdir(cfg.GetCwd(), workdir, who); err != nil {
		return nil, err
	}
	return l, nil
}

// maxVector limits the arguments of a program together, and its environment, in bytes with the NUL that
// ends each string. It is gVisor's limit; with a larger one the kernel would refuse the program.
const maxVector = 2 << 20

// checkLength returns an error for arguments or an environment that are too long for the kernel, whose own
// error would give no reason.
func checkLength(argv, env []string) error {
	for what, list := range map[string][]string{"the arguments of the command": argv, "its environment": env} {
		total := 0
		for _, s := range list {
			total += len(s) + 1
		}
		if total > maxVector {
			return answer.New(fault.CodeInvalidCommand, "%s have %d bytes in all, and may have %d", what, total, maxVector)
		}
	}
	for _, kv := range env {
		if name, _, _ := strings.Cut(kv, "="); len(kv) > agentapi.MaxArgument {
			return answer.New(fault.CodeInvalidEnv,
				"the environment variable %q has %d bytes with its name, and may have %d",
				name, len(kv), agentapi.MaxArgument)
		}
	}
	return nil
}

// defaultTerm is the TERM of programs in a terminal unless the environment sets one. E2B's clients and
// ours emulate that terminal.
const defaultTerm = "xterm-256color"

// commandEnv returns a command's environment: PATH, the user's name and home, in a terminal TERM, then the
// sandbox's variables, then the call's. Later values replace earlier ones.
func commandEnv(who *account.User, terminal bool, sandbox, call map[string]string) ([]string, error) {
	vars := map[string]string{"PATH": defaultPath, "HOME": who.Home}
	if who.Name != "" {
		vars["USER"], vars["LOGNAME"] = who.Name, who.Name
	}
	if terminal {
		vars["TERM"] = defaultTerm
	}
	for _, m := range []map[string]string{sandbox, call} {
		for name, value := range m {
			if name == "" || strings.ContainsAny(name, "=\x00") || strings.IndexByte(value, 0) >= 0 {
				return nil, answer.New(fault.CodeInvalidEnv,
					"%q is no name of an environment variable, or its value contains a NUL", name)
			}
			vars[name] = value
		}
	}
	env := make([]string, 0, len(vars))
	for name, value := range vars {
		env = append(env, name+"="+value)
	}
	return env, nil
}

// workdir returns the directory in which a command starts: the call's, else the
// sandbox's, else the user's home. If the home is missing it returns the root directory.
func (p *Processes) workdir(call, sandbox string, who *account.User) (string, error) {
	asked := call
	if asked == "" {
		asked = sandbox
	}
	dir, err := account.ResolvePath(asked, who.Home)
	if err != nil {
		return "", answer.New(fault.CodeWorkdirNotFound, "working directory: %s", err)
	}
	var st unix.Stat_t
	switch err := unix.Stat(dir, &st); {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return dir, nil
	case asked == "":
		return "/", nil
	case err == nil:
		return "", answer.New(fault.CodeWorkdirNotFound, "working directory %q is not a directory", dir)
	}
	return "", answer.New(fault.CodeWorkdirNotFound, "working directory %q does not exist", dir)
}

// launch makes the process. The caller must call run, which reads its output.
func (p *Processes) launch(l *launchSpec) (*command, []*stream, error) {
	program, err := lookPath(l.argv[0], l.dir, l.env)
	if err != nil {
		return nil, nil, err
	}
	ends, err := p.openEnds(l.req, l.user)
	if err != nil {
		return nil, nil, fmt.Errorf("making pipes: %w", err)
	}
	c := &command{
		tag:      l.req.Tag,
		config:   l.req.GetProcess(),
		started:  time.Now(),
		limit:    l.req.GetExecute().GetMaxOutputBytes(),
		exited:   make(chan struct{}),
		done:     make(chan struct{}),
		stdin:    ends.stdin,
		pty:      ends.pty,
		input:    make(chan struct{}, 1),
		detached: l.detached,
	}
	sp := &spawn{path: program, argv: l.argv, attr: &syscall.ProcAttr{
		Dir:   l.dir,
		Env:   l.env,
		Files: ends.child[:],
		Sys: &syscall.SysProcAttr{
			// The command gets its own session, so that signals to it reach no other
			// command, and it cannot take a terminal of the agent.
			Setsid:     true,
			Setctty:    ends.pty != nil,
			Credential: &syscall.Credential{Uid: l.user.UID, Gid: l.user.GID, Groups: l.user.Groups},
		},
	}}
	err = p.spawner.start(sp)
	ends.closeChild()
	if err != nil {
		ends.closeOurs()
		return nil, nil, err
	}
	c.pid, c.group, c.groupName, c.ended = sp.pid, sp.group, sp.group.name, sp.ended
	c.group.leader = c.pid
	p.mu.Lock()
	p.commands[c.pid] = c
	p.mu.Unlock()
	p.guard.wake()
	return c, ends.streams, nil
}

// startProblem returns the problem that an error of making a process means.
func startProblem(l *launchSpec, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	switch errno {
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE:
		return answer.New(fault.CodeTooManyProcesses, "no more processes can be started in the sandbox: %s", errno)
	case syscall.ENOENT, syscall.EACCES, syscall.ENOTDIR, syscall.ENOEXEC, syscall.E2BIG, syscall.EISDIR,
		syscall.EPERM, syscall.ENAMETOOLONG, syscall.ELOOP, syscall.ETXTBSY:
		return answer.New(fault.CodeInvalidCommand, "starting %q: %s", l.argv[0], errno)
	}
	return fmt.Errorf("starting %q: %w", l.argv[0], err)
}

// notStarted returns the events of a program that cannot be run in an execute call. They
// are those of a shell: exit code 127 or 126, and the reason on standard error. It returns
// nil for other errors and other calls.
func notStarted(req *process.StartRequest, err error, took time.Duration) []*process.ProcessEvent {
	if req.GetExecute() == nil {
		return nil
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return nil
	}
	code := int32(0)
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR:
		code = exitNotFound
	case syscall.EACCES, syscall.ENOEXEC, syscall.EISDIR, syscall.EPERM,
		syscall.ENAMETOOLONG, syscall.ELOOP, syscall.ETXTBSY, syscall.E2BIG:
		code = exitCannotRun
	default:
		return nil
	}
	text := fmt.Sprintf("%s: %s\n", req.GetProcess().GetCmd(), errno)
	stderr := &process.DataEvent{Output: &process.DataEvent_Stderr{Stderr: []byte(text)}}
	return []*process.ProcessEvent{
		{Event: &process.ProcessEvent_Data{Data: stderr}},
		{Event: &process.ProcessEvent_End{End: &process.EndEvent{
			ExitCode: code, Exited: true, Status: fmt.Sprintf("exit status %d", code), DurationUs: took.Microseconds(),
		}}},
	}
}

// retire removes an ended command from the list, at once or, with keep, after endKept.
// It shelves a command that outlives its call.
func (p *Processes) retire(c *command, keep bool) {
	if c.detached != nil {
		p.shelve(c)
		return
	}
	remove := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.commands[c.pid] == c { // another command may have the pid by now
			delete(p.commands, c.pid)
		}
	}
	if keep {
		time.AfterFunc(endKept, remove)
	} else {
		remove()
	}
}

// find returns the command that a selector names. A running one takes precedence over an
// ended one.
func (p *Processes) find(sel *process.ProcessSelector) (*command, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var found *command
	switch s := sel.GetSelector().(type) {
	case *process.ProcessSelector_Pid:
		found = p.commands[int(s.Pid)]
	case *process.ProcessSelector_Tag:
		for _, c := range p.commands {
			if c.tag != nil && *c.tag == s.Tag && (found == nil || c.running()) {
				found = c
			}
		}
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the process is not named"))
	}
	if found == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such process"))
	}
	return found, nil
}

// inGroup returns the running command in the named control group, nil if there is none.
func (p *Processes) inGroup(name string) *command {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.commands {
		if c.groupName == name && c.running() {
			return c
		}
	}
	return nil
}

// findRunning returns the running command that a selector names.
func (p *Processes) findRunning(sel *process.ProcessSelector) (*command, error) {
	c, err := p.find(sel)
	if err == nil && !c.running() {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("the process has ended"))
	}
	return c, err
}

func (c *command) running() bool {
	select {
	case <-c.exited:
		return false
	default:
		return true
	}
}
