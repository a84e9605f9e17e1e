// Command probe does actions inside a sandbox that the agent's tests cannot do with
// a shell.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	switch os.Args[1] {
	case "status": // print the lines of /proc/self/status that start with the given words
		status(os.Args[2:])
	case "socket": // leave a socket at the given path
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err == nil {
			err = syscall.Bind(fd, &syscall.SockaddrUnix{Name: os.Args[2]})
		}
		if err != nil {
			panic(err)
		}
	case "maps": // map so many pieces of memory that cannot be joined, make /tmp/mapped, and stay
		maps(os.Args[2])
	case "id":
		fmt.Println(os.Getuid(), os.Geteuid())
	case "alloc": // hold so many MiB without end
		alloc(os.Args[2])
	case "daemon": // fork twice into new sessions and ignore TERM, HUP and INT
		daemon(os.Args[2:])
	case "forkbomb":
		forkBomb()
	case "hoard": // make children that end at once, and never wait for them
		for {
			zombies("1000")
		}
	case "processes": // start so many processes that stay for a while, and print how many were possible
		processes(os.Args[2])
	case "fill": // start so many processes, then more one by one until a start fails; stay, and print their number
		fill(os.Args[2])
	case "zombies": // leave so many ended children to PID 1
		zombies(os.Args[2])
	case "signals": // send PID 1 each of these signals, a hundred times over
		signals(os.Args[2:])
	case "cpuid":
		cpuid()
	case "terminal": // print the state of a terminal's master before, while and after its other end is open
		terminal()
	case "true":
	}
}

// terminal makes a terminal and prints whether it is hung up and the error of a read.
func terminal() {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	must(err)
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	must(err)
	must(unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0))
	look := func(when string) {
		fds := []unix.PollFd{{Fd: int32(master)}}
		_, err := unix.Poll(fds, 0)
		must(err)
		_, err = unix.Read(master, make([]byte, 1))
		fmt.Println(when, fds[0].Revents&unix.POLLHUP != 0, err)
	}
	look("before")
	other, err := unix.Open("/dev/pts/"+strconv.Itoa(n), unix.O_RDWR|unix.O_NOCTTY, 0)
	must(err)
	look("open")
	must(unix.Close(other))
	look("closed")
	other, err = unix.Open("/dev/pts/"+strconv.Itoa(n), unix.O_RDWR|unix.O_NOCTTY, 0)
	must(err)
	look("open again")
	must(unix.Close(other))
}

func status(words []string) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		for _, w := range words {
			if strings.HasPrefix(lines.Text(), w+":") {
				fmt.Println(lines.Text())
			}
		}
	}
}

func alloc(mib string) {
	n, err := strconv.Atoi(mib)
	if err != nil {
		os.Exit(2)
	}
	b := make([]byte, n<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	fmt.Println("holding", n)
	for {
		time.Sleep(time.Hour)
		b[0]++
	}
}

// daemon runs itself again in a new session, twice; the last process sleeps.
func daemon(rest []string) {
	depth := 0
	if len(rest) > 0 {
		depth, _ = strconv.Atoi(rest[0])
	}
	if depth >= 2 {
		signal.Ignore(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
		fmt.Println(os.Getpid())
		time.Sleep(time.Hour)
	}
	cmd := exec.Command("/proc/self/exe", "daemon", strconv.Itoa(depth+1))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if depth == 0 {
		// The command itself stays, so that its time limit can pass.
		time.Sleep(time.Hour)
	}
}

func signals(numbers []string) {
	for range 100 {
		for _, n := range numbers {
			number, err := strconv.Atoi(n)
			if err != nil {
				os.Exit(2)
			}
			if err := syscall.Kill(1, syscall.Signal(number)); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
	}
}

func forkBomb() {
	for {
		// A raw system call forks like a shell: both copies go on here.
		if _, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0); errno != 0 {
			syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0)
		}
	}
}

func zombies(count string) {
	n, err := strconv.Atoi(count)
	if err != nil {
		os.Exit(2)
	}
	for range n {
		if _, err := syscall.ForkExec("/bin/probe", []string{"probe", "true"}, &syscall.ProcAttr{}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

func fill(count string) {
	quick, err := strconv.Atoi(count)
	if err != nil {
		os.Exit(2)
	}
	made := 0
	for ; ; made++ {
		if _, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "30"}, &syscall.ProcAttr{}); err != nil {
			break
		}
		if made >= quick {
			time.Sleep(150 * time.Millisecond)
		}
	}
	time.Sleep(2 * time.Second)
	fmt.Println(made)
}

func processes(count string) {
	n, err := strconv.Atoi(count)
	if err != nil {
		os.Exit(2)
	}
	made := 0
	for range n {
		if _, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "30"}, &syscall.ProcAttr{}); err == nil {
			made++
		}
	}
	fmt.Println(made)
}

func maps(count string) {
	n, err := strconv.Atoi(count)
	if err != nil {
		panic(err)
	}
	for i := range n {
		prot := syscall.PROT_READ | i%2*syscall.PROT_WRITE
		if _, err := syscall.Mmap(-1, 0, 4096, prot, syscall.MAP_PRIVATE|syscall.MAP_ANON); err != nil {
			panic(err)
		}
	}
	if err := os.WriteFile("/tmp/mapped", nil, 0o600); err != nil {
		panic(err)
	}
	time.Sleep(time.Hour)
}
