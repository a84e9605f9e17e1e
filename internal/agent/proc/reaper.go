package proc

import (
	"errors"
	"sync"
	"syscall"
)

// reaper waits for every child of PID 1. It hands the ends of commands to their
// waiters and drops those of orphans, which the kernel gives to PID 1. Nothing else
// in the program may wait for a process.
type reaper struct {
	kick chan struct{} // receives when a child was made; capacity 1

	mu sync.Mutex
	// +checklocks:mu
	waiting map[int]chan<- syscall.WaitStatus
	// A child may end between its fork and the registration of its pid. While
	// forks are in progress, early keeps the ends of unknown children.
	// +checklocks:mu
	forking int
	// +checklocks:mu
	early map[int]syscall.WaitStatus
}

func newReaper() *reaper {
	return &reaper{
		kick:    make(chan struct{}, 1),
		waiting: map[int]chan<- syscall.WaitStatus{},
		early:   map[int]syscall.WaitStatus{},
	}
}

// run reaps for ever.
func (r *reaper) run() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == nil:
			r.ended(pid, status)
		case errors.Is(err, syscall.EINTR):
		default:
			// ECHILD: there are no children. Only descendants of a child become
			// orphans, so that the next child comes from a fork.
			<-r.kick
		}
	}
}

func (r *reaper) ended(pid int, status syscall.WaitStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ch, ok := r.waiting[pid]; ok {
		delete(r.waiting, pid)
		ch <- status // has room for one
		return
	}
	if r.forking > 0 {
		r.early[pid] = status
	}
}

// fork calls start, which makes a child, and returns the child's pid and a
// channel that receives its end, once, after it has been reaped.
func (r *reaper) fork(start func() (int, error)) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	r.forking++
	r.mu.Unlock()

	pid, err := start()

	r.mu.Lock()
	defer r.mu.Unlock()
	r.forking--
	ch := make(chan syscall.WaitStatus, 1)
	if err == nil {
		if status, ok := r.early[pid]; ok {
			delete(r.early, pid)
			ch <- status
		} else {
			r.waiting[pid] = ch
		}
	}
	if r.forking == 0 {
		clear(r.early)
	}
	select {
	case r.kick <- struct{}{}:
	default:
	}
	return pid, ch, err
}
