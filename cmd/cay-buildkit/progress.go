package main

import (
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	digest "github.com/opencontainers/go-digest"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// progress converts the solver's reports about vertices to events. It belongs to one goroutine,
// except for the names.
type progress struct {
	conn  *wire.Conn
	line  func(name string) int // returns the line of a step in the Dockerfile, 0 if it is unknown
	steps map[digest.Digest]*stepState
	gone  bool // the client has left

	mu sync.Mutex
	// +checklocks:mu
	names map[string]string // names of steps by digest
	// +checklocks:mu
	running []string // names of steps that run, in order of their begin
	// +checklocks:mu
	broken string // the name of the step that failed first
}

type stepState struct {
	number       int
	began, ended bool
}

func newProgress(conn *wire.Conn, line func(name string) int) *progress {
	return &progress{conn: conn, line: line, steps: map[digest.Digest]*stepState{}, names: map[string]string{}}
}

func (p *progress) send(e wire.Event) {
	e.Name, e.Error = wire.Short(e.Name), wire.Short(e.Error)
	if !p.gone {
		p.gone = p.conn.Send(wire.Report{Event: &e}, nil) != nil
	}
}

// follow sends events until the solver's reports end.
func (p *progress) follow(statuses <-chan *client.SolveStatus) {
	for s := range statuses {
		for _, v := range s.Vertexes {
			p.vertex(v)
		}
		for _, l := range s.Logs {
			p.log(l)
		}
		for _, w := range s.Warnings {
			line := ""
			if len(w.Range) > 0 && w.Range[0].Start != nil {
				line = " (line " + strconv.Itoa(int(w.Range[0].Start.Line)) + ")"
			}
			p.send(wire.Event{Kind: wire.Note, Text: wire.Short(string(w.Short)) + line, Time: time.Now()})
		}
	}
}

func (p *progress) step(d digest.Digest) *stepState {
	s := p.steps[d]
	if s == nil {
		s = &stepState{number: len(p.steps) + 1}
		p.steps[d] = s
	}
	return s
}

// name returns the front end's name for the step of a digest.
func (p *progress) name(digest string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.names[digest]
}

// noteRunning records which steps run, and which failed first.
func (p *progress) noteRunning(v *client.Vertex) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := slices.Index(p.running, v.Name)
	switch {
	case v.Completed == nil && at < 0:
		p.running = append(p.running, v.Name)
	case v.Completed != nil && at >= 0:
		p.running = slices.Delete(p.running, at, at+1)
	}
	if v.Error != "" && p.broken == "" {
		p.broken = v.Name
	}
}

// at returns the name of the step at which a build was stopped: the one that failed, or else the
// last one that runs.
func (p *progress) at() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken != "" || len(p.running) == 0 {
		return p.broken
	}
	return p.running[len(p.running)-1]
}

func (p *progress) vertex(v *client.Vertex) {
	p.mu.Lock()
	p.names[v.Digest.String()] = v.Name
	p.mu.Unlock()
	if v.Started == nil && !v.Cached {
		return // it may never be needed
	}
	p.noteRunning(v)
	s := p.step(v.Digest)
	e := wire.Event{Step: s.number}
	e.Stage, e.Number, e.Total, e.Name = splitName(v.Name)
	if !s.began {
		s.began = true
		e.Kind, e.Time, e.Line = wire.Began, time.Now(), p.line(v.Name)
		if v.Started != nil {
			e.Time = *v.Started
		}
		p.send(e)
	}
	if v.Completed != nil && !s.ended {
		s.ended = true
		e.Kind, e.Time, e.Cached, e.Error = wire.Ended, *v.Completed, v.Cached, v.Error
		if v.Started != nil && !v.Cached {
			e.Duration = v.Completed.Sub(*v.Started)
		}
		p.send(e)
	}
}

// logPiece is the number of bytes of a log in one event. As JSON they are at most six times as
// long.
const logPiece = 16 << 10

func (p *progress) log(l *client.VertexLog) {
	stream := "stdout"
	if l.Stream == 2 {
		stream = "stderr"
	}
	s := p.step(l.Vertex)
	for data := l.Data; len(data) > 0; {
		piece := data[:min(len(data), logPiece)]
		data = data[len(piece):]
		p.send(wire.Event{Kind: wire.Log, Step: s.number, Stream: stream, Text: string(piece), Time: l.Timestamp})
	}
}

// vertexName matches the front end's names: "[build 2/5] RUN make".
var vertexName = regexp.MustCompile(`^\[([^\]]*?) ?(?:(\d+)/(\d+))?\] (.*)$`)

// spelledOut matches what the front end adds to the name of an image.
var spelledOut = regexp.MustCompile(`\bdocker\.io/(library/)?|@sha256:[0-9a-f]{64}\b`)

// splitName splits a name of a vertex. One without brackets is internal.
func splitName(name string) (stage string, number, total int, step string) {
	name = spelledOut.ReplaceAllString(name, "")
	m := vertexName.FindStringSubmatch(name)
	if m == nil {
		return "internal", 0, 0, name
	}
	number, _ = strconv.Atoi(m[2]) // 0 if absent
	total, _ = strconv.Atoi(m[3])
	return m[1], number, total, m[4]
}
