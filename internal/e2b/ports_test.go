package e2b

import (
	"testing"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestPorts(t *testing.T) {
	h := newHarness(t)
	open, _ := h.create(`{"templateID":"base"}`)
	private := h.control("POST", "/v2/sandboxes",
		`{"templateID":"base","network":{"allowPublicTraffic":false,"maskRequestHost":"app:${PORT}"}}`).json
	closed, _ := private["sandboxID"].(string)
	traffic, _ := private["trafficAccessToken"].(string)
	sb, err := h.sandboxes.Create(t.Context(), sandbox.Caller{OrgID: h.org.Org.ID}, sandbox.Request{Template: "base"},
		sandbox.Once{}, true)
	if err != nil {
		t.Fatal(err)
	}
	v1 := shown(sb.ID)
	for name, c := range map[string]struct {
		heads  []string
		status int
	}{
		"public, by headers":          {[]string{idHeader, open, portHeader, "8080"}, 202},
		"public, by any host":         {[]string{"Host", "8080-" + open + ".somewhere"}, 202},
		"public, by our host":         {[]string{"Host", "8080-" + open + ".boxes.example"}, 202},
		"private":                     {[]string{idHeader, closed, portHeader, "8080"}, 403},
		"private, wrong token":        {[]string{idHeader, closed, portHeader, "8080", trafficHeader, "x"}, 403},
		"private, another's token":    {[]string{idHeader, closed, portHeader, "8080", trafficHeader, h.handler.token(trafficToken, sandbox.ID(idPrefix+open))}, 403},
		"private, the token for envd": {[]string{idHeader, closed, portHeader, "8080", trafficHeader, h.handler.token(envdToken, sandbox.ID(idPrefix+closed))}, 403},
		"private, with its token":     {[]string{idHeader, closed, portHeader, "8080", trafficHeader, traffic}, 202},
		"private, by any host":        {[]string{"Host", "8080-" + closed + ".somewhere"}, 403},
		"private, by our host":        {[]string{"Host", "8080-" + closed + ".boxes.example"}, 418}, // the next handler decides by key or signature
		"of v1, by headers":           {[]string{idHeader, v1, portHeader, "8080"}, 403},
		"of v1, by our host":          {[]string{"Host", "8080-" + v1 + ".boxes.example"}, 418},
		"of nobody, by our host":      {[]string{"Host", "8080-aaaaaaaaaaaaaaaaaaaa.boxes.example"}, 418},
		"of nobody":                   {[]string{idHeader, "aaaaaaaaaaaaaaaaaaaa", portHeader, "8080"}, 502},
		"the agent, by our host":      {[]string{"Host", "49983-" + open + ".boxes.example"}, 404},
	} {
		if r := h.send("GET", "/some/path", "", c.heads...); r.status != c.status {
			t.Errorf("%s: %d %s, want %d", name, r.status, r.body, c.status)
		}
	}
	for _, to := range h.carried {
		if host := map[string]string{open: "", closed: "app:8080"}[shown(sandbox.ID(to.Target.SandboxID))]; to.Port != 8080 ||
			to.Host != host || to.Path != "" {
			t.Errorf("carried to %+v", to)
		}
	}
	for _, r := range h.reached() {
		if r.Header.Get(idHeader) != "" || r.Header.Get(portHeader) != "" || r.Header.Get(trafficHeader) != "" {
			t.Errorf("carried with %v", r.Header)
		}
	}
	if d := h.control("GET", "/sandboxes/"+open, "").json["domain"]; d != "boxes.example" {
		t.Errorf("the domain is %v", d)
	}

	h.portErr = fault.New(fault.Upstream, fault.CodePortClosed, "no")
	if r := h.send("GET", "/mcp", "", idHeader, open, portHeader, "50005"); r.status != 501 {
		t.Errorf("the port of the MCP gateway: %d %s", r.status, r.body)
	}
	for err, want := range map[error]string{
		fault.New(fault.Upstream, fault.CodePortClosed, "no"):            "The sandbox is running but port is not open",
		fault.New(fault.Upstream, fault.CodePortNoAnswer, "it is mute"):  "The sandbox is running but it is mute",
		fault.New(fault.Unavailable, fault.CodeSandboxUnreachable, "no"): "The sandbox is running but does not answer",
		fault.New(fault.Conflict, "sandbox_not_running", "it has gone"):  notFoundText,
	} {
		h.portErr = err
		r := h.send("GET", "/", "", idHeader, open, portHeader, "8080")
		port := any(float64(8080))
		if want == notFoundText {
			port = nil
		}
		if r.status != 502 || r.json["message"] != want || r.json["sandboxId"] != open || r.json["port"] != port {
			t.Errorf("%v: %d %s", err, r.status, r.body)
		}
	}
}
