package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/store"
)

// testLog returns a logger that writes to the test's output.
func testLog(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

func addresses(texts ...string) (out []netip.Addr) {
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

// TestDatabaseHosts compares the hosts of URLs with those that the store's library finds in them.
func TestDatabaseHosts(t *testing.T) {
	for text, want := range map[string]string{
		"":                                   "[]",
		"postgres:///cay?host=/run":          "[]",
		"postgres://%2Frun%2Fpostgresql/cay": "[]",
		"postgres://cay@127.0.0.1/cay?sslmode=disable":                         "[]",
		"postgres://cay@localhost/cay?sslmode=disable":                         "[]",
		"postgres://cay@192.0.2.7:5433/cay?sslmode=prefer":                     "[192.0.2.7/32]",
		"postgres://cay:a%40b%2Cc@192.0.2.7/cay?sslmode=prefer":                "[192.0.2.7/32]",
		"postgresql://192.0.2.7/cay?sslmode=require":                           "[192.0.2.7/32]",
		"postgres://cay@[::ffff:192.0.2.7]:5432/cay?sslmode=require":           "[192.0.2.7/32]",
		"postgres://cay@192.0.2.8,192.0.2.7,[2001:db8::1]/cay?sslmode=require": "[192.0.2.7/32 192.0.2.8/32]",
		"postgres://cay@192.0.2.8,192.0.2.7:5433/cay?sslmode=require":          "[192.0.2.7/32 192.0.2.8/32]",
		"postgres://cay@[2001:db8::1]:5432,192.0.2.7:5433/cay?sslmode=require": "[192.0.2.7/32]",
		"postgres://cay@192.0.2.1/cay?sslmode=require&host=192.0.2.7":          "[192.0.2.7/32]",
		"postgres://cay@/cay?sslmode=require&host=192.0.2.7,192.0.2.8&port=1":  "[192.0.2.7/32 192.0.2.8/32]",
	} {
		d, err := newDenied(config.Config{Store: config.Store{URL: config.Secret(text)}}, testLog(t))
		if err != nil {
			t.Fatal(err)
		}
		// The settings have no other URLs.
		if text == "" || store.CheckPostgresURL(text) == nil {
			if got := sorted(d.list()); got != want || len(d.names) > 0 {
				t.Errorf("%q: denied are %s and %d names, want %s", text, got, len(d.names), want)
			}
		}
		list, err := d.open(t.Context(), text)
		if got := sorted(list); err != nil || got != want {
			t.Errorf("%q: opened with %s, %v, want %s", text, got, err, want)
		}
		all, err := store.PostgresAddresses(t.Context(), text)
		if err != nil || len(all) != len(list) {
			t.Errorf("%q: the server connects to %v, %v", text, all, err)
		}
	}
	for text, want := range map[string]string{
		"postgres://db1,db2,db1:5433/cay?sslmode=require":    "[db1 db2]",
		"postgres://cay@DB.example.com./cay?sslmode=require": "[DB.example.com.]",
		"postgres://LOCALHOST./cay":                          "[]",
	} {
		d, err := newDenied(config.Config{Store: config.Store{URL: config.Secret(text)}}, testLog(t))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(hostsOf(d)); got != want {
			t.Errorf("%q: the names are %s, want %s", text, got, want)
		}
	}
}

func sorted(list []netip.Prefix) string {
	return fmt.Sprint(slices.SortedFunc(slices.Values(list), netip.Prefix.Compare))
}

func hostsOf(d *denied) (out []string) {
	for _, n := range d.names {
		out = append(out, n.host)
	}
	return out
}

// TestDatabaseOfTheEnvironment denies the address of a database that the URL does not name.
func TestDatabaseOfTheEnvironment(t *testing.T) {
	t.Setenv("PGHOST", "192.0.2.7")
	const text = "postgres:///cay?sslmode=require"
	d, err := newDenied(config.Config{Store: config.Store{URL: text}}, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if list, err := d.open(t.Context(), text); err != nil || fmt.Sprint(list) != "[192.0.2.7/32]" {
		t.Errorf("denied are %v, %v", list, err)
	}
}

// TestBucketHost checks to which S3 servers sandboxes are kept from connecting.
func TestBucketHost(t *testing.T) {
	for text, want := range map[string]string{
		"":                   "[] []",
		"file:///srv/bucket": "[] []",
		"s3://bucket":        "[] []", // Amazon's, which have everybody's buckets
		"s3://bucket?endpoint=s3.eu-central-1.amazonaws.com":                     "[] []",
		"s3://bucket?endpoint=https://vpce-0123-abc.s3.vpce.AmazonAWS.com.:443/": "[] []",
		"s3://bucket?endpoint=s3.cn-north-1.amazonaws.com.cn":                    "[] []",
		"s3://bucket?endpoint=notamazonaws.com":                                  "[bucket.notamazonaws.com] []",
		"s3://bucket?endpoint=http://minio.example:9000&path_style=true":         "[minio.example] []",
		"s3://bucket?endpoint=http://minio.example:9000":                         "[bucket.minio.example] []",
		"s3://bucket?endpoint=http://10.1.2.3:9000":                              "[] [10.1.2.3/32]",
		"s3://bucket?endpoint=http://100.64.2.3:9000&path_style=true":            "[] [100.64.2.3/32]",
		"s3://bucket?endpoint=http://172.31.0.1&path_style=true":                 "[] [172.31.0.1/32]",
		"s3://bucket?endpoint=http://192.168.0.1&path_style=true":                "[] [192.168.0.1/32]",
		"s3://bucket?endpoint=http://[fd00::1]:9000&path_style=true":             "[] []",
		"s3://bucket?endpoint=http://127.0.0.1:9000&path_style=true":             "[] []",
		"s3://bucket?endpoint=http://localhost:9000&path_style=true":             "[] []",
		"s3://bucket?endpoint=https://8.8.8.8&path_style=true":                   "[] []", // public
	} {
		d, err := newDenied(config.Config{Files: config.Files{URL: text}}, testLog(t))
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got := fmt.Sprint(hostsOf(d), d.list()); got != want {
			t.Errorf("%q: names and addresses are %s, want %s", text, got, want)
		}
	}
	for _, bad := range []config.Config{{Files: config.Files{URL: "s3://"}},
		{Network: config.Network{AlwaysDeny: []string{"10.0.0.1/8"}}}} {
		if _, err := newDenied(bad, testLog(t)); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
}

// names answers lookups. It is used by one goroutine at a time, as the tests wait for the lookups.
type names map[string][]netip.Addr

func (n names) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	if found := n[host]; found != nil {
		return found, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// TestDeniedFollowsNames moves a database and a bucket, lets lookups and changes of the rules fail, and waits.
func TestDeniedFollowsNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		d, err := newDenied(config.Config{
			Network: config.Network{AlwaysDeny: []string{"198.18.0.0/15", "fd00::/8"}},
			Store:   config.Store{URL: "postgres://cay@192.0.2.99,db1.example,db2.example:5433/cay?sslmode=require"},
			Files:   config.Files{URL: "s3://bucket?endpoint=http://minio.example:9000&path_style=true"},
		}, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		at := names{
			"db1.example":   addresses("192.0.2.1", "::ffff:192.0.2.2", "2001:db8::1", "127.0.0.1"),
			"db2.example":   addresses("192.0.2.2", "8.8.8.8"),
			"minio.example": addresses("10.0.0.1", "9.9.9.9", "fd00::7"),
		}
		d.lookup = at.lookup
		first, err := d.open(t.Context(), "") // the store's own lookup needs a real resolver
		const fixed = "[198.18.0.0/15 fd00::/8 192.0.2.99/32 "
		if want := fixed + "8.8.8.8/32 10.0.0.1/32 192.0.2.1/32 192.0.2.2/32]"; err != nil || fmt.Sprint(first) != want {
			t.Fatalf("at first %v, %v, want %s", first, err, want)
		}
		var applied []string
		var fail error
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			d.follow(ctx, func(_ context.Context, all []netip.Prefix) error {
				applied = append(applied, strings.TrimPrefix(fmt.Sprint(all), fixed))
				return fail
			})
		}()
		synctest.Wait()
		after := func(wait time.Duration, want ...string) {
			t.Helper()
			time.Sleep(wait)
			synctest.Wait()
			if !slices.Equal(applied, want) {
				t.Errorf("after %v more the lists are %q, want %q", wait, applied, want)
			}
			applied = nil
		}
		after(5 * denyEvery) // nothing changes

		at["db1.example"] = addresses("192.0.2.3")
		delete(at, "db2.example") // a standby whose name is gone keeps the other from nothing
		at["minio.example"] = addresses("10.0.0.2", "9.9.9.8")
		const all = "8.8.8.8/32 10.0.0.1/32 10.0.0.2/32 192.0.2.1/32 192.0.2.2/32 192.0.2.3/32]"
		after(denyEvery, all)
		after(denyKept - denyEvery)
		after(denyEvery, "8.8.8.8/32 10.0.0.2/32 192.0.2.2/32 192.0.2.3/32]")
		after(2 * denyKept) // what the name had before its lookups failed stays
		if got := strings.Count(log.String(), "level=WARN"); got != 1 || !strings.Contains(log.String(), "db2.example") {
			t.Errorf("%d warnings, want one, of the name that failed:\n%s", got, log.String())
		}

		// An address that comes back in time stays, and counts from the beginning.
		at["db2.example"] = addresses("192.0.2.2", "8.8.8.8")
		at["db1.example"] = addresses("192.0.2.4")
		const moved = "8.8.8.8/32 10.0.0.2/32 192.0.2.2/32 192.0.2.3/32 192.0.2.4/32]"
		after(denyEvery, moved)
		at["db1.example"] = addresses("192.0.2.3")
		after(denyKept - denyEvery)
		at["db1.example"] = addresses("192.0.2.4")
		after(denyKept)
		after(denyEvery, "8.8.8.8/32 10.0.0.2/32 192.0.2.2/32 192.0.2.4/32]")

		// A change that fails is tried again, although nothing changes meanwhile.
		fail = errors.New("the rules cannot be changed")
		at["db1.example"] = addresses("192.0.2.5", "192.0.2.4")
		const more = "8.8.8.8/32 10.0.0.2/32 192.0.2.2/32 192.0.2.4/32 192.0.2.5/32]"
		after(2*denyEvery, more, more)
		fail = nil
		after(2*denyEvery, more)
		stop()
		<-ended
	})
}

// TestDeniedIsBounded gives a name more addresses than are kept, at once and one after the other.
func TestDeniedIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		d, err := newDenied(config.Config{Store: config.Store{URL: "postgres://cay@db.example/cay?sslmode=require"}},
			slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		var many []netip.Addr
		for i := range 2 * maxAddresses {
			many = append(many, netip.AddrFrom4([4]byte{20, 0, byte(i >> 8), byte(i)}))
		}
		at := names{"db.example": many}
		d.lookup = at.lookup
		for range 3 {
			d.lookUp(t.Context())
		}
		if got := len(d.list()); got != maxAddresses {
			t.Errorf("%d addresses of one answer are denied, want %d", got, maxAddresses)
		}
		if got := strings.Count(log.String(), "level=WARN"); got != 1 {
			t.Errorf("%d warnings, want one", got)
		}
		for i := range 3 * maxAddresses {
			at["db.example"] = []netip.Addr{netip.AddrFrom4([4]byte{30, 0, byte(i >> 8), byte(i)})}
			d.lookUp(t.Context())
			time.Sleep(time.Millisecond)
		}
		list := d.list()
		if len(list) != maxAddresses {
			t.Errorf("%d addresses are denied, want %d", len(list), maxAddresses)
		}
		if want := (netip.AddrFrom4([4]byte{30, 0, 8, 0})); list[0].Addr() != want {
			t.Errorf("the first address is %s, want %s: the name has lost the others before", list[0], want)
		}
	})
}

