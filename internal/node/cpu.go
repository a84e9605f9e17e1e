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

// cpuClass returns the class of this machine's processors. gVisor restores a checkpoint where the processor has all
// features of the one that it was made on and the same size of cache lines, and machines of one class have the same.
// The kernel's list of features has some of its own, so machines of two classes may be able to restore each other's
// checkpoints all the same.
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
		return "", fmt.Errorf("/proc/cpuinfo does not tell the features of the processor")
	}
	sum := sha256.Sum256([]byte(strings.Join(facts, "\n")))
	return fmt.Sprintf("%s-%x", runtime.GOARCH, sum[:8]), nil
}
