package cli

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progressEvery is how often a live line is drawn anew. People see no more than
// about ten a second; each costs a write to the terminal.
const progressEvery = 100 * time.Millisecond

// progress tells of long work on stderr: on a terminal as one line that
// changes, elsewhere as a line for every change of state. It is not safe for
// concurrent use.
type progress struct {
	w     io.Writer
	live  bool
	shown string
	drawn time.Time
}

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

// tick shows a number that changes all the time: on a terminal only, and not too
// often.
func (p *progress) tick(format string, args ...any) {
	if p.live && time.Since(p.drawn) >= progressEvery {
		p.drawn = time.Now()
		text := printable(fmt.Sprintf(format, args...))
		p.draw(text)
		p.shown = text
	}
}

func (p *progress) draw(text string) {
	const width = 78 // characters; a longer line would wrap and could not be drawn over
	if r := []rune(text); len(r) > width {
		text = string(r[:width-1]) + "…"
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", text)
}

// done takes the live line away.
func (p *progress) done() {
	if p.live && p.shown != "" {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
	p.shown = ""
}

// counting counts what is read through it and shows it.
type counting struct {
	io.Reader
	p     *progress
	what  string
	total int64 // 0 is unknown
	n     int64
}

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
