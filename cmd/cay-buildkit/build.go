package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/frontend"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/solver/llbsolver"
	"github.com/moby/buildkit/solver/pb"
	policypb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	digest "github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/cgroup"
)

const (
	frontendName = "dockerfile.v0"
	// layoutStore is the name, in a build's session, of the store of its images.
	layoutStore = "given"
)

// noRegistry returns no registry for an image that the policy lets through, so that none is
// reached.
func noRegistry(string) ([]docker.RegistryHost, error) {
	return nil, errors.New("images come from the server only")
}

// build is one build under way.
type build struct {
	engine  *engine
	disk    *disk
	use     *diskUse
	conn    *wire.Conn
	request *wire.Build
	layouts layouts
	session string

	mu sync.Mutex
	// +checklocks:mu
	bases map[string]*given // by the name requested
	// +checklocks:mu
	missing string // why an image was not given
	// +checklocks:mu
	places map[string]place // of steps, by the front end's names
}

// given is an image that was requested.
type given struct {
	done   chan struct{} // closed when answer is set
	answer wire.Answer
}

// run builds, and returns the digest and the descriptor of the image's manifest. It calls cancel,
// which ends ctx, when the connection ends.
func (b *build) run(ctx context.Context,
	cancel context.CancelCauseFunc) (manifest string, descriptor json.RawMessage, err error) {
	gone := make(chan struct{})
	b.layouts = layouts{conn: b.conn, gone: gone, waiting: map[int64]chan blobGift{}}
	go b.answers(cancel, gone)
	if err := b.checkSyntax(); err != nil {
		return "", nil, err
	}
	s, err := b.open(ctx)
	if err != nil {
		return "", nil, err
	}
	defer s.Close()
	b.session = s.ID()
	b.engine.builds.Store(b.session, b)
	defer b.engine.builds.Delete(b.session)
	exporter, err := b.exporter(ctx)
	if err != nil {
		return "", nil, err
	}
	id := identity.NewID()
	progress := newProgress(b.conn, func(name string) int {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.places[name].line
	})
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		statuses := make(chan *client.SolveStatus, 8)
		// The error of Solve says more than this one.
		go b.engine.solver.Status(context.WithoutCancel(ctx), id, statuses)
		progress.follow(statuses)
	}()
	done, err := b.engine.solver.Solve(ctx, id, s.ID(),
		frontend.SolveRequest{Frontend: frontendName, FrontendOpt: b.options()}, 0,
		exporter, nil, nil, true, nil, s.ID(), false)
	select {
	case <-followed:
	case <-time.After(lastEvents): // a solve that ended at once may never have been seen
	}
	if err == nil && b.disk.overran(b.use) {
		err = b.disk.exceeded()
	}
	if err != nil {
		return "", nil, b.explain(ctx, err, progress)
	}
	if err := decode(done.ExporterResponse[exptypes.ExporterImageDescriptorKey], &descriptor); err != nil {
		return "", nil, fmt.Errorf("reading the image's descriptor: %w", err)
	}
	return done.ExporterResponse[exptypes.ExporterImageDigestKey], descriptor, nil
}

// lastEvents is the time that the end of a build waits for its last events.
const lastEvents = 5 * time.Second

// answers passes on the server's answers until the connection ends, which cancels the build.
func (b *build) answers(cancel context.CancelCauseFunc, gone chan<- struct{}) {
	defer close(gone)
	for {
		var a wire.Answer
		file, err := b.conn.Receive(&a)
		if err != nil {
			cancel(errors.New("the build was cancelled"))
			return
		}
		if a.Blob > 0 {
			b.layouts.given(a, file)
			continue
		}
		b.mu.Lock()
		if asked := b.bases[a.Name]; asked != nil {
			asked.answer = a
			close(asked.done)
		}
		b.mu.Unlock()
	}
}

