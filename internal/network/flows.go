package network

import (
	"cmp"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Flows bounds the connections, of every protocol, that the host tracks for slots. The host has
// one table for all connections, its own included, and drops new ones when it is full. 0 in a
// field takes its default.
type Flows struct {
	PerSlot   int // at once
	PerSecond int // new ones of a slot; four times as many at once
	Percent   int // of the host's table, for all slots together
}

// Defaults of Flows. A browser or a package manager has some dozens of connections at once; with
// less than 100 a second and the timeouts below a crawler does not reach the first limit.
const (
	DefaultFlowsPerSlot   = 1024
	DefaultFlowsPerSecond = 200
	DefaultFlowsPercent   = 50
)

const (
	// flowsBurst is the number of seconds' worth of new flows that may come at once.
	flowsBurst = 4
	// questionsPerSecond bounds the packets of a slot to the resolver, since all slots share its
	// socket. It is above the resolver's own limit for a slot.
	questionsPerSecond = 500

	// fragmentsPerSecond bounds the fragments of a slot. The host reassembles those of all slots
	// and its own in 4 MiB, and keeps incomplete ones for 30 seconds. Programs rarely send
	// fragments.
	fragmentsPerSecond = 50
	fragmentsBurst     = 200

	// All slots' flows are counted in at most bucketsMost lists, by a number that the kernel
	// gives each flow and that a sandbox cannot choose. Searching one list of all flows would
	// take longer the more there are; a list for fewer than bucketLeast would often be full by
	// chance.
	bucketsMost = 4096
	bucketLeast = 32

	// conntrackMax is the assumed size of the host's table if the kernel does not tell it. It is
	// the kernel's value on small hosts.
	conntrackMax = 65536
)

// Timeouts of slots' flows that differ from the kernel's, in seconds. Flows that have ended, or
// were never answered, make room soon. Connections without a packet stay half a day instead of
// five.
var (
	tcpTimes = expr.CtStatePolicyTimeout{
		expr.CtStateTCPSYNSENT: 30, expr.CtStateTCPSYNRECV: 30, expr.CtStateTCPESTABLISHED: 12 * 3600, expr.CtStateTCPFINWAIT: 30,
		expr.CtStateTCPCLOSEWAIT: 60, expr.CtStateTCPLASTACK: 10, expr.CtStateTCPTIMEWAIT: 10, expr.CtStateTCPCLOSE: 5,
		expr.CtStateTCPSYNSENT2: 30, expr.CtStateTCPRETRANS: 120, expr.CtStateTCPUNACK: 120,
	}
	udpTimes = expr.CtStatePolicyTimeout{expr.CtStateUDPUNREPLIED: 10, expr.CtStateUDPREPLIED: 60}
	// A question has one answer, and most programs ask each from another port.
	dnsTimes = expr.CtStatePolicyTimeout{expr.CtStateUDPUNREPLIED: 10, expr.CtStateUDPREPLIED: 3}
)

const (
	chainFlows  = "flows"  // regular: bounds new flows
	chainExcess = "excess" // regular: counts, logs and drops packets beyond the limits

	chainPieces = "pieces" // from a sandbox, before fragments are reassembled
	chainErrors = "errors" // regular: ICMP from a sandbox

	totalExcess = "excess_total"
	timesTCP    = "times_tcp"
	timesUDP    = "times_udp"
	timesDNS    = "times_dns"

	// excessPrefix distinguishes refusals by these limits from those by policy in the netfilter
	// log.
	excessPrefix = "cay-excess"
)

// flows has the sets that count what slots have open.
type flows struct {
	limits  Flows
	all     int // limit of all slots together
	buckets int

	rate      *nftables.Set // new flows, by slot
	open      *nftables.Set // tracked flows, by slot
	total     *nftables.Set // tracked flows, by bucket
	questions *nftables.Set // packets to the resolver, by slot
	fragments *nftables.Set // by slot
}

func newFlows(t *nftables.Table, l layout, limits Flows) flows {
	limits.PerSlot = cmp.Or(limits.PerSlot, DefaultFlowsPerSlot)
	limits.PerSecond = cmp.Or(limits.PerSecond, DefaultFlowsPerSecond)
	limits.Percent = cmp.Or(limits.Percent, DefaultFlowsPercent)
	bySlot := func(name string, timeout time.Duration) *nftables.Set {
		return &nftables.Set{Table: t, Name: name,
			KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr), Concatenation: true, Dynamic: true,
			HasTimeout: timeout > 0, Timeout: timeout, Size: uint32(l.capacity())}
	}
	f := flows{limits: limits, all: trackable() * limits.Percent / 100, rate: bySlot("flow_rates", ratesTimeout),
		open: bySlot("open_flows", 0), questions: bySlot("questions", ratesTimeout),
		fragments: bySlot("fragments", ratesTimeout)}
	f.buckets = 1 << (bits.Len(uint(max(1, min(bucketsMost, f.all/bucketLeast)))) - 1)
	f.total = &nftables.Set{Table: t, Name: "all_flows", KeyType: nftables.TypeMark, Dynamic: true,
		Size: uint32(f.buckets)}
	return f
}

// trackable returns the number of connections that the host's table holds.
func trackable() int {
	if b, err := os.ReadFile(filepath.Join(sysctlDir, "netfilter/nf_conntrack_max")); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n > 0 {
			return n
		}
	}
	return conntrackMax
}

func (f flows) sets() []*nftables.Set {
	return []*nftables.Set{f.rate, f.open, f.total, f.questions, f.fragments}
}

