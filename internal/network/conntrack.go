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

// The part of linux/netfilter/nfnetlink_conntrack.h that is used here.
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
	attrIPv4Source  = 1 // in a tuple's addresses
	attrFilterOrig  = 1 // in a filter, as the reply's below
	attrFilterReply = 2
	filterSource    = 1 << 0 // compare the tuple's source address alone
)

// forgetConnections removes what connection tracking remembers of an address:
// the connections it opened, and those the host opened to it. Otherwise the next
// sandbox with the address would get what is still sent to the previous one.
func forgetConnections(ctx context.Context, a netip.Addr) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("opening connection tracking: %w", err)
	}
	defer c.Close()
	for _, tuple := range []uint16{attrTupleOrig, attrTupleReply} {
		found, err := connectionsFrom(c, tuple, a)
		if err != nil {
			return fmt.Errorf("listing connections of %s: %w", a, err)
		}
		for _, f := range found {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("forgetting connections of %s: %w", a, err)
			}
			_, err := c.Execute(conntrackMessage(conntrackDelete, netlink.Acknowledge, f))
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("forgetting a connection of %s: %w", a, err)
			}
		}
	}
	return nil
}

// connectionsFrom lists the connections whose tuple (of one direction) has the
// source address, each as the attributes that identify it. The kernel filters;
// one older than 5.8 sends everything, so it is looked at here again.
func connectionsFrom(c *netlink.Conn, tuple uint16, a netip.Addr) ([][]byte, error) {
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
	request, err := e.Encode()
	if err != nil {
		return nil, err
	}
	messages, err := c.Execute(conntrackMessage(conntrackGet, netlink.Dump, request))
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for _, m := range messages {
		id, source, err := parseConnection(m.Data, tuple)
		if err != nil {
			return nil, err
		}
		if source == a {
			out = append(out, id)
		}
	}
	return out, nil
}

// parseConnection reads one entry: the attributes that identify it and the
// source address of the tuple asked for.
func parseConnection(data []byte, tuple uint16) (id []byte, source netip.Addr, err error) {
	if len(data) < headerLength {
		return nil, netip.Addr{}, errors.New("connection tracking sent a truncated entry")
	}
	d, err := netlink.NewAttributeDecoder(data[headerLength:])
	if err != nil {
		return nil, netip.Addr{}, err
	}
	e := netlink.NewAttributeEncoder()
	for d.Next() {
		switch d.Type() {
		case attrTupleOrig:
			e.Bytes(attrTupleOrig|unix.NLA_F_NESTED, d.Bytes())
		case attrID, attrZone:
			e.Bytes(d.Type(), d.Bytes())
		}
		if d.Type() != tuple {
			continue
		}
		d.Nested(func(d *netlink.AttributeDecoder) error {
			for d.Next() {
				if d.Type() == attrTupleIP {
					d.Nested(func(d *netlink.AttributeDecoder) error {
						for d.Next() {
							if b := d.Bytes(); d.Type() == attrIPv4Source && len(b) == 4 {
								source = netip.AddrFrom4([4]byte(b))
							}
						}
						return nil
					})
				}
			}
			return nil
		})
	}
	if err := d.Err(); err != nil {
		return nil, netip.Addr{}, err
	}
	id, err = e.Encode()
	return id, source, err
}

// headerLength is that of struct nfgenmsg: family, version, resource.
const headerLength = 4

func conntrackMessage(kind uint16, flags netlink.HeaderFlags, attributes []byte) netlink.Message {
	header := make([]byte, headerLength)
	header[0] = unix.AF_INET
	binary.BigEndian.PutUint16(header[2:], 0)
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(conntrackSubsystem<<8 | kind), Flags: netlink.Request | flags},
		Data:   append(header, attributes...),
	}
}
