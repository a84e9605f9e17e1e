package main

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// TestLastMessage checks that the last error of a log is found at its end, however long the log is.
func TestLastMessage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "runsc.log")
	if got := lastMessage(file); got != "" {
		t.Errorf("of no log: %q", got)
	}
	const long = 64 << 20 // in a sparse file
	for _, from := range []int64{0, long} {
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		text := "the rest of a line\n" + `{"level":"error","msg":"the reason"}` + "\n" +
			`{"level":"info","msg":"more"}` + "\n"
		if _, err := f.WriteAt([]byte(text), from); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got := lastMessage(file)
		runtime.ReadMemStats(&after)
		if held := after.TotalAlloc - before.TotalAlloc; got != "the reason" || held > 8*mostLog {
			t.Errorf("of a log of %d bytes: %q, with %d bytes of memory", from+int64(len(text)), got, held)
		}
	}
}
