package e2b

import (
	"time"

	"github.com/cayhq/cay/internal/sandbox"
)

// envdVersion is what clients decide by what they may ask of the agent for: everything
// that E2B's has at this version it has.
const envdVersion = "0.6.13"

// clientID is required on the wire and read by nobody.
const clientID = "cay"

// sandboxBody is Sandbox: what create, connect and fork answer.
type sandboxBody struct {
	SandboxID          string  `json:"sandboxID"`
	TemplateID         string  `json:"templateID"`
	Alias              string  `json:"alias,omitempty"`
	ClientID           string  `json:"clientID"`
	EnvdVersion        string  `json:"envdVersion"`
	EnvdAccessToken    string  `json:"envdAccessToken,omitempty"`
	TrafficAccessToken *string `json:"trafficAccessToken"`
	Domain             *string `json:"domain"`
}

func (s *Surface) sandboxOf(box sandbox.Sandbox) sandboxBody {
	keep := keptWith(box)
	out := sandboxBody{SandboxID: shown(box.ID), TemplateID: box.TemplateID, Alias: box.Template, ClientID: clientID, EnvdVersion: envdVersion}
	if !keep.open(box) {
		out.EnvdAccessToken = s.token(envdToken, box.ID)
	}
	if !keep.public() {
		out.TrafficAccessToken = new(s.token(trafficToken, box.ID))
	}
	out.Domain = s.domain()
	return out
}

// domain is where the ports of sandboxes have host names, nil for nowhere.
func (s *Surface) domain() *string {
	if s.Names.Domain == "" {
		return nil
	}
	return &s.Names.Domain
}

// listedBody is ListedSandbox.
type listedBody struct {
	SandboxID   string            `json:"sandboxID"`
	TemplateID  string            `json:"templateID"`
	Alias       string            `json:"alias,omitempty"`
	ClientID    string            `json:"clientID"`
	StartedAt   time.Time         `json:"startedAt"`
	EndAt       time.Time         `json:"endAt"`
	State       string            `json:"state"`
	CPUCount    int               `json:"cpuCount"`
	MemoryMB    int               `json:"memoryMB"`
	DiskSizeMB  int               `json:"diskSizeMB"`
	EnvdVersion string            `json:"envdVersion"`
	Metadata    map[string]string `json:"metadata,omitempty"`
}

func listed(box sandbox.Sandbox) listedBody {
	return listedBody{
		SandboxID: shown(box.ID), TemplateID: box.TemplateID, Alias: box.Template, ClientID: clientID,
		// When it was created, so that a listing is in the order of what it shows.
		StartedAt: box.CreatedAt.UTC(), EndAt: endOf(box).UTC(), State: stateOf(box),
		CPUCount: box.Size.VCPUs, MemoryMB: box.Size.MemoryMB, DiskSizeMB: box.DiskMB,
		EnvdVersion: envdVersion, Metadata: box.Metadata,
	}
}

// stateOf is the state of a sandbox that is there; all others are running. One that is being suspended takes no
// traffic any more.
func stateOf(box sandbox.Sandbox) string {
	switch box.State {
	case sandbox.Suspending, sandbox.Suspended, sandbox.Waking:
		return statePaused
	}
	return stateRunning
}

// The states of the wire.
const (
	stateRunning = "running"
	statePaused  = "paused"
)

// never is the end of a sandbox that has none: the field is required.
var never = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)

// endOf is when the sandbox stops running, as far as that is known.
func endOf(box sandbox.Sandbox) time.Time {
	switch {
	case !box.SuspendedAt.IsZero():
		return box.SuspendedAt
	case box.Mode == sandbox.Ephemeral && !box.ExpiresAt.IsZero():
		return box.ExpiresAt
	case box.Mode == sandbox.Ephemeral:
		return box.CreatedAt.Add(box.Timeout)
	case box.IdleTimeout > 0:
		return box.LastActivityAt.Add(box.IdleTimeout)
	}
	return never
}

// detailBody is SandboxDetail.
type detailBody struct {
	listedBody
	EnvdAccessToken     string        `json:"envdAccessToken,omitempty"`
	AllowInternetAccess *bool         `json:"allowInternetAccess"`
	Domain              *string       `json:"domain"`
	Network             *networkBody  `json:"network,omitempty"`
	Lifecycle           lifecycleBody `json:"lifecycle"`
}

type lifecycleBody struct {
	OnTimeout  string `json:"onTimeout"`
	AutoResume bool   `json:"autoResume"`
}

func (s *Surface) detail(box sandbox.Sandbox, withToken bool) detailBody {
	keep := keptWith(box)
	out := detailBody{listedBody: listed(box), Domain: s.domain(), AllowInternetAccess: keep.Internet, Network: keep.Network,
		Lifecycle: lifecycleBody{OnTimeout: "kill", AutoResume: keep.wakes(box)}}
	if box.AtEnd != sandbox.EndDestroys {
		out.Lifecycle.OnTimeout = "pause"
	}
	if withToken && !keep.open(box) {
		out.EnvdAccessToken = s.token(envdToken, box.ID)
	}
	return out
}