// TestServersAreDenied checks that no sandbox reaches another server of the fleet, and that its own is no matter of it.
func TestServersAreDenied(t *testing.T) {
	d, err := newDenied(config.Config{}, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	d.lookup = names{"b.example": addresses("192.0.2.2", "127.0.0.1", "fd00::7")}.lookup
	at := func(id, address string) fleet.Node { return fleet.Node{ID: id, About: fleet.About{Address: address}} }
	nodes := []fleet.Node{at("self", "192.0.2.9:1"), at("a", "192.0.2.1:7000"), at("b", "b.example:7000"), at("c", "")}
	d.addServers("self", func(context.Context) ([]fleet.Node, error) { return nodes, nil })
	first, err := d.open(t.Context(), "")
	if err != nil || fmt.Sprint(first) != "[192.0.2.1/32 192.0.2.2/32]" {
		t.Errorf("denied are %v, %v", first, err)
	}
	nodes = append(nodes, at("d", "8.8.8.8:7000"))
	var then []netip.Prefix
	d.update(t.Context(), func(_ context.Context, all []netip.Prefix) error { then = all; return nil })
	if fmt.Sprint(then) != "[8.8.8.8/32 192.0.2.1/32 192.0.2.2/32]" {
		t.Errorf("with another server %v are denied", then)
	}
	// A name that cannot be looked up takes nothing from the others.
	nodes = []fleet.Node{at("b", "unknown.example:7000"), at("e", "192.0.2.5:7000")}
	d.update(t.Context(), func(_ context.Context, all []netip.Prefix) error { then = all; return nil })
	if fmt.Sprint(then) != "[8.8.8.8/32 192.0.2.1/32 192.0.2.2/32 192.0.2.5/32]" {
		t.Errorf("with a server without an address %v are denied", then)
	}
}

// TestNothingToFollow checks that a server without names to follow has nothing that runs.
func TestNothingToFollow(t *testing.T) {
	for _, cfg := range []config.Config{{}, {Network: config.Network{AlwaysDeny: []string{"10.0.0.0/8"}},
		Store: config.Store{URL: "postgres://cay@192.0.2.7/cay?sslmode=require"},
		Files: config.Files{URL: "s3://bucket"}}} {
		d, err := newDenied(cfg, testLog(t))
		if err != nil {
			t.Fatal(err)
		}
		s := &server{denied: d}
		s.followDenied()
		if len(s.closers) != 0 {
			t.Errorf("%+v: something runs", cfg)
		}
	}
}
