package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// attack describes what one kind of hostile tenant does. Its pause gives it its share of the
// processors: a hundred tenants that compute slow down an honest one whatever the server does, and
// the test is about everything else.
type attack struct {
	name    string
	request object // request for its sandbox, nil for none
	prepare func(h *hostile)
	round   func(ctx context.Context, h *hostile)
	pause   time.Duration
	// persistent gives the tenant a sandbox that is suspended and woken.
	persistent bool
}

var attacks = []attack{
	{name: "outputs, slow readers", request: object{}, round: floodOutputs, pause: 3 * time.Second},
	{name: "listings of a huge tree", request: object{}, prepare: plantTree, round: listTree, pause: 2 * time.Second},
	{name: "names", request: object{"egress": object{"mode": "deny_all", "allow_domains": []string{"*.flood.test"}}}, round: floodNames, pause: time.Second},
	{name: "10,000 ranges", request: object{}, round: floodRanges, pause: 2 * time.Second},
	{name: "UDP flows", request: object{}, round: floodFlows, pause: time.Second},
	{name: "fork bombs", request: object{}, round: forkBomb, pause: 15 * time.Second},
	{name: "memory eaters", request: object{}, round: eatMemory, pause: 10 * time.Second},
	{name: "disk fillers", request: object{"disk_size_mb": 100}, round: fillDisk, pause: 5 * time.Second},
	{name: "port floods", request: object{}, prepare: serveFiles, round: floodPorts, pause: time.Second},
	{name: "slow connections", round: slowConnections, pause: time.Second},
	{name: "long paths", round: floodPaths, pause: 500 * time.Millisecond},
	{name: "builds with bombs", round: buildBombs, pause: 5 * time.Second},
	{name: "suspends and wakes", request: object{}, round: churnSleep, pause: 2 * time.Second, persistent: true},
	{name: "E2B's API", round: floodE2B, pause: 2 * time.Second},
	{name: "followers", request: object{}, round: floodFollowers, pause: time.Second},
	{name: "creates and forks", request: object{}, round: floodStarts, pause: 3 * time.Second},
	{name: "JSON and archives", request: object{}, round: floodBodies, pause: time.Second},
}

// at makes n concurrent calls of f.
func at(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

func (h *hostile) newRequest(method, path string, body any) *http.Request {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			panic(err) // the request is the test's own
		}
		r = bytes.NewReader(data)
	}
	req, err := http.NewRequest(method, h.server.url+path, r)
	if err != nil {
		panic(err) // the request is the test's own
	}
	req.Header.Set("Authorization", "Bearer "+h.server.key)
	return req
}

// run executes a command line.
func (h *hostile) run(ctx context.Context, command, timeout string) {
	h.call(ctx, "POST", h.path("/execute"), object{"command": command, "timeout": timeout})
}

// script executes a Python program.
func (h *hostile) script(ctx context.Context, timeout, program string, args ...string) {
	h.call(ctx, "POST", h.path("/execute"), object{"args": append([]string{"python3", "-c", program}, args...),
		"timeout": timeout})
}

// floodOutputs fills both outputs of commands with bytes that are not text, and reads slowly.
func floodOutputs(ctx context.Context, h *hostile) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	at(4, func(int) {
		h.sip(ctx, h.newRequest("POST", h.path("/execute"),
			object{"command": `tr '\0' '\377' </dev/zero | head -c 9000000; tr '\0' '\377' </dev/zero | head -c 9000000 >&2`}),
			256<<10, 200*time.Millisecond)
	})
}

func plantTree(h *hostile) {
	h.server.want(h.id, `for i in $(seq 100); do mkdir -p /tree/$i && (cd /tree/$i && touch $(seq 200)); done`,
		object{"timeout": "3m"})
}

func listTree(ctx context.Context, h *hostile) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	at(3, func(int) {
		h.sip(ctx, h.newRequest("GET", h.path("/files/list?path=/tree&depth=10"), nil), 256<<10, 200*time.Millisecond)
	})
}

// floodNames asks for ever new names, each of which becomes part of the policy.
func floodNames(ctx context.Context, h *hostile) {
	h.script(ctx, "30s", `
import os, socket, struct, time
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(0.01)
end = time.time() + 5
while time.time() < end:
    name = os.urandom(6).hex().encode()
    q = os.urandom(2) + b"\1\0\0\1\0\0\0\0\0\0" + bytes([len(name)]) + name + b"\5flood\4test\0\0\1\0\1"
    try:
        u.sendto(q, ("`+h.out.address+`", 53)); u.recv(600)
    except OSError: pass
    time.sleep(0.02)
`)
}

func floodRanges(ctx context.Context, h *hostile) {
	ranges := make([]string, 0, 10_000)
	for i := range cap(ranges) {
		ranges = append(ranges, fmt.Sprintf("203.%d.%d.%d/32", i>>15, i>>7&255, i<<1&255))
	}
	h.call(ctx, "PUT", h.path("/egress"), object{"mode": "deny_all", "allow_cidrs": ranges})
	h.call(ctx, "PUT", h.path("/egress"), object{"mode": "deny_all", "allow_cidrs": ranges[:2]})
}

