package e2b

import (
	"encoding/json"

	"github.com/cayhq/cay/internal/sandbox"
)

// options are the settings of a sandbox that was made through this API. They are stored in its
// row's FrontData.
type options struct {
	Made     bool         `json:"e2b"`                // made through this API
	Secure   bool         `json:"secure"`             // traffic needs a token
	AutoWake bool         `json:"auto_resume"`        // traffic wakes the sandbox when it is paused
	Internet *bool        `json:"internet,omitempty"` // as it was asked for
	Network  *networkBody `json:"network,omitempty"`  // as it was asked for
}

// optionsOf returns the options of a sandbox. A sandbox made through the v1 API has none.
func optionsOf(sb sandbox.Sandbox) options {
	var o options
	if sb.FrontData != "" && json.Unmarshal([]byte(sb.FrontData), &o) != nil {
		return options{} // not written by this package
	}
	return o
}

func (o options) String() string {
	text, err := json.Marshal(o)
	if err != nil { // cannot happen with strings and booleans
		panic(err)
	}
	return string(text)
}

// open reports whether commands and files need no token.
func (o options) open(sandbox.Sandbox) bool { return o.Made && !o.Secure }

// resumes reports whether traffic wakes the sandbox when it is paused. Persistent sandboxes of the v1 API
// always wake.
func (o options) resumes(sb sandbox.Sandbox) bool {
	return o.AutoWake || !o.Made && sb.Mode == sandbox.Persistent
}

// wakes reports whether traffic wakes the sandbox as it is now. As in E2B, traffic does not boot a
// sandbox that was paused without memory: the program that it is meant for does not run there.
func (o options) wakes(sb sandbox.Sandbox) bool {
	rebooted := o.Made && !sb.SuspendedAt.IsZero() && sb.Kept == sandbox.KeepFiles
	return o.resumes(sb) && !rebooted
}

// public reports whether ports need no token. Ports of sandboxes made through the v1 API always
// need one.
func (o options) public() bool {
	protected := o.Network != nil && o.Network.AllowPublicTraffic != nil && !*o.Network.AllowPublicTraffic
	return o.Made && !protected
}

// hostMask returns the Host that servers inside see, or "" for that of the request.
func (o options) hostMask() string {
	if o.Network == nil {
		return ""
	}
	return o.Network.MaskRequestHost
}
