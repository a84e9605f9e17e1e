package node

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
)

// cpuClass returns the class of this machine's processors. gVisor restores a checkpoint on a processor that has the
// same size of cache lines as the one that the checkpoint was made on, and all its features. Machines of one class have
// the same of both. The kernel's list of features includes some that gVisor does not need, so machines of different
// classes may still be able to restore each other's checkpoints.
func cpuClass() (string, error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", fmt.Errorf("reading the features of the processor: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20) // the flags of one processor take 2 to 4 KiB
	var facts []string
	for lines.Scan() && lines.Text() != "" { // the first processor
		name, value, _ := strings.Cut(lines.Text(), ":")
		switch name = strings.TrimSpace(name); name {
		case "flags", "Features":
			words := strings.Fields(value)
			slices.Sort(words)
			facts = append(facts, name+" "+strings.Join(words, " "))
		case "vendor_id", "CPU implementer", "clflush size", "cache_alignment":
			facts = append(facts, name+" "+strings.TrimSpace(value))
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("reading the features of the processor: %w", err)
	}
	if len(facts) == 0 {
		return "", fmt.Errorf("/proc/cpuinfo does not list the features of the processor")
	}
	sum := sha256.Sum256([]byte(strings.Join(facts, "\n")))
	return fmt.Sprintf("%s-%x", runtime.GOARCH, sum[:8]), nil
}
