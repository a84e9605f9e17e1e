// Package noderpc is the wire between the nodes and the replicas of a cluster: JSON over HTTP/2 with TLS on both ends.
//
// It owns the form of the calls, and which certificate may make which: everything but a join needs a node's, and the
// node is the certificate's, never one that a body names. What the calls mean is decided by package fleet. All calls
// are POST. Fields that the other end does not know are ignored, so that two versions can talk. Errors keep the kind,
// the code and the text of package fault.
//
//	/join     token, csr, name and what the machine has   node, cluster, certificate, authorities
//	/renew    session, csr                                certificate, authorities
//	/session  session                                     lease_ms, cordoned, drain_ms
//	/beat     session                                     lease_ms, cordoned, drain_ms
//	/leave    session                                     nothing
//
// Handlers and clients are safe for concurrent use.
package noderpc

import (
	"time"

	"github.com/cayhq/cay/internal/fleet"
)

// The paths of the calls.
const (
	pathJoin    = "/join"
	pathRenew   = "/renew"
	pathSession = "/session"
	pathBeat    = "/beat"
	pathLeave   = "/leave"
)

const (
	// maxBody limits a request and an answer, in bytes. The largest has three certificates, some 3 KiB.
	maxBody = 64 << 10
	// callTimeout limits one call to one replica, with its connection. A replica answers in milliseconds; with a longer
	// time, a node would notice late that a replica is away and lose its lease before it asks another one.
	callTimeout = 5 * time.Second
)

type joinRequest struct {
	Token        string `json:"token"`
	CSR          string `json:"csr"`
	Name         string `json:"name"`
	Version      string `json:"version"`
	VCPUs        int    `json:"vcpus"`
	MemoryMB     int    `json:"memory_mb"`
	MaxSandboxes int    `json:"max_sandboxes"`
}

type renewRequest struct {
	Session string `json:"session"`
	CSR     string `json:"csr"`
}

type sessionRequest struct {
	Session string `json:"session"`
}

type beatRequest struct {
	Session      string `json:"session"`
	MemoryFreeMB int    `json:"memory_free_mb"`
	Sandboxes    int    `json:"sandboxes"`
	Starting     int    `json:"starting"`
}

// joined answers /join and /renew.
type joined struct {
	Node        string `json:"node"`
	Cluster     string `json:"cluster"`
	Certificate string `json:"certificate"`
	Authorities string `json:"authorities"`
}

func joinedOf(j fleet.Joined) joined {
	return joined{Node: j.Node, Cluster: j.Cluster, Certificate: j.Certificate, Authorities: j.Authorities}
}

// lease answers /session and /beat.
type lease struct {
	LeaseMs  int64 `json:"lease_ms"`
	Cordoned bool  `json:"cordoned"`
	DrainMs  int64 `json:"drain_ms"`
}

func leaseOf(l fleet.Lease) lease {
	return lease{LeaseMs: l.For.Milliseconds(), Cordoned: l.Orders.Cordoned, DrainMs: l.Orders.Drain.Milliseconds()}
}

func (l lease) lease() fleet.Lease {
	return fleet.Lease{For: time.Duration(l.LeaseMs) * time.Millisecond,
		Orders: fleet.Orders{Cordoned: l.Cordoned, Drain: time.Duration(l.DrainMs) * time.Millisecond}}
}

// problem is the answer to a call that failed.
type problem struct {
	Code         string `json:"code"`
	Detail       string `json:"detail"`
	Field        string `json:"field,omitempty"`
	RetryAfterMs int64  `json:"retry_after_ms,omitempty"`
}
