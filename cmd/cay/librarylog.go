package main

import (
	"bytes"
	"fmt"
	"log"
	"log/slog"
)

// maxLibraryLine is how much of a line of a library's is logged, bytes. net/http quotes up to 64 KiB that a
// server inside a sandbox sends unasked, at every connection.
const maxLibraryLine = 512

// libraryLog takes what libraries write with package log, which knows no levels: for those who look closely.
type libraryLog struct{ log *slog.Logger }

// Write implements [io.Writer]: a call is a line.
func (l libraryLog) Write(b []byte) (int, error) {
	line := bytes.TrimRight(b, "\n")
	if len(line) > maxLibraryLine {
		line = fmt.Appendf(line[:maxLibraryLine:maxLibraryLine], "… (%d bytes)", len(b))
	}
	l.log.Debug("said a library", "line", string(line))
	return len(b), nil
}

// catchLibraries makes package log write to l.
func catchLibraries(l *slog.Logger) {
	log.SetFlags(0) // l has the time
	log.SetOutput(libraryLog{l})
}
