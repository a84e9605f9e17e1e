package api

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
)

// sendResult answers with the result of a command. It writes the output from the pieces that hold
// it and gives up each piece after writing it, so that there is never a second copy.
func (s *server) sendResult(w http.ResponseWriter, r *http.Request, result agentapi.ExecuteResult,
	stdout, stderr *budget.Bytes) {
	head, err := json.Marshal(endOf(result))
	if err != nil {
		s.fail(w, r, err)
		return
	}
	out := bufio.NewWriterSize(&answerBegin{w: w}, int(min(int64(piece), 1<<10+2*(stdout.Len()+stderr.Len()))))
	_, err = out.Write(head[:len(head)-1]) // without the closing brace
	if err == nil {
		err = writeOutputField(out, "stdout", stdout, result.StdoutTruncated)
	}
	if err == nil {
		err = writeOutputField(out, "stderr", stderr, result.StderrTruncated)
	}
	if err == nil {
		_, err = out.WriteString("}\n")
	}
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		// The caller has left; the answer cannot be repaired.
		callOf(r).Err = err
	}
}

// resultEnd is ExecuteResult without its outputs.
type resultEnd struct {
	DurationMs      int64   `json:"duration_ms"`
	ExitCode        int     `json:"exit_code"`
	OOMKilled       bool    `json:"oom_killed"`
	Signal          *string `json:"signal,omitempty"`
	StderrTruncated bool    `json:"stderr_truncated"`
	StdoutTruncated bool    `json:"stdout_truncated"`
	TimedOut        bool    `json:"timed_out"`
}

func endOf(r agentapi.ExecuteResult) resultEnd {
	out := resultEnd{ExitCode: r.ExitCode, StdoutTruncated: r.StdoutTruncated, StderrTruncated: r.StderrTruncated,
		DurationMs: r.Duration.Milliseconds(), TimedOut: r.TimedOut, OOMKilled: r.OOMKilled}
	if r.Signal != 0 {
		out.Signal = new(signalName(r.Signal))
	}
	return out
}

// writeOutputField writes an output as a field of JSON: unchanged if it is UTF-8, else in base64.
// If the output was cut in the middle of a character, the incomplete character is dropped; it does
// not make the text binary.
func writeOutputField(out *bufio.Writer, name string, b *budget.Bytes, cut bool) error {
	isText, tail := textOf(b)
	if tail > 0 && !cut {
		isText = false
	}
	if _, err := out.WriteString(`,"` + name + `":"`); err != nil {
		return err
	}
	if isText {
		left := b.Len() - int64(tail)
		for p := b.Next(); p != nil; p = b.Next() {
			p = p[:min(int64(len(p)), left)]
			left -= int64(len(p))
			if err := writeEscaped(out, p); err != nil {
				return err
			}
		}
		return out.WriteByte('"')
	}
	enc := base64.NewEncoder(base64.StdEncoding, out)
	for p := b.Next(); p != nil; p = b.Next() {
		if _, err := enc.Write(p); err != nil {
			return err
		}
	}
	if err := enc.Close(); err != nil {
		return err
	}
	_, err := out.WriteString(`","` + name + `_encoding":"` + string(ExecuteResultStdoutEncodingBase64) + `"`)
	return err
}

// textOf reports whether the bytes are UTF-8, apart from tail bytes at the end that begin a
// character.
func textOf(b *budget.Bytes) (ok bool, tail int) {
	var held [utf8.UTFMax]byte // the incomplete character at the end of a piece
	for _, p := range b.Pieces() {
		for tail > 0 && len(p) > 0 {
			held[tail] = p[0]
			tail, p = tail+1, p[1:]
			if utf8.FullRune(held[:tail]) {
				if !utf8.Valid(held[:tail]) {
					return false, 0
				}
				tail = 0
			}
		}
		rest := agentapi.IncompleteTail(p)
		if !utf8.Valid(p[:len(p)-rest]) {
			return false, 0
		}
		if rest > 0 {
			tail = copy(held[:], p[len(p)-rest:])
		}
	}
	return true, tail
}

const hexDigits = "0123456789abcdef"

// writeEscaped writes text, which is UTF-8 or a part of it, into a JSON string.
func writeEscaped(out *bufio.Writer, p []byte) error {
	for len(p) > 0 {
		n := 0
		for n < len(p) && p[n] >= ' ' && p[n] != '"' && p[n] != '\\' {
			n++
		}
		if _, err := out.Write(p[:n]); err != nil {
			return err
		}
		if p = p[n:]; len(p) == 0 {
			break
		}
		escaped := []byte{'\\', p[0]}
		switch c := p[0]; c {
		case '"', '\\':
		case '\n':
			escaped[1] = 'n'
		case '\r':
			escaped[1] = 'r'
		case '\t':
			escaped[1] = 't'
		default:
			escaped = []byte{'\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&0xf]}
		}
		if _, err := out.Write(escaped); err != nil {
			return err
		}
		p = p[1:]
	}
	return nil
}
