package cli

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progressEvery is the time between two changes of a live line. People see about ten changes a second. With less, cay
// spends more on writes to the terminal; with much more, the line jumps.
const progressEvery = 100 * time.Millisecond

// progress reports long work on standard error: on a terminal as one line that changes, elsewhere as a line for each
// change of state. It is not safe for concurrent use.
type progress struct {
	w     io.Writer
	live  bool
	shown string
	drawn time.Time
}

// progress returns a progress on cay's standard error.
func (a *app) progress() *progress { return &progress{w: a.err, live: isTerminal(a.err)} }

// say shows a state of the work.
func (p *progress) say(format string, args ...any) {
	text := printable(fmt.Sprintf(format, args...))
	if text == p.shown {
		return
	}
	if p.live {
		p.draw(text)
	} else {
		fmt.Fprintln(p.w, text)
	}
	p.shown = text
}

// tick shows a number that changes all the time, only on a terminal and at most every progressEvery.
func (p *progress) tick(format string, args ...any) {
	if p.live && time.Since(p.drawn) >= progressEvery {
		p.drawn = time.Now()
		text := printable(fmt.Sprintf(format, args...))
		p.draw(text)
		p.shown = text
	}
}

// draw replaces the live line.
func (p *progress) draw(text string) {
	const width = 78 // characters; a line that the terminal wraps cannot be replaced
	if r := []rune(text); len(r) > width {
		text = string(r[:width-1]) + "…"
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", text)
}

// done removes the live line.
func (p *progress) done() {
	if p.live && p.shown != "" {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	p.shown = ""
}

// counting is a reader that shows the number of bytes read.
type counting struct {
	io.Reader
	p     *progress
	what  string
	total int64 // 0 if it is not known
	n     int64
}

// Read implements [io.Reader].
func (c *counting) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n += int64(n)
	parts := []string{c.what, bytesText(c.n)}
	if c.total > 0 {
		parts = append(parts, "of", bytesText(c.total))
	}
	c.p.tick("%s", strings.Join(parts, " "))
	return n, err
}
