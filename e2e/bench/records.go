package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of records, each for SQLite and for a PostgreSQL on the loopback that syncs each commit to
// the same disk.
const (
	recordsExecute = "execute args [true], records in %s"
	recordsWarm    = "create from the pool, records in %s"
	recordsClaims  = "claims of %d clients, records in %s"
)

const (
	inSQLite   = "SQLite"
	inPostgres = "PostgreSQL"
)

// claimClients are the numbers of clients that claim at once, and claimsOfEach those of their claims: some seconds each
// on a disk that syncs in 5 ms.
var claimClients = []int{8, 32}

const claimsOfEach = 50

// measureRecords measures what the place of the records changes: two servers with pools in turn, and the claims that
// each kind of database makes in a second.
func measureRecords(ctx context.Context, o options, s *server, _ *docker, r *results) (err error) {
	pg, err := caytest.NewPostgresOnLoopback()
	if err != nil {
		progress("leaving out records in PostgreSQL: " + err.Error())
		return nil
	}
	defer func() { err = errors.Join(err, pg.Remove()) }()
	url, err := pg.Create("server", "")
	if err != nil {
		return err
	}
	var ids, kinds []string
	var servers []*server
	for _, c := range []struct{ kind, url string }{{inSQLite, ""}, {inPostgres, url}} {
		one, err := startServer(ctx, s.program, s.outside, "CAY_POOL_ENABLED=true", "CAY_STORE_URL="+c.url)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, one.close()) }()
		if err := one.awaitTemplate(ctx, template); err != nil {
			return err
		}
		id, err := one.create(ctx)
		if err != nil {
			return err
		}
		servers, ids, kinds = append(servers, one), append(ids, id), append(kinds, c.kind)
	}
	if err := measureRecordsExecute(ctx, o.starts, servers, ids, kinds, r); err != nil {
		return err
	}
	for range o.starts {
		for n, one := range servers {
			var warm results
			if err := one.warmOnce(ctx, true, &warm); err != nil {
				return err
			}
			r.add(fmt.Sprintf(recordsWarm, kinds[n]), unitMS, warm.find(warmCreate).Samples[0])
		}
	}
	return measureClaims(ctx, s.dir, pg, r)
}

// measureRecordsExecute runs commands on the servers in turn, before any of them has a pool to keep: making a pooled
// sandbox takes the processors from the commands.
func measureRecordsExecute(ctx context.Context, rounds int, servers []*server, ids, kinds []string, r *results) error {
	for i := range (rounds + 1) * 2 * row {
		for n, one := range servers {
			began := time.Now()
			if _, err := one.execute(ctx, ids[n], cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
				return err
			}
			if i >= 2*row { // the first ones warm up
				r.took(fmt.Sprintf(recordsExecute, kinds[n]), began)
			}
		}
	}
	return nil
}

// measureClaims makes as many claims as fast as each database takes them, without sandboxes.
func measureClaims(ctx context.Context, dir string, pg *caytest.Postgres, r *results) error {
	for _, clients := range claimClients {
		lite, err := store.Open(ctx, filepath.Join(dir, fmt.Sprintf("claims%d.db", clients)))
		if err != nil {
			return err
		}
		if err := errors.Join(claims(ctx, lite, inSQLite, clients, r), lite.Close()); err != nil {
			return err
		}
		url, err := pg.Create(fmt.Sprintf("claims%d", clients), "")
		if err != nil {
			return err
		}
		remote, err := store.OpenPostgres(ctx, store.PostgresConfig{URL: url, MaxConns: 16})
		if err != nil {
			return err
		}
		if err := errors.Join(claims(ctx, remote, inPostgres, clients, r), remote.Close()); err != nil {
			return err
		}
	}
	return nil
}

// claims claims pooled sandboxes from clients at once, each for an organization of its own.
func claims(ctx context.Context, db *store.DB, kind string, clients int, r *results) error {
	if _, err := db.StartSession(ctx, "bench", false); err != nil {
		return err
	}
	ids := make([][]sandbox.ID, clients)
	for c := range clients {
		for range claimsOfEach {
			id := sandbox.NewID()
			if err := db.AddPooled(ctx, sandbox.Pooled{ID: id, Run: "run", CreatedAt: time.Now()}); err != nil {
				return err
			}
			ids[c] = append(ids[c], id)
		}
	}
	errs := make([]error, clients)
	began := time.Now()
	var all sync.WaitGroup
	for c := range clients {
		all.Go(func() {
			for _, id := range ids[c] {
				s := sandbox.Sandbox{ID: id, OrgID: fmt.Sprint("org_", c), Mode: sandbox.Ephemeral, State: sandbox.Running,
					Run: "run", CreatedAt: time.Now(), StartedAt: time.Now()}
				if _, _, err := db.Claim(ctx, s, sandbox.Quota{Sandboxes: 1000}, sandbox.Once{}); err != nil {
					errs[c] = err
					return
				}
			}
		})
	}
	all.Wait()
	took := time.Since(began)
	r.add(fmt.Sprintf(recordsClaims, clients, kind), unitRate, float64(clients*claimsOfEach)/took.Seconds())
	return errors.Join(errs...)
}
