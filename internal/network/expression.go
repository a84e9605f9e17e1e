package network

import (
	"errors"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The parts that rules are made of. Each is a piece of an nftables expression; join joins them to
// a rule. Registers 1 and 2 have 16 bytes each, so a link's name in 1 is followed by an address
// in 2, as in a concatenated key.

// direction tells which link of a packet is meant.
type direction bool

const (
	incoming direction = false // the link that a packet came in by
	outgoing direction = true  // the link that it goes out by
)

// end tells which end of a packet's way is meant.
type end bool

const (
	source      end = false
	destination end = true
)

func join(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }
func gotoChain(name string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: name}}
}
func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }
func leave() []expr.Any      { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

// count adds a packet to a counter of the table.
func count(name string) []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}
}

// redirectTo redirects a connection to a port of the host itself.
func redirectTo(port uint16) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1, Flags: redirectPorts}}
}

// redirectPorts is the flag for given ports (NF_NAT_RANGE_PROTO_SPECIFIED).
const redirectPorts = 2

// logTo reports the packet to the group of the netfilter log, with its first snapLength bytes.
func logTo(group uint16) []expr.Any {
	return []expr.Any{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN, Group: group, Snaplen: snapLength}}
}

// logWith reports the packet as logTo does, with a prefix that tells why.
func logWith(group uint16, prefix string) []expr.Any {
	return []expr.Any{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_PREFIX,
		Group: group, Snaplen: snapLength, Data: []byte(prefix)}}
}

// withinRate matches as long as the key in register 1 comes at most ratePerSlot times a second.
// The set m keeps the rates.
func withinRate(m *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Dynset{SrcRegKey: 1, SetName: m.Name, SetID: m.ID, Operation: unix.NFT_DYNSET_OP_ADD,
		Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: ratePerSlot, Unit: expr.LimitTimeSecond, Burst: rateBurst}}}}
}

func metaLink(d direction, register uint32) expr.Any {
	key := expr.MetaKeyIIFNAME
	if d == outgoing {
		key = expr.MetaKeyOIFNAME
	}
	return &expr.Meta{Key: key, Register: register}
}

// linkIs matches links whose names begin with prefix, by a comparison shorter than the name.
func linkIs(d direction, prefix string) []expr.Any {
	return []expr.Any{metaLink(d, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(prefix)}}
}

func linkIsNot(d direction, prefix string) []expr.Any {
	return []expr.Any{metaLink(d, 1), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte(prefix)}}
}

func isIPv4() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}}}
}

func notIPv4() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}}}
}

// address loads an IPv4 address of the packet into a register.
func address(e end, register uint32) expr.Any {
	const sourceOffset, destinationOffset = 12, 16 // in the IPv4 header, RFC 791
	offset := uint32(sourceOffset)
	if e == destination {
		offset = destinationOffset
	}
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}
}

func load(e end) []expr.Any { return []expr.Any{address(e, 1)} }

// linkAnd loads a link's name and an address, the key of slots and policies.
func linkAnd(d direction, e end) []expr.Any { return []expr.Any{metaLink(d, 1), address(e, 2)} }

func inSet(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

func notInSet(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: true}}
}

// verdictOf applies the verdict that the map has; without an element the rule does not match.
func verdictOf(m *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, DestRegister: 0, IsDestRegSet: true, SetName: m.Name, SetID: m.ID}}
}

// sourceIn matches source addresses in a prefix.
func sourceIn(p netip.Prefix) []expr.Any {
	first := p.Masked().Addr().As4()
	mask := binaryutil.BigEndian.PutUint32(^uint32(0) << (32 - p.Bits()))
	return []expr.Any{address(source, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: first[:]}}
}

func addressType(op expr.CmpOp, kind uint32) []expr.Any {
	return []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: op, Register: 1, Data: binaryutil.NativeEndian.PutUint32(kind)}}
}

// addressTypeIs matches the type that the host's routing table has for the destination when the
// packet comes (unix.RTN_LOCAL: one of the host's addresses).
func addressTypeIs(kind uint32) []expr.Any    { return addressType(expr.CmpOpEq, kind) }
func addressTypeIsNot(kind uint32) []expr.Any { return addressType(expr.CmpOpNeq, kind) }

// state matches connections in any of the states.
func state(bits uint32) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}}
}

// isRedirected matches connections whose destination was rewritten.
func isRedirected() []expr.Any {
	const destinationRewritten = 1 << 5 // IPS_DST_NAT
	return []expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(destinationRewritten), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}}
}

// isReply matches packets against the direction in which their connection was opened.
func isReply() []expr.Any    { return wayIs(1) } // IP_CT_DIR_REPLY
func isOriginal() []expr.Any { return wayIs(0) } // IP_CT_DIR_ORIGINAL

func wayIs(way byte) []expr.Any {
	return join([]expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}}, equals([]byte{way}))
}

func protocolIs(p byte) []expr.Any {
	return join([]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}}, equals([]byte{p}))
}

// isFragment matches packets with more fragments to follow, or with an offset other than 0.
func isFragment() []expr.Any {
	const fragmentOffset = 6 // in the IPv4 header, with three flags before it
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: fragmentOffset, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0x3f, 0xff}, Xor: make([]byte, 2)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 2)}}
}

// Types of ICMP messages that are errors, RFC 792.
const (
	icmpUnreachable  = 3
	icmpSourceQuench = 4
	icmpRedirect     = 5
	icmpTimeExceeded = 11
	icmpParameter    = 12
)

// quotedDestination loads the destination of the packet that an ICMP error quotes into a
// register.
func quotedDestination(register uint32) expr.Any {
	const header, destinationOffset = 8, 16 // of ICMP, and in the IPv4 header after it
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: header + destinationOffset,
		Len: 4}
}

func icmpType(kind byte) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind}}}
}

func isICMP() []expr.Any { return protocolIs(unix.IPPROTO_ICMP) }

// equals compares register 1 with data.
func equals(data []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

// loadPort loads a port of TCP or UDP. A packet without ports does not match.
func loadPort(e end) []expr.Any {
	offset := uint32(0)
	if e == destination {
		offset = 2
	}
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}}
}

func portOf(protocol byte, e end, port uint16) []expr.Any {
	return join(protocolIs(protocol), loadPort(e), equals(binaryutil.BigEndian.PutUint16(port)))
}

func tcpPort(e end, port uint16) []expr.Any { return portOf(unix.IPPROTO_TCP, e, port) }

// isGone reports whether err says that something does not exist, such as the object of a
// deletion.
func isGone(err error) bool { return errors.Is(err, unix.ENOENT) }
