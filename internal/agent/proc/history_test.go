package proc

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

func said(s agentapi.Stream, text string) *process.ProcessEvent {
	data := &process.DataEvent{}
	switch s {
	case agentapi.Stdout:
		data.Output = &process.DataEvent_Stdout{Stdout: []byte(text)}
	case agentapi.Stderr:
		data.Output = &process.DataEvent_Stderr{Stderr: []byte(text)}
	case agentapi.Terminal:
		data.Output = &process.DataEvent_Pty{Pty: []byte(text)}
	}
	return &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: data}}
}

// replay reads a history from an offset to its present end.
func replay(h *history, offset int64) (out, errs string, lost int64, pieces int) {
	for {
		s, data, gone, _ := h.read(offset)
		switch {
		case gone > 0:
			lost += gone
			offset += gone
			continue
		case len(data) == 0:
			return out, errs, lost, pieces
		case s == agentapi.Stderr:
			errs += string(data)
		default:
			out += string(data)
		}
		offset += int64(len(data))
		pieces++
	}
}

func TestHistoryKeepsOrderAndBounds(t *testing.T) {
	h := &history{limit: 1 << 20}
	h.take(said(agentapi.Stdout, "one"))
	h.take(said(agentapi.Stdout, "two"))
	h.take(said(agentapi.Stderr, "bad"))
	h.take(said(agentapi.Stdout, "three"))
	for _, c := range []struct {
		from      int64
		out, errs string
		pieces    int
	}{{0, "onetwothree", "bad", 3}, {4, "wothree", "bad", 3}, {7, "three", "ad", 2}, {13, "e", "", 1}, {14, "", "", 0}} {
		out, errs, lost, pieces := replay(h, c.from)
		if out != c.out || errs != c.errs || lost != 0 || pieces != c.pieces {
			t.Errorf("from %d: %q, %q, %d lost, in %d pieces; want %q, %q in %d",
				c.from, out, errs, lost, pieces, c.out, c.errs, c.pieces)
		}
	}
	if first, next := h.bounds(); first != 0 || next != 14 {
		t.Errorf("bounds %d to %d", first, next)
	}
}

func TestHistoryForgetsTheOldest(t *testing.T) {
	for name, step := range map[string]string{"large": strings.Repeat("0123456789abcdef", 4<<10), "small": "x"} {
		t.Run(name, func(t *testing.T) {
			h := &history{limit: 256 << 10}
			total := int64(0)
			for range max(40, (1<<20)/len(step)/64) {
				for _, s := range []agentapi.Stream{agentapi.Stdout, agentapi.Stderr} {
					h.take(said(s, step))
					total += int64(len(step))
				}
			}
			size := 0
			for _, p := range h.pieces {
				size += cap(p.data) + pieceCost/2
			}
			if size > 300<<10 {
				t.Errorf("%d pieces take %d bytes, want about %d", len(h.pieces), size, h.limit)
			}
			out, errs, lost, _ := replay(h, 0)
			if lost == 0 || lost+int64(len(out)+len(errs)) != total {
				t.Errorf("%d bytes are lost and %d there, of %d", lost, len(out)+len(errs), total)
			}
			if !strings.HasSuffix(errs, step) {
				t.Errorf("the end is %.20q", errs)
			}
			h.setLimit(leastHistory)
			if out, errs, more, _ := replay(h, 0); more <= lost || len(out)+len(errs) > leastHistory ||
				more+int64(len(out)+len(errs)) != total {
				t.Errorf("with less room %d bytes are lost, %d there", more, len(out)+len(errs))
			}
		})
	}
}

func TestHistoryDoesNotCutCharacters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &history{limit: 1 << 20}
		text := strings.Repeat("a€é😀", 20_000)
		for rest := []byte(text); len(rest) > 0; {
			n := min(len(rest), 1009)
			h.take(said(agentapi.Terminal, string(rest[:n])))
			rest = rest[n:]
		}
		var all []byte
		for offset := int64(0); ; {
			_, data, _, _ := h.read(offset)
			if len(data) == 0 {
				break
			}
			if !utf8.Valid(data) {
				t.Fatalf("a piece at %d is cut within a character", offset)
			}
			all = append(all, data...)
			offset += int64(len(data))
		}
		if !bytes.Equal(all, []byte(text)) {
			t.Errorf("%d bytes came of %d", len(all), len(text))
		}
		// The beginning of a character is released when its rest does not come in time.
		h = &history{limit: 1 << 20}
		h.take(said(agentapi.Stdout, "x\xe2\x82"))
		h.take(said(agentapi.Stderr, "y"))
		if out, errs, _, _ := replay(h, 0); out != "x" || errs != "y" {
			t.Errorf("%q and %q before the rest of the character", out, errs)
		}
		_, _, _, changed := h.read(2)
		time.Sleep(holdTime)
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("the waiting reader is not woken")
		}
		if out, _, _, _ := replay(h, 0); out != "x\xe2\x82" {
			t.Errorf("%q after a while", out)
		}
		h.take(said(agentapi.Stdout, "\xe2"))
		h.take(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.EndEvent{}}})
		if out, _, _, _ := replay(h, 0); out != "x\xe2\x82\xe2" {
			t.Errorf("%q at the end", out)
		}
		if _, _, _, changed := h.read(5); changed != nil {
			t.Error("a reader would wait for more after the end")
		}
	})
}
