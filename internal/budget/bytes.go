package budget

const (
	// leastPiece and mostPiece bound the size, in bytes, of the pieces that short writes are
	// gathered in. A smaller piece would cost more than its content; a larger one could stay
	// mostly empty.
	leastPiece, mostPiece = 512, 64 << 10
	// ownPiece is the length in bytes from which Keep keeps a slice without copying it.
	ownPiece = 8 << 10
	// pieceCost is the estimated cost of a piece besides its bytes, including what the allocator
	// rounds up.
	pieceCost = 64
)

// Bytes is a buffer of pieces, so that growing never copies. The zero value is empty and takes
// its memory from no budget. It belongs to one goroutine at a time.
type Bytes struct {
	Account *Account

	pieces [][]byte
	size   int64
	held   int64 // of the account
}

// Len returns the number of bytes kept.
func (b *Bytes) Len() int64 { return b.size }

// Keep adds p, which belongs to b from then on. After an error, one of [Account.Take], nothing
// was added.
func (b *Bytes) Keep(p []byte) error {
	if len(p) < ownPiece {
		_, err := b.Write(p)
		return err
	}
	if err := b.hold(int64(cap(p))); err != nil {
		return err
	}
	b.pieces = append(b.pieces, p)
	b.size += int64(len(p))
	return nil
}

// Write adds a copy of p. It implements [io.Writer]; its errors are those of Keep.
func (b *Bytes) Write(p []byte) (int, error) {
	last := len(b.pieces) - 1
	room := 0
	if last >= 0 {
		room = cap(b.pieces[last]) - len(b.pieces[last])
	}
	head, rest := p[:min(room, len(p))], p[min(room, len(p)):]
	if len(rest) > 0 {
		size := max(len(rest), int(min(max(b.size, leastPiece), mostPiece)))
		if err := b.hold(int64(size)); err != nil {
			return 0, err
		}
		b.pieces = append(b.pieces, append(make([]byte, 0, size), rest...))
	}
	if len(head) > 0 {
		b.pieces[last] = append(b.pieces[last], head...)
	}
	b.size += int64(len(p))
	return len(p), nil
}

func (b *Bytes) hold(n int64) error {
	if err := b.Account.Take(n + pieceCost); err != nil {
		return err
	}
	b.held += n + pieceCost
	return nil
}

// Pieces returns the pieces. The caller must not change them.
func (b *Bytes) Pieces() [][]byte { return b.pieces }

// Bytes returns a copy of all bytes.
func (b *Bytes) Bytes() []byte {
	all := make([]byte, 0, b.size)
	for _, p := range b.pieces {
		all = append(all, p...)
	}
	return all
}

// Next removes and returns the first piece, nil when there is none. It gives back the piece's
// memory at once, since the caller is about to be done with it.
func (b *Bytes) Next() []byte {
	if len(b.pieces) == 0 {
		b.Drop()
		return nil
	}
	p := b.pieces[0]
	b.pieces[0], b.pieces = nil, b.pieces[1:]
	n := min(int64(cap(p))+pieceCost, b.held)
	b.held -= n
	b.size -= int64(len(p))
	b.Account.Give(n)
	return p
}

// Drop forgets all bytes and gives their memory back.
func (b *Bytes) Drop() {
	b.Account.Give(b.held)
	b.pieces, b.size, b.held = nil, 0, 0
}
