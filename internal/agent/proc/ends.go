package proc

import (
	"errors"
	"fmt"
	"os"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agentapi/process"
)

// ends holds both sides of a new command's pipes or terminal.
type ends struct {
	child   [3]uintptr
	stdin   *os.File
	pty     *os.File
	streams []*stream
	opened  []int // the child's descriptors, to close after the fork
}

// openEnds makes the standard streams of a command that runs as the user. They belong to the user, so
// that the command can open /dev/stderr and other paths that lead to them.
func (p *Processes) openEnds(req *process.StartRequest, who *account.User) (*ends, error) {
	e := &ends{}
	err := error(nil)
	if req.GetPty() != nil {
		err = e.openPTY(req.GetPty().GetSize(), who, p.users)
	} else {
		err = e.openPipes(req, who, p.null)
	}
	if err != nil {
		e.closeChild()
		e.closeOurs()
		return nil, err
	}
	return e, nil
}

func (e *ends) openPipes(req *process.StartRequest, who *account.User, null *os.File) error {
	needsStdin := req.Stdin == nil || req.GetStdin()
	if x := req.GetExecute(); x != nil {
		needsStdin = len(x.GetStdin()) > 0 || !x.GetCloseStdin()
	}
	if needsStdin {
		fds, err := e.pipe(1, who)
		if err != nil {
			return err
		}
		e.child[0], e.stdin = uintptr(fds[0]), os.NewFile(uintptr(fds[1]), "stdin")
		e.opened = append(e.opened, fds[0])
	} else {
		e.child[0] = null.Fd()
	}
	for i, kind := range []string{"stdout", "stderr"} {
		fds, err := e.pipe(0, who)
		if err != nil {
			return err
		}
		e.child[i+1] = uintptr(fds[1])
		e.opened = append(e.opened, fds[1])
		e.streams = append(e.streams, newStream(os.NewFile(uintptr(fds[0]), kind), kind))
	}
	return nil
}

// pipe makes a pipe whose end number ours does not block, so that waiting on it holds no thread. The
// other end, for the child, belongs to the user and blocks, as programs expect.
func (e *ends) pipe(ours int, who *account.User) ([2]int, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return fds, err
	}
	err := unix.SetNonblock(fds[ours], true)
	if err == nil && (who.UID != 0 || who.GID != 0) {
		err = unix.Fchown(fds[1-ours], int(who.UID), int(who.GID))
	}
	if err != nil {
		return fds, errors.Join(err, unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return fds, nil
}

const (
	// groupOfTTYs names the group that may write to every terminal, with modeTTY, as login sets it.
	// Without such a group only the user may write, with modeNoTTY.
	groupOfTTYs = "tty"
	modeTTY     = 0o620
	modeNoTTY   = 0o600

	firstFD = 3 // the first descriptor after the standard streams
)

func (e *ends) openPTY(size *process.PTY_Size, who *account.User, users *account.Users) error {
	master, slave, err := pty.Open()
	if err != nil {
		return err
	}
	defer closeAll(master, slave)
	gid, mode := who.GID, uint32(modeNoTTY)
	if tty, err := users.GroupNamed(groupOfTTYs); err == nil {
		gid, mode = tty, modeTTY
	}
	if err := slave.Chown(int(who.UID), int(gid)); err != nil {
		return fmt.Errorf("giving the terminal to its user: %w", err)
	}
	if err := slave.Chmod(os.FileMode(mode)); err != nil {
		return fmt.Errorf("giving the terminal to its user: %w", err)
	}
	fd, err := unix.FcntlInt(slave.Fd(), unix.F_DUPFD_CLOEXEC, firstFD)
	if err != nil {
		return err
	}
	e.opened = []int{fd}
	e.child = [3]uintptr{uintptr(fd), uintptr(fd), uintptr(fd)}
	// The library's descriptor blocks, and a blocking read has no deadline: use a duplicate.
	ours, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, firstFD)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(ours, true); err != nil {
		return errors.Join(err, unix.Close(ours))
	}
	e.pty = os.NewFile(uintptr(ours), "pty")
	e.streams = []*stream{newStream(e.pty, "pty")}
	if size.GetCols() == 0 && size.GetRows() == 0 {
		return nil
	}
	return setSize(e.pty, size)
}

// setSize sets a terminal's size. Unlike pty.Setsize it does not make the descriptor blocking.
func setSize(terminal *os.File, size *process.PTY_Size) error {
	const largest = 1<<16 - 1
	raw, err := terminal.SyscallConn()
	if err != nil {
		return err
	}
	ws := &unix.Winsize{Row: uint16(min(size.GetRows(), largest)), Col: uint16(min(size.GetCols(), largest))}
	failed := raw.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, ws) })
	return errors.Join(failed, err)
}

func (e *ends) closeChild() {
	for _, fd := range e.opened {
		// Nothing was written to it, so that no error can lose data.
		_ = unix.Close(fd)
	}
	e.opened = nil
}

func (e *ends) closeOurs() {
	closeAll(e.stdin)
	for _, s := range e.streams {
		closeAll(s.file)
	}
}

// resize sets the size of the command's terminal.
func (c *command) resize(size *process.PTY_Size) error {
	if c.pty == nil {
		return errNoPTY
	}
	return setSize(c.pty, size)
}
