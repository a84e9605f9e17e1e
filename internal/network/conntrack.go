package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The used part of linux/netfilter/nfnetlink_conntrack.h. The kernel selects the connections of one
// address. vishvananda/netlink reads the whole table for each deletion, which sandboxes can fill:
// then every slot that is given back, and every change of a policy, would read all entries. Also a
// listing that finds nothing takes the kernel some milliseconds, since it locks every bucket of the
// table, so listings are avoided.
const (
	conntrackSubsystem = 1
	conntrackGet       = 1
	conntrackDelete    = 2

	attrTupleOrig  = 1
	attrTupleReply = 2
	attrID         = 12
	attrZone       = 18
	attrFilter     = 25

	attrTupleIP     = 1 // in a tuple
	attrTupleProto  = 2
	attrIPv4Source  = 1 // in a tuple's addresses, as is the destination
	attrProtoNumber = 1 // in a tuple's protocol, as are the ports

	attrIPv4Destination  = 2
	attrProtoSource      = 2
	attrProtoDestination = 3
	attrFilterOrig       = 1 // in a filter, as is the reply below
	attrFilterReply      = 2
	filterSource         = 1 << 0 // compare only the tuple's source address
)

// forgetConnections removes the tracked connections of an address: those that it opened, and
// those that the host opened to it. Otherwise the next sandbox with the address would get packets
// sent to the previous one.
func forgetConnections(ctx context.Context, s *sockets, a netip.Addr) error {
	for _, tuple := range []uint16{attrTupleOrig, attrTupleReply} {
		err := forgetAll(s, a, tuple)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) { // a kernel before 6.11
			err = forget(ctx, s, a, tuple, func(connection) bool { return true })
		}
		if err != nil {
			return fmt.Errorf("forgetting connections of %s: %w", a, err)
		}
	}
	return nil
}

// forgetAll removes the connections that have the source address in the tuple of one direction, with
// one request. Older kernels refuse it, since to them the tuple is incomplete.
func forgetAll(s *sockets, a netip.Addr, tuple uint16) error {
	request, err := encodeFilter(tuple, a)
	if err != nil {
		return err
	}
	m := conntrackMessage(conntrackDelete, netlink.Acknowledge, request)
	m.Data[1] = familyCounts
	_, err = s.tracked.execute(m)
	return err
}

// cutConnections forgets the connections of a slot that its policy does not allow, and those to
// destinations that no slot may reach. Packets of the other side then find no way in, and the rules
// check the sandbox's packets as those of new connections.
func cutConnections(ctx context.Context, by *sockets, s *Slot, r *compiled, never *forbidden) error {
	err := forget(ctx, by, s.Addr, attrTupleOrig, func(c connection) bool {
		if never.covers(s, c) {
			return true
		}
		// Only a redirected connection has the gateway at its other end.
		if c.end.Addr() == s.Gateway {
			direct := c.to == netip.AddrPortFrom(metadataAddr, metadataPort)
			return !direct && (!r.names || c.to.Port() != dnsPort && contains(r.deny, c.to.Addr()))
		}
		return !r.allows(c.protocol, c.end) || r.names && c.to.Port() == dnsPort
	})
	if err != nil {
		return fmt.Errorf("cutting connections of %s: %w", s.Addr, err)
	}
	return nil
}

// forget removes the connections that have the source address in the tuple of one direction and
// for which which returns true.
func forget(ctx context.Context, s *sockets, a netip.Addr, tuple uint16, which func(connection) bool) error {
	found, err := connectionsFrom(s, tuple, a)
	if err != nil {
		return fmt.Errorf("listing connections: %w", err)
	}
	for _, f := range found {
		if !which(f) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := s.tracked.execute(conntrackMessage(conntrackDelete, netlink.Acknowledge, f.id))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("deleting a connection: %w", err)
		}
	}
	return nil
}

// connection is an entry of connection tracking.
type connection struct {
	id       []byte // the attributes that identify it
	protocol byte
	source   netip.Addr     // in the tuple of the request
	to       netip.AddrPort // the destination that it was opened to
	end      netip.AddrPort // the destination after rewriting
}

