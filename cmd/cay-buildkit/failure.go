package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"regexp"

	"github.com/moby/buildkit/solver/errdefs"
	llberrdefs "github.com/moby/buildkit/solver/llbsolver/errdefs"
	"github.com/moby/buildkit/sourcepolicy/policysession"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// failedError is a failure with a text for the user.
type failedError struct{ *wire.Failure }

func (e *failedError) Error() string { return e.Message }

// explain converts the solver's error to one for the user.
func (b *build) explain(ctx context.Context, err error, p *progress) error {
	// The error holds snapshots for debugging, which are not used.
	if held, ok := errors.AsType[*llberrdefs.ExecError](err); ok {
		defer held.Release()
	}
	if _, ok := errors.AsType[*failedError](err); ok {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	f := &wire.Failure{Kind: wire.Internal, ExitCode: -1, Message: plain(err)}
	if sources := errdefs.Sources(err); len(sources) > 0 {
		last := sources[len(sources)-1]
		where := quote(last.Info, last.Ranges)
		f.Kind, f.Step, f.Line = wire.Dockerfile, where.text, where.line
	}
	if v, ok := errors.AsType[*errdefs.VertexError](err); ok {
		if where := b.places[p.name(v.Digest)]; where.line > 0 {
			f.Kind, f.Step, f.Line = wire.Step, where.text, where.line
		}
	}
	if _, ok := errors.AsType[*machineError](err); ok {
		f.Kind = wire.Internal
	}
	s, ofStep := errors.AsType[*stepError](err)
	if stopped, ok := errors.AsType[*stepError](context.Cause(ctx)); ok {
		s, ofStep = stopped, true // it concerns the whole build
	} else if !ofStep && isFull(err) {
		errors.As(b.disk.exceeded(), &s)
		ofStep = true
	}
	if ofStep {
		if where := b.places[p.at()]; f.Line == 0 && where.line > 0 {
			f.Step, f.Line = where.text, where.line
		}
		f.Kind, f.ExitCode, f.Message, f.Tail = s.kind, s.code, s.text, s.tail
	}
	if denied := policysession.DenyMessages(err); len(denied) > 0 {
		f.Kind, f.Message = wire.Dockerfile, denied[0].Message
	}
	if b.missing != "" {
		f.Kind, f.Message = wire.Base, b.missing
	}
	return &failedError{f}
}

// machinery matches parts of an error about BuildKit's internals, which do not help users.
var machinery = regexp.MustCompile(
	`failed to (solve|compute cache key|load cache key|calculate checksum of ref [^ ]+|walk [^:]*|process "[^"]*"): |` +
		`rpc error: code = \w+ desc = |dockerfile parse error on line \d+: `)

func plain(err error) string { return machinery.ReplaceAllString(err.Error(), "") }

// decode decodes an answer of the exporter, JSON in base64.
func decode(text string, to any) error {
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, to)
}

// failureOf returns the failure to report for any error.
func failureOf(err error) *wire.Failure {
	if f, ok := errors.AsType[*failedError](err); ok {
		f.Message = wire.Short(f.Message)
		return f.Failure
	}
	return &wire.Failure{Kind: wire.Internal, ExitCode: -1, Message: wire.Short(err.Error())}
}