// floodFlows sends to thousands of ports of the test's own address outside.
func floodFlows(ctx context.Context, h *hostile) {
	h.script(ctx, "30s", `
import socket, time
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(6000):
    try: u.sendto(b"x", ("`+h.out.second+`", 1024 + i))
    except OSError: pass
    if i % 20 == 0: time.sleep(0.005)
`)
}

func forkBomb(ctx context.Context, h *hostile) {
	h.run(ctx, "b() { b | b & }; b; sleep 60", "1s")
}

func eatMemory(ctx context.Context, h *hostile) {
	h.script(ctx, "20s", "l = []\nwhile True: l.append(bytearray(4 << 20))")
}

func fillDisk(ctx context.Context, h *hostile) {
	h.run(ctx, "dd if=/dev/zero of=/var/fill bs=1M count=200; rm -f /var/fill; "+
		"seq 20000 | (mkdir -p /many; cd /many; head -2000 | xargs touch); rm -rf /many", "30s")
}

func serveFiles(h *hostile) {
	h.server.want(h.id, "cd / && nohup python3 -m http.server 8000 >/dev/null 2>&1 & sleep 1")
}

// floodPorts makes many concurrent requests to one port, and opens tunnels without using them.
func floodPorts(ctx context.Context, h *hostile) {
	at(20, func(int) { h.call(ctx, "GET", portPath(h.id, 8000)+"/", nil) })
	var open []net.Conn
	for range 20 {
		c, err := net.Dial("tcp", strings.TrimPrefix(h.server.url, "http://"))
		if err != nil {
			h.did("broken")
			continue
		}
		open = append(open, c)
		fmt.Fprintf(c, "POST %s?port=8000 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nConnection: Upgrade\r\n"+
			"Upgrade: tcp\r\n\r\n", h.path("/tunnel"), h.server.key)
	}
	h.rest(ctx, 2*time.Second)
	for _, c := range open {
		c.Close()
	}
}

// slowConnections holds connections that send a head at one byte a second, connections that send a
// body that way, and connections that send nothing.
func slowConnections(ctx context.Context, h *hostile) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	at(150, func(i int) {
		c, err := net.Dial("tcp", strings.TrimPrefix(h.server.url, "http://"))
		if err != nil {
			h.did("broken")
			return
		}
		defer c.Close()
		head := "GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + h.server.key + "\r\n"
		switch i % 3 {
		case 0:
			_, err = io.WriteString(c, head+"X-Slow: ")
		case 1:
			_, err = io.WriteString(c, strings.Replace(head, "GET", "POST", 1)+
				"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{")
		case 2:
			_, err = io.WriteString(c, head+"\r\n")
		}
		for err == nil && ctx.Err() == nil {
			h.rest(ctx, time.Second)
			if i%3 != 2 {
				_, err = io.WriteString(c, " ")
			}
		}
	})
}

// floodPaths makes requests without a key, with the longest paths that the server takes.
func floodPaths(ctx context.Context, h *hostile) {
	path := "/v1/" + strings.Repeat("a", 57<<10)
	for range 10 {
		r := h.newRequest("GET", path, nil)
		r.Header.Set("Authorization", "none")
		h.sip(ctx, r, 64<<10, 0)
	}
}

// buildBombs builds a Dockerfile that adds an archive of a high compression ratio, and runs a fork
// bomb.
func buildBombs(ctx context.Context, h *hostile) {
	name := "bomb-" + fmt.Sprint(time.Now().UnixNano())
	body, kind := templateForm(object{"name": name, "dockerfile": "Dockerfile"}, bombContext())
	status, answer, err := h.server.request(ctx, "POST", "/v1/templates", kind, body)
	if err != nil || status != 202 {
		h.did(fmt.Sprintf("%dxx", status/100))
		return
	}
	id := text(answer, "id")
	for deadline := time.Now().Add(2 * time.Minute); ctx.Err() == nil &&
		time.Now().Before(deadline); h.rest(ctx, time.Second) {
		if status, answer := h.call(ctx, "GET", "/v1/templates/"+id, nil); status != 200 ||
			text(answer, "status") == "ready" || text(answer, "status") == "failed" {
			break
		}
	}
	h.call(context.WithoutCancel(ctx), "DELETE", "/v1/templates/"+id+"?force=true", nil)
}

