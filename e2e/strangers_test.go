package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	cay "github.com/cayhq/cay/sdk/go"
)

// TestStrangersCannotFillTheLog floods the server from one address with requests that have no key
// and the longest accepted paths, and checks how much the log has grown. Meanwhile a caller with a
// key is answered.
func TestStrangersCannotFillTheLog(t *testing.T) {
	s := shared(t)
	size := func() int64 {
		info, err := os.Stat(s.logFile())
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	const callers, each = 4, 500
	// Another address than that of other tests at this server, whose attempts are counted separately.
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 7)}}
	before := size()
	var wg sync.WaitGroup
	statuses := make(chan int, callers*each)
	for c := range callers {
		wg.Go(func() {
			conn, err := from.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			in := bufio.NewReader(conn)
			for i := range each {
				path := fmt.Sprintf("/v1/%d/%d/%s", c, i, strings.Repeat("x", 30<<10))
				if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\n\r\n", path,
					strings.Repeat("i", 128)); err != nil {
					t.Error(err)
					return
				}
				resp, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = in.Discard(int(resp.ContentLength))
				statuses <- resp.StatusCode
			}
		})
	}
	for range 20 {
		if _, err := s.api().Me(t.Context()); err != nil {
			t.Errorf("a caller with a key is answered %v", err)
		}
	}
	wg.Wait()
	close(statuses)
	count := map[int]int{}
	for status := range statuses {
		count[status]++
	}
	if count[401] == 0 || count[429] == 0 || count[401]+count[429] != callers*each {
		t.Errorf("the flood is answered %v", count)
	}
	// One address may cause 100 lines at once and 10 a second more, none of which is over 1 KiB.
	if grown := size() - before; grown > 1<<20 {
		t.Errorf("%d requests without a key have written %d bytes of log", callers*each, grown)
	}
	key, err := s.api().CreateAPIKey(t.Context(), requestOf[cay.CreateAPIKeyRequest](t,
		object{"name": "after", "scopes": []string{"exec"}}))
	if err == nil {
		err = s.api().RevokeAPIKey(t.Context(), key.ID)
	}
	if err != nil {
		t.Errorf("afterwards a key is answered %v", err)
	}
}
