package sandbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Limits of a request. All are part of the contract; a comment gives the reason of those that have
// one.
const (
	DefaultTimeout          = 5 * time.Minute
	MinTimeout              = time.Second
	MaxTimeout              = 24 * time.Hour
	DefaultIdleTimeout      = 10 * time.Minute
	MinIdleTimeout          = 10 * time.Second
	DefaultRecoveryInterval = 10 * time.Minute
	MinRecoveryInterval     = time.Minute

	// These limit a row, so that a listing of 200 rows stays within a few MB:
	MaxEnv           = 256       // entries
	MaxEnvBytes      = 128 << 10 // names and values together; Linux refuses more in one exec
	MaxMetadata      = 64        // entries
	MaxMetadataKey   = 128       // bytes
	MaxMetadataValue = 1024      // bytes
	MinDiskMB        = 64        // a package manager cannot start with less
)

// Request asks for a sandbox. A nil pointer means "not given", unlike zero.
type Request struct {
	Template string // name or id; exclusive with Snapshot
	Snapshot string // name or id; fixes size and disk and gives defaults for the rest
	Mode     string // "" means ephemeral

	Timeout          *time.Duration // ephemeral only
	AtEnd            AtEnd          // ephemeral only; "" means EndDestroys
	IdleTimeout      *time.Duration // persistent only
	RecoveryInterval *time.Duration // persistent only

	Size       string // "" means the template's, else the configured default
	DiskSizeMB *int
	Env        map[string]string
	Metadata   map[string]string
	Egress     *Egress // nil means the template's default
	User       string  // "" means the template's
	// BuiltinUser replaces root as the user of a built-in template, if User is "".
	BuiltinUser string
	FrontData   string // see [Sandbox]
}

// TemplateVersion holds the settings of a ready template that a new sandbox needs.
type TemplateVersion struct {
	ID, Name string
	Version  int
	Builtin  bool // the template belongs to all organizations
	// Shape holds the template's settings. Its Size has only a name. An empty name, and a disk of 0,
	// mean the configured default.
	Shape
}

// Templates finds templates. Package template implements it.
type Templates interface {
	// Ready returns the version that a new sandbox of orgID is made from. It returns NotFound, code
	// "template_not_found", or Conflict, code "template_not_ready", with the state and progress in the
	// detail.
	Ready(ctx context.Context, orgID, nameOrID string) (TemplateVersion, error)
}

func invalid(field, detail string, args ...any) error {
	return fault.InvalidField(field, detail, args...)
}

func index(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }

