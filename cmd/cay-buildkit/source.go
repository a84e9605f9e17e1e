package main

import (
	"context"
	"fmt"
	"strings"

	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/pb"
	digest "github.com/opencontainers/go-digest"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// frontEnd converts a Dockerfile to definitions and has them solved. The build checks each
// definition first.
func (e *engine) frontEnd(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
	b, ok := e.builds.Load(c.BuildOpts().SessionID)
	if !ok {
		return nil, fmt.Errorf("session %s is of no build", c.BuildOpts().SessionID)
	}
	return dockerfile.Build(ctx, &watched{Client: c, build: b.(*build)})
}

type watched struct {
	gateway.Client
	build *build
}

// Solve solves a definition that has nothing forbidden in it.
func (w *watched) Solve(ctx context.Context, r gateway.SolveRequest) (*gateway.Result, error) {
	if r.Definition != nil {
		if err := w.build.look(r.Definition); err != nil {
			return nil, err
		}
	}
	return w.Client.Solve(ctx, r)
}

// place is the place of a step in the Dockerfile.
type place struct {
	text string
	line int
}

// look records the place of each step of a definition, and refuses what leads out of the sandbox.
// The solver knows steps by digests, which change when the policy replaces their sources; names
// stay.
func (b *build) look(def *pb.Definition) error {
	places := map[string]place{} // by digest
	ops := map[string]*pb.Op{}
	for _, data := range def.Def {
		op := &pb.Op{}
		if err := op.UnmarshalVT(data); err != nil {
			return fmt.Errorf("reading a definition: %w", err)
		}
		d := digest.FromBytes(data).String()
		ops[d], places[d] = op, placeOf(def.Source, d)
		for _, in := range op.Inputs {
			if places[in.Digest].line == 0 {
				places[in.Digest] = places[d] // what ADD fetches has the place of the ADD
			}
		}
		if meta := def.Metadata[d]; meta != nil && places[d].line > 0 {
			b.mu.Lock()
			b.places[meta.Description[customName]] = places[d]
			b.mu.Unlock()
		}
	}
	for d, op := range ops {
		why := forbidden(op.GetExec())
		if from := op.GetSource(); from != nil && why == "" {
			why = b.forbiddenSource(from)
		}
		if why != "" {
			return &failedError{&wire.Failure{Kind: wire.Dockerfile, Step: places[d].text, Line: places[d].line, ExitCode: -1,
				Message: why}}
		}
	}
	return nil
}

// customName is the key of the front end's name for a step.
const customName = "llb.customname"

// forbidden returns the reason why a step may not be run, "" if it may.
func forbidden(e *pb.ExecOp) string {
	switch {
	case e == nil:
		return ""
	case e.Network == pb.NetMode_HOST:
		return "--network=host is not permitted: a step has a network of its own"
	case e.Security == pb.SecurityMode_INSECURE:
		return "--security=insecure is not permitted"
	case len(e.CdiDevices) > 0:
		return "--device is not permitted"
	}
	return ""
}

// forbiddenSource returns the reason why a source may not be used, "" if it may.
func (b *build) forbiddenSource(s *pb.SourceOp) string {
	scheme, _, _ := strings.Cut(s.Identifier, "://")
	switch scheme {
	case "local", "http", "https", "docker-image":
		return ""
	case "oci-layout":
		if s.Attrs[pb.AttrOCILayoutSessionID] != b.session {
			return "images come from the server only"
		}
		return "" // an image from the policy
	case "git":
		if b.engine.worker.GitSource == nil {
			return "adding a git repository needs the program git on the server, which is not there"
		}
		// Other URLs would be opened as the server's own user, with its keys.
		if url := s.Attrs[pb.AttrFullRemoteURL]; !strings.HasPrefix(url, "https://") && !strings.HasPrefix(url, "http://") {
			return "git repositories are added from https:// and http:// only"
		}
		return ""
	}
	return scheme + " sources are not supported"
}

func placeOf(s *pb.Source, d string) place {
	locations := s.GetLocations()[d].GetLocations()
	if len(locations) == 0 {
		return place{}
	}
	last := locations[len(locations)-1]
	if i := int(last.SourceIndex); i >= 0 && i < len(s.Infos) {
		return quote(s.Infos[i], last.Ranges)
	}
	return place{}
}

// maxQuote is the number of bytes of a step that are quoted.
const maxQuote = 400

// quote returns the text of the Dockerfile in the ranges, one a line, and the place where it
// begins.
func quote(source *pb.SourceInfo, ranges []*pb.Range) place {
	if source == nil {
		return place{}
	}
	lines := strings.Split(string(source.Data), "\n")
	from, to := len(lines)+1, 0
	for _, r := range ranges {
		from, to = min(from, int(r.GetStart().GetLine())), max(to, int(r.GetEnd().GetLine()))
	}
	if from < 1 || from > len(lines) {
		return place{}
	}
	to = min(max(to, from), len(lines))
	text := strings.TrimSpace(strings.Join(lines[from-1:to], "\n"))
	if len(text) > maxQuote {
		text = strings.ToValidUTF8(text[:maxQuote], "") + " …"
	}
	return place{text, from}
}
