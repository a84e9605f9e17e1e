package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// line is one line of an answer of the code interpreter.
type line = object

// interpreter drives the server of the template code-interpreter from inside its sandbox.
type interpreter struct {
	s  *server
	id string
}

// ask makes one request and returns the status and the body.
func (i interpreter) ask(method, path, body string, more ...string) (status int, answer string) {
	i.s.t.Helper()
	args := append([]string{"curl", "-sN", "-X", method, "-w", "\n%{http_code}", "-H", "Content-Type: application/json"},
		more...)
	if body != "" {
		args = append(args, "-d", "@-")
	}
	r, err := i.s.api().Execute(context.Background(), i.id, cay.ExecuteRequest{
		Args: append(args, "http://localhost:49999"+path), Stdin: &body, Timeout: new("1m")})
	if err != nil {
		i.s.t.Errorf("%s %s: %v", method, path, err)
		return 0, ""
	}
	end := strings.LastIndex(r.Stdout, "\n")
	if r.ExitCode != 0 || end < 0 {
		i.s.t.Errorf("%s %s: %s", method, path, jsonOf(r))
		return 0, ""
	}
	if _, err := fmt.Sscan(r.Stdout[end+1:], &status); err != nil {
		i.s.t.Error(err)
	}
	return status, r.Stdout[:end]
}

// run executes code and returns the lines of a complete answer: the number comes first and the end
// last.
func (i interpreter) run(code string, more object) []line {
	i.s.t.Helper()
	request := object{"code": code}
	for k, v := range more {
		request[k] = v
	}
	body, err := json.Marshal(request)
	if err != nil {
		i.s.t.Error(err)
	}
	status, answer := i.ask("POST", "/execute", string(body))
	var lines []line
	for text := range strings.Lines(answer) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			i.s.t.Errorf("execute %q: %d %s", code, status, answer)
		}
		lines = append(lines, l)
	}
	if status != 200 || len(lines) == 0 || lines[len(lines)-1]["type"] != "end_of_execution" {
		i.s.t.Errorf("execute %q: %d %s", code, status, answer)
		return []line{{}}
	}
	return lines
}

// of returns the first line of a type, nil if there is none.
func of(lines []line, kind string) line {
	for _, l := range lines {
		if l["type"] == kind {
			return l
		}
	}
	return nil
}

// value returns the text of the main result of code.
func (i interpreter) value(code string, more object) any {
	i.s.t.Helper()
	lines := i.run(code, more)
	if e := of(lines, "error"); e != nil {
		i.s.t.Errorf("execute %q: %v", code, e)
	}
	for _, l := range lines {
		if l["type"] == "result" && l["is_main_result"] == true {
			return l["text"]
		}
	}
	return nil
}

func (s *server) interpreter() interpreter {
	s.t.Helper()
	// The template is built when it is first asked for.
	if _, err := s.api().RebuildTemplate(context.Background(), "code-interpreter", nil, nil); err != nil {
		s.t.Fatalf("asking for the template: %v", err)
	}
	s.needTemplate("code-interpreter")
	return interpreter{s, s.create(object{"template": "code-interpreter", "env": object{"OF_THE_SANDBOX": "yes"}})}
}

// TestCodeInterpreter checks the answers of the template's server.
func TestCodeInterpreter(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	i := s.interpreter()
	defer s.destroy(i.id)
	t.Run("results", func(t *testing.T) { interpreterResults(t, interpreter{s.in(t), i.id}) })
	t.Run("charts", func(t *testing.T) { interpreterCharts(t, interpreter{s.in(t), i.id}) })
	t.Run("axes", func(t *testing.T) { interpreterAxes(t, interpreter{s.in(t), i.id}) })
	t.Run("contexts", func(t *testing.T) { interpreterContexts(t, interpreter{s.in(t), i.id}) })
	t.Run("trouble", func(t *testing.T) { interpreterTrouble(t, interpreter{s.in(t), i.id}) })
	t.Run("refused", func(t *testing.T) { interpreterRefuses(t, interpreter{s.in(t), i.id}) })
	t.Run("fork", func(t *testing.T) {
		i := interpreter{s.in(t), i.id}
		i.value("kept = 41", nil)
		child := interpreter{i.s, i.s.fork(i.id, nil)[0]}
		defer i.s.destroy(child.id)
		if got := child.value("kept += 1; kept", nil); got != "42" {
			t.Errorf("the child has %v", got)
		}
		if got := i.value("kept", nil); got != "41" {
			t.Errorf("the sandbox itself has %v", got)
		}
	})
}