// checkSyntax refuses a Dockerfile for another front end than this one.
func (b *build) checkSyntax() error {
	root, err := os.OpenRoot(filepath.Join(contextsDir, b.request.Dockerfile))
	if err != nil {
		return fmt.Errorf("opening the Dockerfile: %w", err)
	}
	defer root.Close()
	text, err := root.ReadFile(b.request.Filename)
	if err != nil {
		return nil // the front end reports the error
	}
	ref, _, location, ok := parser.DetectSyntax(text)
	if !ok {
		return nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err == nil && (named.Name() == "docker.io/docker/dockerfile" ||
		named.Name() == "docker.io/docker/dockerfile-upstream") {
		if tagged, ok := named.(reference.Tagged); !ok || strings.HasPrefix(tagged.Tag(), "1") || tagged.Tag() == "latest" {
			return nil // this front end
		}
	}
	failure := &wire.Failure{Kind: wire.Dockerfile, ExitCode: -1, Step: "# syntax=" + ref,
		Message: fmt.Sprintf("the Dockerfile wants the front end %s; only docker/dockerfile:1 can be used, which is built in", ref)}
	if len(location) > 0 {
		failure.Line = location[0].Start.Line
	}
	return &failedError{failure}
}

// open makes the build's session, which has what BuildKit may ask for during the build.
func (b *build) open(ctx context.Context) (*session.Session, error) {
	// No other build has the key. BuildKit keeps the contexts of one key in one place, and copies
	// only what differs in size or date, which says nothing about two users' files.
	s, err := session.NewSession(ctx, identity.NewID())
	if err != nil {
		return nil, fmt.Errorf("making a session: %w", err)
	}
	contextFS, err := fsutil.NewFS(filepath.Join(contextsDir, b.request.Context))
	if err != nil {
		return nil, fmt.Errorf("opening the context: %w", err)
	}
	dockerfileFS, err := fsutil.NewFS(filepath.Join(contextsDir, b.request.Dockerfile))
	if err != nil {
		return nil, fmt.Errorf("opening the Dockerfile: %w", err)
	}
	out := &output{conn: b.conn, blobs: b.engine.blobs}
	s.Allow(filesync.NewFSSyncProvider(filesync.StaticDirSource{"context": contextFS, "dockerfile": dockerfileFS}, nil))
	s.Allow(sessioncontent.NewAttachable(map[string]content.Store{"oci:" + layoutStore: &b.layouts, "export": out}))
	s.Allow(policysession.NewPolicyProvider(b.policy))
	go s.Run(ctx, func(ctx context.Context, _ string, meta map[string][]string) (net.Conn, error) {
		here, there := net.Pipe()
		go b.engine.sessions.HandleConn(ctx, there, meta)
		return here, nil
	})
	return s, nil
}

// options returns the front end's options. The user determines arguments only.
func (b *build) options() map[string]string {
	r := b.request
	options := map[string]string{
		"filename": r.Filename,
		"cmdline":  frontendName, // so that a syntax line does not lead to another front end
	}
	for name, value := range r.Args {
		options["build-arg:"+name] = value
	}
	delete(options, "build-arg:BUILDKIT_SYNTAX")
	maps.Copy(options, map[string]string{
		"build-arg:BUILDKIT_MULTI_PLATFORM": "false",
		"target":                            r.Target,
	})
	if r.MemoryBytes > 0 {
		options["memory"] = strconv.FormatInt(r.MemoryBytes, 10)
	}
	if r.CPUs > 0 {
		options["cpuperiod"] = strconv.Itoa(cgroup.CPUPeriod)
		options["cpuquota"] = strconv.Itoa(int(r.CPUs * cgroup.CPUPeriod))
	}
	if r.NoCache {
		options["no-cache"] = ""
	}
	return options
}

// exporter returns the exporter of the image's layout. It does not compress layers, since the
// image is unpacked next. Files keep their times: programs that record the time of one file in
// another, as Python does for compiled files, would find the times to differ.
func (b *build) exporter(ctx context.Context) (llbsolver.ExporterRequest, error) {
	var r llbsolver.ExporterRequest
	exp, err := b.engine.worker.Exporter(client.ExporterOCI, b.engine.sessions)
	if err != nil {
		return r, fmt.Errorf("making the exporter: %w", err)
	}
	attributes := map[string]string{
		"tar":                                   "false",
		string(exptypes.OptKeyLayerCompression): "uncompressed",
		string(exptypes.OptKeySourceDateEpoch):  strconv.Itoa(wire.Epoch),
	}
	if said := b.request.Args["SOURCE_DATE_EPOCH"]; said != "" {
		if _, err := strconv.ParseInt(said, 10, 64); err == nil {
			attributes[string(exptypes.OptKeySourceDateEpoch)] = said
			attributes[string(exptypes.OptKeyRewriteTimestamp)] = "true"
		}
	}
	instance, err := exp.Resolve(ctx, 0, attributes)
	if err != nil {
		return r, fmt.Errorf("making the exporter: %w", err)
	}
	r.Exporters = append(r.Exporters, announced{instance, b.conn})
	return r, nil
}

// announced is an exporter that reports when it begins. All steps are over then.
type announced struct {
	exporter.ExporterInstance
	conn *wire.Conn
}

// Export implements [exporter.ExporterInstance].
func (a announced) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (
	map[string]string, exporter.FinalizeFunc, exporter.DescriptorReference, error,
) {
	if err := a.conn.Send(wire.Report{Event: &wire.Event{Kind: wire.Made, Time: time.Now()}}, nil); err != nil {
		return nil, nil, nil, fmt.Errorf("reporting that all steps are over: %w", err)
	}
	return a.ExporterInstance.Export(ctx, src, info)
}

// policy decides where a build's sources come from. Images are only those that the server gives
// for their names; an image that the user names in another way cannot be reached.
func (b *build) policy(ctx context.Context,
	r *policysession.CheckPolicyRequest) (*policysession.DecisionResponse, *gatewaypb.ResolveSourceMetaRequest, error) {
	if why := b.forbiddenSource(r.Source.Source); why != "" {
		return &policysession.DecisionResponse{Action: policypb.PolicyAction_DENY,
			DenyMessages: []*policysession.DenyMessage{{Message: why}}}, nil, nil
	}
	image, ok := strings.CutPrefix(r.Source.Source.Identifier, "docker-image://")
	if !ok {
		return &policysession.DecisionResponse{Action: policypb.PolicyAction_ALLOW}, nil, nil
	}
	answer, err := b.ask(ctx, image)
	if err != nil {
		return nil, nil, err
	}
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return nil, nil, err
	}
	pinned, err := reference.WithDigest(named, digest.Digest(answer.Manifest))
	if err != nil {
		return nil, nil, fmt.Errorf("image %s: %w", image, err)
	}
	return &policysession.DecisionResponse{Action: policypb.PolicyAction_CONVERT, Update: &pb.SourceOp{
		Identifier: "oci-layout://" + pinned.String(),
		Attrs:      map[string]string{pb.AttrOCILayoutSessionID: b.session, pb.AttrOCILayoutStoreID: layoutStore},
	}}, nil, nil
}

// ask gets an image from the server, once for each name in a build.
func (b *build) ask(ctx context.Context, name string) (*wire.Answer, error) {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w", name, err)
	}
	name = reference.FamiliarString(named)
	b.mu.Lock()
	// A resolved name comes again with the digest that it was resolved to.
	plain, wanted, _ := strings.Cut(name, "@")
	if known := b.bases[plain]; known != nil && known.answer.Manifest == wanted {
		name, wanted = plain, ""
	}
	asked, known := b.bases[name]
	if !known {
		asked = &given{done: make(chan struct{})}
		b.bases[name] = asked
	}
	b.mu.Unlock()
	if !known {
		if err := b.conn.Send(wire.Report{Base: name}, nil); err != nil {
			return nil, err
		}
	}
	select {
	case <-asked.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if asked.answer.Error != "" {
		b.mu.Lock()
		b.missing = asked.answer.Error
		b.mu.Unlock()
		return nil, errors.New(asked.answer.Error)
	}
	if wanted != "" && asked.answer.Manifest != wanted {
		return nil, fmt.Errorf("image %s was given as %s", name, asked.answer.Manifest)
	}
	return &asked.answer, nil
}
