package objects

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

// testSecret is the secret of the MACs of tests.
var testSecret = []byte("a secret of thirty-two bytes, or")

// testContent returns n bytes of which no two blocks are equal.
func testContent(n int) []byte {
	content := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(content)
	return content
}

// macOf returns the MAC of a piece, whose content is written in pieces of step bytes.
func macOf(t *testing.T, secret, salt []byte, key string, piece int, content []byte, step int) MAC {
	t.Helper()
	keys, err := newMACKeys(secret, salt, key)
	if err != nil {
		t.Fatal(err)
	}
	m := keys.piece(piece)
	for some := range slices.Chunk(content, step) {
		if n, err := m.Write(some); n != len(some) || err != nil {
			t.Fatalf("writing %d bytes: %d, %v", len(some), n, err)
		}
	}
	return m.mac()
}

// definedMAC returns the MAC of a piece as the comment of MAC defines it, computed from the whole piece.
func definedMAC(t *testing.T, secret, salt []byte, key string, piece uint32, content []byte) MAC {
	t.Helper()
	derived, err := hkdf.Key(sha256.New, secret, salt, "cay pieces of an object\n"+key, 64)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(derived[:32])
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	data := binary.BigEndian.AppendUint32(nil, piece)
	for i := 0; i*65536 < len(content); i++ {
		nonce := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, piece), uint64(i))
		data = gcm.Seal(data, nonce, nil, content[i*65536:min(len(content), (i+1)*65536)])
	}
	outer := hmac.New(sha256.New, derived[32:])
	outer.Write(binary.BigEndian.AppendUint64(data, uint64(len(content))))
	return MAC(outer.Sum(nil)[:16])
}

// TestMACIsAsDefined compares MACs with their definition, however a piece is divided. Another definition would make the
// copies in a bucket look damaged.
func TestMACIsAsDefined(t *testing.T) {
	salt := bytes.Repeat([]byte{7}, saltSize)
	for _, n := range []int{0, 1, macBlock - 1, macBlock, macBlock + 1, 5*macBlock + 100} {
		content := testContent(n)
		want := definedMAC(t, testSecret, salt, "a/b", 3, content)
		for _, step := range []int{1, 1000, macBlock - 1, macBlock, macBlock + 1, bufferSize, bufferSize + 1} {
			if got := macOf(t, testSecret, salt, "a/b", 3, content, step); got != want {
				t.Errorf("%d bytes, %d at once: %x, want %x", n, step, got, want)
			}
		}
	}
	// Another implementation of HKDF, AES-256-GCM and HMAC computed these.
	for n, want := range map[int]string{
		0: "095ae073b19b22bae0baff3c2ad580e2", 200_000: "8222f0b5ab88665f63a43073d4c1c3c6",
	} {
		content := make([]byte, n)
		for i := range content {
			content[i] = byte(i % 251)
		}
		got, err := macOf(t, testSecret, salt, "a/b", 3, content, bufferSize).MarshalText()
		if err != nil || string(got) != want {
			t.Errorf("%d bytes: %s, %v, want %s", n, got, err, want)
		}
	}
}

// TestMACsDiffer changes all that a MAC depends on.
func TestMACsDiffer(t *testing.T) {
	const n = 3*macBlock + 100
	content, salt := testContent(n), testContent(saltSize)
	type input struct {
		secret, salt []byte
		key          string
		piece        int
		content      []byte
	}
	with := func(change func(content []byte) []byte) input {
		return input{testSecret, salt, "a", 1, change(bytes.Clone(content))}
	}
	inputs := map[string]input{
		"the piece":          {testSecret, salt, "a", 1, content},
		"another secret":     {testSecret[1:], salt, "a", 1, content},
		"another salt":       {testSecret, testSecret, "a", 1, content},
		"another object":     {testSecret, salt, "b", 1, content},
		"another index":      {testSecret, salt, "a", 2, content},
		"no content":         {testSecret, salt, "a", 1, nil},
		"a byte less":        with(func(c []byte) []byte { return c[:n-1] }),
		"a byte more":        with(func(c []byte) []byte { return append(c, 0) }),
		"two bytes more":     with(func(c []byte) []byte { return append(c, 0, 0) }),
		"its whole blocks":   with(func(c []byte) []byte { return c[:3*macBlock] }),
		"a block less":       with(func(c []byte) []byte { return c[:2*macBlock] }),
		"without its start":  with(func(c []byte) []byte { return c[macBlock:] }),
		"a block of zeros":   with(func(c []byte) []byte { clear(c[:macBlock]); return c }),
		"a block twice":      with(func(c []byte) []byte { copy(c[macBlock:], c[:macBlock]); return c }),
		"the first bit":      with(func(c []byte) []byte { c[0] ^= 0x80; return c }),
		"a bit in its midst": with(func(c []byte) []byte { c[2*macBlock-1] ^= 1; return c }),
		"the last bit":       with(func(c []byte) []byte { c[n-1] ^= 1; return c }),
		"swapped blocks": with(func(c []byte) []byte {
			return slices.Concat(c[macBlock:2*macBlock], c[:macBlock], c[2*macBlock:])
		}),
	}
	names := map[MAC]string{}
	for name, in := range inputs {
		mac := macOf(t, in.secret, in.salt, in.key, in.piece, in.content, bufferSize)
		if other, taken := names[mac]; taken {
			t.Errorf("%s has the MAC of %s", name, other)
		}
		names[mac] = name
	}
}

