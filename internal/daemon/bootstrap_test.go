package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/store"
)

// TestFirstKeyOfTwoServers starts two servers at once with empty records, again and again. One makes the first key and
// writes it to its file, and the other one starts without a file.
func TestFirstKeyOfTwoServers(t *testing.T) {
	pg := caytest.StartPostgres(t)
	url, err := pg.Create("records", "")
	if err != nil {
		t.Fatal(err)
	}
	var servers [2]*auth.Service
	for i := range servers {
		db, err := store.OpenPostgres(t.Context(), store.PostgresConfig{URL: url, MaxConns: 4})
		if err != nil {
			t.Fatal(err)
		}
		servers[i] = auth.New(db, auth.Config{Log: slog.New(slog.DiscardHandler), Alone: db.Alone})
		t.Cleanup(func() {
			if err := errors.Join(servers[i].Close(context.Background()), db.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	for round := range 30 {
		if err := pg.Exec("records", "TRUNCATE orgs, api_keys CASCADE"); err != nil {
			t.Fatal(err)
		}
		var made [len(servers)]bool
		var files [len(servers)]string
		var starts sync.WaitGroup
		begin := make(chan struct{})
		for i, s := range servers {
			dir := t.TempDir()
			files[i] = filepath.Join(dir, keyFile)
			starts.Go(func() {
				<-begin
				var err error
				if made[i], err = s.Bootstrap(t.Context(), saveKey(dir)); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		close(begin)
		starts.Wait()
		if made[0] == made[1] {
			t.Fatalf("round %d: the first key was made by %v", round, made)
		}
		for i := range servers {
			secret, err := os.ReadFile(files[i])
			if !made[i] {
				if err == nil {
					t.Errorf("round %d: the server that made no key has a file of one", round)
				}
				continue
			}
			for j, s := range servers {
				if _, err := s.Authenticate(t.Context(), strings.TrimSpace(string(secret))); err != nil {
					t.Errorf("round %d: server %d refuses the key: %v", round, j, err)
				}
			}
		}
	}
}
