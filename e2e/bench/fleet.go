package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of fleets, each asked of the sandbox's own server and of another one.
const (
	fleetExecute  = "execute args [true], asked of %s"
	fleetCreate   = "create, asked of %s"
	fleetUpload   = "upload of 100 MB, asked of %s"
	fleetDownload = "download of 100 MB, asked of %s"
)

const (
	ownServer     = "its own server"
	anotherServer = "another server"
)

// measureFleet measures what it costs to ask another server of a fleet than the one that has the sandbox. Both are on
// this machine, so that they share its processors.
func measureFleet(ctx context.Context, o options, s *server, _ *docker, r *results) (err error) {
	pg, err := caytest.NewPostgresOnLoopback()
	if err != nil {
		progress("leaving out fleets: " + err.Error())
		return nil
	}
	defer func() { err = errors.Join(err, pg.Remove()) }()
	servers := map[string]*server{}
	for _, name := range []string{anotherServer, ownServer} { // the first one has the first key, and builds
		one, err := startMember(ctx, s, pg, len(servers))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, one.close()) }()
		servers[name] = one
		if one.api, err = cay.New(one.url, servers[anotherServer].key); err != nil {
			return err
		}
		if err := one.awaitTemplate(ctx, template); err != nil {
			return err
		}
	}
	own := servers[ownServer]
	if _, err := own.api.CordonNode(ctx, "host-0"); err != nil {
		return err
	}
	id, err := own.create(ctx)
	if err != nil {
		return err
	}
	if err := servers[anotherServer].poll(ctx, patience, func() (bool, error) {
		_, err := servers[anotherServer].api.Execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}})
		return err == nil, nil // the servers find each other within seconds
	}); err != nil {
		return err
	}
	if err := fleetCalls(ctx, o, servers, id, r); err != nil {
		return err
	}
	return fleetFiles(ctx, o, servers, id, r)
}

// startMember starts a server of a fleet, whose node is called host-N.
func startMember(ctx context.Context, s *server, pg *caytest.Postgres, n int) (*server, error) {
	secret, bucket := filepath.Join(s.dir, "fleet-secret"), filepath.Join(s.dir, "fleet-bucket")
	url := pg.URL("fleet")
	if n == 0 {
		if err := os.WriteFile(secret, bytes.Repeat([]byte("0123456789abcdef"), 4), 0o600); err != nil {
			return nil, err
		}
		if err := os.Mkdir(bucket, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if _, err := pg.Create("fleet", ""); err != nil {
			return nil, err
		}
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	return startServer(ctx, s.program, s.outside, fmt.Sprint("CAY_NODE_NAME=host-", n), "CAY_STORE_URL="+url,
		"CAY_FILES_URL=file://"+bucket, "CAY_FLEET_LISTEN="+address, "CAY_FLEET_SECRET_FILE="+secret)
}

// fleetCalls runs commands and makes sandboxes, asked of each server in turn.
func fleetCalls(ctx context.Context, o options, servers map[string]*server, id string, r *results) error {
	for i := range (o.starts + 1) * 2 * row {
		for name, one := range servers {
			began := time.Now()
			if _, err := one.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
				return err
			}
			if i >= 2*row { // the first ones warm up
				r.took(fmt.Sprintf(fleetExecute, name), began)
			}
		}
	}
	for range o.starts {
		for name, one := range servers {
			began := time.Now()
			made, err := one.create(ctx)
			if err != nil {
				return err
			}
			r.took(fmt.Sprintf(fleetCreate, name), began)
			if err := one.api.DestroySandbox(ctx, made); err != nil {
				return err
			}
		}
	}
	return nil
}

// fleetFiles moves a file in and out of a sandbox, asked of each server in turn.
func fleetFiles(ctx context.Context, o options, servers map[string]*server, id string, r *results) error {
	data := make([]byte, cay.MaxFile)
	if _, err := rand.Read(data); err != nil {
		return err
	}
	for range o.transfers() {
		for name, one := range servers {
			upload, download := fmt.Sprintf(fleetUpload, name), fmt.Sprintf(fleetDownload, name)
			if err := one.transfer(ctx, id, data, upload, download, r); err != nil {
				return err
			}
		}
	}
	return nil
}
