// Package runsc drives gVisor's runsc: it writes the OCI bundle of a sandbox,
// starts it, finds its processes again, and ends it.
//
// It knows gVisor and nothing of the product. A [Runtime] keeps no state in
// memory: its records of a sandbox are in the bundle directory and below the
// runtime's root, so it finds them again after a restart of the server. Its methods
// may be called concurrently for different sandboxes.
//
// After an error of [Runtime.Run] nothing of the sandbox runs and nothing is left
// but the bundle directory, which belongs to the caller.
package runsc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Runtime drives sandboxes with one build of runsc.
type Runtime struct {
	// Program is the path of cay-runsc.
	Program string
	// Flags come before the verb of every call: those of [Flags] at the time when the
	// sandbox was first started, since its checkpoints are only restored with the same.
	Flags []string
	// Root is the directory of runsc's own state and control sockets. The path must be
	// short: the name of a Unix socket has at most 107 bytes, and runsc puts a socket
	// elsewhere when its name is longer. The directory should not survive a reboot.
	Root string
	// Standby, if not nil, has a process of Program that starts sandboxes sooner.
	Standby *Standby
}

// Container describes one sandbox to runsc.
type Container struct {
	ID     string // also the name of its state below Root
	Bundle string // directory for config.json and logs; exists, belongs to the sandbox alone
	Spec   *specs.Spec
}

// Names of the files in a bundle.
const (
	specFile = "config.json"
	pidFile  = "sandbox.pid"
	logFile  = "runsc.log" // runsc's own messages, JSON lines; read when a start fails
	panicLog = "panic.log" // the message of a sentry that panicked
)

// Run creates and starts the sandbox and returns the process ID of its sentry
// once the first process inside has been started. It does not wait until that
// process is ready. When ctx ends first, Run kills the start; after any error the
// caller must call [Runtime.Remove].
func (r *Runtime) Run(ctx context.Context, c Container) (pid int, err error) {
	if err := writeSpec(c); err != nil {
		return 0, err
	}
	return r.start(ctx, c, "run")
}

func (r *Runtime) start(ctx context.Context, c Container, verb ...string) (pid int, err error) {
	file := filepath.Join(c.Bundle, pidFile)
	args := r.args(c, append(verb, "--detach", "--bundle="+c.Bundle, "--pid-file="+file, c.ID)...)
	err = errGone
	if w := r.Standby.take(r.Program); w != nil {
		err = w.run(ctx, args)
	}
	if errors.Is(err, errGone) {
		err = r.run(ctx, args)
	}
	if err != nil {
		return 0, fmt.Errorf("starting sandbox %s: %w: %s", c.ID, err, lastMessages(c.Bundle))
	}
	return PID(c.Bundle)
}

// run calls runsc and waits for its end.
func (r *Runtime) run(ctx context.Context, args []string) error {
	cmd := command(ctx, r.Program, args...)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := begin(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// begin starts a call that starts a sandbox, on a thread that the caller keeps until the call has ended.
//
// If the server is killed, the kernel kills runsc too (Pdeathsig), so that no start continues that the
// next server does not see; processes that runsc has started are in the control group. The kernel
// sends that signal when the thread ends that started the program.
//
// The standard streams are /dev/null: the sandbox's first process inherits them and must not be able
// to fill the host's disk. runsc writes its messages to a file of their own.
func begin(cmd *exec.Cmd) error {
	cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	return cmd.Start()
}

// args returns the arguments of a call of runsc for the sandbox.
func (r *Runtime) args(c Container, verb ...string) []string {
	args := append(slices.Clone(r.Flags),
		"--root="+r.Root,
		"--log="+filepath.Join(c.Bundle, logFile),
		"--panic-log="+filepath.Join(c.Bundle, panicLog),
		// Annotations on the root make the writable layer; this flag makes the gofer
		// hand over the layer's file.
		"--overlay2=root:dir="+c.Bundle)
	return append(args, verb...)
}

// command returns a call of runsc.
func command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &unix.SysProcAttr{
		// A ^C at the server's terminal must not reach sandboxes.
		Setsid: true,
		// Sentry and gofer would keep the supplementary groups of the server, such as root's:
		// a user namespace forbids changing groups.
		Credential: &syscall.Credential{},
	}
	return cmd
}

// Flags returns the flags that sandboxes are started with on a platform: systrap
// (everywhere) or kvm (where there is /dev/kvm). Each differs from runsc's default for
// a reason.
func Flags(platform string) []string {
	return []string{
		"--platform=" + platform,
		"--log-format=json",
		"--network=sandbox",
		// sudo and su work as in any image. The capability set bounds root inside, not
		// the lack of setuid.
		"--allow-suid",
		// The operator chooses the host's settings; doctor checks them.
		"--host-settings=ignore",
		// The images are immutable.
		"--file-access=exclusive",
		"--file-access-mounts=exclusive",
		// Sizes with shared CPUs have no quota to count CPUs from.
		"--cpu-num-from-quota=true",
	}
}

func writeSpec(c Container) error {
	data, err := json.Marshal(c.Spec)
	if err != nil {
		return fmt.Errorf("encoding the spec of %s: %w", c.ID, err)
	}
	if err := os.WriteFile(filepath.Join(c.Bundle, specFile), data, 0o600); err != nil {
		return fmt.Errorf("writing the spec of %s: %w", c.ID, err)
	}
	return nil
}

// PID returns the process ID that the sentry of a bundle had when it was started.
func PID(bundle string) (int, error) {
	data, err := os.ReadFile(filepath.Join(bundle, pidFile))
	if err != nil {
		return 0, fmt.Errorf("reading the sentry's process id: %w", err)
	}
	var pid int
	if _, err := fmt.Sscan(string(data), &pid); err != nil || pid <= 1 {
		return 0, fmt.Errorf("reading the sentry's process id: %q is none", data)
	}
	return pid, nil
}

// Limits of an error's quotation of runsc's log, bytes. A message begins with its reason; that of a failed
// save continues with megabytes of gVisor's state.
const (
	mostQuoted = 2000 // of a log
	mostOfLine = 600  // of one message
	// mostRead is the end of a log that is read, in bytes. A sentry can make its log longer than the host's
	// memory. With less, the reason of a failed save would often be lost before the state behind it.
	mostRead = 4 << 20
)

// Panic returns the beginning of the message of a sentry that panicked, "" if there is none.
func (c Container) Panic() string {
	f, err := os.Open(filepath.Join(c.Bundle, panicLog))
	if err != nil {
		return ""
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, mostQuoted))
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(string(data), "")
}

