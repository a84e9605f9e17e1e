package agentapi

import (
	"encoding/binary"
	"fmt"
	"io"
	"unicode/utf8"
)

// Stream says which of a process's outputs bytes are of.
type Stream byte

// The streams, and the other things that come in the frames of a process's output. The
// numbers are on the wire.
const (
	Stdout    Stream = 1
	Stderr    Stream = 2
	Terminal  Stream = 3 // of a process with a terminal, which has no other
	frameLost Stream = 4 // the offset is where the gap begins, the payload its bytes as 8 of them
	frameEnd  Stream = 5 // the payload is a Process as JSON; nothing follows
	frameIdle Stream = 6 // says only that the agent lives
)

// Output of a process is sent in frames: the kind (1 byte), the offset of the first byte
// in all output of the process (8), the payload's length (4), numbers big-endian, and
// the payload.
const frameHead = 13

// maxFrame is the most that is taken in a frame, bytes. An agent sends up to MaxPiece of
// output, and a Process of a few KiB at the end.
const maxFrame = MaxPiece

// MaxPiece is how much output the agent sends in one frame at the most, bytes.
const MaxPiece = 64 << 10

// Frame is one of them.
type Frame struct {
	Kind    Stream
	Offset  int64
	Payload []byte
}

// LostFrame says that so many bytes from offset on are not kept any more.
func LostFrame(offset, bytes int64) Frame {
	return Frame{Kind: frameLost, Offset: offset, Payload: binary.BigEndian.AppendUint64(nil, uint64(bytes))}
}

// EndFrame is the last one; process is the Process as JSON.
func EndFrame(offset int64, process []byte) Frame {
	return Frame{Kind: frameEnd, Offset: offset, Payload: process}
}

// IdleFrame is sent when there is nothing to say.
func IdleFrame() Frame { return Frame{Kind: frameIdle} }

// WriteTo writes the frame in one piece.
func (f Frame) WriteTo(w io.Writer) (int64, error) {
	b := make([]byte, 0, frameHead+len(f.Payload))
	b = append(b, byte(f.Kind))
	b = binary.BigEndian.AppendUint64(b, uint64(f.Offset))
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.Payload)))
	n, err := w.Write(append(b, f.Payload...))
	return int64(n), err
}

// readFrame reads a frame that a stranger may have written.
func readFrame(r io.Reader) (Frame, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Frame{}, err
	}
	f := Frame{Kind: Stream(head[0]), Offset: int64(binary.BigEndian.Uint64(head[1:]))}
	size := binary.BigEndian.Uint32(head[9:])
	switch {
	case f.Kind < Stdout || f.Kind > frameIdle:
		return Frame{}, fmt.Errorf("a frame of output is of the kind %d", f.Kind)
	case f.Offset < 0:
		return Frame{}, fmt.Errorf("a frame of output begins at %d", f.Offset)
	case size > maxFrame:
		return Frame{}, fmt.Errorf("a frame of output has %d bytes", size)
	}
	f.Payload = make([]byte, size)
	if _, err := io.ReadFull(r, f.Payload); err != nil {
		return Frame{}, fmt.Errorf("reading a frame of output: %w", noEOF(err))
	}
	if f.Kind == frameLost && (size != 8 || f.lost() <= 0) {
		return Frame{}, fmt.Errorf("a frame of output does not say what was lost")
	}
	return f, nil
}

func (f Frame) lost() int64 { return int64(binary.BigEndian.Uint64(f.Payload)) }

// noEOF is the error of a reader that ended where it may not.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// IncompleteTail is how many bytes at the end of b are the beginning of a character whose
// rest may come yet.
func IncompleteTail(b []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		tail := b[len(b)-n:]
		if utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return n
		}
	}
	return 0
}
