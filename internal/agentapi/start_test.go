package agentapi

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

// TestStartFailureIsPrintable checks that the text of an error, which has output of the start command and reaches
// users' terminals, is short and printable.
func TestStartFailureIsPrintable(t *testing.T) {
	var text string
	c, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var got StartRequest
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil || r.URL.Path != "/start" ||
			got.Command != "serve" || got.Ready.Port != 80 || got.Ready.TimeoutMs != 1000 {
			t.Errorf("%s: %+v, %v", r.URL.Path, got, err)
		}
		w.Header().Set(CodeHeader, fault.CodeStartFailed)
		w.WriteHeader(http.StatusConflict)
		_ = json.NewEncoder(w).Encode(map[string]any{"code": 409, "message": text})
	})
	for give, want := range map[string]string{
		"it ended:\n\tone\r\ntwo":                      "it ended:\n\tone\ntwo",
		"\x1b[31mred\x1b[0m\x00\u009b2J":               "[31mred[0m2J",
		strings.Repeat("\x01", maxErrorText-3) + "end": "end", // JSON escapes each as six bytes
		strings.Repeat("<", maxErrorText+1):            strings.Repeat("<", maxErrorText),
		strings.Repeat("x", maxErrorText-1) + "é":      strings.Repeat("x", maxErrorText-1) + "\uFFFD",
	} {
		text = give
		err := c.Start(t.Context(), Target{SandboxID: "sbx_a"},
			StartRequest{Command: "serve", Ready: &Ready{Port: 80, TimeoutMs: 1000}})
		if f := fault.As(err); f == nil || f.Kind != fault.Conflict || f.Code != fault.CodeStartFailed || f.Detail != want {
			t.Errorf("%.20q: got %.80q, want %.80q", give, err, want)
		}
	}
}
