package network

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// element reads the element of one slot from a set keyed by link and address, with its counter and
// comment. found is false if the set or the element does not exist. The nftables library reads only
// whole sets, which takes longer the more slots there are.
func (t *table) element(set *nftables.Set, s *Slot) (e nftables.SetElement, found bool, err error) {
	a := netlink.NewAttributeEncoder()
	a.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.table.Name)
	a.String(unix.NFTA_SET_ELEM_LIST_SET, set.Name)
	a.Nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(a *netlink.AttributeEncoder) error {
		a.Nested(unix.NFTA_LIST_ELEM, func(a *netlink.AttributeEncoder) error {
			a.Nested(unix.NFTA_SET_ELEM_KEY, func(a *netlink.AttributeEncoder) error {
				a.Bytes(unix.NFTA_DATA_VALUE, slotKey(s))
				return nil
			})
			return nil
		})
		return nil
	})
	request, err := a.Encode()
	if err != nil {
		return e, false, err
	}
	header := make([]byte, headerLength)
	header[0] = unix.NFPROTO_INET
	answers, err := t.sockets.short.execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETSETELEM, Flags: netlink.Request},
		Data:   append(header, request...),
	})
	if errors.Is(err, unix.ENOENT) {
		return e, false, nil
	}
	for _, m := range answers {
		if err == nil {
			err = parseElement(m.Data, &e)
		}
	}
	if err != nil {
		return e, false, fmt.Errorf("reading nftables set %s: %w", set.Name, err)
	}
	return e, true, nil
}

// parseElement parses the only element of an answer.
func parseElement(data []byte, e *nftables.SetElement) error {
	if len(data) < headerLength {
		return errors.New("the kernel sent a truncated element")
	}
	d, err := netlink.NewAttributeDecoder(data[headerLength:])
	if err != nil {
		return err
	}
	nested(d, unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(d *netlink.AttributeDecoder) {
		nested(d, unix.NFTA_LIST_ELEM, func(d *netlink.AttributeDecoder) {
			for d.Next() {
				switch d.Type() {
				case unix.NFTA_SET_ELEM_EXPR:
					d.Nested(func(d *netlink.AttributeDecoder) error { return parseCounter(d, e) })
				case unix.NFTA_SET_ELEM_USERDATA:
					e.Comment, _ = userdata.GetString(d.Bytes(), userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
				}
			}
		})
	})
	return d.Err()
}

// parseCounter parses the expression of an element, if it is a counter.
func parseCounter(d *netlink.AttributeDecoder, e *nftables.SetElement) error {
	name := ""
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_EXPR_NAME:
			name = d.String()
		case unix.NFTA_EXPR_DATA:
			if name != "counter" {
				continue
			}
			e.Counter = &expr.Counter{}
			d.Nested(func(d *netlink.AttributeDecoder) error {
				d.ByteOrder = binary.BigEndian
				for d.Next() {
					switch d.Type() {
					case unix.NFTA_COUNTER_BYTES:
						e.Counter.Bytes = d.Uint64()
					case unix.NFTA_COUNTER_PACKETS:
						e.Counter.Packets = d.Uint64()
					}
				}
				return nil
			})
		}
	}
	return nil
}

// nested calls f with the attributes inside each attribute of a type.
func nested(d *netlink.AttributeDecoder, kind uint16, f func(*netlink.AttributeDecoder)) {
	for d.Next() {
		if d.Type() == kind {
			d.Nested(func(d *netlink.AttributeDecoder) error { f(d); return nil })
		}
	}
}
