package e2b

import (
	"encoding/json"

	"github.com/cayhq/cay/internal/sandbox"
)

// kept is what this surface keeps with a sandbox that was made through it.
type kept struct {
	Made      bool         `json:"e2b"`                 // through this surface
	Secure    bool         `json:"secure"`              // its traffic needs a token
	AutoWake  bool         `json:"auto_resume"`         // traffic wakes it when it is paused
	Internet  *bool        `json:"internet,omitempty"`  // as it was asked for
	Network   *networkBody `json:"network,omitempty"`   // as it was asked for
	HostMask  string       `json:"host_mask,omitempty"` // what servers inside see as Host
	Protected bool         `json:"protected,omitempty"` // its ports need a token
}

// keptWith is what is kept with a sandbox; of one that was made through the v1 API nothing.
func keptWith(box sandbox.Sandbox) kept {
	var k kept
	if box.Surface != "" && json.Unmarshal([]byte(box.Surface), &k) != nil {
		return kept{} // of another surface
	}
	return k
}

func (k kept) String() string {
	text, err := json.Marshal(k)
	if err != nil { // texts and booleans only
		panic(err)
	}
	return string(text)
}

// open reports whether commands and files need no token.
func (k kept) open(sandbox.Sandbox) bool { return k.Made && !k.Secure }

// wakes reports whether traffic wakes it: that is what the persistent ones of the v1 API
// are for.
func (k kept) wakes(box sandbox.Sandbox) bool {
	return k.AutoWake || !k.Made && box.Mode == sandbox.Persistent
}

// public reports whether its ports are anybody's. Those of the v1 API's are not.
func (k kept) public() bool { return k.Made && !k.Protected }