// bombContext returns a build context with a compressed archive of 600 MiB of zeros.
var bombContext = sync.OnceValue(func() []byte {
	var bomb, context bytes.Buffer
	z := gzip.NewWriter(&bomb)
	w := tar.NewWriter(z)
	must := func(err error) {
		if err != nil {
			panic(err) // a buffer does not fail
		}
	}
	must(w.WriteHeader(&tar.Header{Name: "nothing", Mode: 0o644, Size: 600 << 20, Typeflag: tar.TypeReg}))
	zeros := make([]byte, 1<<20)
	for range 600 {
		_, err := w.Write(zeros)
		must(err)
	}
	must(w.Close())
	must(z.Close())
	w = tar.NewWriter(&context)
	for name, data := range map[string][]byte{"Dockerfile": []byte("FROM python\nADD bomb.tar.gz /bomb\n" +
		"RUN b() { b | b & }; b; sleep 5; head -c 2000000000 /dev/zero >/fill\n"), "bomb.tar.gz": bomb.Bytes()} {
		must(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}))
		_, err := w.Write(data)
		must(err)
	}
	must(w.Close())
	return context.Bytes()
})

func churnSleep(ctx context.Context, h *hostile) {
	h.call(ctx, "POST", h.path("/suspend"), nil)
	h.call(ctx, "POST", h.path("/wake"), nil)
}

// floodE2B makes sandboxes through E2B's API, and asks for files with false signatures.
func floodE2B(ctx context.Context, h *hostile) {
	control := func(method, path string, body any) []byte {
		r := h.newRequest(method, path, body)
		r.Header.Set("X-API-Key", h.server.key)
		resp, err := h.client.Do(r.WithContext(ctx))
		if err != nil {
			return nil // the time is over
		}
		defer resp.Body.Close()
		h.did(fmt.Sprintf("%dxx", resp.StatusCode/100))
		answer, _ := io.ReadAll(resp.Body)
		return answer
	}
	id := text(control("POST", "/v2/sandboxes", object{"templateID": "python", "timeout": 60}), "sandboxID")
	at(10, func(int) {
		for range 5 {
			control("GET", "/files?path=/etc/passwd&username=root&signature=v1_none", nil)
		}
	})
	if id != "" {
		ctx = context.WithoutCancel(ctx)
		control("DELETE", "/sandboxes/"+id, nil)
	}
}

// floodFollowers lets many clients follow one process with endless output, and read slowly or not
// at all.
func floodFollowers(ctx context.Context, h *hostile) {
	_, answer := h.call(ctx, "POST", h.path("/processes"),
		object{"command": "while :; do head -c 65536 /dev/zero | tr '\\0' x; sleep 0.2; done"})
	var process struct{ PID int }
	if json.Unmarshal(answer, &process) != nil || process.PID == 0 {
		return // the count of answers shows it
	}
	own, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	at(60, func(i int) {
		h.sip(own, h.newRequest("GET", fmt.Sprintf("%s/%d/output", h.path("/processes"), process.PID), nil), 4<<10,
			time.Duration(i)*50*time.Millisecond)
	})
	h.call(context.WithoutCancel(ctx), "DELETE", fmt.Sprintf("%s/%d", h.path("/processes"), process.PID), nil)
}

// floodStarts makes concurrent requests for more than its quota, in every way that starts a
// sandbox.
func floodStarts(ctx context.Context, h *hostile) {
	at(6, func(i int) {
		if i == 0 {
			h.call(ctx, "POST", h.path("/fork"), object{"count": 2, "timeout": "1m"})
			return
		}
		h.call(ctx, "POST", "/v1/sandboxes", object{"timeout": "1m", "disk_size_mb": 200 + i})
	})
	for _, id := range h.sandboxes(context.WithoutCancel(ctx)) {
		if id != h.id {
			h.call(context.WithoutCancel(ctx), "DELETE", "/v1/sandboxes/"+id, nil)
		}
	}
}

// sandboxes lists the sandboxes of the tenant.
func (h *hostile) sandboxes(ctx context.Context) (ids []string) {
	_, answer := h.call(ctx, "GET", "/v1/sandboxes?limit=200", nil)
	var list struct{ Sandboxes []struct{ ID string } }
	_ = json.Unmarshal(answer, &list) // no sandboxes if it fails
	for _, sandbox := range list.Sandboxes {
		ids = append(ids, sandbox.ID)
	}
	return ids
}

// floodBodies sends bodies that are cheap to write and expensive to read.
func floodBodies(ctx context.Context, h *hostile) {
	for _, body := range []string{
		strings.Repeat(`{"a":`, 150_000),
		`{"env":` + strings.Repeat("[", 900_000),
		`{"timeout":1` + strings.Repeat("0", 900_000) + "}",
		`{"env":{` + strings.Repeat(`"k":"v",`, 100_000) + `"k":"v"}}`,
		`{"metadata":{"` + strings.Repeat("\\u0000", 100_000) + "\":\"\xff\"}}",
	} {
		status, _, err := h.server.request(ctx, "POST", "/v1/sandboxes", "application/json", strings.NewReader(body))
		if err == nil {
			h.did(fmt.Sprintf("%dxx", status/100))
		}
	}
	bomb := bufio.NewReader(bytes.NewReader(bombContext()))
	status, _, err := h.server.request(ctx, "PUT", h.path("/files/tar?path=/tmp"), "application/x-tar", bomb)
	if err == nil {
		h.did(fmt.Sprintf("%dxx", status/100))
	}
}
