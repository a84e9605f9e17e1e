package daemon

import (
	"bytes"
	"log"
	"log/slog"
	"os"
	"strings"
	"testing"
)

// TestLibrariesCannotFillTheLog logs a long line of a library, as net/http does with what a sandbox sends.
func TestLibrariesCannotFillTheLog(t *testing.T) {
	defer log.SetFlags(log.Flags())
	defer log.SetOutput(os.Stderr)
	for level, most := range map[slog.Level]int{slog.LevelInfo: 0, slog.LevelDebug: 1 << 10} {
		var out bytes.Buffer
		catchLibraries(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level})))
		log.Printf("Unsolicited response starting with %q", strings.Repeat("x", 64<<10))
		if out.Len() > most || most > 0 && !strings.Contains(out.String(), "Unsolicited") {
			t.Errorf("at level %s the log gets %d bytes, at most it may %d: %.200s", level, out.Len(), most, out.String())
		}
	}
}
