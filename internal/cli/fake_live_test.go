package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/coder/websocket"

	cay "github.com/cayhq/cay/sdk/go"
)

// liveRoutes returns the fake server's processes and terminals. Each process has written a line to both streams, and
// ends with 3 when a call waits for it or follows it. A terminal shows a prompt and the typed keys, and ends with 7
// after a line. That of the command "flaky" breaks off before it shows the line.
func (f *fakeAPI) liveRoutes() map[string]fakeHandler {
	const p = "/v1/sandboxes/{id}/processes"
	return map[string]fakeHandler{
		"POST " + p:                       f.startProcess,
		"GET " + p:                        f.listProcesses,
		"GET " + p + "/{process}/wait":    f.withProcess(waitProcess),
		"GET " + p + "/{process}/output":  f.withProcess(processOutput),
		"POST " + p + "/{process}/signal": f.withProcess(noContent),
		"DELETE " + p + "/{process}":      f.withProcess(noContent),
		"GET /v1/sandboxes/{id}/terminal": f.terminal,
	}
}

func noContent(w http.ResponseWriter, _ *http.Request, _ cay.Process) { w.WriteHeader(204) }

func (f *fakeAPI) startProcess(w http.ResponseWriter, _ *http.Request, body []byte) {
	var in cay.StartProcessRequest
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.processes {
		if in.Tag != nil && p.Tag != nil && *p.Tag == *in.Tag {
			refuse(w, 409, "tag_in_use", "tag", fmt.Sprintf("process %d has the tag %q and runs", p.PID, *in.Tag))
			return
		}
	}
	p := cay.Process{PID: len(f.processes) + 1, Args: in.Args, Tag: in.Tag,
		User: given(first(deref(in.User), "root")), Status: "running", StartedAt: time.Now(), OutputKept: true,
		OutputFrom: new(int64(0)), OutputTo: new(int64(8))}
	f.processes = append([]cay.Process{p}, f.processes...)
	answer(w, 201, p)
}

func (f *fakeAPI) listProcesses(w http.ResponseWriter, _ *http.Request, _ []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	answer(w, 200, map[string]any{"processes": f.processes})
}

func (f *fakeAPI) withProcess(do func(http.ResponseWriter, *http.Request, cay.Process)) fakeHandler {
	return func(w http.ResponseWriter, r *http.Request, _ []byte) {
		f.mu.Lock()
		defer f.mu.Unlock()
		ref := r.PathValue("process")
		for _, p := range f.processes {
			if strconv.Itoa(p.PID) == ref || deref(p.Tag) == ref {
				do(w, r, p)
				return
			}
		}
		refuse(w, 404, "process_not_found", "", fmt.Sprintf("there is no process %q", ref))
	}
}

func waitProcess(w http.ResponseWriter, _ *http.Request, p cay.Process) {
	p.Status, p.Exit = "exited", &cay.ProcessExit{ExitCode: 3}
	answer(w, 200, p)
}

func processOutput(w http.ResponseWriter, r *http.Request, p cay.Process) {
	if r.Header.Get("Accept") == "text/event-stream" {
		streamResult(w, cay.ExecuteResult{ExitCode: 3, Stdout: "out\n", Stderr: "err\n"})
		return
	}
	errs := cay.OutputPiece{Data: "err\n", Stream: new(cay.StreamStderr), Offset: new(int64(4))}
	out := cay.ProcessOutput{Process: p, NextOffset: 8, Output: []cay.OutputPiece{errs}}
	if r.URL.Query().Get("offset") == "0" {
		outs := cay.OutputPiece{Data: "out\n", Stream: new(cay.StreamStdout), Offset: new(int64(0))}
		out.Output = []cay.OutputPiece{outs, errs}
	}
	answer(w, 200, out)
}

func (f *fakeAPI) terminal(w http.ResponseWriter, r *http.Request, _ []byte) {
	if r.PathValue("id") == "sbx_none" {
		refuse(w, 404, "sandbox_not_found", "", "there is no sandbox sbx_none")
		return
	}
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	say := func(kind websocket.MessageType, text string) { _ = conn.Write(r.Context(), kind, []byte(text)) }
	query := r.URL.Query()
	offset := first(query.Get("offset"), "0")
	say(websocket.MessageText, `{"type":"started","pid":4,"offset":`+offset+`}`)
	if offset == "0" {
		say(websocket.MessageBinary, "> ")
	}
	if query.Has("process") {
		say(websocket.MessageBinary, "hello\n") // typed before the connection broke
	}
	for !query.Has("process") {
		kind, b, err := conn.Read(r.Context())
		if err != nil || query.Get("command") == "exec 'flaky'" {
			return
		}
		if kind == websocket.MessageBinary {
			say(websocket.MessageBinary, string(b))
			if b[len(b)-1] == '\n' {
				break
			}
		}
	}
	say(websocket.MessageText, `{"type":"exit","exit_code":7,"duration_ms":5,"timed_out":false,"oom_killed":false}`)
	_ = conn.Close(websocket.StatusNormalClosure, "")
}
