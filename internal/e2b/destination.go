package e2b

import (
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// The headers that name the sandbox and the port of a request.
const (
	idHeader   = "E2b-Sandbox-Id"
	portHeader = "E2b-Sandbox-Port"
)

// place is a port of a sandbox; the zero value is none.
type place struct {
	id   string // as clients see it, without the prefix
	port int
	// shared reports that the host does not name the port, so that the answer comes from an
	// origin that other sandboxes share.
	shared bool
}

func (p place) sandbox() sandbox.ID { return sandbox.ID(idPrefix + p.id) }

var (
	shownID = regexp.MustCompile(`^[a-z0-9]{1,64}$`)
	// hostLabel matches cay's ids only, so that it takes no other host name for one.
	hostLabel = regexp.MustCompile(`^([0-9]{1,5})-([a-z2-7]{20})$`)
)

// destination returns the port that a request is for, by its headers or else its host.
func destination(r *http.Request) (place, error) {
	ids, ports := r.Header.Values(idHeader), r.Header.Values(portHeader)
	if len(ids)+len(ports) == 0 {
		return hostDestination(r.Host), nil
	}
	if len(ids) != 1 || len(ports) != 1 {
		return place{}, fault.InField(fault.CodeInvalidHeader, idHeader, "%s and %s are needed together, each once", idHeader,
			portHeader)
	}
	port, err := strconv.Atoi(ports[0])
	if err != nil || port < 1 || port > 65535 {
		return place{}, fault.InField(fault.CodeInvalidHeader, portHeader, "must be a port from 1 to 65535")
	}
	if !shownID.MatchString(ids[0]) {
		return place{}, fault.InField(fault.CodeInvalidHeader, idHeader,
			"must be the id of a sandbox: lower-case letters and digits")
	}
	return place{ids[0], port, true}, nil
}

// hostDestination parses a host of the form PORT-ID.anything.
func hostDestination(host string) place {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	label, _, dotted := strings.Cut(strings.ToLower(host), ".")
	m := hostLabel.FindStringSubmatch(label)
	if m == nil || !dotted {
		return place{}
	}
	port, err := strconv.Atoi(m[1])
	if err != nil || port < 1 || port > 65535 {
		return place{}
	}
	return place{m[2], port, false}
}