// connectionsFrom returns the connections that have the source address in the tuple of one
// direction. The kernel filters; kernels before 5.8 do not, so this filters again.
func connectionsFrom(s *sockets, tuple uint16, a netip.Addr) ([]connection, error) {
	request, err := encodeFilter(tuple, a)
	if err != nil {
		return nil, err
	}
	messages, err := s.tracked.execute(conntrackMessage(conntrackGet, netlink.Dump, request))
	if err != nil {
		return nil, err
	}
	var out []connection
	for _, m := range messages {
		found, err := parseConnection(m.Data, tuple)
		if err != nil {
			return nil, err
		}
		if found.source == a {
			out = append(out, found)
		}
	}
	return out, nil
}

// encodeFilter encodes the attributes that select the connections with the source address in the
// tuple of one direction.
func encodeFilter(tuple uint16, a netip.Addr) ([]byte, error) {
	addr := a.As4()
	e := netlink.NewAttributeEncoder()
	e.Nested(tuple, func(e *netlink.AttributeEncoder) error {
		e.Nested(attrTupleIP, func(e *netlink.AttributeEncoder) error {
			e.Bytes(attrIPv4Source, addr[:])
			return nil
		})
		return nil
	})
	e.Nested(attrFilter, func(e *netlink.AttributeEncoder) error {
		orig, reply := uint32(filterSource), uint32(0)
		if tuple == attrTupleReply {
			orig, reply = reply, orig
		}
		e.Uint32(attrFilterOrig, orig)
		e.Uint32(attrFilterReply, reply)
		return nil
	})
	return e.Encode()
}

// parseConnection parses one entry. Its source is that of the given tuple.
func parseConnection(data []byte, tuple uint16) (connection, error) {
	if len(data) < headerLength {
		return connection{}, errors.New("connection tracking sent a truncated entry")
	}
	d, err := netlink.NewAttributeDecoder(data[headerLength:])
	if err != nil {
		return connection{}, err
	}
	var out connection
	e := netlink.NewAttributeEncoder()
	for d.Next() {
		switch d.Type() {
		case attrTupleOrig:
			e.Bytes(attrTupleOrig|unix.NLA_F_NESTED, d.Bytes())
		case attrID, attrZone:
			e.Bytes(d.Type(), d.Bytes())
		}
		if d.Type() != attrTupleOrig && d.Type() != attrTupleReply {
			continue
		}
		var ends flow
		kind := d.Type()
		d.Nested(ends.parse)
		if kind == tuple {
			out.source = ends.source.Addr()
		}
		if kind == attrTupleOrig {
			out.protocol, out.to = ends.protocol, ends.destination
		} else {
			out.end = ends.source
		}
	}
	if err := d.Err(); err != nil {
		return connection{}, err
	}
	out.id, err = e.Encode()
	return out, err
}

// flow is one direction of a connection. Protocols without ports have 0 for them.
type flow struct {
	protocol            byte
	source, destination netip.AddrPort
}

// parse parses a tuple's attributes.
func (f *flow) parse(d *netlink.AttributeDecoder) error {
	var addrs [2]netip.Addr
	var ports [2]uint16
	for d.Next() {
		switch d.Type() {
		case attrTupleIP:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					if b := d.Bytes(); len(b) == 4 && (d.Type() == attrIPv4Source || d.Type() == attrIPv4Destination) {
						addrs[d.Type()-attrIPv4Source] = netip.AddrFrom4([4]byte(b))
					}
				}
				return nil
			})
		case attrTupleProto:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					switch b := d.Bytes(); {
					case d.Type() == attrProtoNumber && len(b) == 1:
						f.protocol = b[0]
					case (d.Type() == attrProtoSource || d.Type() == attrProtoDestination) && len(b) == 2:
						ports[d.Type()-attrProtoSource] = binary.BigEndian.Uint16(b)
					}
				}
				return nil
			})
		}
	}
	f.source, f.destination = netip.AddrPortFrom(addrs[0], ports[0]), netip.AddrPortFrom(addrs[1], ports[1])
	return nil
}

const (
	// headerLength is the length of struct nfgenmsg: family, version, resource.
	headerLength = 4
	// familyCounts is the version in it with which a deletion of many connections is restricted to those
	// of the family. With version 0 the kernel ignores the family and refuses the filter.
	familyCounts = 1
)

func conntrackMessage(kind uint16, flags netlink.HeaderFlags, attributes []byte) netlink.Message {
	header := make([]byte, headerLength)
	header[0] = unix.AF_INET
	binary.BigEndian.PutUint16(header[2:], 0)
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(conntrackSubsystem<<8 | kind), Flags: netlink.Request | flags},
		Data:   append(header, attributes...),
	}
}
