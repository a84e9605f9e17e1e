package network

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs f on a thread of its own that ends when f returns, so that f may move it to
// another namespace and no other goroutine ever runs there. f must not start goroutines that rely
// on the namespace.
//
// The process's main thread cannot end, and leaving it in another namespace would also change
// what /proc/self/net shows. If the scheduler offers it, it is kept busy while f runs on another
// thread.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		// There is no unlock, so the thread ends with the goroutine.
		done <- f()
	}()
	return <-done
}

// inNamespace runs f on a thread of its own in the namespace at path.
func inNamespace(path string, f func() error) error {
	return onThread(func() error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening namespace %s: %w", path, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering namespace %s: %w", path, err)
		}
		return f()
	})
}
