package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dropped lists capabilities that would let a flaw of the server do more than its work needs:
// change the kernel's code and memory, the clock, the kernel's log, and the policies and records of
// security modules, or reboot.
var dropped = map[string]int{
	"SYS_MODULE": unix.CAP_SYS_MODULE, "SYS_RAWIO": unix.CAP_SYS_RAWIO, "SYS_BOOT": unix.CAP_SYS_BOOT,
	"SYS_TIME": unix.CAP_SYS_TIME, "SYSLOG": unix.CAP_SYSLOG, "MAC_ADMIN": unix.CAP_MAC_ADMIN,
	"MAC_OVERRIDE": unix.CAP_MAC_OVERRIDE, "BPF": unix.CAP_BPF, "PERFMON": unix.CAP_PERFMON,
	"AUDIT_CONTROL": unix.CAP_AUDIT_CONTROL, "AUDIT_READ": unix.CAP_AUDIT_READ,
	"WAKE_ALARM": unix.CAP_WAKE_ALARM, "LINUX_IMMUTABLE": unix.CAP_LINUX_IMMUTABLE,
}

// TestServerCapabilities checks all threads of the running server, and of the processes that it
// starts. All other tests show that the server works without these capabilities.
func TestServerCapabilities(t *testing.T) {
	s := shared(t)
	s.needTemplate("python")
	server := s.cmd.Process.Pid
	var children []string
	// a poll with a deadline
	for deadline := time.Now().Add(patience); len(children) == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server has not started any process")
		}
		children = childrenOf(t, server)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", server))
	if err != nil || len(threads) < 2 {
		t.Fatalf("the server's threads are %v, %v", threads, err)
	}
	for _, process := range append(threads, children...) {
		status, err := os.ReadFile(filepath.Join(process, "status"))
		if err != nil {
			continue // the thread has ended
		}
		for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
			_, rest, _ := strings.Cut(string(status), "\n"+set+":")
			line, _, _ := strings.Cut(rest, "\n")
			bits, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
			if err != nil || bits>>unix.CAP_SYS_ADMIN&1 == 0 {
				t.Errorf("%s of %s is %q, %v", set, process, line, err)
			}
			for name, number := range dropped {
				if bits>>number&1 != 0 {
					t.Errorf("%s has %s in %s", process, name, set)
				}
			}
		}
	}
}

// childrenOf returns the paths below /proc of the processes that a process has started.
func childrenOf(t *testing.T, parent int) (paths []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		status, err := os.ReadFile(file)
		// after an error the process has ended
		if err == nil && strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", parent)) {
			paths = append(paths, filepath.Dir(file))
		}
	}
	return paths
}
