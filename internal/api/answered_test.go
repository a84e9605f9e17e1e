package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestLifeOfASandbox(t *testing.T) {
	h := newTestServer(t)
	r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","timeout":"1h30m","size":"performance-1x","disk_size_mb":1024,
		"env":{"A":"1"},"metadata":{"team":"x"},"mode":"ephemeral","egress":{"mode":"allow_all"},"idle_timeout":null}`)
	sbx := as[Sandbox](t, 201, r)
	if r.header.Get("Location") != "/v1/sandboxes/"+sbx.ID {
		t.Errorf("Location %q", r.header.Get("Location"))
	}
	if sbx.Status != SandboxStatusRunning || sbx.Template != "python" || sbx.TemplateVersion != 3 ||
		*sbx.TimeoutSeconds != 5400 || sbx.VCPUs != 1 || sbx.MemoryMB != 2048 || sbx.DiskMB != 1024 || sbx.Env["A"] != "1" ||
		sbx.Env["LANG"] != "C.UTF-8" || sbx.Metadata["team"] != "x" {
		t.Errorf("created %s", r.body)
	}
	if life := sbx.ExpiresAt.Sub(*sbx.StartedAt); life != 90*time.Minute {
		t.Errorf("the timeout is %s, want 1h30m", life)
	}
	for _, absent := range []string{"idle_timeout_seconds", "last_activity_at", "suspended_at", "destroyed_at", "error"} {
		if bytes.Contains(r.body, []byte(absent)) {
			t.Errorf("the field %s does not apply but is present: %s", absent, r.body)
		}
	}
	path := "/v1/sandboxes/" + sbx.ID
	same := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
	if same.ID != sbx.ID || !same.CreatedAt.Equal(sbx.CreatedAt) {
		t.Errorf("get %+v", same)
	}
	for _, body := range []string{"", "{}", `{"timeout":"48h"}`} {
		kept := as[Sandbox](t, 200, h.send(t, "POST", path+"/keepalive", h.key, body))
		want := int64(5400)
		if strings.Contains(body, "48h") {
			want = 86400 // limited to 24 hours
		}
		if *kept.TimeoutSeconds != want {
			t.Errorf("keepalive %q: %d s, want %d", body, *kept.TimeoutSeconds, want)
		}
	}
	as[Sandbox](t, 200, h.send(t, "POST", path+"/wake", h.key, ""))
	policy := `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"deny_cidrs":["10.1.0.0/16"],"allow_ports":[443],` +
		`"allow_domains":["*.Example.com"]}`
	changed := as[Sandbox](t, 200, h.send(t, "PUT", path+"/egress", h.key, policy))
	read := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
	want := Egress{Mode: EgressModeDenyAll, AllowCIDRs: []string{"10.0.0.0/8"}, DenyCIDRs: []string{"10.1.0.0/16"},
		AllowPorts: []int{443}, AllowDomains: []string{"*.example.com"}}
	if !cmp.Equal(changed.Egress, want) || !cmp.Equal(read.Egress, want) {
		t.Errorf("policy %+v, read %+v", changed.Egress, read.Egress)
	}
	use := &NetworkUse{PacketsAllowed: 4, BytesAllowed: 4096, PacketsDenied: 1, BytesDenied: 60}
	if !cmp.Equal(read.Network, use) || changed.Network != nil {
		t.Errorf("network %+v, in the answer to another call %+v", read.Network, changed.Network)
	}
	for range 2 {
		if r := h.send(t, "DELETE", path, h.key, ""); r.status != 204 || len(r.body) != 0 {
			t.Errorf("destroy: %d %s", r.status, r.body)
		}
	}
	gone := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
	for deadline := time.Now().Add(5 * time.Second); gone.State == SandboxStateDestroying && time.Now().Before(deadline); {
		gone = as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
	}
	if gone.Status != SandboxStatusDestroyed || *gone.DestroyReason != "requested" || gone.DestroyedAt == nil {
		t.Errorf("destroyed: %+v", gone)
	}
	events := as[EventList](t, 200, h.send(t, "GET", path+"/events", h.key, "")).Events
	var states []SandboxState
	for _, e := range events {
		states = append(states, e.To)
	}
	if want := []SandboxState{"destroyed", "destroying", "running", "running", "creating"}; !slices.Equal(states, want) ||
		events[len(events)-1].From != nil {
		t.Errorf("events %v, want %v, the oldest without a from", states, want)
	}
	if e := events[2]; e.From == nil || *e.From != e.To || e.Reason != "egress_changed" || e.Detail == nil {
		t.Errorf("the change of policy is %+v", e)
	}
}

func TestCreateWithoutWaiting(t *testing.T) {
	h := newTestServer(t)
	started := make(chan struct{})
	h.node.OnCreate = func(ctx context.Context, _ sandbox.Spec) error {
		select {
		case <-started:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	sbx := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes?wait=false", h.key, `{"template":"python"}`))
	if sbx.Status != SandboxStatusCreating || sbx.StartedAt != nil {
		t.Errorf("created %+v", sbx)
	}
	close(started)
	for deadline := time.Now().Add(10 * time.Second); ; {
		if sbx = as[Sandbox](t, 200,
			h.send(t, "GET", "/v1/sandboxes/"+sbx.ID, h.key, "")); sbx.Status == SandboxStatusRunning {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %s", sbx.Status)
		}
	}
}

func TestBootFailed(t *testing.T) {
	h := newTestServer(t)
	h.node.OnCreate = func(context.Context, sandbox.Spec) error { return errors.New("mounting /var/lib/secret: EIO") }
	r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python"}`)
	if r.status != 500 || r.problem.Code != "boot_failed" || bytes.Contains(r.body, []byte("secret")) {
		t.Errorf("status %d %s", r.status, r.body)
	}
	failed := as[SandboxList](t, 200, h.send(t, "GET", "/v1/sandboxes?status=destroyed", h.key, "")).Sandboxes
	if len(failed) != 1 || failed[0].State != SandboxStateFailed || *failed[0].DestroyReason != "boot_failed" ||
		strings.Contains(*failed[0].Error, "secret") {
		t.Errorf("left behind: %+v", failed)
	}
}

