package wire

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func pair(t testing.TB) (*Conn, *Conn) {
	t.Helper()
	here, file, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	there, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { here.Close(); there.Close() })
	return here, there
}

// TestMessages sends messages with and without files from several goroutines. Each arrives whole,
// with its own file.
func TestMessages(t *testing.T) {
	here, there := pair(t)
	dir := t.TempDir()
	names := []string{"a", "b", "c", "d"}
	var sending sync.WaitGroup
	for _, name := range names {
		sending.Go(func() {
			f, err := os.Create(filepath.Join(dir, name))
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			if err := errors.Join(here.Send(Answer{Name: name, Error: strings.Repeat("x", 100<<10)}, f),
				here.Send(Answer{Name: "none"}, nil)); err != nil {
				t.Error(err)
			}
		})
	}
	got := map[string]int{}
	for range 2 * len(names) {
		var a Answer
		f, err := there.Receive(&a)
		if err != nil {
			t.Fatal(err)
		}
		got[a.Name]++
		if (f != nil) != (a.Name != "none") {
			t.Fatalf("%s came with the file %v", a.Name, f)
		}
		if f == nil {
			continue
		}
		to, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
		if err != nil || filepath.Base(to) != a.Name {
			t.Errorf("%s came with %s, %v", a.Name, to, err)
		}
		if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("the file of %s stays open in programs: %v", a.Name, err)
		}
		f.Close()
	}
	sending.Wait()
	if diff := cmp.Diff(map[string]int{"a": 1, "b": 1, "c": 1, "d": 1, "none": 4}, got); diff != "" {
		t.Error(diff)
	}
}

// TestEnds checks that after a Hangup the other direction works, and that after a Close nothing
// does.
func TestEnds(t *testing.T) {
	here, there := pair(t)
	if err := here.Hangup(); err != nil {
		t.Fatal(err)
	}
	var a Answer
	if _, err := there.Receive(&a); !errors.Is(err, io.EOF) {
		t.Errorf("after a hangup: %v", err)
	}
	if err := there.Send(Answer{Name: "last"}, nil); err != nil {
		t.Error(err)
	}
	if _, err := here.Receive(&a); err != nil || a.Name != "last" {
		t.Errorf("got %v, %v", a, err)
	}
	there.Close()
	if _, err := here.Receive(&a); !errors.Is(err, io.EOF) {
		t.Errorf("after a close: %v", err)
	}
}

// TestTooLong checks that Send refuses messages that the other end could not receive.
func TestTooLong(t *testing.T) {
	here, there := pair(t)
	if err := here.Send(Answer{Name: strings.Repeat("x", MaxMessage)}, nil); err == nil ||
		!strings.Contains(err.Error(), "too long") {
		t.Errorf("got %v", err)
	}
	if err := here.Send(Answer{Name: strings.Repeat("x", MaxMessage-100)}, nil); err != nil {
		t.Error(err)
	}
	var a Answer
	if _, err := there.Receive(&a); err != nil || len(a.Name) != MaxMessage-100 {
		t.Errorf("got %d bytes, %v", len(a.Name), err)
	}
}

// FuzzReceive sends any message. Receive must report what is wrong, and leave no file open.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"build":{"context":"/x","args":{"A":"b"}}}`))
	f.Add([]byte(`{"event":{"kind":"log","text":"\u0000"}}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > MaxMessage {
			return
		}
		here, there := pair(t)
		if _, err := here.socket.Write(data); err != nil {
			t.Fatal(err)
		}
		var r Report
		if file, err := there.Receive(&r); file != nil || errors.Is(err, io.EOF) {
			t.Errorf("got %v, %v", file, err)
		}
	})
}
