// Package wire defines the protocol between the server and cay-buildkit.
//
// There is one control connection for the life of the program, and one connection for each build.
// Both are pairs of Unix sockets that keep messages apart. The program is given its end; nothing
// listens anywhere. A message is one JSON object and at most one open file. The end of the
// control connection ends the program, the end of a build's connection ends the build.
//
// On the control connection the server sends [Control], the program [Ask]. On a build's
// connection the server sends [Request] once and then [Answer], the program [Report].
package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Control is a message of the server on the control connection. Exactly one field is set.
type Control struct {
	Config *Config   `json:"config,omitempty"` // only in the first message
	Build  bool      `json:"build,omitempty"`  // the file is a connection for a build
	Slot   *SlotGift `json:"slot,omitempty"`
}

// Config configures the program. Its paths are the host's: the program opens the files and then
// leaves the host's file tree.
type Config struct {
	Disk     string `json:"disk"`     // image of the ext4 file system that everything is written to, or a directory
	Image    bool   `json:"image"`    // whether Disk is an image
	Contexts string `json:"contexts"` // directory below which builds have their contexts
	RunDir   string `json:"run_dir"`  // empty directory over which the program builds its file tree
	Runsc    string `json:"runsc"`
	Platform string `json:"platform"` // of gVisor: systrap or kvm
	Group    string `json:"group"`    // control group below which groups of steps are made

	Nameservers []string `json:"nameservers"`
	CacheBytes  int64    `json:"cache_bytes"`
	BuildBytes  int64    `json:"build_bytes"` // bytes that one build may write
	Steps       int      `json:"steps"`       // steps that may run at once
}

// SlotGift answers an [Ask] for a slot. Unless Error is set, the file is the slot's network
// namespace.
type SlotGift struct {
	ID    int64  `json:"id"`
	Error string `json:"error,omitempty"`
}

// Ask is a message of the program on the control connection. Exactly one field is set.
type Ask struct {
	Ready   *Ready `json:"ready,omitempty"`   // only in the first message
	Take    int64  `json:"take,omitempty"`    // asks for a slot under this number
	Release int64  `json:"release,omitempty"` // gives back the slot of this number, in which nothing runs any more
}

// Ready reports that the program has started, or why it has not.
type Ready struct {
	Snapshotter string `json:"snapshotter,omitempty"`
	Git         bool   `json:"git,omitempty"` // whether ADD of a git repository works
	Error       string `json:"error,omitempty"`
	NoDisk      bool   `json:"no_disk,omitempty"` // the error is that the disk's image cannot be mounted
}

// Request tells what a connection is for. Exactly one field is set.
type Request struct {
	Build *Build `json:"build,omitempty"`
	Prune *Prune `json:"prune,omitempty"`
}

// Prune removes unused entries of the cache, the longest unused first, until Keep bytes are left.
type Prune struct {
	Keep int64 `json:"keep"`
}

// Build describes a Dockerfile to build. Its directories are relative to [Config].Contexts.
type Build struct {
	Context     string            `json:"context"`    // directory of the build context
	Dockerfile  string            `json:"dockerfile"` // directory that Filename is in
	Filename    string            `json:"filename"`   // of the Dockerfile
	Args        map[string]string `json:"args,omitempty"`
	Target      string            `json:"target,omitempty"`
	MemoryBytes int64             `json:"memory_bytes"` // limit of one step
	CPUs        float64           `json:"cpus"`         // limit of one step; 0: none
	NoCache     bool              `json:"no_cache,omitempty"`
}

// Answer is a message of the server on a build's connection. It answers a report's Base or Blob.
type Answer struct {
	Name     string `json:"name,omitempty"` // of the image asked for; "" answers a Blob
	Manifest string `json:"manifest,omitempty"`
	Blob     int64  `json:"blob,omitempty"` // the number of the request for a blob; the file is the blob
	Error    string `json:"error,omitempty"`
}

// Report is a message of the program on a build's connection. Exactly one field is set; Done is
// the last message.
type Report struct {
	Base   string   `json:"base,omitempty"`   // the name of an image that the build needs
	Blob   *BlobAsk `json:"blob,omitempty"`   // asks for a blob of the build's images
	Output string   `json:"output,omitempty"` // the digest of a blob of the result; the file is the blob
	Event  *Event   `json:"event,omitempty"`
	Done   *Done    `json:"done,omitempty"`
}

// BlobAsk asks for a blob. Blobs are sent as open files, since the program sees no file of the
// host.
type BlobAsk struct {
	ID     int64  `json:"id"` // from 1
	Digest string `json:"digest"`
}

// Kinds of [Event].
const (
	Began = "began" // a step has begun
	Log   = "log"   // a step has written Text
	Ended = "ended" // a step is over
	Note  = "note"  // a remark: Text
	Made  = "made"  // all steps are over; the image is written next
)

// Event is one piece of a build's progress.
type Event struct {
	Kind     string        `json:"kind"`
	Step     int           `json:"step,omitempty"`   // number in this build, from 1, in order of appearance; 0: none
	Name     string        `json:"name,omitempty"`   // as written in the Dockerfile, such as "RUN make"
	Line     int           `json:"line,omitempty"`   // of the Dockerfile, from 1, of one that has begun; 0 if unknown
	Stage    string        `json:"stage,omitempty"`  // in the Dockerfile; "internal" if the step is not in it
	Number   int           `json:"number,omitempty"` // in its stage, from 1; 0 if it has none
	Total    int           `json:"total,omitempty"`  // number of steps of its stage
	Stream   string        `json:"stream,omitempty"` // stdout or stderr
	Text     string        `json:"text,omitempty"`   // as it was written: part of a line, or several lines
	Cached   bool          `json:"cached,omitempty"`
	Error    string        `json:"error,omitempty"`
	Duration time.Duration `json:"duration,omitempty"`
	Time     time.Time     `json:"time"`
}

