package agentapi

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

var target = Target{SandboxID: "sbx_a", Run: "1"}

// TestFollowHostileAgents checks that Follow refuses output that no agent can send.
func TestFollowHostileAgents(t *testing.T) {
	frames := func(all ...Frame) []byte {
		var b bytes.Buffer
		for _, f := range all {
			if _, err := f.WriteTo(&b); err != nil {
				t.Fatal(err)
			}
		}
		return b.Bytes()
	}
	end := EndFrame(9, []byte(`{"pid":7,"end":{"exitCode":3}}`))
	for name, c := range map[string]struct {
		body []byte
		want string // the output that is emitted
		bad  bool
	}{
		"right":             {frames(Frame{Stdout, 5, []byte("out")}, IdleFrame(), Frame{Stderr, 8, []byte("E")}, end), "outE", false},
		"empty pieces":      {frames(Frame{Stdout, 5, nil}, end), "", false},
		"no end":            {frames(Frame{Stdout, 5, []byte("out")}), "out", true},
		"cut":               {frames(Frame{Stdout, 5, []byte("out")})[:frameHead+1], "", true},
		"back to the start": {frames(Frame{Stdout, 5, []byte("out")}, Frame{Stdout, 5, []byte("out")}, end), "out", true},
		"before the offset": {frames(Frame{Stdout, 4, []byte("out")}, end), "", true},
		"beyond all":        {frames(LostFrame(5, 1<<62), end), "", true},
		"too large":         {append(frames(Frame{Stdout, 5, nil})[:9], 0x7f, 0, 0, 0), "", true},
		"an unknown kind":   {frames(Frame{9, 5, nil}, end), "", true},
		"an end of nothing": {frames(EndFrame(5, []byte("x"))), "", true},
		"nothing":           {nil, "", true},
	} {
		client, _ := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(c.body) })
		got := ""
		p, err := client.Follow(t.Context(), target, FollowRequest{Ref: "7", Offset: 5},
			func(o ProcessOutput) error { got += string(o.Data); return nil })
		if got != c.want || (err != nil) != c.bad || !c.bad && (p.PID != 7 || p.End.Result().ExitCode != 3) {
			t.Errorf("%s: %q, %+v, %v", name, got, p, err)
		}
		if f := fault.As(err); c.bad && (f == nil || f.Code != fault.CodeSandboxUnreachable) {
			t.Errorf("%s: %v, want %s", name, err, fault.CodeSandboxUnreachable)
		}
	}
}

func TestFollowEnds(t *testing.T) {
	client, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = Frame{Stdout, 0, []byte("out")}.WriteTo(w)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	no := errors.New("no")
	_, err := client.Follow(t.Context(), target, FollowRequest{Ref: "7"}, func(ProcessOutput) error { return no })
	if !errors.Is(err, no) {
		t.Errorf("an error of emit: %v", err)
	}
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err = client.Follow(ctx, target, FollowRequest{Ref: "7"},
		func(ProcessOutput) error { cancel(why); return nil })
	if !errors.Is(err, why) {
		t.Errorf("an end of the context: %v", err)
	}
}

// TestOnlyPlainCallsAreGathered checks that an agent may hold back output of Execute and not of ExecuteStream.
func TestOnlyPlainCallsAreGathered(t *testing.T) {
	var gather []bool
	_, handler := process.NewProcessHandler(gathered{got: &gather})
	client, _ := serve(t, handler.ServeHTTP)
	if _, err := client.Execute(t.Context(), target, ExecuteRequest{Command: "x"}); err != nil {
		t.Fatal(err)
	}
	_, err := client.ExecuteStream(t.Context(), target, ExecuteRequest{Command: "x"},
		func(ExecuteEvent) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]bool{true, false}, gather); diff != "" {
		t.Errorf("gathered (- want):\n%s", diff)
	}
}

// gathered is an agent whose commands end at once. It notes whether each could be gathered.
type gathered struct {
	process.UnimplementedProcessHandler
	got *[]bool
}

func (g gathered) Start(_ context.Context, r *connect.Request[process.StartRequest],
	out *connect.ServerStream[process.StartResponse]) error {
	*g.got = append(*g.got, r.Msg.GetExecute().GetGather())
	end := &process.ProcessEvent_End{End: &process.EndEvent{}}
	return out.Send(&process.StartResponse{Event: &process.ProcessEvent{Event: end}})
}

// TestOlderAgents checks the error of calls that an agent of an earlier version does not have.
func TestOlderAgents(t *testing.T) {
	client, _ := serve(t, http.NotFound)
	_, startErr := client.StartProcess(t.Context(), target, StartProcess{Args: []string{"true"}})
	_, inputErr := client.WriteInput(t.Context(), target, "7", bytes.NewReader([]byte("x")), false)
	_, waitErr := client.WaitProcess(t.Context(), target, "7", time.Second)
	_, followErr := client.Follow(t.Context(), target, FollowRequest{Ref: "7"}, func(ProcessOutput) error { return nil })
	for name, err := range map[string]error{"start": startErr, "input": inputErr, "wait": waitErr, "follow": followErr} {
		if f := fault.As(err); f == nil || f.Code != fault.CodeSandboxTooOld || f.Kind != fault.Conflict {
			t.Errorf("%s: %v", name, err)
		}
	}
}
