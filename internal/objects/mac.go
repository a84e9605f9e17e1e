package objects

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
)

const (
	// macBlock is the number of bytes that one GMAC authenticates, since Go's GCM takes them in one slice. It is a part of
	// the MAC's definition, so it can never change. A smaller one costs more calls; a larger one more memory.
	macBlock = 64 << 10
	// saltSize is the size of a salt in bytes. Two random ones of this size are never equal.
	saltSize = 32
	// macPurpose begins what a secret is derived for, so that no other use of the secret gives the same keys.
	macPurpose = "cay pieces of an object\n"
)

// Pieces describes the pieces of an object, in order. Its JSON is in the seals of checkpoints, which are kept for as
// long as these, so fields can be added but not changed.
type Pieces struct {
	// Salt and MACs authenticate the pieces with a secret.
	Salt []byte `json:"salt,omitempty"`
	MACs []MAC  `json:"macs,omitempty"`
	// Sums are the SHA-256 of the pieces, which only earlier versions of cay wrote, the first of them without MACs.
	Sums []Sum `json:"sha256,omitempty"`
}

// MAC authenticates a piece of an object with a secret. Its verification takes a quarter of the CPU time of a SHA-256.
//
// The MAC of a piece is the first half of the HMAC-SHA256 over the piece's index, the GMACs of its blocks and its
// length. The GMAC of a block is the tag of AES-256-GCM without a plaintext and with the block as additional data; the
// nonce is the indexes of the piece and of the block in it.
//
// A person who can write the bucket, and has no secret, cannot make content that has the MAC of other content:
//
//   - Both keys are derived, by HKDF-SHA256, from the secret, a random salt for each upload, and the key of the object.
//     So the MACs of other objects, and of earlier uploads of the same one, are those of other keys.
//   - GMAC needs another nonce for each block under a key, and gets it, since each upload has a salt of its own. The
//     indexes in the nonce make a block valid at its place only. A changed block has the same GMAC with a probability
//     of less than 2^-115.
//   - The GMACs are not published. Only HMAC gets them, whose output does not reveal them. So GMAC's key would stay
//     secret even if a nonce was used twice, for a file that changed while it was read.
//   - The HMAC covers the number and the order of the blocks, the length, and the index of the piece. A guess at its
//     128 bits is right with a probability of 2^-128, and each guess takes a download.
//
// A person who knows the secret can make other content with the same MAC, which a SHA-256 would show.
type MAC [16]byte

// MarshalText implements [encoding.TextMarshaler].
func (m MAC) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, m[:]), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (m *MAC) UnmarshalText(text []byte) error {
	if len(text) != 2*len(m) {
		return fmt.Errorf("%.80q is not a MAC of %d bytes", text, len(m))
	}
	if _, err := hex.Decode(m[:], text); err != nil {
		return fmt.Errorf("%.80q is not a MAC: %w", text, err)
	}
	return nil
}

// newSalt returns a random salt.
func newSalt() []byte {
	salt := make([]byte, saltSize)
	rand.Read(salt) // never fails
	return salt
}

// macKeys are the keys of the MACs of one object's pieces. Several goroutines may use them.
type macKeys struct {
	gcm   cipher.AEAD // for blocks
	outer []byte      // of the HMAC
}

// newMACKeys derives the keys for an object.
func newMACKeys(secret, salt []byte, key string) (*macKeys, error) {
	const size = 32 // bytes of each of the two keys
	derived, err := hkdf.Key(sha256.New, secret, salt, macPurpose+key, 2*size)
	if err != nil {
		return nil, fmt.Errorf("deriving the keys of object %s: %w", key, err)
	}
	block, err := aes.NewCipher(derived[:size])
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	return &macKeys{gcm, derived[size:]}, err
}

// pieceMAC computes the MAC of a piece that is written to it. It has at most macBlock bytes of the piece in memory.
type pieceMAC struct {
	keys   *macKeys
	outer  hash.Hash
	nonce  [12]byte // the index of the piece in 4 bytes, and that of the next block in 8
	blocks uint64
	length uint64 // bytes of the piece so far
	rest   []byte // begins a block that is not complete
	gmac   []byte // of the last block
}