func TestIdempotency(t *testing.T) {
	h := newTestServer(t)
	key := header("Idempotency-Key", "job-17")
	first := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","timeout":"5m"}`, key))
	again := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key,
		"{ \"timeout\": \"5m\",\n\"template\": \"python\" }", key))
	if again.ID != first.ID {
		t.Errorf("repeating a create made %s and %s", first.ID, again.ID)
	}
	if r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","timeout":"6m"}`, key); r.status != 409 ||
		r.problem.Code != "idempotency_key_reused" {
		t.Errorf("another body: %d %s", r.status, r.body)
	}
	theirs := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.other, `{"template":"python","timeout":"5m"}`, key))
	if theirs.ID == first.ID {
		t.Error("another organization got our sandbox")
	}
}

func TestListFiltersAndPages(t *testing.T) {
	h := newTestServer(t)
	var ids []string
	for i := range 5 {
		body := fmt.Sprintf(`{"template":"python","metadata":{"n":"%d","odd":"%t","a b":"c&d"}}`, i, i%2 == 1)
		ids = append(ids, as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key, body)).ID)
	}
	h.send(t, "DELETE", "/v1/sandboxes/"+ids[0], h.key, "")
	slices.Reverse(ids) // listings begin with the newest
	list := func(query string) (got []string, next *string) {
		page := as[SandboxList](t, 200, h.send(t, "GET", "/v1/sandboxes?"+query, h.key, ""))
		for _, b := range page.Sandboxes {
			got = append(got, b.ID)
		}
		return got, page.NextCursor
	}
	for _, c := range []struct {
		query string
		want  []string
	}{
		{"", ids[:4]},
		{"status=destroyed", ids[4:]},
		{"status=destroyed&status=running", ids},
		{"status=creating", nil},
		{"metadata.odd=true", []string{ids[1], ids[3]}},
		{"metadata.odd=true&metadata.n=3", ids[1:2]},
		{"metadata.odd=true&metadata.n=2", nil},
		{"metadata.a+b=c%26d&limit=1", ids[:1]},
		{"metadata.none=", nil},
	} {
		if got, _ := list(c.query); !slices.Equal(got, c.want) {
			t.Errorf("%q: %v, want %v", c.query, got, c.want)
		}
	}
	var all []string
	query := "limit=3&status=destroyed&status=running"
	for next := new(""); next != nil; {
		var got []string
		got, next = list(query)
		all = append(all, got...)
		if next != nil {
			query = "limit=3&status=destroyed&status=running&cursor=" + url.QueryEscape(*next)
		}
	}
	if !slices.Equal(all, ids) {
		t.Errorf("the pages list %v, want %v", all, ids)
	}
	if r := h.send(t, "GET", "/v1/sandboxes?status=suspended", h.key, ""); !bytes.Contains(
		r.body, []byte(`"sandboxes":[]`)) {
		t.Errorf("an empty list is %s", r.body)
	}
}