func interpreterResults(t *testing.T, i interpreter) {
	lines := i.run("import sys\nx = 41\nprint('out'); print('err', file=sys.stderr)\nx + 1", nil)
	if lines[0]["type"] != "number_of_executions" || lines[0]["execution_count"] != float64(1) {
		t.Errorf("the answer begins with %v", lines[0])
	}
	for kind, want := range map[string]string{"stdout": "out\n", "stderr": "err\n"} {
		l := of(lines, kind)
		at, err := time.Parse(time.RFC3339, fmt.Sprint(l["timestamp"]))
		if l["text"] != want || err != nil || time.Since(at) > time.Minute {
			t.Errorf("%s is %v, %v", kind, l, err)
		}
	}
	if r := of(lines, "result"); r["text"] != "42" || r["is_main_result"] != true {
		t.Errorf("the result is %v", r)
	}
	if got := i.value("x", nil); got != "41" {
		t.Errorf("the state is %v", got)
	}
	if got := i.value("'it is'", nil); got != "it is" { // without its quotes
		t.Errorf("a text is %v", got)
	}
	lines = i.run("def f(): return 1/0\nf()", nil)
	if e := of(lines, "error"); e["name"] != "ZeroDivisionError" || e["value"] != "division by zero" ||
		!strings.Contains(e["traceback"].(string), "ZeroDivisionError") {
		t.Errorf("the error is %v", e)
	}
	lines = i.run(`from IPython.display import *
display(HTML("<b>h</b>")); display(JSON({"a": 1})); display(SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"))
display(Markdown("# m")); display(Latex("$l$")); display(Javascript("1")); display({"application/x-own": "o"}, raw=True)`, nil)
	all := line{}
	for _, l := range lines {
		for k, v := range l {
			all[k] = v
		}
	}
	for k, want := range map[string]any{"html": "<b>h</b>", "json": object{"a": 1.0},
		"svg": "<svg xmlns='http://www.w3.org/2000/svg'/>", "markdown": "# m",
		"latex": "$l$", "javascript": "1", "extra": object{"application/x-own": "o"}} {
		got, _ := json.Marshal(all[k])
		if text, _ := json.Marshal(want); string(got) != string(text) {
			if k == "svg" && strings.HasPrefix(fmt.Sprint(all[k]), "<svg") {
				continue // IPython reads and writes these values again
			}
			t.Errorf("%s is %s, want %s", k, got, text)
		}
	}
	frame := of(i.run("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', None]})", nil), "result")
	if data, _ := json.Marshal(frame["data"]); string(data) != `{"a":[1,2],"b":["x",null]}` ||
		!strings.Contains(fmt.Sprint(frame["html"]), "<table") {
		t.Errorf("a frame is %v", frame)
	}
	// The variables of the sandbox, and those of one execution alone.
	const env = "import os; [os.environ.get(n) for n in ('OF_THE_SANDBOX', 'ONCE')]"
	if got := i.value(env, object{"env_vars": object{"ONCE": "now"}}); got != "['yes', 'now']" {
		t.Errorf("the variables are %v", got)
	}
	if got := i.value(env, nil); got != "['yes', None]" {
		t.Errorf("afterwards the variables are %v", got)
	}
	if got := i.value("os.getuid(), os.getcwd()", nil); got != "(1000, '/home/user')" {
		t.Errorf("it runs as %v", got)
	}
}