// piece returns a pieceMAC for the piece with an index.
func (k *macKeys) piece(i int) *pieceMAC {
	m := &pieceMAC{keys: k, outer: hmac.New(sha256.New, k.outer)}
	binary.BigEndian.PutUint32(m.nonce[:], uint32(i))
	m.outer.Write(m.nonce[:4])
	return m
}

// Write implements [io.Writer] and does not fail. The MAC does not depend on how the piece is divided among calls;
// whole blocks are not copied.
func (m *pieceMAC) Write(p []byte) (int, error) {
	n := len(p)
	m.length += uint64(n)
	if len(m.rest) > 0 {
		fill := min(macBlock-len(m.rest), len(p))
		m.rest, p = append(m.rest, p[:fill]...), p[fill:]
		if len(m.rest) == macBlock {
			m.block(m.rest)
			m.rest = m.rest[:0]
		}
	}
	for ; len(p) >= macBlock; p = p[macBlock:] {
		m.block(p[:macBlock])
	}
	m.rest = append(m.rest, p...)
	return n, nil
}

// block adds the GMAC of the next block.
func (m *pieceMAC) block(data []byte) {
	binary.BigEndian.PutUint64(m.nonce[4:], m.blocks)
	m.blocks++
	m.gmac = m.keys.gcm.Seal(m.gmac[:0], m.nonce[:], nil, data)
	m.outer.Write(m.gmac)
}

// mac ends the piece and returns its MAC.
func (m *pieceMAC) mac() MAC {
	if len(m.rest) > 0 {
		m.block(m.rest)
	}
	m.outer.Write(binary.BigEndian.AppendUint64(nil, m.length))
	return MAC(m.outer.Sum(nil)) // its first half
}

// verifier verifies the pieces of an object, by their MACs if it has keys, and else by their SHA-256.
type verifier struct {
	pieces Pieces
	keys   *macKeys // nil without MACs
}

// verifier returns a verifier for an object of size bytes. It returns [ErrDamaged] if p cannot describe such an object.
func (p Pieces) verifier(key string, size int64, secret []byte) (*verifier, error) {
	v := &verifier{pieces: p}
	hasMACs := len(p.MACs) > 0 || len(p.Salt) > 0
	if n := pieces(size); size < 0 || hasMACs && (int64(len(p.MACs)) != n || len(p.Salt) != saltSize) ||
		(!hasMACs || len(p.Sums) > 0) && int64(len(p.Sums)) != n {
		return nil, fmt.Errorf("object %s: %d sums and %d MACs of %d bytes: %w", key, len(p.Sums), len(p.MACs), size,
			ErrDamaged)
	}
	if !hasMACs {
		return v, nil
	}
	var err error
	v.keys, err = newMACKeys(secret, p.Salt, key)
	return v, err
}

// Verify returns [ErrDamaged] if p, which describes the object of a key, does not describe the first size bytes of f.
func (p Pieces) Verify(ctx context.Context, key string, f io.ReaderAt, size int64, secret []byte) error {
	v, err := p.verifier(key, size, secret)
	if err != nil {
		return err
	}
	buf := make([]byte, bufferSize)
	for i := range int(pieces(size)) {
		content, ok := v.piece(i)
		body := pieceOf(f, size, i)
		n, err := io.CopyBuffer(struct{ io.Writer }{content}, onlyReader{ctx, body}, buf)
		if err != nil {
			return fmt.Errorf("reading the file of object %s: %w", key, err)
		}
		if n < body.Size() || !ok() {
			return fmt.Errorf("piece %d of object %s: %w", i, key, ErrDamaged)
		}
	}
	return nil
}

// piece returns a writer for the content of a piece, and a function that reports whether it was the right content.
func (v *verifier) piece(i int) (content io.Writer, ok func() bool) {
	if v.keys == nil {
		sum := sha256.New()
		return sum, func() bool { return Sum(sum.Sum(nil)) == v.pieces.Sums[i] }
	}
	m := v.keys.piece(i)
	return m, func() bool {
		mac := m.mac()
		return hmac.Equal(mac[:], v.pieces.MACs[i][:])
	}
}
