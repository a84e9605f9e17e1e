package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// ratePerSlot and rateBurst bound the refused packets of a slot that the kernel reports, per
	// second and at once. They are enough to see what does not connect; a sandbox that floods
	// causes no more.
	ratePerSlot = 10
	rateBurst   = 20
	// ratesTimeout is the time for which the kernel remembers the rate of a slot; forgetting one
	// allows it a burst.
	ratesTimeout = time.Minute

	// snapLength is the number of bytes of a packet that the kernel reports: the longest IPv4
	// header and the ports after it.
	snapLength = 64

	// firstGroup to lastGroup are the groups of the netfilter log, one of which is used. Log
	// daemons usually have the low ones.
	firstGroup, lastGroup = 0xca00, 0xcaff

	// denialsEvery is the time in which equal refusals are counted together.
	denialsEvery = time.Second
	// denialsKept bounds the number of different refusals kept in that time, and of those waiting
	// to be read.
	denialsKept = 1024
)

// Denied reports refused packets of a slot to the same destination within a second.
type Denied struct {
	Slot        *Slot
	Destination netip.AddrPort // port 0 for protocols without ports
	Protocol    string         // "tcp", "udp", "icmp", or "ip-" and a number
	Count       int            // packets that the kernel reported, at most 10 a second for a slot
	Excess      bool           // the policy allows it, but the slot has too many
}

// denials receives reports of refused packets from the kernel.
type denials struct {
	slotOf func(netip.Addr) (*Slot, bool)
	out    chan Denied
	conn   *netlink.Conn // nil: no reports
	found  map[denial]int
}

// denial is the part of a report by which refusals are counted together.
type denial struct {
	slot     *Slot
	to       netip.AddrPort
	protocol byte
	excess   bool
}

func newDenials(slotOf func(netip.Addr) (*Slot, bool)) *denials {
	return &denials{slotOf: slotOf, out: make(chan Denied, denialsKept), found: map[denial]int{}}
}

// Denials returns a channel of refusals. A refusal that is not read in time is dropped. The
// channel is never closed.
func (n *Network) Denials() <-chan Denied { return n.denials.out }

// The used part of linux/netfilter/nfnetlink_log.h.
const (
	logSubsystem  = 4
	logPacket     = 0 // message types
	logConfig     = 1
	logAttrBytes  = 9 // of a packet: its first bytes
	logAttrPrefix = 10
	logCfgCommand = 1 // of a configuration, as is the mode
	logCfgMode    = 2
	logBind       = 1 // a command
	logCopyPacket = 2 // a mode
)

// listen takes a free group of the netfilter log.
func (d *denials) listen() (group uint16, err error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("opening the netfilter log: %w", err)
	}
	for group = firstGroup; group <= lastGroup; group++ {
		err = configureLog(c, group, logCfgCommand, []byte{logBind})
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EPERM) {
			break
		}
	}
	if err == nil {
		mode := append(binary.BigEndian.AppendUint32(nil, snapLength), logCopyPacket, 0)
		err = configureLog(c, group, logCfgMode, mode)
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("taking a group of the netfilter log: %w", err), c.Close())
	}
	d.conn = c
	return group, nil
}

func configureLog(c *netlink.Conn, group uint16, attribute uint16, value []byte) error {
	e := netlink.NewAttributeEncoder()
	e.Bytes(attribute, value)
	data, err := e.Encode()
	if err != nil {
		return err
	}
	header := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group)
	_, err = c.Execute(netlink.Message{
		Header: netlink.Header{Type: logSubsystem<<8 | logConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append(header, data...),
	})
	return err
}

func (d *denials) close() error {
	if d.conn == nil {
		return nil
	}
	return d.conn.Close()
}

// run receives, gathers and passes on reports until ctx ends.
func (d *denials) run(ctx context.Context) {
	if d.conn == nil {
		return
	}
	// This ends a wait below; setting a deadline of an open socket does not fail.
	defer context.AfterFunc(ctx, func() { _ = d.conn.SetReadDeadline(time.Now()) })()
	defer d.close() //nolint:errcheck // it was only read from
	next := time.Now().Add(denialsEvery)
	for ctx.Err() == nil {
		if err := d.conn.SetReadDeadline(next); err != nil {
			return
		}
		messages, err := d.conn.Receive()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ENOBUFS): // more came than was read
		case err != nil:
			return
		}
		for _, m := range messages {
			if m.Header.Type == logSubsystem<<8|logPacket {
				d.hear(m.Data)
			}
		}
		if now := time.Now(); !now.Before(next) {
			d.pass()
			next = now.Add(denialsEvery)
		}
	}
}

// hear records the report of one packet.
func (d *denials) hear(data []byte) {
	if len(data) < headerLength {
		return
	}
	a, err := netlink.NewAttributeDecoder(data[headerLength:])
	if err != nil {
		return
	}
	var f flow
	var ok, excess bool
	for a.Next() {
		switch a.Type() {
		case logAttrBytes:
			f, ok = parsePacket(a.Bytes())
		case logAttrPrefix:
			excess = a.String() == excessPrefix
		}
	}
	if !ok {
		return
	}
	s, ok := d.slotOf(f.source.Addr())
	if !ok {
		return
	}
	if key := (denial{s, f.destination, f.protocol, excess}); d.found[key] > 0 || len(d.found) < denialsKept {
		d.found[key]++
	}
}

// pass sends the gathered refusals to the channel, as far as it has room.
func (d *denials) pass() {
	for key, count := range d.found {
		select {
		case d.out <- Denied{key.slot, key.to, protocolName(key.protocol), count, key.excess}:
		default: // the reader is behind
		}
	}
	clear(d.found)
}

// parsePacket parses addresses and ports of an IPv4 packet, of which only the beginning must be
// there.
func parsePacket(b []byte) (flow, bool) {
	const shortest = 20
	if len(b) < shortest || b[0]>>4 != 4 {
		return flow{}, false
	}
	f := flow{protocol: b[9]}
	var ports [2]uint16
	header := int(b[0]&0xf) * 4
	first := binary.BigEndian.Uint16(b[6:])&0x1fff == 0 // the first fragment
	if f.protocol == unix.IPPROTO_TCP || f.protocol == unix.IPPROTO_UDP {
		if header >= shortest && first && len(b) >= header+4 {
			ports = [2]uint16{binary.BigEndian.Uint16(b[header:]), binary.BigEndian.Uint16(b[header+2:])}
		}
	}
	f.source = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), ports[0])
	f.destination = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[16:20])), ports[1])
	return f, true
}

func protocolName(p byte) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	}
	return "ip-" + strconv.Itoa(int(p))
}
