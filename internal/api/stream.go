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
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// maxWaiting limits the output of a command that waits for a slow caller, in bytes, with the cost
	// of each piece. It holds both streams up to the size at which they are truncated, so that a
	// command seldom waits. A command that writes single bytes to two streams in turn may wait.
	maxWaiting = 2*agentapi.DefaultMaxOutput + 4<<20
	// pacedWaiting replaces maxWaiting, in bytes, where the command waits for its caller. With a
	// smaller limit, the delay of the network alone would stop the command.
	pacedWaiting = 1 << 20
	// waitingCost is the approximate cost of a waiting piece in addition to its bytes.
	waitingCost = 64
	// mergeBelow is the size in bytes up to which output is appended to a waiting piece of the same
	// stream.
	mergeBelow = 32 << 10
)

// errStopping ends the calls that have no end of their own when the server stops.
var errStopping = fault.New(fault.Unavailable, fault.CodeStopping,
	"the server stops; the process goes on, and can be followed again when the server is back")

// untilStop returns a copy of ctx that is also canceled when the server stops, with the cause
// errStopping.
func (s *server) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.Stopping, func() { cancel(errStopping) })
	return ctx, func() { stop(); cancel(nil) }
}

// eventReply sends an answer of server-sent events. The answer begins with the first event, so that
// an earlier error is answered like that of any call. One goroutine at a time may use it.
type eventReply struct {
	*httpserver.EventStream
	s    *server
	w    http.ResponseWriter
	r    *http.Request
	left bool // the caller has left, or stopped reading
}

func (s *server) newEventReply(w http.ResponseWriter, r *http.Request) *eventReply {
	return &eventReply{EventStream: httpserver.NewEventStream(w, r), s: s, w: w, r: r}
}

// send sends events that are encoded already.
func (e *eventReply) send(text string) error {
	err := e.Send(text)
	if err != nil {
		e.left, callOf(e.r).Gone = true, true
	}
	return err
}

// fail ends a stream that has begun with an error event; otherwise it answers the error.
func (e *eventReply) fail(err error) {
	if !e.Begun() {
		e.s.fail(e.w, e.r, err)
		return
	}
	if e.left || e.r.Context().Err() != nil {
		callOf(e.r).Gone = true
		return
	}
	var b strings.Builder
	status, f := verdict(e.r, err)
	if err := httpserver.WriteEvent(&b, "", "error", problemOf(e.r, status, f)); err == nil {
		// If this fails, the caller has left.
		_ = e.send(b.String())
	}
}

