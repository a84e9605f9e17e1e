package cli

import (
	"context"
	"errors"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// flagOf maps the fields of the API's requests to the flags and arguments that set them.
var flagOf = map[string]string{
	"template": "--template", "timeout": "--timeout", "idle_timeout": "--idle-timeout", "recovery_interval": "--recovery-interval", "mode": "--mode", "size": "--size",
	"env": "--env", "metadata": "--metadata", "placement": "--require", "placement.require": "--require", "disk_size_mb": "--disk-size-mb", "workdir": "--workdir", "user": "--user",
	"egress.mode": "--egress-mode", "egress.allow_cidrs": "--egress-allow-cidr", "egress.deny_cidrs": "--egress-deny-cidr",
	"egress.allow_ports": "--egress-allow-port", "egress.allow_domains": "--egress-allow-domain",
	"allow_cidrs": "--egress-allow-cidr", "deny_cidrs": "--egress-deny-cidr", "allow_ports": "--egress-allow-port", "allow_domains": "--egress-allow-domain", "egress": "--egress-mode", "owner": "--owner", "depth": "--depth", "status": "--status",
	"url": "URL", "types": "--type", "secret": "--secret-stdin", "after": "--after",
	"scopes": "--scope", "expires_in": "--expires-in", "name": "NAME", "path": "PATH", "args": "COMMAND", "stdin": "standard input",
	"tag": "--tag", "process": "PROCESS", "signal": "--signal", "offset": "--offset", "command": "COMMAND",
	"description": "--description", "dockerfile": "--dockerfile", "image": "--image", "context": "--context", "debian": "--debian", "debian.suite": "--suite",
	"build_args": "--build-arg", "target": "--target", "start_command": "--start-command", "ready.port": "--ready-port", "ready.command": "--ready-command",
	"ready.http": "--ready-http", "ready.timeout": "--ready-timeout", "credentials": "--registry-username", "credentials.registry": "--registry", "force": "--force",
	"quota.sandboxes": "--quota-sandboxes", "quota.vcpus": "--quota-vcpus", "quota.memory_mb": "--quota-memory-mb",
}

// flagFor returns the flag or argument that sets a field, such as "egress.allow_cidrs[2]" or "env.FOO", or "" if
// there is none.
func flagFor(field string, cmd *cobra.Command) string {
	if field == "mode" && cmd.Flags().Lookup("egress-mode") != nil && cmd.Flags().Lookup("template") == nil {
		return "--egress-mode"
	}
	if field == "mode" && cmd.Flags().Lookup("persistent") != nil {
		return "--persistent"
	}
	field, _, _ = strings.Cut(field, "[")
	for field != "" {
		if flag := flagOf[field]; flag != "" {
			return flag
		}
		i := strings.LastIndexByte(field, '.')
		field = field[:max(i, 0)]
	}
	return ""
}

// explain returns the text of an error for the user of a verb.
func explain(err error, cmd *cobra.Command) string {
	var refused *cay.Error
	if errors.As(err, &refused) {
		told := *refused
		if flag := flagFor(told.Field, cmd); flag != "" {
			told.Field = flag
		}
		// The text before that of the answer says what cay was doing.
		doing := strings.TrimSuffix(err.Error(), refused.Error())
		text := doing + told.Error()
		if told.Status == 401 {
			text += "; the key comes from --api-key, CAY_API_KEY, ~/.cay/config.toml or the server on this machine, in " +
				"this order"
		}
		return text
	}
	var conn *url.Error
	if errors.As(err, &conn) && !errors.Is(err, context.Canceled) {
		return "cannot reach the server at " + serverOf(conn.URL) + ": " + conn.Err.Error() +
			"; start one with cay server, or name it with --api-url"
	}
	return err.Error()
}

// serverOf returns the scheme and host of a URL.
func serverOf(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return text
	}
	return u.Scheme + "://" + u.Host
}
