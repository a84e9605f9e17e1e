package main

import (
	"io"
	"strings"
	"sync"
)

// tail keeps the end of what is written through it. Both streams of a step share one, and may
// write concurrently.
type tail struct {
	mu sync.Mutex
	// +checklocks:mu
	kept []byte
}

const (
	tailBytes = 8 << 10
	tailLines = 20
)

// through returns a writer that passes on to w.
func (t *tail) through(w io.Writer) io.Writer { return tailWriter{t, w} }

type tailWriter struct {
	t *tail
	w io.Writer
}

func (w tailWriter) Write(data []byte) (int, error) {
	w.t.mu.Lock()
	w.t.kept = append(w.t.kept, data...)
	if over := len(w.t.kept) - tailBytes; over > 0 {
		w.t.kept = append(w.t.kept[:0], w.t.kept[over:]...)
	}
	w.t.mu.Unlock()
	return w.w.Write(data)
}

// lines returns the last lines.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.TrimRight(strings.ToValidUTF8(string(t.kept), "\uFFFD"), "\r\n")
	if text == "" {
		return nil
	}
	lines := strings.Split(text, "\n")
	return lines[max(0, len(lines)-tailLines):]
}
