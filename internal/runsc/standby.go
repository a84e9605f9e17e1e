package runsc

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// awaitVerb makes cay-runsc wait for its arguments, a JSON array, at the socket that is descriptor 3, where
// it answers with a byte when it has them.
const awaitVerb = "await"

// Standby keeps one process of cay-runsc ready for the next start of a sandbox: without it the first
// process of a start spends 8 ms on its own start while the other CPUs wait. The process serves one
// start and is then replaced. A start that finds no process starts its own.
//
// Its methods may be called concurrently, and on nil, which has no process.
type Standby struct {
	program string
	ready   chan *waiting
	closed  chan struct{}
	ended   sync.WaitGroup
}

// pause is the time between a start that took the process and the start of the next process: the new
// sandbox and a first command in it need the CPUs for some 40 ms.
const pause = 100 * time.Millisecond

// waiting holds a process that waits for its arguments.
type waiting struct {
	cmd   *exec.Cmd
	args  *os.File      // the other end of its socket
	ended chan struct{} // closed when it has
}

// NewStandby keeps a process of the program ready until Close.
func NewStandby(program string) *Standby {
	s := &Standby{program: program, ready: make(chan *waiting), closed: make(chan struct{})}
	s.ended.Go(s.keep)
	return s
}

// Close ends the process that waits.
func (s *Standby) Close() {
	close(s.closed)
	s.ended.Wait()
}

// keep starts one process after the other.
func (s *Standby) keep() {
	runtime.LockOSThread() // which begin asks for
	defer runtime.UnlockOSThread()
	for {
		// An error is not reported here: a start then starts its own process and reports it.
		if w, err := standBy(s.program); err == nil {
			select {
			case s.ready <- w:
			case <-s.closed:
				w.dismiss()
				return
			}
			select {
			case <-w.ended:
			case <-s.closed:
				return
			}
		}
		select {
		case <-time.After(pause):
		case <-s.closed:
			return
		}
	}
}

// standBy starts a process that waits.
func standBy(program string) (*waiting, error) {
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, its := os.NewFile(uintptr(ends[0]), "arguments"), os.NewFile(uintptr(ends[1]), "arguments")
	defer its.Close()
	cmd := command(context.Background(), program, awaitVerb)
	cmd.ExtraFiles = []*os.File{its}
	if err := begin(cmd); err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	return &waiting{cmd: cmd, args: ours, ended: make(chan struct{})}, nil
}

// take returns the process if it waits and runs the program, else nil.
func (s *Standby) take(program string) *waiting {
	if s == nil || s.program != program {
		return nil
	}
	select {
	case w := <-s.ready:
		return w
	default:
		return nil
	}
}

// errGone reports that a process ended before it had its arguments.
var errGone = errors.New("the standby process of runsc is gone")

// run sends the process its arguments and waits for its end. When ctx ends, it kills the process.
func (w *waiting) run(ctx context.Context, args []string) error {
	defer close(w.ended)
	stop := context.AfterFunc(ctx, func() { _ = w.cmd.Process.Kill() })
	defer stop()
	told := json.NewEncoder(w.args).Encode(args)
	if told == nil {
		_, told = w.args.Read(make([]byte, 1))
	}
	_ = w.args.Close() // there is no more to be said
	err := w.cmd.Wait()
	switch {
	case err != nil && ctx.Err() != nil:
		return ctx.Err()
	case told != nil:
		return errors.Join(errGone, told, err)
	}
	return err
}

// dismiss ends a process that gets no arguments.
func (w *waiting) dismiss() {
	_ = w.args.Close()
	_ = w.cmd.Wait()
}