// TestMACsAreParsed decodes descriptions of pieces.
func TestMACsAreParsed(t *testing.T) {
	p := Pieces{Sums: []Sum{{1}}, Salt: []byte{2}, MACs: []MAC{{3}, {0xff}}}
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var back Pieces
	if err := json.Unmarshal(text, &back); err != nil || !slices.Equal(back.Sums, p.Sums) ||
		!slices.Equal(back.Salt, p.Salt) || !slices.Equal(back.MACs, p.MACs) {
		t.Errorf("%s is decoded to %v, %v; want %v", text, back, err, p)
	}
	for _, text := range []string{`[""]`, `["00"]`, `["` + string(bytes.Repeat([]byte("0"), 34)) + `"]`,
		`["` + string(bytes.Repeat([]byte("g"), 32)) + `"]`, `[7]`} {
		if err := json.Unmarshal([]byte(text), &back.MACs); err == nil {
			t.Errorf("%s was decoded", text)
		}
	}
}

// TestPiecesStayInPlace writes a bucket as a person could who has the right to, with content that was uploaded, but in
// another place. No download may take it for its own.
func TestPiecesStayInPlace(t *testing.T) {
	b, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	transfer := NewTransfer(b)
	const size = 3 * minPart
	f, _ := testFile(t, size)
	p, err := transfer.UploadPieces(t.Context(), "a", f, size, testSecret)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, size)
	if _, err := f.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	reordered := slices.Concat(content[minPart:2*minPart], content[:minPart], content[2*minPart:])
	changed := slices.Concat(content[:size-1], []byte{content[size-1] ^ 1})
	ofOther, err := transfer.UploadPieces(t.Context(), "b", f, size, testSecret)
	if err != nil {
		t.Fatal(err)
	}
	swapped := Pieces{Salt: p.Salt, MACs: slices.Clone(p.MACs)}
	swapped.MACs[0], swapped.MACs[1] = p.MACs[1], p.MACs[0]
	for name, c := range map[string]struct {
		object []byte
		pieces Pieces
	}{
		"unchanged":                   {content, p},
		"swapped pieces":              {reordered, p},
		"swapped pieces and MACs":     {reordered, swapped},
		"a piece twice":               {slices.Concat(content[:minPart], content[:minPart], content[2*minPart:]), p},
		"a flipped bit":               {changed, p},
		"a byte less":                 {content[:size-1], p},
		"a piece less":                {content[:2*minPart], p},
		"a byte more":                 {slices.Concat(content, []byte{0}), p},
		"a piece more":                {slices.Concat(content, content[:minPart]), p},
		"the MACs of another object":  {content, Pieces{Salt: p.Salt, MACs: ofOther.MACs}},
		"and the salt of that object": {content, ofOther},
	} {
		if _, err := b.Put(t.Context(), "a", section(c.object), sha256.Sum256(c.object), Condition{}); err != nil {
			t.Fatal(err)
		}
		err := transfer.DownloadPieces(t.Context(), "a", emptyFile(t), size, c.pieces, testSecret, 0)
		if name == "unchanged" && err != nil || name != "unchanged" && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
