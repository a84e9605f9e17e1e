package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	cay "github.com/cayhq/cay/sdk/go"
)

// egressFlags holds the flags of a policy.
type egressFlags struct {
	mode        string
	allowCIDR   []string
	denyCIDR    []string
	allowPort   []int
	allowDomain []string
}

// add adds the flags to those of a verb. otherwise is a text about the policy without any of them.
func (e *egressFlags) add(f *pflag.FlagSet, otherwise string) {
	f.StringVar(&e.mode, "egress-mode", "", "allow_all or deny_all"+otherwise)
	f.StringArrayVar(&e.allowCIDR, "egress-allow-cidr", nil,
		"range that may be reached; implies deny_all for the rest (repeatable)")
	f.StringArrayVar(&e.denyCIDR, "egress-deny-cidr", nil,
		"range that may not be reached, even if it is allowed; implies deny_all (repeatable)")
	f.IntSliceVar(&e.allowPort, "egress-allow-port", nil,
		"TCP port that the allowed ranges are restricted to (repeatable)")
	f.StringArrayVar(&e.allowDomain, "egress-allow-domain", nil,
		"name that may be reached over TCP, or *.NAME for the names below it; implies deny_all for the rest (repeatable)")
}

// policy returns the policy that the flags ask for, nil if no flag is given.
func (e egressFlags) policy() *cay.Egress {
	lists := len(e.allowCIDR)+len(e.denyCIDR)+len(e.allowPort)+len(e.allowDomain) > 0
	if !lists && e.mode == "" {
		return nil
	}
	if e.mode == "" {
		e.mode = "deny_all"
	}
	return &cay.Egress{Mode: cay.EgressMode(e.mode), AllowCIDRs: e.allowCIDR, DenyCIDRs: e.denyCIDR,
		AllowPorts: e.allowPort, AllowDomains: e.allowDomain}
}

// egressCommand returns the verb that shows or replaces the policy of a sandbox.
func (a *app) egressCommand() *cobra.Command {
	var flags egressFlags
	cmd := &cobra.Command{
		Use:   "egress ID",
		Short: "Show or replace what a sandbox may reach",
		Long: `Show what a sandbox may reach, or replace it by the policy that the flags describe.
The new policy replaces all of the old one, at once and for established connections
too. A suspended sandbox is not woken; it has the policy when it wakes. Each of the
lists implies deny_all.`,
		Example: `  cay sandbox egress sbx_…
  cay sandbox egress sbx_… --egress-mode deny_all
  cay sandbox egress sbx_… --egress-allow-cidr 0.0.0.0/0 --egress-deny-cidr 10.0.0.0/8`,
		Args:              theArgs("ID"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			var s *cay.Sandbox
			if p := flags.policy(); p != nil {
				s, err = c.SetEgress(cmd.Context(), args[0], *p)
			} else {
				s, err = c.GetSandbox(cmd.Context(), args[0])
			}
			if err != nil {
				return err
			}
			return a.show(s.Egress, func() error { return a.showEgress(s) })
		},
	}
	flags.add(cmd.Flags(), "")
	return cmd
}

// showEgress prints the policy and the traffic of a sandbox.
func (a *app) showEgress(s *cay.Sandbox) error {
	e := s.Egress
	return a.details("mode", string(e.Mode),
		"allow", strings.Join(e.AllowCIDRs, " "), "TCP ports", portsText(e.AllowPorts),
		"deny", strings.Join(e.DenyCIDRs, " "), "domains", strings.Join(e.AllowDomains, " "),
		"network", networkText(s.Network))
}

// portsText returns ports with spaces between them.
func portsText(ports []int) string { return strings.Trim(fmt.Sprint(ports), "[]") }

// shown limits the entries of a list that egressText has. With more, the line of a long policy wraps.
const shown = 5

// egressText returns a policy as one line.
func egressText(e cay.Egress) string {
	text := string(e.Mode)
	list := func(before string, all []string) {
		if len(all) == 0 {
			return
		}
		text += before + strings.Join(all[:min(len(all), shown)], " ")
		if more := len(all) - shown; more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
	}
	list(", allow ", e.AllowCIDRs)
	list(", TCP ports ", strings.Fields(portsText(e.AllowPorts)))
	list(", domains ", e.AllowDomains)
	list(", deny ", e.DenyCIDRs)
	return text
}

// networkText returns a text about the traffic of a sandbox, or "" if it is not known.
func networkText(n *cay.NetworkUse) string {
	if n == nil {
		return ""
	}
	return fmt.Sprintf("%d packets (%s) allowed, %d packets (%s) denied", n.PacketsAllowed, bytesText(n.BytesAllowed),
		n.PacketsDenied, bytesText(n.BytesDenied))
}
