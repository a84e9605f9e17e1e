package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/moby/buildkit/solver/errdefs"
	llberrdefs "github.com/moby/buildkit/solver/llbsolver/errdefs"
	"github.com/moby/buildkit/sourcepolicy/policysession"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// failedError is a failure that is fit for the user.
type failedError struct{ *wire.Failure }

func (e *failedError) Error() string { return e.Message }

// explain makes of the solver's error what the user needs to know.
func (b *build) explain(err error) error {
	// The snapshots that the error holds for debugging are nobody's.
	if held, ok := errors.AsType[*llberrdefs.ExecError](err); ok {
		defer held.Release()
	}
	f := &wire.Failure{Kind: wire.Internal, ExitCode: -1, Message: plain(err)}
	sources := errdefs.Sources(err)
	if len(sources) > 0 {
		f.Kind = wire.Dockerfile
		f.Step, f.Line = quote(sources[len(sources)-1])
	}
	if _, ok := errors.AsType[*errdefs.VertexError](err); ok && f.Step != "" {
		f.Kind = wire.Step
	}
	if s, ok := errors.AsType[*stepError](err); ok {
		f.Kind, f.ExitCode, f.Message, f.Tail = s.kind, s.code, s.text, s.tail
	}
	if denied := policysession.DenyMessages(err); len(denied) > 0 {
		f.Kind, f.Message = wire.Dockerfile, denied[0].Message
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.missing != "" {
		f.Kind, f.Message = wire.Base, b.missing
	}
	return &failedError{f}
}

// What an error says of our machinery, and users have no use for.
var machinery = regexp.MustCompile(`failed to (solve|compute cache key|load cache key|calculate checksum of ref [^ ]+|walk [^:]*|process "[^"]*"): |rpc error: code = \w+ desc = |dockerfile parse error on line \d+: `)

func plain(err error) string { return machinery.ReplaceAllString(err.Error(), "") }

// maxQuote is how much of a step is quoted, in bytes.
const maxQuote = 400

// quote is what the Dockerfile says where an error comes from, and the line where that begins.
func quote(s *errdefs.Source) (text string, line int) {
	if s.Info == nil || len(s.Ranges) == 0 {
		return "", 0
	}
	lines := strings.Split(string(s.Info.Data), "\n")
	from, to := int(s.Ranges[0].Start.Line), int(s.Ranges[0].End.Line)
	if from < 1 || from > len(lines) {
		return "", 0
	}
	to = min(max(to, from), len(lines))
	text = strings.TrimSpace(strings.Join(lines[from-1:to], "\n"))
	if len(text) > maxQuote {
		text = strings.ToValidUTF8(text[:maxQuote], "") + " …"
	}
	return text, from
}

// decode reads what the exporter answers as JSON in base64.
func decode(text string, to any) error {
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, to)
}

// failureOf is what is reported of any error.
func failureOf(err error) *wire.Failure {
	if f, ok := errors.AsType[*failedError](err); ok {
		return f.Failure
	}
	return &wire.Failure{Kind: wire.Internal, ExitCode: -1, Message: fmt.Sprint(err)}
}