func TestExecute(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	var got agentapi.ExecuteRequest
	var result agentapi.ExecuteResult
	h.agent.execute = func(_ context.Context, r agentapi.ExecuteRequest) (agentapi.ExecuteResult, error) {
		got = r
		if h.sandboxes.InUse() != 1 {
			t.Errorf("%d leases while a command runs, want 1", h.sandboxes.InUse())
		}
		return result, nil
	}
	execute := func(body string) ExecuteResult {
		t.Helper()
		return as[ExecuteResult](t, 200, h.send(t, "POST", "/v1/sandboxes/"+sbx.ID+"/execute", h.key, body))
	}

	result = agentapi.ExecuteResult{ExitCode: 3, Stdout: []byte("<é>\n"), Stderr: []byte{0xff, 0},
		Duration: 1500 * time.Microsecond}
	out := execute(`{"command":"x","timeout":"1m30s","workdir":"/tmp","env":{"A":"1"},"stdin":"in\u0000","user":"nobody"}`)
	if got.Command != "x" || got.Args != nil || got.Timeout != 90*time.Second || got.Workdir != "/tmp" ||
		got.Env["A"] != "1" || string(got.Stdin) != "in\x00" || got.User != "nobody" {
		t.Errorf("the agent was asked %+v", got)
	}
	if out.ExitCode != 3 || out.Stdout != "<é>\n" || out.StdoutEncoding != nil || out.DurationMs != 1 ||
		out.Signal != nil {
		t.Errorf("answer %+v", out)
	}
	if b, err := base64.StdEncoding.DecodeString(out.Stderr); out.StderrEncoding == nil || err != nil ||
		!bytes.Equal(b, []byte{0xff, 0}) {
		t.Errorf("binary output is %q, %v", out.Stderr, err)
	}

	result = agentapi.ExecuteResult{ExitCode: 137, Signal: 9, OOMKilled: true, TimedOut: true, StdoutTruncated: true,
		Stdout: []byte("ab\xc3")}
	out = execute(`{"args":["sleep","1"]}`)
	if !slices.Equal(got.Args, []string{"sleep", "1"}) || got.Timeout != 30*time.Second || len(got.Stdin) != 0 {
		t.Errorf("the agent was asked %+v", got)
	}
	if *out.Signal != "SIGKILL" || !out.OOMKilled || !out.TimedOut || !out.StdoutTruncated || out.Stdout != "ab" ||
		out.StdoutEncoding != nil {
		t.Errorf("answer %+v", out)
	}
	if target := h.agent.targets[0]; target.SandboxID != sbx.ID || target.Run == "" {
		t.Errorf("target %+v", target)
	}
	if h.sandboxes.InUse() != 0 {
		t.Error("a lease is still held")
	}
}

// outputField returns a field of output as a client reads it.
func outputField(t *testing.T, kept *budget.Bytes, cut bool) (text string, encoded bool) {
	t.Helper()
	var b strings.Builder
	out := bufio.NewWriter(&b)
	if err := errors.Join(writeOutputField(out, "x", kept, cut), out.Flush()); err != nil {
		t.Fatal(err)
	}
	var got struct {
		X        string `json:"x"`
		Encoding string `json:"x_encoding"`
	}
	if err := json.Unmarshal([]byte("{"+b.String()[1:]+"}"), &got); err != nil {
		t.Fatalf("%.100q: %v", b.String(), err)
	}
	return got.X, got.Encoding == "base64"
}

