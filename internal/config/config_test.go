package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/sandbox"
)

func configFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cay.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfigPrecedence(t *testing.T) {
	file := configFile(t, "listen = \"127.0.0.1:1\"\nshutdown_timeout = \"7s\"\n"+
		"[network]\nready = 3\nalways_deny = [\"10.0.0.0/8\"]\n")
	c, err := Read(file, []string{"CAY_NETWORK_READY=5", "CAY_NETWORK_NAMESERVERS=192.0.2.1,192.0.2.2",
		"CAY_IMAGES_REGISTRY=false", "HOME=/x"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	if c.Listen != "127.0.0.1:1" || time.Duration(c.ShutdownTimeout) != 7*time.Second ||
		c.Network.Ready != 5 || c.Images.Registry {
		t.Errorf("got %+v", c)
	}
	if diff := cmp.Diff([]string{"192.0.2.1", "192.0.2.2"}, c.Network.Nameservers); diff != "" {
		t.Error(diff)
	}
	if c.Sandbox.DefaultSize != "shared-cpu-1x" || len(c.Sandbox.Sizes) != 8 {
		t.Errorf("the defaults are gone: %+v", c.Sandbox)
	}
}

func TestConfigSizesReplaceTheDefaults(t *testing.T) {
	file := configFile(t, `
[sandbox]
default_size = "tiny"
[[sandbox.sizes]]
name = "tiny"
vcpus = 1
memory_mb = 256
[[sandbox.sizes]]
name = "own"
vcpus = 2
memory_mb = 4096
dedicated = true
`)
	c, err := Read(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []sandbox.Size{
		{Name: "tiny", VCPUs: 1, MemoryMB: 256},
		{Name: "own", VCPUs: 2, MemoryMB: 4096, Dedicated: true},
	}
	if diff := cmp.Diff(want, c.Sandbox.Sizes); diff != "" {
		t.Error(diff)
	}
	if err := c.Check(); err != nil {
		t.Error(err)
	}
}

func TestConfigRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		file, env string
		want      string
	}{
		"unknown key":       {file: "lisen = \"x\"", want: "lisen"},
		"unknown table key": {file: "[network]\nrnage = \"x\"", want: "network.rnage"},
		"bad number":        {env: "CAY_NETWORK_READY=many", want: "CAY_NETWORK_READY"},
		"bad duration":      {env: "CAY_SHUTDOWN_TIMEOUT=soon", want: "CAY_SHUTDOWN_TIMEOUT"},
		"host bits":         {env: "CAY_NETWORK_RANGE=10.0.0.1/8", want: "network.range"},
		"webhook ranges":    {env: "CAY_WEBHOOKS_ALLOW_CIDRS=10.0.0.1/8", want: "webhooks.allow_cidrs"},
		"webhooks at once":  {env: "CAY_WEBHOOKS_CONCURRENCY=3", want: "webhooks.concurrency"},
		"always deny":       {env: "CAY_NETWORK_ALWAYS_DENY=10.0.0.0/8,x", want: "network.always_deny"},
		"default size":      {env: "CAY_SANDBOX_DEFAULT_SIZE=huge", want: "sandbox.default_size"},
		"platform":          {env: "CAY_SANDBOX_PLATFORM=xen", want: "sandbox.platform"},
		"root's ids":        {env: "CAY_SANDBOX_FIRST_UID=0", want: "sandbox.first_uid"},
		"negative ids":      {env: "CAY_SANDBOX_FIRST_UID=2147483647", want: "sandbox.first_uid"},
		"disk":              {env: "CAY_SANDBOX_DEFAULT_DISK_MB=1", want: "sandbox.default_disk_mb"},
		"no builds":         {env: "CAY_BUILD_CONCURRENT=0", want: "build.concurrent"},
		"no context":        {file: "[build]\ncontext_limit_mb = 0", want: "build.context_limit_mb"},
		"no time":           {env: "CAY_BUILD_TIMEOUT=0", want: "build.timeout"},
		"fewer templates":   {env: "CAY_TEMPLATES_MAX_PER_ORG=-1", want: "templates.max_per_org"},
		"same size twice":   {file: "[[sandbox.sizes]]\nname = \"a\"\nvcpus = 1\nmemory_mb = 256\n[[sandbox.sizes]]\nname = \"a\"\nvcpus = 1\nmemory_mb = 256\n", want: "sandbox.sizes"},
		"no bucket":         {env: "CAY_FILES_URL=http://x", want: "files.url"},
		"no credentials":    {env: "CAY_FILES_URL=s3://cay", want: "files.access_key"},
		"local images":      {env: "CAY_FILES_IMAGES_MB=-1", want: "files.images_mb"},
		"two credentials": {file: "[files]\nurl = \"s3://cay\"\naccess_key = \"a\"\ncredentials_file = \"/c\"\n",
			want: "files.credentials_file"},
		"two passwords":   {file: "[store]\nurl = \"postgres:///cay\"\npassword = \"a\"\npassword_file = \"b\"\n", want: "store.password_file"},
		"fleet's address": {env: "CAY_FLEET_LISTEN=here", want: "fleet.listen"},
		"fleet's secret":  {env: "CAY_FLEET_LISTEN=127.0.0.1:1", want: "fleet.secret_file"},
		"fleet without an address": {file: "[store]\nurl = \"postgres:///cay\"\n[fleet]\nlisten = \"0.0.0.0:1\"\n",
			want: "fleet.advertise"},
		"fleet's port":    {file: "[fleet]\nlisten = \"127.0.0.1:1\"\nadvertise = \"10.0.0.1\"\n", want: "fleet.advertise"},
		"no fleet":        {env: "CAY_FLEET_ADVERTISE=10.0.0.1:1", want: "fleet.listen"},
		"name of a node":  {env: "CAY_NODE_NAME=Host_1", want: "node.name"},
		"label of a node": {env: "CAY_NODE_LABELS=zone=a,zone=b", want: "node.labels"},
		"no database":     {env: "CAY_STORE_PASSWORD=a", want: "store.url"},
		"few connections": {env: "CAY_STORE_MAX_CONNS=3", want: "store.max_conns"},
		"pool target":     {env: "CAY_POOL_TARGET=-1", want: "pool.target"},
		"pool bound":      {env: "CAY_POOL_MAX_MEMBERS=-1", want: "pool.max_members"},
		"pool template":   {file: "[[pool.templates]]\ntarget = 1\n", want: "pool.templates[0].template"},
		"pool size":       {file: "[[pool.templates]]\ntemplate = \"python\"\nsize = \"huge\"\n", want: "pool.templates[0].size"},
		"pool own target": {file: "[[pool.templates]]\ntemplate = \"a\"\n[[pool.templates]]\ntemplate = \"b\"\ntarget = -1\n", want: "pool.templates[1].target"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Read(configFile(t, tt.file), []string{tt.env})
			if err == nil {
				err = c.Check()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to name %s", err, tt.want)
			}
		})
	}
}