// streamCommand runs a command and streams its output as events.
func (s *server) streamCommand(w http.ResponseWriter, r *http.Request, id SandboxID, request agentapi.ExecuteRequest,
	detach bool) {
	s.inside(w, r, id, sandbox.ForCommand, func(t agentapi.Target) error {
		reply := s.newEventReply(w, r)
		defer reply.Close()
		if detach {
			s.streamDetached(reply, t, request)
			return nil
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		account := &callOf(r).Account
		if err := account.Take(2 * piece); err != nil { // for the text that is being sent
			return err
		}
		most := maxWaiting
		if request.MaxOutput > agentapi.DefaultMaxOutput {
			most = pacedWaiting
			callOf(r).Patience.Stall = maxProcessTimeout // a pager may take as long as the command
		}
		queue := newOutbox(account, most)
		var wg sync.WaitGroup
		wg.Go(func() {
			if queue.drain(reply) != nil {
				cancel() // the caller does not read, so kill the command
			}
		})
		put := func(e agentapi.ExecuteEvent) error { return queue.put(ctx, e) }
		result, err := s.Agent.ExecuteStream(ctx, t, request, put)
		queue.close()
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
	if err := httpserver.WriteEvent(&b, "", "exit", exit); err != nil {
		reply.fail(err)
		return
	}
	_ = reply.send(b.String()) // send notes that the caller has left
}

// streamDetached starts a process and follows its output from the first byte.
func (s *server) streamDetached(reply *eventReply, t agentapi.Target, request agentapi.ExecuteRequest) {
	p, err := s.Agent.StartProcess(reply.r.Context(), t, request.Detached())
	if err != nil {
		reply.fail(err)
		return
	}
	var b strings.Builder
	if err = httpserver.WriteEvent(&b, "0", "started", ProcessStarted{PID: p.PID}); err == nil {
		err = reply.send(b.String())
	}
	if err != nil {
		reply.fail(err)
		return
	}
	s.followProcess(reply, t, agentapi.FollowRequest{Ref: strconv.Itoa(p.PID)})
}

// followProcess sends the output of a process until the process ends.
func (s *server) followProcess(reply *eventReply, t agentapi.Target, f agentapi.FollowRequest) {
	ctx, cancel := s.untilStop(reply.r.Context())
	defer cancel()
	f.Begun = reply.Begin
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
		reply.fail(fault.New(fault.Unavailable, fault.CodeSandboxUnreachable,
			"the sandbox ended the stream before the process"))
	}
}

// eventPiece is the largest number of bytes of output in one event. Encoded as JSON they may take
// six times as many.
const eventPiece = 16 << 10

// parts cuts output into pieces for events. It does not cut within a character.
func parts(o agentapi.ProcessOutput) []agentapi.ProcessOutput {
	var all []agentapi.ProcessOutput
	for len(o.Data) > eventPiece {
		n := eventPiece - agentapi.IncompleteTail(o.Data[:eventPiece])
		all = append(all, agentapi.ProcessOutput{Stream: o.Stream, Offset: o.Offset, Data: o.Data[:n]})
		o.Offset, o.Data = o.Offset+int64(n), o.Data[n:]
	}
	return append(all, o)
}

// writeOutput writes a piece of output of a process as an event.
func writeOutput(b *strings.Builder, o agentapi.ProcessOutput) error {
	if o.Lost > 0 {
		return httpserver.WriteEvent(b, strconv.FormatInt(o.Offset+o.Lost, 10), "lost",
			OutputLost{Offset: o.Offset, Bytes: o.Lost})
	}
	piece := pieceOf(o.Data)
	piece.Offset = &o.Offset
	return httpserver.WriteEvent(b, strconv.FormatInt(o.Offset+int64(len(o.Data)), 10), streamNames[o.Stream], piece)
}

// streamNames maps streams to the names of their events. Agents send no other streams.
var streamNames = map[agentapi.Stream]string{
	agentapi.Stdout: "stdout", agentapi.Stderr: "stderr", agentapi.Terminal: "terminal",
}

func pieceOf(data []byte) OutputPiece {
	var piece OutputPiece
	var encoded bool
	if piece.Data, encoded = text(data); encoded {
		piece.Encoding = new(OutputPieceEncodingBase64)
	}
	return piece
}

// outbox queues the output of a command for a caller that may be slower than the command.
type outbox struct {
	mu sync.Mutex
	// +checklocks:mu
	waiting []outEvent
	// +checklocks:mu
	cost int
	// +checklocks:mu
	sending int64 // taken from the account by the events that take returned last
	// +checklocks:mu
	closed bool

	account *budget.Account
	most    int           // limit of cost, in bytes
	more    chan struct{} // signaled after put and close; capacity 1
	room    chan struct{} // signaled after take; capacity 1
}

// outEvent is a waiting event with the amount that it holds of the account.
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

// put adds an event. It waits while the outbox is full.
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
			return false // wait until the caller has taken some
		}
		held = 0 // one piece may always wait; the cost of the call includes it
	}
	o.cost += len(e.Data)
	if n := len(o.waiting) - 1; n >= 0 && e.PID == 0 && o.waiting[n].Stream == e.Stream &&
		len(o.waiting[n].Data) < mergeBelow {
		o.waiting[n].Data = append(o.waiting[n].Data, e.Data...)
		o.waiting[n].held += held
		return true
	}
	o.cost += waitingCost
	o.waiting = append(o.waiting, outEvent{e, held})
	return true
}

// close tells take that no more events come.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	signal(o.more)
}

// take waits for events and returns as many as are sent at once; it returns none after the last. A
// call of take means that the events of the previous call have been sent.
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

// takeSome returns the events that are sent at once. again reports whether more events wait or the
// outbox is closed.
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

// drain sends events until the outbox is closed. It joins characters that were cut between two
// pieces.
func (o *outbox) drain(reply *eventReply) error {
	var held [agentapi.Stderr + 1][]byte
	var b strings.Builder
	write := func(s agentapi.Stream, data []byte) error {
		for len(data) > 0 {
			n := len(data)
			if n > eventPiece {
				n = eventPiece - agentapi.IncompleteTail(data[:eventPiece])
			}
			if err := httpserver.WriteEvent(&b, "", streamNames[s], pieceOf(data[:n])); err != nil {
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
				if err := httpserver.WriteEvent(&b, "", "started", ProcessStarted{PID: e.PID}); err != nil {
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