// FuzzOutputField checks that the answer does not depend on how an output is split into pieces.
func FuzzOutputField(f *testing.F) {
	f.Add([]byte("plain\x00\"\\\n\r\t\x7f é € 😀"), uint8(3), false)
	f.Add([]byte("a\xf0\x9f\x98"), uint8(1), true)
	f.Add([]byte("\xff\xc3"), uint8(1), false)
	f.Fuzz(func(t *testing.T, b []byte, size uint8, cut bool) {
		const own = 8 << 10 // pieces of this length are kept without copying
		padding := bytes.Repeat([]byte("x"), own)
		var kept budget.Bytes
		var whole []byte
		for piece := range slices.Chunk(b, int(size)+1) {
			// Pieces end at arbitrary bytes of the input.
			p := append(padding[:own:own], piece...)
			if len(whole) > 0 {
				p = append(slices.Clone(piece), padding...)
			}
			whole = append(whole, p...)
			if err := kept.Keep(p); err != nil {
				t.Fatal(err)
			}
		}
		text, encoded := outputField(t, &kept, cut)
		got := []byte(text)
		if encoded {
			var err error
			if got, err = base64.StdEncoding.DecodeString(text); err != nil {
				t.Fatal(err)
			}
		}
		lost := len(whole) - len(got)
		if !bytes.HasPrefix(whole, got) || lost > 0 && (!cut || encoded || agentapi.IncompleteTail(whole) != lost) {
			t.Errorf("got %d of %d bytes, cut %t, encoded %t", len(got), len(whole), cut, encoded)
		}
		if encoded && utf8.Valid(whole) || !encoded && !utf8.Valid(got) {
			t.Errorf("encoded %t, and UTF-8 is %t", encoded, utf8.Valid(whole))
		}
		if kept.Len() != 0 {
			t.Errorf("%d bytes are still held", kept.Len())
		}
	})
}

func TestOutputAsText(t *testing.T) {
	for _, c := range []struct {
		in      string
		cut     bool
		want    string
		encoded bool
	}{
		{"", false, "", false},
		{"plain\x00", false, "plain\x00", false},
		{"é", false, "é", false},
		{"a\xc3", false, "YcM=", true},      // not cut, so the bytes are kept
		{"a\xc3", true, "a", false},         // half of é
		{"a\xe2\x82", true, "a", false},     // two thirds of €
		{"a\xf0\x9f\x98", true, "a", false}, // three quarters of an emoji
		{"a\xff", true, "Yf8=", true},       // no continuation could make it UTF-8
		{"\xffa\xc3", true, "/2HD", true},   // binary before the cut
		{"\xc3", true, "", false},
		{"\x82\x82\x82", true, "goKC", true},
	} {
		var kept budget.Bytes
		if err := kept.Keep([]byte(c.in)); err != nil {
			t.Fatal(err)
		}
		if got, encoded := outputField(t, &kept, c.cut); got != c.want || encoded != c.encoded {
			t.Errorf("%q, cut %t, is %q, %t; want %q, %t", c.in, c.cut, got, encoded, c.want, c.encoded)
		}
	}
	for n, want := range map[int]string{1: "SIGHUP", 15: "SIGTERM", 34: "SIGRTMIN", 36: "SIGRTMIN+2", 33: "SIG33"} {
		if got := signalName(n); got != want {
			t.Errorf("signal %d is %q, want %q", n, got, want)
		}
	}
}

