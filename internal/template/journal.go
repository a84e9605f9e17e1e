package template

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
)

const (
	// flushEvery is the interval at which a build's output is written to the database, and so the
	// delay with which followers see it. Each write takes two commits.
	flushEvery = 250 * time.Millisecond
	// maxLogLine bounds a line of a build log, in bytes.
	maxLogLine = 4000
	// maxLog bounds the log of a build, in bytes with lineCost for each line, so that one answer
	// can hold all of it.
	maxLog   = 4 << 20
	lineCost = 64
	// maxWaiting bounds the lines that wait to be written. If the disk is slower than the build,
	// the build waits.
	maxWaiting = 10_000
	// tailLines is the number of lines of output in the error of a build whose builder gives
	// none.
	tailLines = 20
)

// journal writes the log and the progress of one build of one template. A goroutine writes lines
// in batches.
type journal struct {
	write func(ctx context.Context, c LogChange, progress string) error

	stop chan struct{} // closed when nothing more is said
	done chan struct{} // closed when the goroutine has ended
	more chan struct{} // holds one token: there is something to write
	room chan struct{} // holds one token: the batch has been taken

	mu sync.Mutex
	// +checklocks:mu
	closed bool
	// +checklocks:mu
	waiting LogChange
	// +checklocks:mu
	progress string
	// +checklocks:mu
	seq int64
	// +checklocks:mu
	steps map[int]*stepLog
	// +checklocks:mu
	size int64 // of all lines, with their cost
	// +checklocks:mu
	tail []string // the last lines that are not headings
}

// stepLog describes the log of one step.
type stepLog struct {
	lines   []lineSize
	size    int64
	dropped int64 // number of dropped lines
	line    int   // of the Dockerfile; 0 is unknown
}

type lineSize struct{ seq, size int64 }

// newJournal starts a journal that continues a log, which has lines if the build was begun before.
// It calls write and failed from one goroutine. close ends it.
func newJournal(ctx context.Context, before []LogLine, write func(context.Context, LogChange, string) error,
	failed func(error)) *journal {
	j := &journal{write: write, stop: make(chan struct{}), done: make(chan struct{}), more: make(chan struct{}, 1),
		room: make(chan struct{}, 1), steps: map[int]*stepLog{}}
	j.mu.Lock()
	for _, l := range before {
		j.seq = l.Seq
		j.countLocked(l)
	}
	j.mu.Unlock()
	go func() {
		defer close(j.done)
		for open := true; open; {
			select {
			case <-j.more:
			case <-j.stop:
			}
			if err := j.flush(ctx); err != nil {
				failed(err)
			}
			select {
			case <-time.After(flushEvery):
			case <-j.stop:
				open = false
			}
		}
		if err := j.flush(ctx); err != nil {
			failed(err)
		}
	}()
	return j
}

// say adds progress of the build.
func (j *journal) say(p Progress) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if p.Name != "" {
		text := heading(p)
		j.progress = text
		j.addLocked(LogLine{Step: p.Step, Heading: true, Line: p.Line, Text: text})
	}
	if p.Text != "" {
		for _, line := range strings.Split(strings.TrimSuffix(p.Text, "\n"), "\n") {
			line = strings.TrimSuffix(line, "\r")
			if p.Step == 0 {
				j.progress = line
			}
			j.addLocked(LogLine{Step: p.Step, Text: line})
			if j.tail = append(j.tail, line); len(j.tail) > tailLines {
				j.tail = j.tail[1:]
			}
		}
	}
}

func heading(p Progress) string {
	text := p.Name
	switch {
	case p.Step > 0 && p.Steps > 0:
		text = fmt.Sprintf("step %d of %d: %s", p.Step, p.Steps, p.Name)
	case p.Step > 0:
		text = fmt.Sprintf("step %d: %s", p.Step, p.Name)
	}
	if p.Cached {
		text += " (cached)"
	}
	return text
}

// addLocked adds a line, waiting while too many wait. After close it does nothing.
//
// +checklocks:j.mu
func (j *journal) addLocked(l LogLine) {
	for len(j.waiting.Add) >= maxWaiting && !j.closed {
		j.mu.Unlock()
		<-j.room
		j.mu.Lock()
	}
	if j.closed {
		return
	}
	if l.Text = strings.ToValidUTF8(l.Text, "?"); len(l.Text) > maxLogLine {
		l.Text = strings.ToValidUTF8(l.Text[:maxLogLine], "") + "…"
	}
	j.seq++
	l.Seq, l.At = j.seq, now()
	if step := j.steps[l.Step]; step != nil && !l.Heading {
		l.Line = step.line
	}
	j.waiting.Add = append(j.waiting.Add, l)
	j.countLocked(l)
	if j.size > maxLog {
		j.dropLocked()
	}
	select {
	case j.more <- struct{}{}:
	default:
	}
}

// countLocked counts a line of the log.
//
// +checklocks:j.mu
func (j *journal) countLocked(l LogLine) {
	step := j.steps[l.Step]
	if step == nil {
		step = &stepLog{}
		j.steps[l.Step] = step
	}
	if l.Heading {
		step.line = l.Line
	}
	size := int64(len(l.Text)) + lineCost
	step.lines, step.size, j.size = append(step.lines, lineSize{l.Seq, size}), step.size+size, j.size+size
}

// dropLocked drops the older half of the largest step, except its heading,
// and puts a note in the place of the last dropped line.
//
// +checklocks:j.mu
func (j *journal) dropLocked() {
	most := 0
	for n, step := range j.steps {
		if s := j.steps[most]; s == nil || step.size > s.size {
			most = n
		}
	}
	step := j.steps[most]
	const keep = 1 // the heading
	n, freed := keep, int64(0)
	for n < len(step.lines)-1 && freed < step.size/2 {
		freed += step.lines[n].size
		n++
	}
	if n == keep {
		return
	}
	from, to := step.lines[keep].seq, step.lines[n-1].seq
	step.dropped += int64(n - keep)
	if step.dropped > int64(n-keep) {
		step.dropped-- // one of them was the last note
	}
	note := LogLine{Seq: to, At: now(), Step: most, Line: step.line,
		Text: fmt.Sprintf("… %d lines left out …", step.dropped)}
	size := int64(len(note.Text)) + lineCost
	rest := append([]lineSize{step.lines[0], {to, size}}, step.lines[n:]...)
	step.lines, step.size, j.size = rest, step.size-freed+size, j.size-freed+size

	var waiting []LogLine // dropped lines need not be written
	for _, l := range j.waiting.Add {
		if l.Step != most || l.Seq < from || l.Seq > to {
			waiting = append(waiting, l)
		}
	}
	j.waiting.Drop = append(j.waiting.Drop, LogRange{most, from, to})
	j.waiting.Add = append(waiting, note)
}

// flush writes the waiting lines.
func (j *journal) flush(ctx context.Context) error {
	j.mu.Lock()
	change, progress := j.waiting, j.progress
	j.waiting = LogChange{}
	j.mu.Unlock()
	select {
	case j.room <- struct{}{}:
	default:
	}
	if len(change.Add)+len(change.Drop) == 0 {
		return nil
	}
	return j.write(ctx, change, progress)
}

// close writes the rest and ends the journal. Call it once; later lines are not written.
func (j *journal) close() (tail []string) {
	j.mu.Lock()
	j.closed = true
	close(j.stop)
	tail = j.tail
	j.mu.Unlock()
	<-j.done
	return tail
}
