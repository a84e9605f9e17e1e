package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// frame is an Ethernet frame with a UDP packet, as a sandbox could write it to its link.
type frame struct {
	to       net.HardwareAddr // nil: the gateway
	src, dst netip.AddrPort
	ttl      byte // 0: 64
	payload  string
	options  []byte     // of IPv4, a multiple of 4 bytes
	pieces   bool       // in two fragments, IPv4 only
	end      netip.Addr // the final destination with options, if not dst
}

// send writes the frame to eth0 of the thread's namespace.
func (f frame) send() error {
	link, err := net.InterfaceByName(insideLink)
	if err != nil {
		return err
	}
	kind := uint16(unix.ETH_P_IP)
	if f.dst.Addr().Is6() {
		kind = unix.ETH_P_IPV6
	}
	to := f.to
	if to == nil {
		to = hostMAC
	}
	packet := f.packet()
	if !f.pieces {
		return sendRaw(link.Index, to, kind, packet)
	}
	for _, piece := range fragments(packet) {
		if err := sendRaw(link.Index, to, kind, piece); err != nil {
			return err
		}
	}
	return nil
}

// fragments splits an IPv4 packet in two, after the ports.
func fragments(packet []byte) [][]byte {
	const first = 8 // bytes after the header, also the unit of offsets
	header := int(packet[0]&0xf) * 4
	piece := func(flags uint16, data []byte) []byte {
		out := append(append([]byte{}, packet[:header]...), data...)
		binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
		binary.BigEndian.PutUint16(out[4:], binary.BigEndian.Uint16(packet[header+6:])) // a different ID
		binary.BigEndian.PutUint16(out[6:], flags)
		binary.BigEndian.PutUint16(out[10:], 0)
		binary.BigEndian.PutUint16(out[10:], checksum(out[:header]))
		return out
	}
	const more = 0x2000
	return [][]byte{piece(more, packet[header:header+first]), piece(1, packet[header+first:])}
}

// sendRaw writes one Ethernet frame to a link.
func sendRaw(link int, to net.HardwareAddr, kind uint16, packet []byte) error {
	return sendAll(link, to, kind, [][]byte{packet})
}

// sendAll writes Ethernet frames to a link over one socket, since closing one takes long.
func sendAll(link int, to net.HardwareAddr, kind uint16, packets [][]byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a packet socket: %w", err)
	}
	defer unix.Close(fd)
	header := append(append(append([]byte{}, to...), sandboxMAC...), byte(kind>>8), byte(kind))
	for _, packet := range packets {
		raw := append(header[:len(header):len(header)], packet...)
		if err := unix.Sendto(fd, raw, 0, &unix.SockaddrLinklayer{Ifindex: link}); err != nil {
			return err
		}
	}
	return nil
}

// sendPackets writes IPv4 packets from a slot to its gateway.
func sendPackets(s *Slot, packets ...[]byte) error {
	return inNamespace(s.Namespace, func() error {
		link, err := net.InterfaceByName(insideLink)
		if err != nil {
			return err
		}
		return sendAll(link.Index, hostMAC, unix.ETH_P_IP, packets)
	})
}

func (f frame) packet() []byte {
	udp := make([]byte, 8, 8+len(f.payload))
	binary.BigEndian.PutUint16(udp[0:], f.src.Port())
	binary.BigEndian.PutUint16(udp[2:], f.dst.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(f.payload)))
	udp = append(udp, f.payload...)
	src, dst := f.src.Addr().AsSlice(), f.dst.Addr().AsSlice()
	pseudo := append(append([]byte{}, src...), dst...)
	if f.end.IsValid() {
		copy(pseudo[len(src):], f.end.AsSlice())
	}
	pseudo = append(pseudo, 0, unix.IPPROTO_UDP, udp[4], udp[5])
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	ttl := f.ttl
	if ttl == 0 {
		ttl = 64
	}
	if f.dst.Addr().Is6() {
		ip := []byte{0x60, 0, 0, 0, udp[4], udp[5], unix.IPPROTO_UDP, ttl}
		return append(append(append(ip, src...), dst...), udp...)
	}
	ip := make([]byte, 12, 20)
	ip[0] = 0x45 + byte(len(f.options)/4)
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(f.options)+len(udp)))
	ip[8], ip[9] = ttl, unix.IPPROTO_UDP
	ip = append(append(append(ip, src...), dst...), f.options...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, udp...)
}

// checksum is the Internet checksum, RFC 1071. Zero is sent as all ones, as UDP wants.
func checksum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		if i%2 == 0 {
			sum += uint32(v) << 8
		} else {
			sum += uint32(v)
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	if sum == 0xffff {
		return 0xffff
	}
	return ^uint16(sum)
}