// Done reports the end of a build or a prune.
type Done struct {
	Manifest   string          `json:"manifest,omitempty"`   // digest of a blob that was sent as Output
	Descriptor json.RawMessage `json:"descriptor,omitempty"` // of the manifest, for the layout's index
	Freed      int64           `json:"freed,omitempty"`      // bytes freed by a prune
	Failure    *Failure        `json:"failure,omitempty"`
}

// Kinds of [Failure].
const (
	Step       = "step"       // a step failed
	Dockerfile = "dockerfile" // the Dockerfile cannot be built as it is
	Base       = "base"       // an image was not found
	Memory     = "memory"     // a step needed more memory than it may have
	Disk       = "disk"       // the build wrote more than it may
	Processes  = "processes"  // a step started more processes than it may
	Internal   = "internal"   // not caused by the user
)

// Failure describes why a build failed.
type Failure struct {
	Kind     string   `json:"kind"`
	Step     string   `json:"step,omitempty"` // as the user wrote it
	Line     int      `json:"line,omitempty"` // of the Dockerfile, from 1; 0 if unknown
	ExitCode int      `json:"exit_code"`      // -1 if no program ended with one
	Tail     []string `json:"tail,omitempty"` // last lines of the step
	Message  string   `json:"message"`
}

// Epoch is the date of an image and its history, in Unix seconds, but not of the files in it, so that
// an image that comes from the cache is the same each time. The build argument SOURCE_DATE_EPOCH is
// the latest date of files too.
const Epoch = 315532800

// MaxMessage is the greatest size of a message in bytes.
const MaxMessage = 192 << 10

// maxText is the length to which Short cuts a text, in bytes.
const maxText = 4 << 10

// Short cuts a text of any length, such as an error that quotes a step, so that it fits into a
// message.
func Short(text string) string {
	if len(text) <= maxText {
		return text
	}
	return strings.ToValidUTF8(text[:maxText], "") + " …"
}

// Conn is one end of a connection. Send may be called concurrently, Receive may not.
type Conn struct {
	socket *net.UnixConn
	buf    []byte

	mu sync.Mutex // keeps messages in the order of their Sends
}

// Pair makes a connection and returns one end to keep, and one for another process.
func Pair() (*Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a pair of sockets: %w", err)
	}
	other := os.NewFile(uintptr(fds[1]), "connection")
	conn, err := Open(os.NewFile(uintptr(fds[0]), "connection"))
	if err != nil {
		return nil, nil, errors.Join(err, other.Close())
	}
	return conn, other, nil
}

// Open makes a connection of an end that [Pair] returned. It takes over the file.
func Open(file *os.File) (*Conn, error) {
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("opening a connection: %w", err)
	}
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("opening a connection: not a Unix socket"), conn.Close())
	}
	// The buffers must hold a message, whatever the machine's default is.
	if err := socket.SetWriteBuffer(MaxMessage + 4<<10); err != nil {
		return nil, errors.Join(fmt.Errorf("opening a connection: %w", err), socket.Close())
	}
	return &Conn{socket: socket, buf: make([]byte, MaxMessage)}, nil
}

// Close ends the connection. Pending calls return.
func (c *Conn) Close() error { return c.socket.Close() }

// Hangup tells the other end that nothing more will be sent. Its messages still arrive.
func (c *Conn) Hangup() error { return c.socket.CloseWrite() }

// Send sends a message and, if it is not nil, an open file, which the caller keeps.
func (c *Conn) Send(message any, file *os.File) error {
	data, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encoding a message: %w", err)
	}
	if len(data) > MaxMessage {
		return fmt.Errorf("a message of %d bytes is too long: at most %d", len(data), MaxMessage)
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, _, err := c.socket.WriteMsgUnix(data, rights, nil); err != nil {
		return fmt.Errorf("sending a message: %w", err)
	}
	return nil
}

// Receive waits for the next message. The file is nil unless one was sent with it; the caller
// must close it. At the end of the connection the error is [io.EOF].
func (c *Conn) Receive(message any) (*os.File, error) {
	rights := make([]byte, unix.CmsgSpace(4*4))
	n, rightsLen, flags, _, err := c.socket.ReadMsgUnix(c.buf, rights)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed) {
		return nil, io.EOF
	}
	if err != nil {
		return nil, fmt.Errorf("receiving a message: %w", err)
	}
	file, err := oneFile(rights[:rightsLen])
	if err != nil {
		return nil, err
	}
	if n == 0 && rightsLen == 0 {
		return nil, io.EOF // sockets of this kind report the end this way
	}
	if flags&unix.MSG_TRUNC != 0 {
		err = fmt.Errorf("a message is longer than %d bytes", MaxMessage)
	} else if err = json.Unmarshal(c.buf[:n], message); err != nil {
		err = fmt.Errorf("decoding a message: %w", err)
	}
	if err != nil && file != nil {
		file.Close()
		file = nil
	}
	return file, err
}

// oneFile returns the first open file that came with a message, and closes others.
func oneFile(rights []byte) (*os.File, error) {
	if len(rights) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, fmt.Errorf("receiving a file: %w", err)
	}
	var first *os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // not files
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			if first == nil {
				first = os.NewFile(uintptr(fd), "received")
			} else {
				unix.Close(fd)
			}
		}
	}
	return first, nil
}
