package agentapi

import (
	"encoding/binary"
	"fmt"
	"io"
	"unicode/utf8"
)

// Stream identifies an output of a process, or another kind of frame.
type Stream byte

// The streams, and the other kinds of frames in a process's output. The numbers are part of
// the protocol: agents of other versions would misread frames with other numbers.
const (
	Stdout    Stream = 1
	Stderr    Stream = 2
	Terminal  Stream = 3 // of a process with a terminal, which has no other stream
	frameLost Stream = 4 // the offset is that of a gap, the payload the gap's length in 8 bytes
	frameEnd  Stream = 5 // the payload is a Process as JSON; no frame follows
	frameIdle Stream = 6 // shows only that the agent is alive
)

// frameHead is the length of a frame without its payload, bytes. The output of a process is
// sent in frames: the kind (1 byte), the offset of the first byte in all output of the process
// (8), the payload's length (4), and the payload. Numbers are big-endian.
const frameHead = 13

// maxFrame limits the payload of a frame that the host accepts, bytes. An agent sends up to
// MaxPiece of output, and a Process of a few KiB at the end; a lower limit would refuse them.
const maxFrame = MaxPiece

// MaxPiece limits the output that the agent sends in one frame, bytes.
const MaxPiece = 64 << 10

// Frame holds one frame of a process's output.
type Frame struct {
	Kind    Stream
	Offset  int64
	Payload []byte
}

// LostFrame returns a frame that reports that as many bytes from offset on are no longer kept.
func LostFrame(offset, bytes int64) Frame {
	return Frame{Kind: frameLost, Offset: offset, Payload: binary.BigEndian.AppendUint64(nil, uint64(bytes))}
}

// EndFrame returns the last frame of an output; process is the Process as JSON.
func EndFrame(offset int64, process []byte) Frame {
	return Frame{Kind: frameEnd, Offset: offset, Payload: process}
}

// IdleFrame returns a frame that the agent sends while there is no output.
func IdleFrame() Frame { return Frame{Kind: frameIdle} }

// WriteTo writes the frame in a single write.
func (f Frame) WriteTo(w io.Writer) (int64, error) {
	b := make([]byte, 0, frameHead+len(f.Payload))
	b = append(b, byte(f.Kind))
	b = binary.BigEndian.AppendUint64(b, uint64(f.Offset))
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.Payload)))
	n, err := w.Write(append(b, f.Payload...))
	return int64(n), err
}

// readFrame reads a frame, which another program than the agent may have written.
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

// lost returns the number of bytes that a frame of the kind frameLost reports.
func (f Frame) lost() int64 { return int64(binary.BigEndian.Uint64(f.Payload)) }

// noEOF returns err, or [io.ErrUnexpectedEOF] for the end of a reader that ended too early.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// IncompleteTail returns the number of bytes at the end of b that begin a character whose
// other bytes may still come.
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
