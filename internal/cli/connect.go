package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/BurntSushi/toml"

	"github.com/cayhq/cay/internal/daemon"
	cay "github.com/cayhq/cay/sdk/go"
)

// defaultURL is the address of a server with default settings.
const defaultURL = "http://127.0.0.1:7070"

// clientConfig holds the settings of ~/.cay/config.toml.
type clientConfig struct {
	account
	Org  string             `toml:"org"`
	Orgs map[string]account `toml:"orgs"`
}

// account holds the address of a server and a key for it.
type account struct {
	APIURL string `toml:"api_url"`
	APIKey string `toml:"api_key"`
}

// readClientConfig reads the settings of the user with the home directory, if there are any.
func readClientConfig(home string) (clientConfig, error) {
	var c clientConfig
	if home == "" {
		return c, nil
	}
	path := filepath.Join(home, ".cay", "config.toml")
	meta, err := toml.DecodeFile(path, &c)
	if errors.Is(err, fs.ErrNotExist) {
		return clientConfig{}, nil
	}
	if err != nil {
		return c, fmt.Errorf("reading %s: %w", path, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		return c, fmt.Errorf("reading %s: there is no setting %s; there are api_url, api_key, org, and "+
			"orgs.NAME.api_url and .api_key", path, unknown[0])
	}
	return c, nil
}

// first returns the first text that is not empty.
func first(texts ...string) string {
	for _, text := range texts {
		if text != "" {
			return text
		}
	}
	return ""
}

// account returns the server to use, the key for it, and the organization that the key must belong to. Flags come
// before the environment, the environment before the config file, and the file before a server on this machine.
func (a *app) account() (acc account, org string, err error) {
	file, err := readClientConfig(a.getenv("HOME"))
	if err != nil {
		return account{}, "", err
	}
	org = first(a.org, a.getenv("CAY_ORG"), file.Org)
	own := file.Orgs[org]
	acc = account{
		APIURL: first(a.apiURL, a.getenv("CAY_API_URL"), own.APIURL, file.APIURL),
		APIKey: first(a.apiKey, a.getenv("CAY_API_KEY"), own.APIKey, file.APIKey),
	}
	if acc.APIURL != "" && acc.APIKey != "" {
		return acc, org, nil
	}
	acc, err = a.fromThisMachine(acc)
	return acc, org, err
}

// fromThisMachine completes an account with the address and the key of a server on this machine.
func (a *app) fromThisMachine(acc account) (account, error) {
	servers, err := a.localServers()
	if err != nil {
		return account{}, err
	}
	if acc.APIURL != "" {
		servers = slices.DeleteFunc(servers, func(s daemon.ServerRecord) bool { return !sameServer(s.URL, acc.APIURL) })
	}
	switch {
	case len(servers) > 1:
		var urls []string
		for _, s := range servers {
			urls = append(urls, s.URL)
		}
		return account{}, fmt.Errorf("several servers run on this machine: choose one with --api-url, of %s",
			strings.Join(urls, ", "))
	case len(servers) == 0 && (acc.APIURL == "" || sameServer(acc.APIURL, defaultURL)):
		// The record of a server may be gone, and one in a container may have its data here.
		servers = []daemon.ServerRecord{{URL: defaultURL, KeyFile: filepath.Join(a.dataDir, "api-key")}}
	case len(servers) == 0:
		servers = []daemon.ServerRecord{{URL: acc.APIURL}}
	}
	acc.APIURL = first(acc.APIURL, servers[0].URL)
	if acc.APIKey != "" {
		return acc, nil
	}
	key, err := os.ReadFile(first(servers[0].KeyFile, os.DevNull))
	switch {
	case errors.Is(err, fs.ErrPermission):
		return account{}, fmt.Errorf("no API key: that of the server on this machine is in %s, which you may not read; "+
			"give --api-key or CAY_API_KEY, or put api_key into ~/.cay/config.toml", servers[0].KeyFile)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return account{}, fmt.Errorf("reading the server's API key: %w", err)
	}
	if acc.APIKey = strings.TrimSpace(string(key)); acc.APIKey == "" {
		return account{}, fmt.Errorf(
			"no API key for %s: give --api-key or CAY_API_KEY, or put api_key into ~/.cay/config.toml", acc.APIURL)
	}
	return acc, nil
}

// localServers returns the servers that run on this machine, with URLs that can be called.
func (a *app) localServers() ([]daemon.ServerRecord, error) {
	all, err := daemon.Servers(a.runDir)
	if err != nil {
		return nil, err
	}
	var running []daemon.ServerRecord
	for _, s := range all {
		// ESRCH says that the process does not exist. Any other error, such as EPERM, says that it does.
		if s.PID <= 0 || errors.Is(syscall.Kill(s.PID, 0), syscall.ESRCH) {
			continue
		}
		if s.URL, err = callable(s.URL); err != nil {
			return nil, fmt.Errorf("reading the record of server %s: %w", s.Instance, err)
		}
		running = append(running, s)
	}
	return running, nil
}

// callable turns the URL on which a server listens into one that can be called, with the loopback for a server that
// listens on every address.
func callable(text string) (string, error) {
	u, err := url.Parse(text)
	if err != nil {
		return "", err
	}
	host := u.Hostname()
	if addr, err := netip.ParseAddr(host); host == "" || err == nil && addr.IsUnspecified() {
		host = "127.0.0.1"
		if addr.Is6() {
			host = "::1"
		}
		u.Host = net.JoinHostPort(host, u.Port())
	}
	return u.String(), nil
}

// sameServer reports whether the texts of two URLs name the same server.
func sameServer(a, b string) bool {
	norm := func(text string) string {
		u, err := url.Parse(text)
		if err != nil {
			return text
		}
		host, port := u.Hostname(), u.Port()
		if host == "localhost" || host == "::1" {
			host = "127.0.0.1"
		}
		return u.Scheme + "://" + net.JoinHostPort(strings.ToLower(host), port) + strings.TrimSuffix(u.Path, "/")
	}
	return norm(a) == norm(b)
}

// client returns a client for the server of the account. It fails if the key belongs to another organization than the
// one that the user asked for.
func (a *app) client(ctx context.Context) (*cay.Client, error) {
	acc, org, err := a.account()
	if err != nil {
		return nil, err
	}
	c, err := cay.New(acc.APIURL, acc.APIKey, cay.WithUserAgent("cay/"+a.version))
	if err != nil {
		return nil, fmt.Errorf("--api-url: %w", err)
	}
	if org == "" {
		return c, nil
	}
	me, err := c.Me(ctx)
	if err != nil {
		return nil, err
	}
	if org != me.Org.Name && org != me.Org.ID {
		return nil, fmt.Errorf("--org: the key belongs to the organization %s, not %s; put the key of %s into "+
			"~/.cay/config.toml under [orgs.%s]", me.Org.Name, org, org, org)
	}
	return c, nil
}
