package agentapi

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func FuzzReadFrame(f *testing.F) {
	for _, frame := range []Frame{{Stdout, 7, []byte("out")}, {Stderr, 0, []byte{}}, LostFrame(0, 9),
		EndFrame(1, []byte("{}")), IdleFrame()} {
		var b bytes.Buffer
		if _, err := frame.WriteTo(&b); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, err := readFrame(bytes.NewReader(b))
		if err != nil {
			return
		}
		if len(frame.Payload) > maxFrame || frame.Offset < 0 || frame.Kind == frameLost && frame.lost() <= 0 {
			t.Fatalf("took %+v", frame)
		}
		var again bytes.Buffer
		if _, err := frame.WriteTo(&again); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Errorf("%x became %x", b, again.Bytes())
		}
		second, err := readFrame(&again)
		if diff := cmp.Diff(frame, second); err != nil || diff != "" {
			t.Errorf("read again: %v\n%s", err, diff)
		}
	})
}

func TestIncompleteTail(t *testing.T) {
	for text, want := range map[string]int{"": 0, "a": 0, "€": 0, "a\xe2": 1, "a\xe2\x82": 2, "\xf0\x9f\x98": 3,
		"\xff": 0, "\x80\x80\x80\x80": 0, "\xc3": 1, "é\x80": 0} {
		if got := IncompleteTail([]byte(text)); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
