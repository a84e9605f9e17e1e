package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
)

// TestReadStdin checks that cay reads nothing from standard input but pipes and files, and stops reading with ctx.
func TestReadStdin(t *testing.T) {
	read := func(ctx context.Context, in *os.File) (string, error) {
		b, err := (&app{in: in, err: io.Discard}).readStdin(ctx)
		return string(b), err
	}
	for name, open := range map[string]func() (*os.File, error){
		"device":    func() (*os.File, error) { return os.Open(os.DevNull) },
		"endless":   func() (*os.File, error) { return os.Open("/dev/zero") },
		"directory": func() (*os.File, error) { return os.Open(t.TempDir()) },
		"closed": func() (*os.File, error) {
			f, err := os.Open(os.DevNull)
			return f, errors.Join(err, f.Close())
		},
	} {
		f, err := open()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := read(t.Context(), f); got != "" || err != nil {
			t.Errorf("%s: read %d bytes, %v; want nothing", name, len(got), err)
		}
		if name != "closed" {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	// A pipe that stays open is not waited for once ctx ends.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := read(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("a pipe that does not end: %v", err)
	}
}

func TestReadStdinPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	want := bytes.Repeat([]byte("some text\x00\xff\n"), 20_000)
	wrote := make(chan error, 1)
	go func() {
		_, err := w.Write(want)
		wrote <- errors.Join(err, w.Close())
	}()
	got, err := (&app{in: r, err: io.Discard}).readStdin(t.Context())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, len(want))
	}
	if err := <-wrote; err != nil {
		t.Error(err)
	}
}
