package sandbox

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
)

// Shape describes what a machine makes a sandbox from, apart from its identity. It is embedded in
// everything that carries these settings from a template to a machine: [TemplateVersion], [Sandbox],
// [Spec], [Snapshot] and [Pooled]. Rows store it as one JSON column, and a machine records it to
// adopt the sandbox. TestShapeIsCarried fails for a field that is lost on the way.
type Shape struct {
	Image   string            `json:"image"` // content hash of the root file system
	Size    Size              `json:"size"`
	DiskMB  int               `json:"disk_mb"` // size limit of the writable layer, MiB
	Env     map[string]string `json:"env"`
	User    string            `json:"user,omitempty"`    // default user of commands and files; "" is root
	Workdir string            `json:"workdir,omitempty"` // default working directory; "" is the user's home
	Egress  Egress            `json:"egress"`
	// Start is run when the sandbox boots. A sandbox that is woken or restored from a snapshot has it
	// running already, unless only files were kept.
	Start Start `json:"start,omitzero"`
}

// Clone returns a copy that shares no map, list or pointer.
func (s Shape) Clone() Shape {
	s.Env = maps.Clone(s.Env)
	s.Egress = s.Egress.Clone()
	s.Start = s.Start.Clone()
	return s
}

// Public returns the shape without its secrets, for a row of a sandbox that is over.
func (s Shape) Public() Shape {
	s.Env = map[string]string{}
	s.Start = Start{}
	return s
}

// Kind identifies sandboxes that a create cannot tell apart while they wait in the pool.
type Kind struct {
	TemplateID string
	Version    int
	Size       string // name
	Digest     string // of the shape, without what a claim sets
}

// kindOf returns the kind of a pooled sandbox of a template's version. A claim gives a pooled
// sandbox its environment, user, working directory and policy, so these count only if a start
// command began with them. Every other field of the shape counts.
func kindOf(templateID string, version int, s Shape) Kind {
	if s.Start.None() {
		s.Env, s.User, s.Workdir, s.Egress = nil, "", "", Egress{}
	} else {
		s.User = cmp.Or(s.Start.User, s.User, rootUser)
		s.Start.User = ""
	}
	text, err := json.Marshal(s)
	if err != nil { // Marshal cannot fail on texts and numbers
		panic(err)
	}
	sum := sha256.Sum256(text)
	return Kind{templateID, version, s.Size.Name, hex.EncodeToString(sum[:])}
}

// kind returns the kind of pooled sandbox that can serve a create of the sandbox.
func (b Sandbox) kind() Kind { return kindOf(b.TemplateID, b.TemplateVersion, b.Shape) }

// kind returns the kind of the pooled sandbox.
func (p Pooled) kind() Kind { return kindOf(p.TemplateID, p.TemplateVersion, p.Shape) }