// TestCallerGoesAway checks that a command is killed when its caller leaves, and that its sandbox
// then no longer counts as in use.
func TestCallerGoesAway(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	running, killed := make(chan struct{}), make(chan error, 1)
	h.agent.execute = func(ctx context.Context, _ agentapi.ExecuteRequest) (agentapi.ExecuteResult, error) {
		close(running)
		<-ctx.Done()
		killed <- ctx.Err()
		return agentapi.ExecuteResult{}, fmt.Errorf("calling the agent: %w", ctx.Err())
	}
	ctx, leave := context.WithCancel(t.Context())
	go func() { <-running; leave() }()
	r, err := http.NewRequestWithContext(ctx, "POST", h.url+"/v1/sandboxes/"+sbx.ID+"/execute",
		strings.NewReader(`{"command":"sleep 100"}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+h.key)
	r.Header.Set("X-Request-Id", "leaver")
	if resp, err := h.http.Do(r); !errors.Is(err, context.Canceled) {
		t.Fatalf("answer %v, %v", resp, err)
	}
	select {
	case <-killed:
	case <-time.After(10 * time.Second):
		t.Fatal("the command was not canceled")
	}
	if line := h.log.line(t, "leaver"); line["status"] != float64(httpserver.StatusGone) {
		t.Errorf("log line %v, want status %d", line, httpserver.StatusGone)
	}
	if n := h.sandboxes.InUse(); n != 0 {
		t.Errorf("%d leases are still held", n)
	}
}

func TestFiles(t *testing.T) {
	h := newTestServer(t)
	base := "/v1/sandboxes/" + h.newSandbox(t).ID + "/files"
	if r := h.send(t, "PUT", base+"?path=/home/user/a%20b&mode=0755&owner=user", h.key, "0123456789"); r.status != 204 {
		t.Fatalf("write: %d %s", r.status, r.body)
	}
	up := h.agent.uploads[0]
	if up.Path != "/home/user/a b" || *up.Mode != 0o755 || up.User != "user" || up.Size != 10 {
		t.Errorf("the agent was asked %+v", up)
	}
	r := h.send(t, "GET", base+"?path=/home/user/a%20b", h.key, "")
	if r.status != 200 || string(r.body) != "0123456789" || r.header.Get("Content-Length") != "10" ||
		r.header.Get("Content-Type") != "application/octet-stream" || r.header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("read: %d %q %v", r.status, r.body, r.header)
	}
	for _, c := range []struct {
		text   string
		status int
		body   string
		part   string
	}{
		{"bytes=2-4", 206, "234", "bytes 2-4/10"},
		{"bytes=-3", 206, "789", "bytes 7-9/10"},
		{"bytes=8-100", 206, "89", "bytes 8-9/10"},
		{"bytes=0-1,4-5", 200, "0123456789", ""},
	} {
		r := h.send(t, "GET", base+"?path=/home/user/a%20b", h.key, "", header("Range", c.text))
		if r.status != c.status || string(r.body) != c.body || r.header.Get("Content-Range") != c.part {
			t.Errorf("range %s: %d %q %q", c.text, r.status, r.body, r.header.Get("Content-Range"))
		}
	}
	r = h.send(t, "GET", base+"?path=/home/user/a%20b", h.key, "", header("Range", "bytes=10-"))
	if r.status != 416 || r.problem.Code != "invalid_range" || r.header.Get("Content-Range") != "bytes */10" {
		t.Errorf("range outside: %d %s %q", r.status, r.body, r.header.Get("Content-Range"))
	}
	if r := h.send(t, "HEAD", base+"?path=/home/user/a%20b", h.key, ""); r.status != 200 ||
		r.header.Get("Content-Length") != "10" || len(r.body) != 0 {
		t.Errorf("head: %d %v", r.status, r.header)
	}
	h.send(t, "PUT", base+"?path=/home/user/empty", h.key, "")
	entries := as[FileList](t, 200, h.send(t, "GET", base+"/list?path=/home&depth=2", h.key, "")).Entries
	if len(entries) != 2 || entries[0].Mode != "0644" {
		t.Errorf("list: %+v", entries)
	}
	if r := h.send(t, "DELETE", base+"?path=/home/user&recursive=true", h.key, ""); r.status != 204 {
		t.Errorf("remove: %d %s", r.status, r.body)
	}
	if r := h.send(t, "GET", base+"/list?path=/home&depth=2", h.key, ""); !bytes.Contains(r.body, []byte(`"entries":[]`)) {
		t.Errorf("an empty directory is %s", r.body)
	}
	if n := h.sandboxes.InUse(); n != 0 {
		t.Errorf("%d leases are still held", n)
	}
}

// streamAgent passes each upload to count, and sends a file that breaks off.
type streamAgent struct {
	*fakeAgent
	count func(io.Reader) error
}

func (a streamAgent) Upload(_ context.Context, _ agentapi.Target, r agentapi.UploadRequest) error {
	return a.count(r.Body)
}

func (a streamAgent) Download(context.Context, agentapi.Target, string, string, string) (*agentapi.Download, error) {
	body := io.MultiReader(strings.NewReader("half of it"), brokenReader{errors.New("the sandbox died")})
	return &agentapi.Download{Body: io.NopCloser(body), Size: 20, Status: 200, Header: http.Header{}}, nil
}

func TestUploadLimitIsCounted(t *testing.T) {
	agent := streamAgent{fakeAgent: newFakeAgent()}
	var n int64
	agent.count = func(r io.Reader) (err error) {
		n, err = io.Copy(io.Discard, r)
		if err != nil {
			err = fmt.Errorf("reading the body: %w", err)
		}
		return err
	}
	h := newTestServer(t, withAgent(&agent))
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/files?path=/a"
	sent := func(size int64) func(*http.Request) {
		return func(r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(io.LimitReader(zeros{}, size)), -1
		}
	}
	if r := h.send(t, "PUT", path, h.key, "", sent(maxFile)); r.status != 204 || n != maxFile {
		t.Errorf("the largest file: %d %s, %d bytes", r.status, r.body, n)
	}
	if r := h.send(t, "PUT", path, h.key, "", sent(maxFile+1)); r.status != 400 || r.problem.Code != "file_too_large" ||
		n > maxFile {
		t.Errorf("a file one byte larger: %d %s, the agent got %d bytes", r.status, r.body, n)
	}
}

// TestDownloadBreaksOff checks that a client can tell a file that breaks off from a complete one.
func TestDownloadBreaksOff(t *testing.T) {
	notForwarded(t, "a replica that has got nothing yet answers 503")
	h := newTestServer(t, withAgent(&streamAgent{fakeAgent: newFakeAgent()}))
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/files?path=/a"
	r, err := http.NewRequestWithContext(t.Context(), "GET", h.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+h.key)
	r.Header.Set("X-Request-Id", "half")
	// The head and the first bytes may have been lost in a buffer, so Do may fail too.
	if resp, err := h.http.Do(r); err == nil {
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("read %q without an error", b)
		}
	}
	if line := h.log.line(t, "half"); !strings.Contains(fmt.Sprint(line["error"]), "the sandbox died") {
		t.Errorf("the log does not say why: %v", line)
	}
	if n := h.sandboxes.InUse(); n != 0 {
		t.Errorf("%d leases are still held", n)
	}
}

func TestTemplates(t *testing.T) {
	h := newTestServer(t)
	names := func(key string) (got []string) {
		for _, v := range as[TemplateList](t, 200, h.send(t, "GET", "/v1/templates", key, "")).Templates {
			got = append(got, v.Name)
		}
		return got
	}
	if got, want := names(h.key), []string{"lazy", "mine", "broken", "slow", "python"}; !slices.Equal(got, want) {
		t.Errorf("templates %v, want %v", got, want)
	}
	if got, want := names(h.other), []string{"lazy", "broken", "slow", "python"}; !slices.Equal(got, want) {
		t.Errorf("templates of another organization %v, want %v", got, want)
	}
	python := as[Template](t, 200, h.send(t, "GET", "/v1/templates/python", h.key, ""))
	if !python.Builtin || python.Version != 3 || *python.Source != "debian:bookworm" || *python.User != "user" ||
		python.Progress != nil || *python.DiskSizeMB != 512 {
		t.Errorf("python is %+v", python)
	}
	same := as[Template](t, 200, h.send(t, "GET", "/v1/templates/"+python.ID, h.key, ""))
	if same.Name != "python" {
		t.Errorf("by id: %+v", same)
	}
	slow := as[Template](t, 200, h.send(t, "GET", "/v1/templates/slow", h.key, ""))
	if slow.Status != TemplateStatusBuilding || *slow.Progress != "installing packages, 3 of 9" {
		t.Errorf("slow is %+v", slow)
	}
	lines := as[TemplateLogs](t, 200, h.send(t, "GET", "/v1/templates/python/logs", h.key, "")).Lines
	if len(lines) != 2 || lines[0].Text != "first" {
		t.Errorf("log %+v", lines)
	}
	sizes := as[SizeList](t, 200, h.send(t, "GET", "/v1/sizes", h.key, "")).Sizes
	if len(sizes) != 2 || sizes[1].Name != "performance-1x" || !sizes[1].Dedicated {
		t.Errorf("sizes %+v", sizes)
	}
}

func TestLogAndMetrics(t *testing.T) {
	notForwarded(t, "the node has the line and the numbers")
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	r := h.send(t, "PUT", "/v1/sandboxes/"+sbx.ID+"/files?path=/private/name", h.key, "0123456789",
		header("X-Request-Id", "bad id\t\"}"))
	id := r.header.Get("X-Request-Id")
	if !strings.HasPrefix(id, "req_") {
		t.Errorf("a request id that could disturb the log was taken over: %q", id)
	}
	line := h.log.line(t, id)
	for name, want := range map[string]any{
		"method": "PUT", "route": "/v1/sandboxes/{id}/files", "path": "/v1/sandboxes/" + sbx.ID + "/files", "status": float64(204), "bytes_in": float64(10),
		"org": h.org.Org.ID, "key": h.org.Key.ID, "level": "INFO",
	} {
		if line[name] != want {
			t.Errorf("log line has %s %v, want %v", name, line[name], want)
		}
	}
	for _, secret := range []string{h.key, "/private/name"} {
		if strings.Contains(h.log.String(), secret) {
			t.Errorf("the log shows %q", secret)
		}
	}
	h.send(t, "GET", "/v1/sandboxes/"+sbx.ID+"/nope", h.key, "")
	h.send(t, "BREW", "/v1/me", h.key, "")
	metrics := string(h.send(t, "GET", "/metrics", h.key, "").body)
	for _, want := range []string{
		`cay_http_requests_total{code="2xx",method="PUT",route="/v1/sandboxes/{id}/files"} 1`,
		`cay_http_requests_total{code="4xx",method="GET",route="none"} 1`,
		`cay_http_requests_total{code="4xx",method="other",route="none"} 1`,
		`cay_http_request_duration_seconds_count{method="POST",route="/v1/sandboxes"} 1`,
		`cay_http_requests_in_flight 1`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in:\n%s", want, metrics)
		}
	}
	if strings.Contains(metrics, sbx.ID) {
		t.Error("a metric has a sandbox's id")
	}
}

// TestServerTiming checks which answers have a Server-Timing header, and which parts it lists.
func TestServerTiming(t *testing.T) {
	h := newTestServer(t)
	parts := func(r reply) (names []string) {
		for part := range strings.SplitSeq(r.header.Get("Server-Timing"), ", ") {
			name, dur, ok := strings.Cut(part, ";dur=")
			if took, err := strconv.ParseFloat(dur, 64); part != "" && (!ok || err != nil || took < 0) {
				t.Errorf("part %q", part)
			}
			names = append(names, name)
		}
		return names
	}
	created := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","mode":"persistent"}`)
	path := "/v1/sandboxes/" + as[Sandbox](t, 201, created).ID
	if got, want := parts(created), []string{"auth", "template", "room", "insert", "commit", "total"}; !slices.Equal(
		got, want) {
		t.Errorf("create: %v, want %v", got, want)
	}
	if got, want := parts(h.send(t, "POST", path+"/execute", h.key, `{"command":"true"}`)),
		[]string{"auth", "find", "agent", "inside", "total"}; !slices.Equal(got, want) {
		t.Errorf("execute: %v, want %v", got, want)
	}
	h.send(t, "POST", path+"/suspend", h.key, "")
	if got, want := parts(h.send(t, "POST", path+"/wake", h.key, "")),
		[]string{"auth", "find", "room", "commit", "commit", "find", "total"}; !slices.Equal(got, want) {
		t.Errorf("wake: %v, want %v", got, want)
	}
	if got := h.send(t, "GET", path, h.key, "").header.Get("Server-Timing"); got != "" {
		t.Errorf("a lookup has %q", got)
	}
}
