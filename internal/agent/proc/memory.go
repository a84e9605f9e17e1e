package proc

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
)

// relievePatience limits the time in which killed processes give their memory back.
// The host asks when little memory is left: a longer wait delays its next step, a
// shorter one reports less freed memory than there is.
const relievePatience = 3 * time.Second

// memory finds and kills the processes that hold the most memory. It allocates its
// buffers beforehand, since it works when no memory is left.
type memory struct {
	processes *Processes
	page      int64

	mu sync.Mutex
	// +checklocks:mu
	proc *os.File // /proc
	// +checklocks:mu
	entries []byte // directory entries
	// +checklocks:mu
	text []byte // content of one file
	// +checklocks:mu
	path []byte
	// +checklocks:mu
	victims []victim
}

type victim struct {
	pid int
	rss int64 // bytes
}

// Sizes of the buffers, in bytes. 1024 processes have about 24 KiB of directory
// entries; more are read in several pieces.
const (
	entriesBuffer = 32 << 10
	textBuffer    = 4 << 10
	maxVictims    = 64 // processes that one scan keeps, the largest
)

func newMemory(p *Processes) *memory {
	return &memory{
		processes: p,
		page:      int64(os.Getpagesize()),
		entries:   make([]byte, entriesBuffer),
		text:      make([]byte, textBuffer),
		path:      make([]byte, 0, 64),
		victims:   make([]victim, 0, maxVictims),
	}
}

// relieve answers POST /memory/relieve.
func (m *memory) relieve(w http.ResponseWriter, r *http.Request) {
	var req agentapi.RelieveRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, textBuffer)).Decode(&req); err != nil {
		answer.Error(w, answer.Bad("relieve: %s", err))
		return
	}
	if req.Bytes <= 0 {
		answer.Error(w, answer.Bad("relieve: bytes must be positive"))
		return
	}
	freed, killed, err := m.free(r.Context(), req.Bytes)
	if err != nil {
		answer.Error(w, err)
		return
	}
	answer.JSON(w, http.StatusOK, agentapi.RelieveReply{Freed: freed, Killed: killed})
}

// free kills the largest processes until they have given back so many bytes of
// resident memory or no process is left to kill, and waits until they are gone.
// It kills no more when a process is slow to give its memory back, and when the
// caller has left: the host looks again before it asks again.
func (m *memory) free(ctx context.Context, bytes int64) (freed int64, killed int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, relievePatience)
	defer cancel()
	for freed < bytes && ctx.Err() == nil {
		if err := m.scanLocked(); err != nil {
			return freed, killed, err
		}
		if len(m.victims) == 0 {
			return freed, killed, nil
		}
		for _, v := range m.victims {
			if freed >= bytes || ctx.Err() != nil {
				break
			}
			m.markKilledLocked(v.pid)
			if unix.Kill(v.pid, unix.SIGKILL) != nil {
				continue // ended by itself
			}
			killed++
			if !m.waitGoneLocked(ctx, v) {
				return freed, killed, nil
			}
			freed += v.rss
		}
	}
	return freed, killed, nil
}

// scanLocked fills victims with the largest processes, largest first.
//
// +checklocks:m.mu
func (m *memory) scanLocked() error {
	m.victims = m.victims[:0]
	if m.proc == nil {
		proc, err := os.Open("/proc")
		if err != nil {
			return err
		}
		m.proc = proc
	}
	fd := int(m.proc.Fd())
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return os.NewSyscallError("seek /proc", err)
	}
	me := os.Getpid()
	for {
		n, err := unix.Getdents(fd, m.entries)
		if err != nil {
			return os.NewSyscallError("read /proc", err)
		}
		if n <= 0 {
			return nil
		}
		for pid, rest := nextPID(m.entries[:n]); rest != nil; pid, rest = nextPID(rest) {
			if pid > 0 && pid != me {
				m.considerLocked(victim{pid: pid, rss: m.rssLocked(pid)})
			}
		}
	}
}

// nextPID returns the pid of the first directory entry of /proc, 0 if that is no process, and the
// entries after it. It returns nil for the latter if there is no entry.
func nextPID(entries []byte) (pid int, rest []byte) {
	const nameAt = 19 // in struct linux_dirent64
	if len(entries) <= nameAt {
		return 0, nil
	}
	length := int(entries[16]) | int(entries[17])<<8
	if length <= nameAt || length > len(entries) {
		return 0, nil
	}
	for _, c := range entries[nameAt:length] {
		if c == 0 {
			break
		}
		if c < '0' || c > '9' {
			pid = 0
			break
		}
		pid = pid*10 + int(c-'0')
	}
	return pid, entries[length:]
}

// eachPID calls f with the pid of each directory entry of /proc that is a process.
func eachPID(entries []byte, f func(pid int)) {
	for pid, rest := nextPID(entries); rest != nil; pid, rest = nextPID(rest) {
		if pid > 0 {
			f(pid)
		}
	}
}

// considerLocked adds v to the victims if it is among the largest.
//
// +checklocks:m.mu
func (m *memory) considerLocked(v victim) {
	if v.rss == 0 {
		return // a zombie
	}
	at := len(m.victims)
	for at > 0 && m.victims[at-1].rss < v.rss {
		at--
	}
	if at == maxVictims {
		return
	}
	if len(m.victims) < maxVictims {
		m.victims = append(m.victims, victim{})
	}
	copy(m.victims[at+1:], m.victims[at:])
	m.victims[at] = v
}

// readLocked returns the start of /proc/PID/name, nil if the process is gone.
//
// +checklocks:m.mu
func (m *memory) readLocked(pid int, name string) []byte {
	m.path = append(m.path[:0], "/proc/"...)
	m.path = strconv.AppendInt(m.path, int64(pid), 10)
	m.path = append(append(m.path, '/'), name...)
	fd, err := unix.Open(string(m.path), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	n, err := unix.Read(fd, m.text)
	// Nothing was written through it.
	_ = unix.Close(fd)
	if err != nil {
		return nil
	}
	return m.text[:n]
}

// rssLocked returns a process's resident memory in bytes, 0 when it is gone.
//
// +checklocks:m.mu
func (m *memory) rssLocked(pid int) int64 {
	return residentPages(m.readLocked(pid, "statm")) * m.page
}

// residentPages returns the second number of a statm file.
func residentPages(statm []byte) int64 {
	field, pages := 0, int64(0)
	for _, c := range statm {
		switch {
		case c == ' ':
			if field++; field == 2 {
				return pages
			}
		case field == 1 && c >= '0' && c <= '9':
			pages = pages*10 + int64(c-'0')
		}
	}
	return 0
}

// markKilledLocked marks the command that the process belongs to as killed for lack of memory.
//
// +checklocks:m.mu
func (m *memory) markKilledLocked(pid int) {
	name := nameOf(m.readLocked(pid, "cgroup"))
	if name == "" {
		return
	}
	if c := m.processes.inGroup(name); c != nil {
		c.oomKilled.Store(true)
	}
}

// waitGoneLocked reports whether the process has given its memory back before ctx ends.
//
// +checklocks:m.mu
func (m *memory) waitGoneLocked(ctx context.Context, v victim) bool {
	for m.rssLocked(v.pid) > 0 {
		if ctx.Err() != nil {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}
