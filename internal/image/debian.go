package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// keyring is the file of keys that verify Debian's archives. Debian has it installed; other
// distributions have a package.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// tailLines is the number of lines of a failed program's output that its error keeps.
const tailLines = 12

// debianTimeout bounds one installation, since a mirror that sends a byte now and then would keep
// every other build waiting. With a shorter one a slow line never gets its 100 MB.
const debianTimeout = time.Hour

// StepError reports a step of a build that failed.
type StepError struct {
	Step     string   // what was being done
	ExitCode int      // of the program that did it; -1 if none, or killed
	Tail     []string // its last lines
	Err      error
}

// Error returns the step, the cause and the program's last lines.
func (e *StepError) Error() string {
	s := e.Step + ": " + e.Err.Error()
	if len(e.Tail) > 0 {
		s += "\n" + strings.Join(e.Tail, "\n")
	}
	return s
}

// Unwrap returns the cause.
func (e *StepError) Unwrap() error { return e.Err }

// Forms of the parts of a Debian source. They end up on a command line, so they have no leading
// "-" and no comma (mmdebstrap splits at it).
var (
	suitePattern   = regexp.MustCompile(`^[a-z][a-z0-9.-]*$`)
	packagePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9+.:-]*(=[A-Za-z0-9.+:~-]+)?$`)
	variants       = map[string]bool{"": true, "minbase": true, "essential": true, "apt": true, "required": true,
		"important": true, "extract": true, "custom": true}
)

func (d *Debian) check() error {
	if !suitePattern.MatchString(d.Suite) {
		return fmt.Errorf("%q is not a Debian suite", d.Suite)
	}
	if !variants[d.Variant] {
		return fmt.Errorf("%q is not a variant of mmdebstrap", d.Variant)
	}
	for _, p := range d.Packages {
		if !packagePattern.MatchString(p) {
			return fmt.Errorf("%q is not the name of a Debian package", p)
		}
	}
	for _, m := range d.Mirrors {
		if !strings.HasPrefix(m, "deb ") || strings.ContainsAny(m, "\n\r\x00") {
			return fmt.Errorf("mirror %q is not a one-line apt source", m)
		}
	}
	for _, p := range append(d.Exclude[:len(d.Exclude):len(d.Exclude)], d.Include...) {
		if !strings.HasPrefix(p, "/") || strings.ContainsAny(p, "\n\r\x00\"") {
			return fmt.Errorf("%q is not a dpkg path pattern", p)
		}
	}
	return nil
}

// args returns the arguments of mmdebstrap: it writes a tar to stdout and messages to stderr.
func (d *Debian) args() []string {
	variant := d.Variant
	if variant == "" {
		variant = "minbase"
	}
	// dpkg need not sync while unpacking, since only the tar is used.
	args := []string{"--variant=" + variant, "--mode=root", "--format=tar", "--dpkgopt=force-unsafe-io"}
	if len(d.Packages) > 0 {
		args = append(args, "--include="+strings.Join(d.Packages, ","))
	}
	for _, p := range d.Exclude {
		args = append(args, "--dpkgopt=path-exclude="+p)
	}
	for _, p := range d.Include {
		args = append(args, "--dpkgopt=path-include="+p)
	}
	args = append(args, hostProxy()...)
	args = append(args, d.Suite, "-")
	return append(args, d.Mirrors...)
}

// hostProxy returns the host's apt proxy settings, since mmdebstrap does not read the host's apt
// configuration. http_proxy and the like reach it through the environment.
func hostProxy() []string {
	out, err := exec.Command("apt-config", "dump", "--format", "%f=%v%n",
		"Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::http::Proxy-Auto-Detect").Output()
	if err != nil {
		return nil // a host without apt has no apt proxy
	}
	var args []string
	for line := range strings.Lines(string(out)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && value != "" && !strings.ContainsAny(value, "\"\n") {
			args = append(args, fmt.Sprintf("--aptopt=%s %q", key, value))
		}
	}
	return args
}

// fromDebian unpacks a Debian system into an empty tree.
func (s *Store) fromDebian(ctx context.Context, t *tree, d *Debian, progress func(string)) error {
	step := "installing Debian " + d.Suite
	if err := d.check(); err != nil {
		return &StepError{Step: step, ExitCode: -1, Err: err}
	}
	program, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return &StepError{Step: step, ExitCode: -1,
			Err: errors.New("mmdebstrap is not installed on this machine (apt-get install mmdebstrap)")}
	}
	if _, err := os.Stat(keyring); err != nil && len(d.Mirrors) == 0 {
		return &StepError{Step: step, ExitCode: -1, Err: errors.New(
			"the keys of Debian's archive are not on this machine (apt-get install debian-archive-keyring; Ubuntu does not " +
				"have them by default)")}
	}
	tmp, err := os.MkdirTemp(s.tmpDir(), "debian-")
	if err != nil {
		return fmt.Errorf("making build directory: %w", err)
	}
	defer os.RemoveAll(tmp) // the next Open removes what is left

	ctx, cancel := context.WithTimeoutCause(ctx, debianTimeout, fmt.Errorf("not done within %v", debianTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, program, d.args()...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "LC_ALL=C.UTF-8", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	// It has namespaces of its own, so that its mounts and all its processes end with it, also if
	// cay is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second // for pipes that another process holds open
	messages := &lines{each: func(line string) {
		// Users read these lines, so they must not show paths of the machine.
		if text, ok := strings.CutPrefix(line, "I: "); ok && !strings.Contains(text, tmp) {
			progress(step + ": " + text)
		}
	}}
	cmd.Stderr = messages
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("making pipe: %w", err)
	}
	progress(fmt.Sprintf("%s: %s", step, strings.Join(d.Packages, " ")))
	// The kernel sends Pdeathsig when the thread that forked ends, not the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return &StepError{Step: step, ExitCode: -1, Err: err}
	}
	tarErr := t.apply(ctx, bufio.NewReaderSize(stdout, 1<<20), false)
	if tarErr != nil {
		cancel() // the reader has stopped
	} else if _, err := io.Copy(io.Discard, stdout); err != nil {
		tarErr = fmt.Errorf("reading the end of the tar: %w", err)
	}
	waitErr := cmd.Wait()
	if cause := context.Cause(ctx); cause != nil && tarErr == nil {
		return cause
	}
	if waitErr != nil && cmd.ProcessState.ExitCode() > 0 {
		return &StepError{Step: step, ExitCode: cmd.ProcessState.ExitCode(), Tail: messages.tail(),
			Err: fmt.Errorf("mmdebstrap ended with exit code %d", cmd.ProcessState.ExitCode())}
	}
	if err := errors.Join(tarErr, waitErr); err != nil {
		return &StepError{Step: step, ExitCode: -1, Tail: messages.tail(), Err: err}
	}
	return nil
}

// lines splits a program's output, passes on each line and keeps the last ones. One goroutine
// writes; it is read after the program has ended.
type lines struct {
	each func(string)
	last []string
	part []byte
}

// maxLine bounds the bytes kept of one line.
const maxLine = 2000

// Write splits b into lines. It never fails.
func (l *lines) Write(p []byte) (int, error) {
	for _, c := range p {
		if c == '\n' || c == '\r' {
			l.end()
		} else if len(l.part) < maxLine {
			l.part = append(l.part, c)
		}
	}
	return len(p), nil
}

func (l *lines) end() {
	line := string(bytes.ToValidUTF8(bytes.TrimSpace(l.part), []byte("?")))
	l.part = l.part[:0]
	if line == "" {
		return
	}
	if len(l.last) == tailLines {
		l.last = l.last[1:]
	}
	l.last = append(l.last, line)
	l.each(line)
}

func (l *lines) tail() []string {
	l.end()
	return l.last
}
