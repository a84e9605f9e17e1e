package e2b

import (
	"time"

	"github.com/cayhq/cay/internal/sandbox"
)

// envdVersion is the version of E2B's agent whose features the agent here has. Clients decide by
// it what they may ask for.
const envdVersion = "0.6.13"

// clientID fills a field that the wire requires and no client reads.
const clientID = "cay"

// sandboxBody is E2B's Sandbox, the answer of create, connect and fork.
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

func (s *Handler) sandboxOf(sb sandbox.Sandbox) sandboxBody {
	opts := optionsOf(sb)
	out := sandboxBody{SandboxID: shown(sb.ID), TemplateID: sb.TemplateID, Alias: sb.Template, ClientID: clientID,
		EnvdVersion: envdVersion}
	if !opts.open(sb) {
		out.EnvdAccessToken = s.token(envdToken, sb.ID)
	}
	if !opts.public() {
		out.TrafficAccessToken = new(s.token(trafficToken, sb.ID))
	}
	out.Domain = s.domain()
	return out
}

// domain returns the domain of the host names of ports, nil if there is none.
func (s *Handler) domain() *string {
	if s.Names.Domain == "" {
		return nil
	}
	return &s.Names.Domain
}

// listedBody is E2B's ListedSandbox.
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

func listed(sb sandbox.Sandbox) listedBody {
	return listedBody{
		SandboxID: shown(sb.ID), TemplateID: sb.TemplateID, Alias: sb.Template, ClientID: clientID,
		// The time of creation, so that lists are in the order of the times they show.
		StartedAt: sb.CreatedAt.UTC(), EndAt: endOf(sb).UTC(), State: stateOf(sb),
		CPUCount: sb.Size.VCPUs, MemoryMB: sb.Size.MemoryMB, DiskSizeMB: sb.DiskMB,
		EnvdVersion: envdVersion, Metadata: sb.Metadata,
	}
}

// The states of this API.
const (
	stateRunning = "running"
	statePaused  = "paused"
)

// apiState says how this API shows a state of the core.
type apiState struct {
	name   string // "" is a sandbox that this API does not have any more
	listed bool   // listings have it
}

// apiStates has every state of the core. A sandbox that is being suspended takes no traffic any
// more, so it is paused. One that is being created is in no listing until it takes traffic.
var apiStates = map[sandbox.State]apiState{
	sandbox.Creating:   {name: stateRunning},
	sandbox.Running:    {name: stateRunning, listed: true},
	sandbox.Suspending: {name: statePaused, listed: true},
	sandbox.Suspended:  {name: statePaused, listed: true},
	sandbox.Waking:     {name: statePaused, listed: true},
	sandbox.Destroying: {},
	sandbox.Destroyed:  {},
	sandbox.Failed:     {},
}

// stateOf returns the state of a sandbox on this API, "" for one that it does not have any more.
func stateOf(sb sandbox.Sandbox) string { return apiStates[sb.State].name }

// listedAs returns the core's states that listings show under a name.
func listedAs(name string) []sandbox.State {
	var states []sandbox.State
	for _, s := range sandbox.States() {
		if shown := apiStates[s]; shown.listed && shown.name == name {
			states = append(states, s)
		}
	}
	return states
}

// never is the end of a sandbox without one, since the field is required.
var never = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)

// endOf returns the time when the sandbox stops running, as far as it is known.
func endOf(sb sandbox.Sandbox) time.Time {
	switch {
	case !sb.SuspendedAt.IsZero():
		return sb.SuspendedAt
	case sb.Mode == sandbox.Ephemeral && !sb.ExpiresAt.IsZero():
		return sb.ExpiresAt
	case sb.Mode == sandbox.Ephemeral:
		return sb.CreatedAt.Add(sb.Timeout)
	case sb.IdleTimeout > 0:
		return sb.LastActivityAt.Add(sb.IdleTimeout)
	}
	return never
}

// detailBody is E2B's SandboxDetail.
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

func (s *Handler) detail(sb sandbox.Sandbox, withToken bool) detailBody {
	opts := optionsOf(sb)
	out := detailBody{listedBody: listed(sb), Domain: s.domain(), AllowInternetAccess: opts.Internet,
		Network:   opts.Network,
		Lifecycle: lifecycleBody{OnTimeout: "kill", AutoResume: opts.resumes(sb)}}
	if sb.AtEnd != sandbox.EndDestroys {
		out.Lifecycle.OnTimeout = "pause"
	}
	if withToken && !opts.open(sb) {
		out.EnvdAccessToken = s.token(envdToken, sb.ID)
	}
	return out
}