func interpreterCharts(t *testing.T, i interpreter) {
	for draw, want := range map[string]string{
		`plt.plot([1,2],[3,4],label="a"); plt.title("T"); plt.xlabel("X")`:                             `"line" "T" [{"label":"a","points":[[1,3],[2,4]]}]`,
		`plt.scatter([1,2],[3,4],label="s")`:                                                           `"scatter" null [{"label":"s","points":[[1,3],[2,4]]}]`,
		`plt.bar(["a","b"],[1,2],label="g")`:                                                           `"bar" null [{"group":"g","label":"a","value":1},{"group":"g","label":"b","value":2}]`,
		`plt.pie([1,3],labels=["p","q"])`:                                                              `"pie" null [{"angle":90,"label":"p","radius":1},{"angle":270,"label":"q","radius":1}]`,
		`plt.boxplot([[1,2,3,4,9]],labels=["u"])`:                                                      `"box_and_whisker" null [{"first_quartile":2,"label":"u","max":4,"median":3,"min":1,"outliers":[9],"third_quartile":4}]`,
		`b=plt.boxplot([[1,2,3,4,9],[2,3,4]],labels=["u","v"],patch_artist=True,showmeans=True)`:       `"box_and_whisker" null [{"first_quartile":2,"label":"u","max":4,"median":3,"min":1,"outliers":[9],"third_quartile":4},{"first_quartile":2.5,"label":"v","max":4,"median":3,"min":2,"outliers":[],"third_quartile":3.5}]`,
		`b=plt.boxplot([[1,2,3,4,9]],labels=["u"],vert=False)`:                                         `"box_and_whisker" null [{"first_quartile":2,"label":"u","max":4,"median":3,"min":1,"outliers":[9],"third_quartile":4}]`,
		`w=plt.pie([1,2],labels=["p","q"])`:                                                            `"pie" null [{"angle":120,"label":"p","radius":1},{"angle":240,"label":"q","radius":1}]`,
		`import datetime; plt.plot([datetime.date(2024,1,1),datetime.date(2024,1,2)],[3,4],label="d")`: `"line" null [{"label":"d","points":[["2024-01-01",3],["2024-01-02",4]]}]`,
		`import datetime; plt.scatter([datetime.datetime(2024,1,1)],["low"],label="d")`:                `"scatter" null [{"label":"d","points":[["2024-01-01T00:00:00+00:00","low"]]}]`,
		`f,(a,b)=plt.subplots(1,2); a.plot([5,6]); b.bar(["z"],[3]); f.suptitle("S")`:                  `"superchart" "S"`,
	} {
		r := of(i.run("import matplotlib.pyplot as plt\n"+draw+"\nplt.show()", nil), "result")
		chart, _ := r["chart"].(object)
		kind, _ := json.Marshal(chart["type"])
		title, _ := json.Marshal(chart["title"])
		elements, _ := json.Marshal(chart["elements"])
		if got := fmt.Sprintf("%s %s %s", kind, title, elements); !strings.HasPrefix(got, want) {
			t.Errorf("%s is the chart %s, want %s", draw, got, want)
		}
		if png, _ := r["png"].(string); !strings.HasPrefix(png, "iVBORw0KGgo") || strings.Contains(png, "\n") {
			t.Errorf("%s has no picture", draw)
		}
	}
}

// interpreterAxes checks the axes of charts: the kind of scale, and the unit in a label.
func interpreterAxes(t *testing.T, i interpreter) {
	const draw = `import matplotlib.pyplot as plt, datetime
f,(a,b)=plt.subplots(1,2)
a.plot([datetime.datetime(2024,1,1),datetime.datetime(2024,1,2)],[3,4]); a.set_xlabel("Day"); a.set_ylabel("Load (%)")
b.plot(["red","blue"],[10,1000]); b.set_yscale("log"); b.set_xlabel("Colour [name]")
plt.show()`
	chart, _ := of(i.run(draw, nil), "result")["chart"].(object)
	charts, _ := chart["elements"].([]any)
	if len(charts) != 2 {
		t.Fatalf("the charts are %v", chart)
	}
	for n, want := range []object{
		{"x_scale": "datetime", "y_scale": "linear", "x_label": "Day", "x_unit": nil, "y_unit": "%"},
		{"x_scale": "categorical", "y_scale": "log", "x_unit": "name", "y_label": nil, "y_unit": nil},
	} {
		got := charts[n].(object)
		for k, v := range want {
			if got[k] != v {
				t.Errorf("chart %d has the %s %v, want %v", n, k, got[k], v)
			}
		}
		if ticks, _ := got["x_ticks"].([]any); n == 0 && (len(ticks) == 0 ||
			!strings.HasPrefix(fmt.Sprint(ticks[0]), "202")) {
			t.Errorf("the ticks of dates are %v", got["x_ticks"])
		}
	}
}

