package api

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// maxWaiting is how much output of a command waits for a caller who reads slowly, bytes
	// with what each piece costs: both streams as far as they are sent, so that mostly the
	// command never waits. One that writes single bytes to two streams in turn may.
	maxWaiting = 2*agentapi.DefaultMaxOutput + 4<<20
	// pacedWaiting replaces maxWaiting where the command waits for its caller, bytes. A smaller one would stop the
	// command for the delay of the network alone.
	pacedWaiting = 1 << 20
	// waitingCost is what a waiting piece costs beside its bytes, about.
	waitingCost = 64
	// mergeBelow is the size up to which a waiting piece takes more of its stream, bytes.
	mergeBelow = 32 << 10
)

// errStopping ends what has no end of its own when the server stops.
var errStopping = fault.New(fault.Unavailable, "stopping", "the server stops; the process goes on, and can be followed again when the server is back")

// untilStop is a context of the call that the server's stop ends too. Its cause is
// errStopping then.
func (s *server) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.Stopping, func() { cancel(errStopping) })
	return ctx, func() { stop(); cancel(nil) }
}

// eventReply is an answer of server-sent events that begins with the first one, so that
// what fails before is answered as any call. It belongs to one goroutine at a time.
type eventReply struct {
	s      *server
	w      http.ResponseWriter
	r      *http.Request
	events *events
	stop   func()
	left   bool // the caller has gone, or did not take it
}

// begin sends the head of the answer, if that has not been done.
func (e *eventReply) begin() {
	if e.events != nil {
		return
	}
	e.w.Header().Set("Content-Type", eventStream)
	e.w.Header().Set("Cache-Control", "no-store")
	e.w.Header().Set("X-Accel-Buffering", "no") // nginx would keep it back
	e.w.WriteHeader(http.StatusOK)
	e.events = &events{w: e.w, control: http.NewResponseController(e.w)}
	// So that the caller knows at once. An error comes again with the first event.
	_ = e.events.send(":\n\n")
	e.stop = e.events.keepalive(callOf(e.r).patience.quiet)
}

// send sends events that are written already.
func (e *eventReply) send(text string) error {
	e.begin()
	err := e.events.send(text)
	if err != nil {
		e.left, callOf(e.r).gone = true, true
	}
	return err
}

// fail ends the stream with an error if it has begun; else the error is the answer.
func (e *eventReply) fail(err error) {
	if e.events == nil {
		e.s.fail(e.w, e.r, err)
		return
	}
	if e.left || e.r.Context().Err() != nil {
		callOf(e.r).gone = true
		return
	}
	var b strings.Builder
	status, f := verdict(e.r, err)
	if err := writeEvent(&b, "", "error", problemOf(e.r, status, f)); err == nil {
		// The caller has gone, if this fails.
		_ = e.send(b.String())
	}
}

// end stops signs of life. It must be called.
func (e *eventReply) end() {
	if e.stop != nil {
		e.stop()
	}
}

