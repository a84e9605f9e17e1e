package api

import (
	"context"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// fakeProcesses fakes the processes of all sandboxes. Each echoes its input, to its terminal if it
// has one, and ends at the end of its input or by a signal.
type fakeProcesses struct {
	mu sync.Mutex
	// +checklocks:mu
	all []*fakeProcess
	// +checklocks:mu
	sizes []agentapi.TerminalSize

	// stream fakes streamed executions; if it is nil, they print "42".
	stream func(ctx context.Context, emit func(agentapi.ExecuteEvent) error) (agentapi.ExecuteResult, error)
}

type fakeProcess struct {
	agentapi.Process
	request agentapi.StartProcess
	output  []byte
	changed chan struct{}
}

var errNoProcess = fault.New(fault.NotFound, fault.CodeProcessNotFound, "no such process")

func (f *fakeProcesses) ExecuteStream(ctx context.Context, _ agentapi.Target, _ agentapi.ExecuteRequest,
	emit func(agentapi.ExecuteEvent) error) (agentapi.ExecuteResult, error) {
	if f.stream != nil {
		return f.stream(ctx, emit)
	}
	return agentapi.ExecuteResult{Duration: time.Millisecond},
		errors.Join(emit(agentapi.ExecuteEvent{PID: 7}),
			emit(agentapi.ExecuteEvent{Stream: agentapi.Stdout, Data: []byte("42\n")}))
}

func (f *fakeProcesses) StartProcess(_ context.Context, _ agentapi.Target,
	r agentapi.StartProcess) (agentapi.Process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &fakeProcess{request: r, changed: make(chan struct{}),
		Process: agentapi.Process{PID: len(f.all) + 1, Tag: r.Tag, Args: r.Args, User: "user", Workdir: "/home/user",
			StartedAt: time.Now(), Terminal: r.Terminal != nil, Input: r.OpenInput || r.Terminal != nil, Kept: true}}
	f.all = append(f.all, p)
	f.said(p, r.Input)
	return p.Process, nil
}

// said adds output of a process. The caller holds f.mu.
func (f *fakeProcesses) said(p *fakeProcess, b []byte) {
	p.output = append(p.output, b...)
	p.Next = int64(len(p.output))
	close(p.changed)
	p.changed = make(chan struct{})
}

func (f *fakeProcesses) end(p *fakeProcess, signal int) {
	p.Input = false
	p.End = &agentapi.ProcessExit{At: time.Now(), Signal: signal, DurationUs: 1500}
	f.said(p, nil)
}

func (f *fakeProcesses) find(ref string) (*fakeProcess, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.all {
		if strconv.Itoa(p.PID) == ref || p.Tag == ref {
			return p, nil
		}
	}
	return nil, errNoProcess
}

func (f *fakeProcesses) Processes(context.Context, agentapi.Target) ([]agentapi.Process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []agentapi.Process
	for _, p := range f.all {
		all = append(all, p.Process)
	}
	return all, nil
}

func (f *fakeProcesses) Process(_ context.Context, _ agentapi.Target, ref string) (agentapi.Process, error) {
	p, err := f.find(ref)
	if err != nil {
		return agentapi.Process{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return p.Process, nil
}

func (f *fakeProcesses) WaitProcess(ctx context.Context, t agentapi.Target, ref string,
	within time.Duration) (agentapi.Process, error) {
	p, err := f.find(ref)
	if err != nil {
		return agentapi.Process{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	_, err = f.Follow(ctx, t, agentapi.FollowRequest{Ref: ref}, func(agentapi.ProcessOutput) error { return nil })
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return p.Process, err
}

func (f *fakeProcesses) SignalProcess(_ context.Context, _ agentapi.Target, ref string, signal int) error {
	p, err := f.find(ref)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.End != nil {
		return fault.New(fault.Conflict, fault.CodeProcessEnded, "has ended")
	}
	f.end(p, signal)
	return nil
}

func (f *fakeProcesses) KillProcess(ctx context.Context, t agentapi.Target, ref string) error {
	p, err := f.find(ref)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p.PID, p.Tag = -1, ""
	return nil
}

func (f *fakeProcesses) ResizeTerminal(_ context.Context, _ agentapi.Target, ref string,
	size agentapi.TerminalSize) error {
	p, err := f.find(ref)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !p.Terminal {
		return fault.New(fault.Conflict, fault.CodeNoTerminal, "has no terminal")
	}
	f.sizes = append(f.sizes, size)
	return nil
}

func (f *fakeProcesses) WriteInput(_ context.Context, _ agentapi.Target, ref string,
	body io.Reader, end bool) (int64, error) {
	p, err := f.find(ref)
	if err != nil {
		return 0, err
	}
	written := int64(0)
	for b := make([]byte, 1<<10); ; {
		n, err := body.Read(b)
		f.mu.Lock()
		switch {
		case p.End != nil:
			err = fault.New(fault.Conflict, fault.CodeProcessEnded, "has ended")
		case n > 0:
			f.said(p, b[:n])
			written += int64(n)
		}
		if err == io.EOF && end {
			f.end(p, 0)
		}
		f.mu.Unlock()
		if err == io.EOF {
			return written, nil
		}
		if err != nil {
			return written, err
		}
	}
}

func (f *fakeProcesses) Follow(ctx context.Context, _ agentapi.Target, r agentapi.FollowRequest,
	emit func(agentapi.ProcessOutput) error) (agentapi.Process, error) {
	p, err := f.find(r.Ref)
	if err != nil {
		return agentapi.Process{}, err
	}
	if r.Begun != nil {
		r.Begun()
	}
	out := agentapi.ProcessOutput{Stream: agentapi.Stdout, Offset: r.Offset}
	if p.request.Terminal != nil {
		out.Stream = agentapi.Terminal
	}
	for {
		f.mu.Lock()
		about, changed := p.Process, p.changed
		out.Data = append([]byte(nil), p.output[min(out.Offset, about.Next):]...)
		f.mu.Unlock()
		if len(out.Data) > 0 {
			if err := emit(out); err != nil {
				return about, err
			}
			out.Offset += int64(len(out.Data))
		}
		if r.Now || about.End != nil {
			return about, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return about, context.Cause(ctx)
		}
	}
}
