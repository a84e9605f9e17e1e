package api

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// optional returns a pointer to v, or nil for the zero value, which the wire format leaves out.
func optional[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// at returns a pointer to the time in UTC, or nil for the zero time, which stands for "not yet" and
// "does not apply".
func at(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return new(t.UTC())
}

// seconds returns d in whole seconds, rounded up, so that a short time is never shown as 0.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// each applies f to every element of list. The result is never nil, so that JSON shows an empty
// list as [].
func each[T, U any](list []T, f func(T) U) []U {
	out := make([]U, len(list))
	for i, v := range list {
		out[i] = f(v)
	}
	return out
}

func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// durable returns where the checkpoint of a sandbox or snapshot that was made at that time is stored.
func (s *server) durable(id string, made time.Time) *Durable {
	if s.Stored != nil && s.Stored(id, made) {
		return new(DurableCluster)
	}
	return new(DurableNode)
}

// sandboxOf encodes a sandbox.
func (s *server) sandboxOf(b sandbox.Sandbox) Sandbox {
	out := Sandbox{
		ID:              string(b.ID),
		Template:        b.Template,
		TemplateID:      b.TemplateID,
		TemplateVersion: b.TemplateVersion,
		Mode:            SandboxMode(b.Mode),
		Status:          SandboxStatus(b.State.Status()),
		State:           SandboxState(b.State),
		Size:            b.Size.Name,
		VCPUs:           b.Size.VCPUs,
		MemoryMB:        b.Size.MemoryMB,
		DiskMB:          b.DiskMB,
		Env:             orEmpty(b.Env),
		Metadata:        orEmpty(b.Metadata),
		Egress:          egressOf(b.Egress),
		CreatedAt:       b.CreatedAt.UTC(),
		StartedAt:       at(b.StartedAt),
		DestroyedAt:     at(b.DestroyedAt),
		DestroyReason:   optional(string(b.DestroyReason)),
		Error:           optional(b.Error),
		Source:          optional(SandboxSource(b.Source)),
		Origin:          optional(b.Origin),
	}
	if since, lost := s.Relay.LostSince(b.Holder.Node); lost && b.State.Status() != sandbox.StatusDestroyed {
		out.Unavailable = new("its machine is lost since " + since.UTC().Format(time.RFC3339))
	}
	if !b.SuspendedAt.IsZero() {
		out.MemoryKept = new(b.Kept == sandbox.KeepAll)
		if !b.State.Over() {
			out.Durable = s.durable(string(b.ID), b.SuspendedAt)
		}
	}
	switch b.Mode {
	case sandbox.Ephemeral:
		out.ExpiresAt = at(b.ExpiresAt)
		out.TimeoutSeconds = new(seconds(b.Timeout))
		out.SuspendedAt = at(b.SuspendedAt)
	case sandbox.Persistent:
		out.IdleTimeoutSeconds = new(seconds(b.IdleTimeout))
		out.RecoveryIntervalSeconds = new(seconds(b.RecoveryInterval))
		out.LastActivityAt = at(b.LastActivityAt)
		out.SuspendedAt = at(b.SuspendedAt)
	}
	return out
}

func egressOf(e sandbox.Egress) Egress {
	out := Egress{Mode: EgressMode(e.Mode)}
	if e.Mode == "" {
		out.Mode = EgressMode(sandbox.AllowAll)
	}
	for _, p := range e.AllowCIDRs {
		out.AllowCIDRs = append(out.AllowCIDRs, netip.Prefix.String(p))
	}
	for _, p := range e.DenyCIDRs {
		out.DenyCIDRs = append(out.DenyCIDRs, netip.Prefix.String(p))
	}
	for _, port := range e.AllowPorts {
		out.AllowPorts = append(out.AllowPorts, int(port))
	}
	out.AllowDomains = e.AllowDomains
	return out
}

func networkOf(t *sandbox.Traffic) *NetworkUse {
	if t == nil {
		return nil
	}
	return &NetworkUse{PacketsAllowed: int64(t.PacketsAllowed), BytesAllowed: int64(t.BytesAllowed),
		PacketsDenied: int64(t.PacketsDenied), BytesDenied: int64(t.BytesDenied)}
}

func eventOf(e sandbox.Event) Event {
	return Event{
		ID: e.ID, Time: e.At.UTC(), From: optional(SandboxState(e.From)), To: SandboxState(e.To),
		Reason: e.Reason, Detail: optional(e.Detail),
	}
}

// encodedPath returns a path encoded for the query of a URL. It keeps the path as readable as
// possible.
func encodedPath(raw []byte) string {
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(string(raw)))
}

func entryOf(e agentapi.Entry) FileEntry {
	return FileEntry{
		Name: e.Name, Path: e.Path, PathEncoded: optional(encodedPath(e.RawPath)), Type: FileEntryType(e.Type), Size: e.Size,
		Mode: fmt.Sprintf("%04o", e.Mode&0o7777), Owner: e.Owner, Group: e.Group, ModifiedAt: e.ModifiedAt.UTC(),
		SymlinkTarget: optional(e.SymlinkTarget),
	}
}

