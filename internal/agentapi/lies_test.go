package agentapi

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

// TestImpossibleAnswers checks that answers with impossible statuses are refused and impossible numbers clamped.
func TestImpossibleAnswers(t *testing.T) {
	for _, status := range []string{"000 x", "001 x", "099 x", "600 x", "999 x"} {
		client, _ := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, "HTTP/1.1 "+status+"\r\nContent-Length: 0\r\n\r\n")
		})
		to := Target{SandboxID: "sbx_a"}
		if err := client.Health(t.Context(), to); fault.As(err) == nil || fault.As(err).Code != fault.CodeSandboxUnreachable {
			t.Errorf("%s: %v", status, err)
		}
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://x/files", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Transport(to, false).RoundTrip(r)
		if fault.As(err) == nil || fault.As(err).Code != fault.CodeSandboxUnreachable {
			if err == nil {
				resp.Body.Close()
			}
			t.Errorf("%s passes: %v", status, err)
		}
	}
	client, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, `{"written":9000000000000000000}`)
	})
	n, err := client.WriteInput(t.Context(), Target{SandboxID: "sbx_a"}, "1", strings.NewReader("four"), false)
	if err != nil || n != 4 {
		t.Errorf("of four bytes %d were taken, %v", n, err)
	}
	for _, end := range []*process.EndEvent{
		{ExitCode: 1 << 30, DurationUs: 1 << 62, Signal: 1 << 30},
		{ExitCode: -1 << 31, DurationUs: -1 << 63, Signal: -1 << 31},
	} {
		r := result(end, false, false)
		if r.ExitCode < -1 || r.ExitCode > 255 || r.Duration < 0 || r.Duration > 366*24*time.Hour ||
			r.Signal < 0 || r.Signal > maxSignal {
			t.Errorf("%v became %+v", end, r)
		}
	}
}
