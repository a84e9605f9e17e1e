package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of egress, for every policy and crowd.
const (
	policyPut     = "PUT egress: %s, %s"
	policyThrough = "a download, one connection: %s, %s"
	policyConnect = "connections opened, one by one: %s, %s"
)

// manyRanges is the largest number of ranges that a policy takes.
const manyRanges = 10_000

// policy is an egress policy under which the host outside can be reached.
type policy struct {
	name   string
	egress cay.Egress
	host   string // name or address under which it reaches the host
}

// policies returns the kinds of policy that differ in cost. The many ranges are single addresses
// with gaps, so that none can be merged with its neighbour.
func policies(o *outside) []policy {
	ranges := []string{o.address + "/32"}
	for i := range manyRanges - 1 {
		ranges = append(ranges, fmt.Sprintf("203.%d.%d.%d/32", i>>15, i>>7&255, i<<1&255))
	}
	const name = "bench.example.test"
	return []policy{
		{"no policy", cay.Egress{Mode: cay.EgressModeAllowAll}, o.address},
		{"one range", cay.Egress{Mode: cay.EgressModeDenyAll, AllowCIDRs: ranges[:1]}, o.address},
		{"10,000 ranges", cay.Egress{Mode: cay.EgressModeDenyAll, AllowCIDRs: ranges}, o.address},
		{"a domain", cay.Egress{Mode: cay.EgressModeDenyAll, AllowDomains: []string{name}}, name},
	}
}

// measureEgress has one sandbox send under every policy, alone and in a crowd of sandboxes that
// have policies of their own.
func measureEgress(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	if err := s.egressRounds(ctx, id, "1 sandbox", o, r); err != nil {
		return err
	}
	var crowd []string
	for i := range o.crowd - 1 {
		sandbox, err := s.api.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: template, Timeout: new(sandboxTimeout),
			Egress: &cay.Egress{Mode: cay.EgressModeDenyAll, AllowCIDRs: []string{fmt.Sprintf("203.0.%d.0/24", i), fmt.Sprintf("203.1.%d.0/24", i)}}},
			cay.CreateOptions{})
		if err != nil {
			return fmt.Errorf("creating sandbox %d of the crowd: %w", i+2, err)
		}
		crowd = append(crowd, sandbox.ID)
	}
	if err := s.egressRounds(ctx, id, fmt.Sprintf("%d sandboxes", o.crowd), o, r); err != nil {
		return err
	}
	for _, id := range append(crowd, id) {
		if err := s.api.DestroySandbox(ctx, id); err != nil {
			return fmt.Errorf("destroying the crowd: %w", err)
		}
	}
	return nil
}

// egressRounds takes all policies in turn, several times. The first round warms up.
func (s *server) egressRounds(ctx context.Context, id, crowd string, o options, r *results) error {
	for i := range max(3, o.starts/3) + 1 {
		into := r
		if i == 0 {
			into = &results{}
		}
		for _, p := range policies(s.outside) {
			if err := s.egressOnce(ctx, id, p, crowd, into); err != nil {
				return fmt.Errorf("%s, %s: %w", p.name, crowd, err)
			}
		}
	}
	return nil
}

// traffic downloads for a second, then connects for a second, and prints both rates. They include
// Python's own work, so they compare policies and say little about the network.
const traffic = `import json, socket, sys, time
host, blob, hang = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
address = socket.gethostbyname(host)
buf, got = bytearray(1 << 20), 0
c = socket.create_connection((address, blob)); c.sendall(b"x\n"); began = time.time()
while time.time() - began < 1:
    got += c.recv_into(buf)
down = got / 1e6 / (time.time() - began); c.close()
opened, began = 0, time.time()
while time.time() - began < 1:
    c = socket.create_connection((address, hang)); c.sendall(b"x\n"); c.recv(1); c.close(); opened += 1
print(json.dumps({"down": down, "connections": opened / (time.time() - began)}))
`

func (s *server) egressOnce(ctx context.Context, id string, p policy, crowd string, r *results) error {
	// The policy before may be large, and its removal must not count.
	if _, err := s.api.SetEgress(ctx, id, cay.Egress{Mode: cay.EgressModeDenyAll}); err != nil {
		return fmt.Errorf("closing: %w", err)
	}
	began := time.Now()
	if _, err := s.api.SetEgress(ctx, id, p.egress); err != nil {
		return fmt.Errorf("setting the policy: %w", err)
	}
	r.took(fmt.Sprintf(policyPut, p.name, crowd), began)
	res, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"python3", "-c", traffic, p.host,
		fmt.Sprint(portBlob), fmt.Sprint(portHang)}})
	if err != nil {
		return err
	}
	var rates struct{ Down, Connections float64 }
	if err := json.Unmarshal([]byte(strings.TrimSpace(res.Stdout)), &rates); err != nil {
		return fmt.Errorf("reading the rates: %w", err)
	}
	r.add(fmt.Sprintf(policyThrough, p.name, crowd), unitMBps, rates.Down)
	r.add(fmt.Sprintf(policyConnect, p.name, crowd), unitConnections, rates.Connections)
	return nil
}