func templateOf(t template.Template) Template {
	return Template{
		ID:             t.ID,
		Name:           t.Name,
		Description:    t.Description,
		Builtin:        t.Builtin(),
		Status:         TemplateStatus(t.Status),
		Progress:       optional(t.Progress),
		BuildError:     buildErrorOf(t.BuildError),
		Version:        t.Version,
		Source:         optional(t.Source),
		ImageSizeBytes: optional(t.ImageSize),
		Env:            orEmpty(t.Env),
		Workdir:        optional(t.Workdir),
		User:           optional(t.User),
		StartCommand:   optional(startText(t.Start)),
		Ready:          readyOf(t.Start.Ready),
		Size:           optional(t.Size.Name),
		DiskSizeMB:     optional(t.DiskMB),
		Egress:         egressOf(t.Egress),
		CreatedAt:      t.CreatedAt.UTC(),
		UpdatedAt:      t.UpdatedAt.UTC(),
		BuiltAt:        at(t.BuiltAt),
	}
}

func buildErrorOf(e *template.BuildError) *BuildError {
	if e == nil {
		return nil
	}
	out := &BuildError{Message: e.Message, Step: optional(e.Step), Tail: e.Tail}
	if e.ExitCode >= 0 {
		out.ExitCode = &e.ExitCode
	}
	return out
}

// startText returns a start command as a line for a shell.
func startText(s sandbox.Start) string {
	if len(s.Args) == 0 {
		return s.Command
	}
	return strings.Join(each(s.Args, func(arg string) string {
		if arg != "" && strings.Trim(arg, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-") == "" {
			return arg
		}
		return "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}), " ")
}

func readyOf(r *sandbox.Ready) *ReadyCheck {
	if r == nil {
		return nil
	}
	timeout := r.Timeout
	if timeout == 0 {
		timeout = sandbox.DefaultReadyTimeout
	}
	out := &ReadyCheck{Port: optional(r.Port), Command: optional(r.Command), Timeout: new(timeout.String())}
	if r.HTTP != nil {
		out.HTTP = &ReadyHTTP{Port: r.HTTP.Port, Path: r.HTTP.Path}
	}
	return out
}

func logLineOf(l template.LogLine) TemplateLogLine {
	return TemplateLogLine{Time: l.At.UTC(), Text: l.Text, Step: optional(l.Step), Heading: l.Heading}
}

func sizeOf(s sandbox.Size) Size {
	return Size{Name: s.Name, VCPUs: s.VCPUs, MemoryMB: s.MemoryMB, Dedicated: s.Dedicated}
}

func quotaOf(q auth.Quota) Quota {
	return Quota{Sandboxes: q.Sandboxes, VCPUs: q.VCPUs, MemoryMB: q.MemoryMB}
}

func orgOf(o auth.Org) Org {
	return Org{ID: o.ID, Name: o.Name, Quota: quotaOf(o.Quota), CreatedAt: o.CreatedAt.UTC()}
}

func scopesOf(scopes []auth.Scope) []Scope {
	return each(scopes, func(s auth.Scope) Scope { return Scope(s) })
}

func keyOf(k auth.Key) APIKey {
	return APIKey{
		ID: k.ID, Name: k.Name, Prefix: k.Prefix, Scopes: scopesOf(k.Scopes), CreatedAt: k.CreatedAt.UTC(),
		ExpiresAt: at(k.ExpiresAt), RevokedAt: at(k.RevokedAt), LastUsedAt: at(k.LastUsedAt),
	}
}

func (s *server) snapshotOf(snap sandbox.Snapshot) Snapshot {
	return Snapshot{
		ID: string(snap.ID), Name: optional(snap.Name), SandboxID: string(snap.SandboxID),
		Template: snap.Template, TemplateID: snap.TemplateID, TemplateVersion: snap.TemplateVersion,
		Size: snap.Size.Name, VCPUs: snap.Size.VCPUs, MemoryMB: snap.Size.MemoryMB, DiskMB: snap.DiskMB, Env: orEmpty(snap.Env),
		Egress: egressOf(snap.Egress), Memory: snap.Kept == sandbox.KeepAll, SizeBytes: snap.Bytes, CreatedAt: snap.CreatedAt.UTC(),
		Durable: s.durable(string(snap.ID), snap.CreatedAt),
	}
}

func (s *server) childOf(c sandbox.Child) ForkChild {
	if c.Err == nil {
		return ForkChild{Sandbox: new(s.sandboxOf(c.Sandbox))}
	}
	status, f := statusOf(c.Err)
	return ForkChild{Error: &ForkError{Status: status, Code: f.Code, Detail: f.Detail}}
}
