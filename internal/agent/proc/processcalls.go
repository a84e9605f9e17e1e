package proc

import (
	"context"
	"errors"
	"os"
	"syscall"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi/process"
)

// List lists the running commands.
func (p *Processes) List(
	context.Context, *connect.Request[process.ListRequest],
) (*connect.Response[process.ListResponse], error) {
	reply := &process.ListResponse{}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.commands {
		if c.running() {
			reply.Processes = append(reply.Processes, &process.ProcessInfo{Config: c.config, Pid: uint32(c.pid), Tag: c.tag})
		}
	}
	return connect.NewResponse(reply), nil
}

// Connect streams the events of a command from now on.
func (p *Processes) Connect(
	ctx context.Context, req *connect.Request[process.ConnectRequest], out *connect.ServerStream[process.ConnectResponse],
) error {
	c, err := p.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	started := make(chan struct{})
	send := func(ev *process.ProcessEvent) error {
		<-started
		return out.Send(&process.ConnectResponse{Event: ev})
	}
	sub, running := c.subscribe(send)
	defer c.unsubscribe(sub)
	err = out.Send(&process.ConnectResponse{Event: &process.ProcessEvent{
		Event: &process.ProcessEvent_Start{Start: &process.StartEvent{Pid: uint32(c.pid)}},
	}})
	close(started) // output that came meanwhile may follow
	if err != nil {
		return err
	}
	if !running {
		end := &process.ProcessEvent_End{End: c.ending()}
		return out.Send(&process.ConnectResponse{Event: &process.ProcessEvent{Event: end}})
	}
	return p.listen(ctx, c, sub, answer.Keepalive(req.Header()))
}

// Update resizes a command's terminal.
func (p *Processes) Update(
	_ context.Context, req *connect.Request[process.UpdateRequest],
) (*connect.Response[process.UpdateResponse], error) {
	c, err := p.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if size := req.Msg.GetPty().GetSize(); size != nil {
		if err := c.resize(size); err != nil {
			return nil, answer.Connect(err)
		}
	}
	return connect.NewResponse(&process.UpdateResponse{}), nil
}

// SendInput writes to a command's standard input or terminal.
func (p *Processes) SendInput(
	_ context.Context, req *connect.Request[process.SendInputRequest],
) (*connect.Response[process.SendInputResponse], error) {
	c, err := p.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := c.write(req.Msg.GetInput()); err != nil {
		return nil, answer.Connect(err)
	}
	return connect.NewResponse(&process.SendInputResponse{}), nil
}

// StreamInput writes many inputs in one call. The first message names the command.
func (p *Processes) StreamInput(
	_ context.Context, in *connect.ClientStream[process.StreamInputRequest],
) (*connect.Response[process.StreamInputResponse], error) {
	var c *command
	for in.Receive() {
		msg := in.Msg()
		switch {
		case msg.GetStart() != nil:
			var err error
			if c, err = p.findRunning(msg.GetStart().GetProcess()); err != nil {
				return nil, err
			}
		case msg.GetData() != nil:
			if c == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("data before start"))
			}
			if err := c.write(msg.GetData().GetInput()); err != nil {
				return nil, answer.Connect(err)
			}
			p.guard.wake()
		}
	}
	if err := in.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&process.StreamInputResponse{}), nil
}

// SendSignal signals a command and its process group.
func (p *Processes) SendSignal(
	_ context.Context, req *connect.Request[process.SendSignalRequest],
) (*connect.Response[process.SendSignalResponse], error) {
	c, err := p.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	var sig syscall.Signal
	switch req.Msg.GetSignal() {
	case process.Signal_SIGNAL_SIGTERM:
		sig = syscall.SIGTERM
	case process.Signal_SIGNAL_SIGKILL:
		sig = syscall.SIGKILL
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("only SIGTERM and SIGKILL can be sent"))
	}
	if err := c.signal(sig); errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("the process has ended"))
	} else if err != nil {
		return nil, answer.Connect(err)
	}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

// CloseStdin ends a command's standard input.
func (p *Processes) CloseStdin(
	_ context.Context, req *connect.Request[process.CloseStdinRequest],
) (*connect.Response[process.CloseStdinResponse], error) {
	c, err := p.findRunning(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := c.closeStdin(); err != nil {
		return nil, answer.Connect(err)
	}
	return connect.NewResponse(&process.CloseStdinResponse{}), nil
}
