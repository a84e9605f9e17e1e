package proc

import (
	"bufio"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/answer"
)

// metricsReply is the answer to GET /metrics, as E2B defines it.
type metricsReply struct {
	Timestamp   int64   `json:"ts"` // Unix seconds
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"` // of all CPUs, since the previous call
	MemTotal    uint64  `json:"mem_total"`    // bytes, like the fields below
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskUsed    uint64  `json:"disk_used"`
	DiskTotal   uint64  `json:"disk_total"`
}

// cpuMeter measures how busy the CPUs are between two calls.
type cpuMeter struct {
	mu sync.Mutex
	// +checklocks:mu
	busy uint64 // clock ticks
	// +checklocks:mu
	idle uint64 // clock ticks
}

var meter cpuMeter

// metrics answers GET /metrics.
func (m *memory) metrics(w http.ResponseWriter, _ *http.Request) {
	reply := metricsReply{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU(), CPUUsedPct: meter.percent()}
	info := readMemInfo()
	reply.MemTotal = info["MemTotal"]
	reply.MemCache = info["Cached"] + info["Buffers"]
	if free := info["MemFree"] + reply.MemCache; free < reply.MemTotal {
		reply.MemUsed = reply.MemTotal - free
	}
	reply.MemTotalMiB, reply.MemUsedMiB = reply.MemTotal>>20, reply.MemUsed>>20
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err == nil {
		reply.DiskTotal = st.Blocks * uint64(st.Bsize)
		reply.DiskUsed = (st.Blocks - st.Bfree) * uint64(st.Bsize)
	}
	answer.JSON(w, http.StatusOK, reply)
}

// readMemInfo returns the values of /proc/meminfo in bytes. The map is empty if the
// file cannot be read.
func readMemInfo() map[string]uint64 {
	info := map[string]uint64{}
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return info
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64); err == nil {
			info[name] = kb << 10
		}
	}
	return info
}

// percent returns how busy the CPUs were since the last call, 0 at the first.
func (c *cpuMeter) percent() float64 {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	busy, idle := parseCPU(string(data))
	c.mu.Lock()
	defer c.mu.Unlock()
	spent, waited := float64(busy-c.busy), float64(idle-c.idle)
	first := c.busy == 0 && c.idle == 0
	c.busy, c.idle = busy, idle
	if first || spent+waited <= 0 || spent < 0 || waited < 0 {
		return 0
	}
	return 100 * spent / (spent + waited)
}

// parseCPU parses the first line of /proc/stat: user nice system idle iowait ….
func parseCPU(stat string) (busy, idle uint64) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	for i, f := range fields[min(1, len(fields)):] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return 0, 0
		}
		if i == 3 || i == 4 {
			idle += n
		} else {
			busy += n
		}
	}
	return busy, idle
}
