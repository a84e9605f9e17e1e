package budget

const (
	// leastPiece and mostPiece bound the pieces that short writes are gathered in, bytes. Less than
	// leastPiece costs more for the piece than for what is in it; more than mostPiece is more that may
	// stay empty.
	leastPiece, mostPiece = 512, 64 << 10
	// ownPiece is from which length on bytes are kept as they came, without a copy.
	ownPiece = 8 << 10
	// pieceCost is what a piece costs beside its bytes, with what the allocator rounds up.
	pieceCost = 64
)

// Bytes are bytes that are kept in pieces, so that they are never copied to grow. The zero value is
// empty and of no budget. It belongs to one goroutine at a time.
type Bytes struct {
	Account *Account

	pieces [][]byte
	size   int64
	held   int64 // of the account
}

// Len returns how many bytes are kept.
func (b *Bytes) Len() int64 { return b.size }

// Keep adds bytes, which are the Bytes' own from now on. After an error, one of [Account.Take], none
// of them was added.
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

// Write adds a copy of p. It implements [io.Writer]; errors are those of Keep.
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

// Pieces returns the pieces. They must not be changed.
func (b *Bytes) Pieces() [][]byte { return b.pieces }

// Bytes returns a copy of all.
func (b *Bytes) Bytes() []byte {
	all := make([]byte, 0, b.size)
	for _, p := range b.pieces {
		all = append(all, p...)
	}
	return all
}

// Next removes the first piece and returns it, nil when there is none. What it held is given back: the
// caller is about to be done with it.
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

// Drop forgets all and gives back what it held.
func (b *Bytes) Drop() {
	b.Account.Give(b.held)
	b.pieces, b.size, b.held = nil, 0, 0
}
