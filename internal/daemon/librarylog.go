package daemon

import (
	"bytes"
	"fmt"
	"log"
	"log/slog"
)

// maxLibraryLine limits a log line of a library, in bytes. Without it a server inside a sandbox could fill the log,
// since net/http quotes up to 64 KiB of an unsolicited response at every connection; with much less, lines lose their
// end.
const maxLibraryLine = 512

// libraryLog logs the lines that libraries write with package log, which has no levels, at the level debug.
type libraryLog struct{ log *slog.Logger }

// Write implements [io.Writer]. It logs each call as one line.
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
