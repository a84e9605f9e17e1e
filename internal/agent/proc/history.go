package proc

import (
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

const (
	// pieceCost is the approximate cost of a piece of history beside its bytes, in bytes. With
	// it the limit also holds for a process that writes single bytes to two streams in turn.
	pieceCost = 96

	// holdTime limits the time for which the beginning of a character waits for its rest. The
	// rest is mostly written already: a pipe or a read was full. A shorter time splits
	// characters; a program that writes half a character and waits is delayed by this much.
	holdTime = 50 * time.Millisecond

	// leastHistory is the least history that each process keeps, however many there are, in bytes.
	leastHistory = 64 << 10
)

// history keeps the end of a process's output. It subscribes to the command and never
// blocks it. Followers read it at their own pace and learn how much they missed. Offsets
// number the bytes of all streams in the order of their arrival. No piece ends within a
// character unless the rest did not come within holdTime.
type history struct {
	mu sync.Mutex
	// +checklocks:mu
	pieces []piece // oldest first, without a gap
	// +checklocks:mu
	first int64 // offset of the oldest byte that is kept
	// +checklocks:mu
	next int64 // offset of the next byte
	// +checklocks:mu
	size int // cost of all pieces, in bytes
	// +checklocks:mu
	limit int // the largest size
	// +checklocks:mu
	held [agentapi.Terminal + 1][]byte // by stream: the beginning of a character
	// +checklocks:mu
	holding *time.Timer // releases held after holdTime; nil until a character was first held
	// +checklocks:mu
	over bool // the output has ended
	// +checklocks:mu
	changed chan struct{} // closed at the next change; nil if no reader waits
}

// piece is consecutive output of one stream. Bytes are only ever appended to it.
type piece struct {
	stream agentapi.Stream
	offset int64
	data   []byte
}

// take adds an event's output to the history. It is a subscriber's send.
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

// addLocked adds output. It holds the beginning of a character at its end back.
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

// release appends the held beginnings of characters without their rests.
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
		if take == 0 { // the next character does not fit into the piece
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

// trimLocked drops the oldest output beyond the limit.
//
// +checklocks:h.mu
func (h *history) trimLocked() {
	n := 0
	for ; n < len(h.pieces)-1 && h.size > h.limit; n++ {
		h.size -= len(h.pieces[n].data) + pieceCost
	}
	if n > 0 {
		clear(h.pieces[:n]) // free the bytes, since the array lives on
		h.pieces = h.pieces[n:]
		h.first = h.pieces[0].offset
	}
}

// setLimit sets the limit of the history's size, in bytes.
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

// bounds returns the offsets of the first byte that is kept and of the next byte to come.
func (h *history) bounds() (first, next int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.first, h.next
}

// read returns the output from an offset on: up to MaxPiece consecutive bytes of one
// stream. If bytes at the offset are lost it returns their number instead. If there is no
// output yet it returns a channel that is closed at the next change, nil after the end.
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