// lastMessages returns the last messages of runsc and of a sentry that panicked, for an error text.
func lastMessages(bundle string) string {
	var out []string
	for _, name := range []string{logFile, panicLog} {
		data, err := tail(filepath.Join(bundle, name), mostRead)
		if err != nil {
			continue
		}
		lines := messages(data)
		room, first := mostQuoted, len(lines)
		for ; first > 0; first-- {
			line := &lines[first-1]
			if len(*line) > mostOfLine {
				*line = (*line)[:mostOfLine] + "…"
			}
			if room -= len(*line); room < 0 {
				break
			}
		}
		if text := strings.Join(lines[first:], "\n"); text != "" {
			out = append(out, text)
		}
	}
	return strings.Join(out, "; ")
}

// tail returns the end of a log of at most limit bytes. If that is not all of it, it begins with a whole
// message or line, if one begins there.
func tail(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // it was only read
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from := max(0, st.Size()-limit)
	data, err := io.ReadAll(io.NewSectionReader(f, from, limit)) // it may grow meanwhile
	if err != nil || from == 0 {
		return data, err
	}
	if i := wholeMessage.FindIndex(data); i != nil {
		data = data[i[0]+1:]
	}
	return data, nil
}

// wholeMessage matches the end of a message or a line before another.
var wholeMessage = regexp.MustCompile(`\}\{|\n`)

// messages returns the texts of a log's JSON messages, which runsc writes without line breaks between them, and the
// lines of everything else, such as a panic.
func messages(log []byte) []string {
	var all []string
	decoder := json.NewDecoder(bytes.NewReader(log))
	for {
		from := decoder.InputOffset()
		var m struct{ Msg string }
		if decoder.Decode(&m) != nil || m.Msg == "" {
			if rest := strings.TrimSpace(string(log[from:])); rest != "" {
				all = append(all, strings.Split(rest, "\n")...)
			}
			return all
		}
		all = append(all, m.Msg)
	}
}

// runsc keeps the state of a sandbox in <id>_sandbox:<id>.state.
const (
	stateInfix  = "_sandbox:"
	stateSuffix = ".state"
)

// IDs returns the sandboxes that runsc has a state of, dead or alive.
func (r *Runtime) IDs() ([]string, error) {
	entries, err := os.ReadDir(r.Root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing runsc's state: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if _, rest, ok := strings.Cut(e.Name(), stateInfix); ok {
			if id, ok := strings.CutSuffix(rest, stateSuffix); ok {
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

// Knows reports whether runsc has a state of a sandbox, dead or alive.
func (r *Runtime) Knows(id string) bool {
	_, err := os.Stat(filepath.Join(r.Root, id+stateInfix+id+stateSuffix))
	return err == nil
}

// Remove removes runsc's state of a sandbox whose processes have ended. It succeeds if
// there is none.
func (r *Runtime) Remove(id string) error {
	matches, err := filepath.Glob(filepath.Join(r.Root, "*"+id+"*"))
	if err != nil {
		return fmt.Errorf("looking for the state of %s: %w", id, err)
	}
	var errs []error
	for _, path := range matches {
		if err := os.RemoveAll(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("removing the state of %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}
