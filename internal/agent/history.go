package agent

import (
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

const (
	// pieceCost is what a piece of history costs beside its bytes, about. It is counted, so
	// that a process that writes single bytes to two streams in turn keeps within the bound.
	pieceCost = 96

	// holdTime is how long the beginning of a character waits for its rest, which mostly is
	// written already: a pipe was full, or a read was. A program that writes half a
	// character and waits is delayed by it.
	holdTime = 50 * time.Millisecond

	// leastHistory is what is kept of each process however many there are, bytes.
	leastHistory = 64 << 10
)

// history is the end of a process's output. It listens to the command and is never slow,
// so it never blocks it; those who follow read it at their own pace and learn what they
// missed. Bytes have offsets in the order they came, whichever stream they are of; no
// piece ends within a character unless nothing came for a while.
type history struct {
	mu sync.Mutex
	// +checklocks:mu
	pieces []piece // oldest first, without a gap
	// +checklocks:mu
	first int64 // offset of the oldest byte that is kept
	// +checklocks:mu
	next int64 // offset of the byte to come
	// +checklocks:mu
	size int // bytes it costs
	// +checklocks:mu
	limit int // of size
	// +checklocks:mu
	held [agentapi.Terminal + 1][]byte // by stream: the beginning of a character
	// +checklocks:mu
	holding *time.Timer // gives up on what is held; nil when nothing is
	// +checklocks:mu
	over bool // nothing comes any more
	// +checklocks:mu
	changed chan struct{} // if somebody waits: closed at the next change
}

// piece is output of one stream. Its bytes are only ever added to.
type piece struct {
	stream agentapi.Stream
	offset int64
	data   []byte
}

// take is a subscriber's send.
func (h *history) take(ev *process.ProcessEvent) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case ev.GetEnd() != nil:
		h.releaseLocked()
		h.over = true
		h.wakeLocked()
	case ev.GetData().GetStdout() != nil:
		h.addLocked(agentapi.Stdout, ev.GetData().GetStdout())
	case ev.GetData().GetStderr() != nil:
		h.addLocked(agentapi.Stderr, ev.GetData().GetStderr())
	case ev.GetData().GetPty() != nil:
		h.addLocked(agentapi.Terminal, ev.GetData().GetPty())
	}
	return nil
}

// addLocked adds output, but for the beginning of a character at its end.
//
// +checklocks:h.mu
func (h *history) addLocked(s agentapi.Stream, b []byte) {
	if len(h.held[s]) > 0 {
		b = append(h.held[s], b...)
		h.held[s] = nil
	}
	if n := agentapi.IncompleteTail(b); n > 0 {
		h.held[s] = slices.Clone(b[len(b)-n:])
		b = b[:len(b)-n]
		if h.holding == nil {
			h.holding = time.AfterFunc(holdTime, h.release)
		} else {
			h.holding.Reset(holdTime)
		}
	}
	h.appendLocked(s, b)
}

// release gives up on the rest of characters.
func (h *history) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.releaseLocked()
}

// +checklocks:h.mu
func (h *history) releaseLocked() {
	for s, b := range h.held {
		h.held[s] = nil
		h.appendLocked(agentapi.Stream(s), b)
	}
}

// +checklocks:h.mu
func (h *history) appendLocked(s agentapi.Stream, b []byte) {
	for len(b) > 0 {
		n := len(h.pieces) - 1
		if n < 0 || h.pieces[n].stream != s || len(h.pieces[n].data) >= outputChunk {
			h.pieces = append(h.pieces, piece{stream: s, offset: h.next})
			h.size += pieceCost
			n++
		}
		p := &h.pieces[n]
		take := min(len(b), outputChunk-len(p.data))
		if take < len(b) {
			take -= agentapi.IncompleteTail(b[:take])
		}
		if take == 0 { // a character does not fit any more
			h.pieces = append(h.pieces, piece{stream: s, offset: h.next})
			h.size += pieceCost
			continue
		}
		p.data = append(p.data, b[:take]...)
		b = b[take:]
		h.size += take
		h.next += int64(take)
	}
	h.trimLocked()
	h.wakeLocked()
}

// trimLocked forgets the oldest output beyond the limit.
//
// +checklocks:h.mu
func (h *history) trimLocked() {
	n := 0
	for ; n < len(h.pieces)-1 && h.size > h.limit; n++ {
		h.size -= len(h.pieces[n].data) + pieceCost
	}
	if n > 0 {
		clear(h.pieces[:n]) // the array lives on, the bytes must not
		h.pieces = h.pieces[n:]
		h.first = h.pieces[0].offset
	}
}

// setLimit changes how much is kept.
func (h *history) setLimit(limit int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.limit = limit
	h.trimLocked()
}

// +checklocks:h.mu
func (h *history) wakeLocked() {
	if h.changed != nil {
		close(h.changed)
		h.changed = nil
	}
}

// bounds are the offsets of the first byte that is kept and of the one to come.
func (h *history) bounds() (first, next int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.first, h.next
}

// read is the output from an offset on: as much of one stream as there is in a row, up to
// MaxPiece; or how many bytes are lost there; or, when there is nothing yet, what is
// closed at the next change, nil if none will come.
func (h *history) read(offset int64) (s agentapi.Stream, data []byte, lost int64, changed <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case offset < h.first:
		return 0, nil, h.first - offset, nil
	case offset >= h.next:
		if !h.over && h.changed == nil {
			h.changed = make(chan struct{})
		}
		return 0, nil, 0, h.changed
	}
	i, found := slices.BinarySearchFunc(h.pieces, offset, func(p piece, o int64) int { return int(p.offset - o) })
	if !found {
		i--
	}
	s, data = h.pieces[i].stream, h.pieces[i].data[offset-h.pieces[i].offset:]
	whole := true
	for _, p := range h.pieces[i+1:] {
		if p.stream != s || len(data)+len(p.data) > agentapi.MaxPiece {
			break
		}
		if whole {
			data, whole = slices.Clone(data), false
		}
		data = append(data, p.data...)
	}
	return s, data[:min(len(data), agentapi.MaxPiece)], 0, nil
}