// openedNone reports whether the slot has never opened a connection. It returns false if that is not
// known. The first packet of each connection is counted before it leaves, apart from those to the
// metadata service, which no policy forbids. A table that was installed anew has counted none of the
// connections from before.
func (n *Network) openedNone(s *Slot) bool {
	n.installing.RLock()
	defer n.installing.RUnlock()
	r, err := n.rulesOf(s)
	if err != nil || n.installed.Load() != r.since {
		return false
	}
	e, known, err := n.rules.element(n.rules.allowed, s)
	return err == nil && known && tallyOf(e) == tally{}
}

// serial lets one function run at a time.
type serial struct{ mu sync.Mutex }

func (o *serial) run(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f()
}

// encodingTimes serialises all networks of a process, since the library writes timeouts into a
// table of its own while it encodes them.
var encodingTimes serial

func (t *table) addTimes(c *nftables.Conn) { encodingTimes.run(func() { t.encodeTimes(c) }) }

func (t *table) encodeTimes(c *nftables.Conn) {
	add := func(name string, protocol uint8, times expr.CtStatePolicyTimeout) {
		c.AddObj(&nftables.NamedObj{Table: t.table, Name: name, Type: nftables.ObjTypeCtTimeout,
			Obj: &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: protocol, Policy: times}})
	}
	add(timesTCP, unix.IPPROTO_TCP, tcpTimes)
	add(timesUDP, unix.IPPROTO_UDP, udpTimes)
	if t.services.DNS != 0 {
		add(timesDNS, unix.IPPROTO_UDP, dnsTimes)
	}
}

// flowRules returns the rules for packets that begin a flow and that the policy lets through. The
// kernel puts a flow into its table only when the packet has left.
func (t *table) flowRules() [][]expr.Any {
	f := t.flows
	slot := join(isIPv4(), linkAnd(incoming, source))
	out := [][]expr.Any{
		join(slot, over(f.rate, &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(f.limits.PerSecond),
			Unit: expr.LimitTimeSecond, Burst: uint32(flowsBurst * f.limits.PerSecond), Over: true}), gotoChain(chainExcess)),
		join(slot, over(f.open, overCount(f.limits.PerSlot)), gotoChain(chainExcess)),
		join(isIPv4(), flowNumber(f.buckets), over(f.total, overCount(f.all/f.buckets)), gotoChain(chainExcess)),
		join(protocolIs(unix.IPPROTO_TCP), times(timesTCP)),
		join(protocolIs(unix.IPPROTO_UDP), times(timesUDP)),
	}
	if port := t.services.DNS; port != 0 {
		out = append(out, join(portOf(unix.IPPROTO_UDP, destination, port), times(timesDNS)))
	}
	return out
}

// fragmentRules bound fragments before they are reassembled. Connection tracking reassembles them
// before any other chain sees them.
func (t *table) fragmentRules(fromUs []expr.Any) [][]expr.Any {
	slot := join(fromUs, isIPv4(), isFragment(), linkAnd(incoming, source))
	return [][]expr.Any{
		join(slot, notInSet(t.slots), drop()),
		join(slot, over(t.flows.fragments, &expr.Limit{Type: expr.LimitTypePkts, Rate: fragmentsPerSecond,
			Unit: expr.LimitTimeSecond, Burst: fragmentsBurst, Over: true}), gotoChain(chainExcess)),
	}
}

// errorRules returns the rules for ICMP errors. The kernel finds the flow of an error by the
// packet that it quotes, so a slot could send errors about other slots' flows in the host's name.
// The rules require that the quoted packet was sent to the slot itself. Redirects are for
// routers.
func (t *table) errorRules() [][]expr.Any {
	out := [][]expr.Any{join(icmpType(icmpRedirect), gotoChain(chainRefuse))}
	for _, kind := range []byte{icmpUnreachable, icmpSourceQuench, icmpTimeExceeded, icmpParameter} {
		out = append(out, join(icmpType(kind), []expr.Any{metaLink(incoming, 1), quotedDestination(2)}, notInSet(t.slots),
			gotoChain(chainRefuse)))
	}
	return out
}

// excessRules count and report packets beyond the limits.
func (t *table) excessRules() [][]expr.Any {
	slot := join(isIPv4(), linkAnd(incoming, source))
	out := [][]expr.Any{join(slot, inSet(t.denied), count(totalDenied), count(totalExcess))}
	if t.log != 0 {
		out = append(out, join(slot, withinRate(t.rates), logWith(t.log, excessPrefix)))
	}
	return append(out, drop())
}

// over matches if the expression that m keeps for the key in register 1 matches.
func over(m *nftables.Set, e expr.Any) []expr.Any {
	return []expr.Any{&expr.Dynset{SrcRegKey: 1, SetName: m.Name, SetID: m.ID, Operation: unix.NFT_DYNSET_OP_ADD,
		Exprs: []expr.Any{e}}}
}

func overCount(n int) expr.Any {
	return &expr.Connlimit{Count: uint32(n), Flags: expr.NFT_CONNLIMIT_F_INV}
}

// flowNumber loads the number of the packet's flow modulo n, a power of two.
func flowNumber(n int) []expr.Any {
	const ctKeyID = 23 // NFT_CT_ID
	return []expr.Any{&expr.Ct{Key: ctKeyID, Register: 1}, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
		Mask: binaryutil.BigEndian.PutUint32(uint32(n - 1)), Xor: make([]byte, 4)}}
}

// times gives a new flow the timeouts of that name.
func times(name string) []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: name}}
}

// isNew matches the first packet of a flow, before the kernel has put the flow into its table.
// The kernel's own state "new" lasts until there is an answer.
func isNew() []expr.Any {
	const confirmed = 1 << 3 // IPS_CONFIRMED
	return []expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(confirmed), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)}}
}

func jumpTo(name string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: name}}
}