func interpreterContexts(t *testing.T, i interpreter) {
	status, body := i.ask("POST", "/contexts", `{"cwd":"/tmp","language":"python"}`)
	id := text([]byte(body), "id")
	if status != 200 || id == "" || text([]byte(body), "cwd") != "/tmp" || text([]byte(body), "language") != "python" {
		t.Fatalf("a context is %d %s", status, body)
	}
	in := object{"context_id": id}
	i.value("y = 7", in)
	if got := i.value("import os; y, os.getcwd()", in); got != "(7, '/tmp')" {
		t.Errorf("in the context: %v", got)
	}
	if e := of(i.run("y", nil), "error"); e["name"] != "NameError" {
		t.Errorf("outside of it: %v", e)
	}
	if status, body := i.ask("GET", "/contexts", ""); status != 200 || !strings.Contains(body, id) {
		t.Errorf("the contexts are %d %s", status, body)
	}
	if status, body := i.ask("POST", "/contexts/"+id+"/restart", ""); status != 200 || body != "null" {
		t.Errorf("restart: %d %s", status, body)
	}
	if e := of(i.run("y", in), "error"); e["name"] != "NameError" {
		t.Errorf("after a restart: %v", e)
	}
	// A restart ends running code.
	ended := make(chan []line, 1)
	go func() { ended <- i.run("open('/tmp/begun', 'w'); import time; time.sleep(300)", in) }()
	i.s.want(i.id, "until [ -e /tmp/begun ]; do sleep 0.05; done")
	if status, body := i.ask("POST", "/contexts/"+id+"/restart", ""); status != 200 {
		t.Errorf("restart: %d %s", status, body)
	}
	if e := of(<-ended, "error"); e["name"] != "ContextRestarted" {
		t.Errorf("what ran ended with %v", e)
	}
	if status, _ := i.ask("DELETE", "/contexts/"+id, ""); status != 200 {
		t.Errorf("remove: %d", status)
	}
	for _, r := range [][2]string{{"DELETE", "/contexts/" + id}, {"POST", "/contexts/" + id + "/restart"}} {
		if status, body := i.ask(r[0], r[1], ""); status != 404 || !strings.Contains(body, "not found") {
			t.Errorf("%s: %d %s", r, status, body)
		}
	}
	if left := i.s.want(i.id, "pgrep -c -f ipykernel_launche[r]"); left != "1" {
		t.Errorf("%s kernels run", left)
	}
}

func interpreterTrouble(t *testing.T, i interpreter) {
	// The server sends keepalives while there is no output.
	if of(i.run("import time; time.sleep(6)", nil), "keepalive") == nil {
		t.Error("six seconds without a keepalive")
	}
	// A caller that leaves interrupts its code, and the next caller does not wait.
	r := i.s.exec(i.id, `timeout 1 curl -sN -H 'Content-Type: application/json' localhost:49999/execute -d `+
		`'{"code":"import time\nfor n in range(600): time.sleep(0.1)"}'`)
	if r.ExitCode != 124 {
		t.Errorf("the caller that leaves: %+v", r)
	}
	if got := i.value("n < 599", nil); got != "True" {
		t.Errorf("the loop went on to its end: %v", got)
	}
	// Executions in one context run one after the other.
	done := make(chan any, 4)
	i.value("order = []", nil)
	for range cap(done) {
		go func() { done <- i.value("order.append('in'); time.sleep(0.2); order.append('out')", nil) }()
	}
	for range cap(done) {
		<-done
	}
	if got := i.value("order == ['in', 'out'] * 4", nil); got != "True" {
		t.Errorf("concurrent executions ran in the order: %v", i.value("order", nil))
	}
	// A large output arrives complete.
	lines := i.run("for n in range(20000): print(n)", nil)
	var out strings.Builder
	for _, l := range lines {
		if l["type"] == "stdout" {
			out.WriteString(l["text"].(string))
		}
	}
	if got := strings.Count(out.String(), "\n"); got != 20000 || !strings.HasSuffix(out.String(), "19999\n") {
		t.Errorf("got %d lines", got)
	}
	// The death of a kernel is reported, and another kernel is started.
	if e := of(i.run("import os; os._exit(3)", nil), "error"); e["name"] != "KernelDied" {
		t.Errorf("a dead kernel: %v", e)
	}
	if got := i.value("6 * 7", nil); got != "42" {
		t.Errorf("after a dead kernel: %v", got)
	}
}

func interpreterRefuses(t *testing.T, i interpreter) {
	for body, want := range map[string]string{
		`{}`:                          "400 code is missing",
		`[]`:                          "400 the body must be a JSON object",
		`{"code":7}`:                  "400 code must be of type str",
		`{"code":"1","language":"r"}`: "400 there is no Jupyter kernel for the language 'r'",
		`{"code":"1","language":"python","context_id":"x"}`: "400 only one of",
		`{"code":"1","context_id":"x"}`:                     "404 Context x not found",
		`{"code":"1","env_vars":{"A":1}}`:                   "400 env_vars must hold texts",
	} {
		status, answer := i.ask("POST", "/execute", body)
		if got := fmt.Sprint(status, " ", answer); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", body, got, want)
		}
	}
	if status, answer := i.ask("POST", "/contexts", `{"cwd":"/none"}`); status != 400 ||
		!strings.Contains(answer, "/none") {
		t.Errorf("a context in a missing directory: %d %s", status, answer)
	}
	if status, answer := i.ask("POST", "/contexts", `{"cwd":"/root"}`); status != 400 ||
		!strings.Contains(answer, "/root") || !strings.Contains(answer, "user") {
		t.Errorf("a context in a directory that only root can open: %d %s", status, answer)
	}
	if status, answer := i.ask("GET", "/health", ""); status != 200 || answer != "OK" {
		t.Errorf("health: %d %s", status, answer)
	}
}
