package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// wireRecord names the binary of a released version whose answers TestWire writes to its file, in
// place of comparing them: after an intended change of the wire, the present one.
var wireRecord = flag.String("wire.record", "", "record the answers of this `binary` in testdata/wire.txt")

const wireFile = "testdata/wire.txt"

// TestWire replays recorded requests of /v1 and compares the answers with recorded ones: status,
// headers and body, but for ids, times and measurements. A difference means that clients see
// another wire than before.
func TestWire(t *testing.T) {
	t.Parallel() // it has its own server
	recorded, err := os.ReadFile(wireFile)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t)
	if *wireRecord != "" {
		s.binary = *wireRecord
	}
	s.start()
	s.needTemplate("python")
	names := &wireNames{byID: map[string]string{}, byName: map[string]string{}, count: map[string]int{}}
	var out bytes.Buffer
	for exchange := range strings.SplitSeq(string(recorded), "\n\n") {
		request, want, _ := strings.Cut(strings.TrimSpace(exchange), "\n")
		if strings.HasPrefix(request, "#") {
			fmt.Fprintf(&out, "%s\n\n", strings.TrimSpace(exchange))
			continue
		}
		got := s.replay(names, request)
		fmt.Fprintf(&out, "%s\n%s\n\n", request, got)
		if *wireRecord == "" && got != strings.TrimSpace(want) {
			t.Errorf("%s\nwas answered by\n%s\nand is now by\n%s", request, want, got)
		}
	}
	s.stop(syscall.SIGTERM)
	if *wireRecord != "" {
		if err := os.WriteFile(wireFile, bytes.TrimRight(out.Bytes(), "\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Skip("recorded, and compared nothing")
	}
}

// replay sends one request, written as METHOD PATH [BODY], and returns its answer as text.
func (s *server) replay(names *wireNames, request string) string {
	s.t.Helper()
	parts := strings.SplitN(names.actual(request), " ", 3)
	var body io.Reader
	if len(parts) == 3 {
		body = strings.NewReader(parts[2])
	}
	r, err := http.NewRequestWithContext(context.Background(), parts[0], s.url+parts[1], body)
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+s.key)
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	lines := []string{fmt.Sprint(resp.StatusCode)}
	for name, values := range resp.Header {
		if !slices.Contains([]string{"Date", "Content-Length", "X-Request-Id"}, name) {
			lines = append(lines, name+": "+strings.Join(values, ", "))
		}
	}
	slices.Sort(lines[1:])
	if text := strings.TrimSpace(string(answer)); text != "" {
		lines = append(lines, text)
	}
	return strings.ReplaceAll(names.stable(strings.Join(lines, "\n")), "\n\n", "\n")
}

// wireNames replaces what differs between two servers.
type wireNames struct {
	byID, byName map[string]string // of ids: sbx_… and <sbx 1>
	count        map[string]int
}

var (
	wireID   = regexp.MustCompile(`\b(sbx|snap|evt|key|org|tpl|prc|bld|whk)_[a-z0-9]{6,}`)
	wireRest = []struct {
		pattern *regexp.Regexp
		by      string
	}{
		{regexp.MustCompile(`cay_[0-9a-f]{40}|whsec_[A-Za-z0-9+/=]{40,}`), `<secret>`},
		{regexp.MustCompile(`"\d{4}-\d\d-\d\dT[^"]*"`), `"<time>"`},
		{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`), `<time>`},
		{regexp.MustCompile(`"(request_id|secret|key|next_cursor|prefix|tag|after|id)":"[A-Za-z0-9_=-]{8,}"`), `"$1":"<text>"`},
		{regexp.MustCompile(`"(duration_ms|size_bytes|image_size_bytes|bytes|pid|pause_ms|version|seq|packets_allowed|` +
			`bytes_allowed|packets_denied|bytes_denied|count|warm|cold|free_mb)":\d+`), `"$1":<n>`},
		{regexp.MustCompile(`(127\.0\.0\.1|localhost):\d+`), `<server>`},
		{regexp.MustCompile(`dur=[0-9.]+`), `dur=<n>`},
		{regexp.MustCompile(`(X-Cay-[A-Za-z-]+|Etag|Last-Modified): .*`), `$1: <text>`},
		{regexp.MustCompile(`(signature|expires)=[A-Za-z0-9_.%-]+`), `$1=<text>`},
	}
)

// stable returns an answer without what differs between two servers.
func (n *wireNames) stable(answer string) string {
	answer = wireID.ReplaceAllStringFunc(answer, func(id string) string {
		if name := n.byID[id]; name != "" {
			return name
		}
		kind, _, _ := strings.Cut(id, "_")
		n.count[kind]++
		name := fmt.Sprintf("<%s %d>", kind, n.count[kind])
		n.byID[id], n.byName[name] = name, id
		return name
	})
	for _, r := range wireRest {
		answer = r.pattern.ReplaceAllString(answer, r.by)
	}
	return answer
}

// actual returns a request with the ids of this server.
func (n *wireNames) actual(request string) string {
	for name, id := range n.byName {
		request = strings.ReplaceAll(request, name, id)
	}
	return request
}