// streamCommand answers an execution with events.
func (s *server) streamCommand(w http.ResponseWriter, r *http.Request, id SandboxID, request agentapi.ExecuteRequest, detach bool) {
	s.inside(w, r, id, func(t agentapi.Target) error {
		reply := &eventReply{s: s, w: w, r: r}
		defer reply.end()
		if detach {
			s.streamDetached(reply, t, request)
			return nil
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		account := &callOf(r).account
		if err := account.Take(2 * piece); err != nil { // what is being sent
			return err
		}
		most := maxWaiting
		if request.MaxOutput > agentapi.DefaultMaxOutput {
			most = pacedWaiting
			callOf(r).patience.stall = maxProcessTimeout // a pager may take as long as the command
		}
		box := newOutbox(account, most)
		var wg sync.WaitGroup
		wg.Go(func() {
			if box.drain(reply) != nil {
				cancel() // nobody reads: the command is killed
			}
		})
		result, err := s.Agent.ExecuteStream(ctx, t, request, func(e agentapi.ExecuteEvent) error { return box.put(ctx, e) })
		box.close()
		wg.Wait()
		if err != nil {
			reply.fail(err)
			return nil
		}
		exit := exitOf(result)
		exit.StdoutTruncated, exit.StderrTruncated = &result.StdoutTruncated, &result.StderrTruncated
		s.sendExit(reply, exit)
		return nil
	})
}

func (s *server) sendExit(reply *eventReply, exit ProcessExit) {
	var b strings.Builder
	if err := writeEvent(&b, "", "exit", exit); err != nil {
		reply.fail(err)
		return
	}
	_ = reply.send(b.String()) // it has noted that the caller has gone
}

// streamDetached starts a process and follows it from its first byte.
func (s *server) streamDetached(reply *eventReply, t agentapi.Target, request agentapi.ExecuteRequest) {
	start := agentapi.StartProcess{Args: request.Argv(), Env: request.Env, Workdir: request.Workdir, User: request.User, Input: request.Stdin,
		TimeoutMs: request.Timeout.Milliseconds()}
	p, err := s.Agent.StartProcess(reply.r.Context(), t, start)
	if err != nil {
		reply.fail(err)
		return
	}
	var b strings.Builder
	if err = writeEvent(&b, "0", "started", ProcessStarted{PID: p.PID}); err == nil {
		err = reply.send(b.String())
	}
	if err != nil {
		reply.fail(err)
		return
	}
	s.followProcess(reply, t, agentapi.FollowRequest{Ref: strconv.Itoa(p.PID)})
}

// followProcess sends a process's output until its end.
func (s *server) followProcess(reply *eventReply, t agentapi.Target, f agentapi.FollowRequest) {
	ctx, cancel := s.untilStop(reply.r.Context())
	defer cancel()
	f.Begun = reply.begin
	var b strings.Builder
	p, err := s.Agent.Follow(ctx, t, f, func(o agentapi.ProcessOutput) error {
		for _, part := range parts(o) {
			b.Reset()
			if err := writeOutput(&b, part); err != nil {
				return err
			}
			if err := reply.send(b.String()); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case err != nil:
		reply.fail(err)
	case p.End != nil:
		s.sendExit(reply, exitOf(p.End.Result()))
	default:
		reply.fail(fault.New(fault.Unavailable, agentapi.CodeUnreachable, "the sandbox ended the stream before the process"))
	}
}

// eventPiece is how much output goes into one event, bytes: as JSON it may be six times that.
const eventPiece = 16 << 10

// parts cuts output into pieces for events, between characters.
func parts(o agentapi.ProcessOutput) []agentapi.ProcessOutput {
	var all []agentapi.ProcessOutput
	for len(o.Data) > eventPiece {
		n := eventPiece - agentapi.IncompleteTail(o.Data[:eventPiece])
		all = append(all, agentapi.ProcessOutput{Stream: o.Stream, Offset: o.Offset, Data: o.Data[:n]})
		o.Offset, o.Data = o.Offset+int64(n), o.Data[n:]
	}
	return append(all, o)
}

// writeOutput writes a piece of a process's output as an event.
func writeOutput(b *strings.Builder, o agentapi.ProcessOutput) error {
	if o.Lost > 0 {
		return writeEvent(b, strconv.FormatInt(o.Offset+o.Lost, 10), "lost", OutputLost{Offset: o.Offset, Bytes: o.Lost})
	}
	piece := pieceOf(o.Data)
	piece.Offset = &o.Offset
	return writeEvent(b, strconv.FormatInt(o.Offset+int64(len(o.Data)), 10), streamNames[o.Stream], piece)
}

// streamNames are the names of events with output. Nothing else comes from an agent.
var streamNames = map[agentapi.Stream]string{agentapi.Stdout: "stdout", agentapi.Stderr: "stderr", agentapi.Terminal: "terminal"}

func pieceOf(data []byte) OutputPiece {
	var piece OutputPiece
	var encoded bool
	if piece.Data, encoded = text(data); encoded {
		piece.Encoding = new(OutputPieceEncodingBase64)
	}
	return piece
}

// outbox is a command's output on its way to a caller, who may be slower than the command.
type outbox struct {
	mu sync.Mutex
	// +checklocks:mu
	waiting []outEvent
	// +checklocks:mu
	cost int
	// +checklocks:mu
	sending int64 // what was taken last has of the account
	// +checklocks:mu
	closed bool

	account *budget.Account
	most    int           // bytes that may wait
	more    chan struct{} // something was put or it was closed; capacity 1
	room    chan struct{} // something was taken; capacity 1
}

// outEvent is an event that waits, with what it has of the account.
type outEvent struct {
	agentapi.ExecuteEvent
	held int64
}

func newOutbox(account *budget.Account, most int) *outbox {
	return &outbox{account: account, most: most, more: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// put adds an event, and waits for room if there is none.
func (o *outbox) put(ctx context.Context, e agentapi.ExecuteEvent) error {
	for !o.tryPut(e) {
		select {
		case <-o.room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	signal(o.more)
	return nil
}

func (o *outbox) tryPut(e agentapi.ExecuteEvent) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cost > o.most {
		return false
	}
	held := int64(len(e.Data) + waitingCost)
	if o.account.Take(held) != nil {
		if len(o.waiting) > 0 {
			return false // until the caller has taken some
		}
		held = 0 // a piece always goes on: it is a part of what the call costs
	}
	o.cost += len(e.Data)
	if n := len(o.waiting) - 1; n >= 0 && e.PID == 0 && o.waiting[n].Stream == e.Stream && len(o.waiting[n].Data) < mergeBelow {
		o.waiting[n].Data = append(o.waiting[n].Data, e.Data...)
		o.waiting[n].held += held
		return true
	}
	o.cost += waitingCost
	o.waiting = append(o.waiting, outEvent{e, held})
	return true
}

// close says that nothing more comes.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	signal(o.more)
}

// take returns what waits, as much as is sent at once, when there is anything; nothing when nothing more comes.
// What it returned before has been sent.
func (o *outbox) take() []outEvent {
	for range o.more {
		some, again := o.takeSome()
		signal(o.room)
		if again {
			signal(o.more) // for the next call
		}
		if len(some) > 0 || again {
			return some
		}
	}
	return nil
}

// takeSome returns what is sent at once, and whether there is more to take or nothing more comes.
func (o *outbox) takeSome() (some []outEvent, again bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.account.Give(o.sending)
	o.sending = 0
	n, size := 0, 0
	for n < len(o.waiting) && size < piece {
		size += len(o.waiting[n].Data) + waitingCost
		o.sending += o.waiting[n].held
		o.cost -= len(o.waiting[n].Data) + waitingCost
		n++
	}
	some, o.waiting = o.waiting[:n:n], o.waiting[n:]
	return some, o.closed || len(o.waiting) > 0
}

// drain sends what comes until it is closed. Characters that were cut are put together.
func (o *outbox) drain(reply *eventReply) error {
	var held [agentapi.Stderr + 1][]byte
	var b strings.Builder
	write := func(s agentapi.Stream, data []byte) error {
		for len(data) > 0 {
			n := len(data)
			if n > eventPiece {
				n = eventPiece - agentapi.IncompleteTail(data[:eventPiece])
			}
			if err := writeEvent(&b, "", streamNames[s], pieceOf(data[:n])); err != nil {
				return err
			}
			data = data[n:]
			if b.Len() < piece {
				continue
			}
			if err := reply.send(b.String()); err != nil {
				return err
			}
			b.Reset()
		}
		return nil
	}
	for {
		some := o.take()
		b.Reset()
		for _, e := range some {
			if e.PID != 0 {
				if err := writeEvent(&b, "", "started", ProcessStarted{PID: e.PID}); err != nil {
					return err
				}
				continue
			}
			data := append(held[e.Stream], e.Data...)
			whole := len(data) - agentapi.IncompleteTail(data)
			held[e.Stream] = data[whole:len(data):len(data)]
			if err := write(e.Stream, data[:whole]); err != nil {
				return err
			}
		}
		if len(some) == 0 {
			for s, data := range held {
				if err := write(agentapi.Stream(s), data); err != nil {
					return err
				}
			}
		}
		if b.Len() > 0 {
			if err := reply.send(b.String()); err != nil {
				return err
			}
		}
		if len(some) == 0 {
			return nil
		}
	}
}