// check reports errors of the request that need no template to be found.
func (r Request) check(cfg Config) error {
	if r.Template == "" && r.Snapshot == "" {
		return invalid("template", "is required, or a snapshot")
	}
	if r.Template != "" && r.Snapshot != "" {
		return invalid("snapshot", "stands for a template: give one of the two")
	}
	switch Mode(r.Mode) {
	case "", Ephemeral:
		if r.IdleTimeout != nil {
			return invalid("idle_timeout", "is for persistent sandboxes; an ephemeral one has a timeout")
		}
		if r.RecoveryInterval != nil {
			return invalid("recovery_interval", "is for persistent sandboxes")
		}
		if t := r.Timeout; t != nil && (*t < MinTimeout || *t > MaxTimeout) {
			return invalid("timeout", "must be between %s and %s", MinTimeout, MaxTimeout)
		}
		if r.AtEnd != "" && r.AtEnd != EndDestroys && !r.AtEnd.Suspends() {
			return invalid("at_end", "must be %s, %s or %s, not %q", EndDestroys, EndSuspends, EndSuspendsFiles, r.AtEnd)
		}
	case Persistent:
		if r.Timeout != nil {
			return invalid("timeout", "is for ephemeral sandboxes; a persistent one has an idle_timeout")
		}
		if r.AtEnd != "" {
			return invalid("at_end", "is for ephemeral sandboxes")
		}
		if t := r.IdleTimeout; t != nil && *t != 0 && (*t < MinIdleTimeout || *t > MaxTimeout) {
			return invalid("idle_timeout", "must be 0 (never) or between %s and %s", MinIdleTimeout, MaxTimeout)
		}
		if t := r.RecoveryInterval; t != nil && *t != 0 && (*t < MinRecoveryInterval || *t > MaxTimeout) {
			return invalid("recovery_interval", "must be 0 (off) or between %s and %s", MinRecoveryInterval, MaxTimeout)
		}
	default:
		return invalid("mode", "must be %s or %s, not %q", Ephemeral, Persistent, r.Mode)
	}
	if _, ok := cfg.size(r.Size); r.Size != "" && !ok {
		return invalid("size", "%q is none of the sizes in GET /v1/sizes", r.Size)
	}
	if d := r.DiskSizeMB; d != nil && (*d < MinDiskMB || *d > cfg.MaxDisk) {
		return invalid("disk_size_mb", "must be between %d and %d", MinDiskMB, cfg.MaxDisk)
	}
	if err := CheckEnv(r.Env); err != nil {
		return err
	}
	return checkMetadata(r.Metadata)
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// CheckEnv returns an error for environment variables that no process could be given: Invalid in
// field "env" or "env.NAME".
func CheckEnv(env map[string]string) error {
	if len(env) > MaxEnv {
		return fault.InvalidField("env", "has %d entries; at most %d", len(env), MaxEnv)
	}
	bytes := 0
	for name, value := range env {
		if !envName.MatchString(name) {
			return fault.InvalidField("env."+name,
				"a name is letters, digits and _, and does not begin with a digit")
		}
		if strings.ContainsRune(value, 0) {
			return fault.InvalidField("env."+name, "a value cannot contain a NUL")
		}
		bytes += len(name) + len(value)
	}
	if bytes > MaxEnvBytes {
		return fault.InvalidField("env", "is %d bytes; at most %d", bytes, MaxEnvBytes)
	}
	return nil
}

func checkMetadata(metadata map[string]string) error {
	if len(metadata) > MaxMetadata {
		return fault.InvalidField("metadata", "has %d entries; at most %d", len(metadata), MaxMetadata)
	}
	for key, value := range metadata {
		if key == "" || len(key) > MaxMetadataKey {
			return fault.InvalidField("metadata", "a key is 1 to %d bytes long", MaxMetadataKey)
		}
		if len(value) > MaxMetadataValue {
			return fault.InvalidField("metadata."+key,
				"a value is at most %d bytes long", MaxMetadataValue)
		}
	}
	return nil
}

// resolve returns the sandbox of the request, with the defaults of the template and the operator.
func (r Request) resolve(cfg Config, orgID string, v TemplateVersion, now time.Time) (Sandbox, error) {
	sbx := Sandbox{
		ID: NewID(), Run: newSecret(10), Token: newSecret(32), OrgID: orgID, Mode: Ephemeral, State: Creating,
		Template: v.Name, TemplateID: v.ID, TemplateVersion: v.Version, Shape: v.Shape.Clone(), Metadata: r.Metadata,
		CreatedAt: now.UTC(), Source: Cold, FrontData: r.FrontData,
	}
	user := r.User
	if user == "" && v.Builtin && cmp.Or(v.User, rootUser) == rootUser {
		user = r.BuiltinUser
	}
	if user != "" && user != v.User {
		sbx.User = user
		if !v.Start.None() {
			sbx.Start.User = cmp.Or(v.User, rootUser) // the command runs as the template's user
		}
	}
	if Mode(r.Mode) == Persistent {
		sbx.Mode, sbx.LastActivityAt = Persistent, sbx.CreatedAt
		sbx.IdleTimeout = or(r.IdleTimeout, DefaultIdleTimeout)
		sbx.RecoveryInterval = or(r.RecoveryInterval, DefaultRecoveryInterval)
	} else {
		sbx.Timeout = or(r.Timeout, DefaultTimeout)
		sbx.AtEnd = EndDestroys
		if r.AtEnd != "" {
			sbx.AtEnd = r.AtEnd
		}
	}
	if sbx.Env == nil {
		sbx.Env = map[string]string{}
	}
	maps.Copy(sbx.Env, r.Env)
	var known bool
	for _, name := range []string{r.Size, v.Size.Name, cfg.DefaultSize} {
		if sbx.Size, known = cfg.size(name); known {
			break
		}
	}
	if !known {
		return Sandbox{}, invalid("size", "neither the request nor the template nor the server names a known size")
	}
	sbx.DiskMB = or(r.DiskSizeMB, cmp.Or(max(v.DiskMB, 0), cfg.DefaultDisk))
	if r.Egress != nil {
		sbx.Egress = r.Egress.Clone()
	}
	if sbx.Egress.Mode == "" {
		sbx.Egress.Mode = AllowAll
	}
	return sbx, nil
}

func (c Config) size(name string) (Size, bool) {
	for _, size := range c.Sizes {
		if size.Name == name {
			return size, true
		}
	}
	return Size{}, false
}

// or returns *p, or otherwise if p is nil.
func or[T any](p *T, otherwise T) T {
	if p != nil {
		return *p
	}
	return otherwise
}

// newSecret returns n random bytes in base32.
func newSecret(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return strings.ToLower(idEncoding.EncodeToString(b))
}

func (b Sandbox) spec() Spec {
	return Spec{ID: b.ID, OrgID: b.OrgID, Run: b.Run, Token: b.Token, Shape: b.Shape}
}

// restored returns the spec of a sandbox that continues from saved state. Its start command runs there
// already, unless files alone were saved.
func (b Sandbox) restored(saved Kept) Spec {
	spec := b.spec()
	if saved == KeepAll {
		spec.Start = Start{}
	}
	return spec
}
