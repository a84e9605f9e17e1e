package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// listed reads a page of a list and returns the ids in it and the next cursor, from the place where
// the API has it.
func (s *server) listed(path, plural, id string, withKey func(*http.Request)) (status int, ids []string, next string) {
	s.t.Helper()
	resp, body := s.page("GET", path, nil, withKey)
	var rows []object
	if plural == "" {
		_ = json.Unmarshal(body, &rows) // no rows if it fails
		next = resp.Header.Get("X-Next-Token")
	} else {
		var all map[string]json.RawMessage
		_ = json.Unmarshal(body, &all)
		_ = json.Unmarshal(all[plural], &rows)
		next = text(body, "next_cursor")
	}
	for _, row := range rows {
		ids = append(ids, fmt.Sprint(row[id]))
	}
	return resp.StatusCode, ids, next
}

// TestCursorsOfOthers uses an organization's cursors with another's key, cursors of one list with
// the other lists, and forged cursors with all. No organization sees a row of another.
func TestCursorsOfOthers(t *testing.T) {
	s := attacked(t)
	mine, other := s.tenant("cursors-a", nil), s.tenant("cursors-b", nil)
	owned := map[*server]map[string]bool{mine: {}, other: {}}
	for _, tenant := range []*server{mine, other} {
		first, second := tenant.create(nil), tenant.create(nil)
		defer tenant.destroy(first)
		defer tenant.destroy(second)
		own := owned[tenant]
		own[first], own[second] = true, true
		own[strings.TrimPrefix(first, "sbx_")], own[strings.TrimPrefix(second, "sbx_")] = true, true
		for i := range 2 {
			own[tenant.snapshot(first, object{"name": fmt.Sprintf("s%d", i)})] = true
			status, body := tenant.call("POST", "/v1/api-keys", object{"name": fmt.Sprintf("k%d", i),
				"scopes": []string{"sandboxes:read"}})
			if status != 201 {
				t.Fatalf("key: %d %s", status, body)
			}
			own[text(body, "id")] = true
		}
		_, body := tenant.call("GET", "/v1/api-keys", nil)
		var keys struct {
			Keys []struct{ ID string } `json:"api_keys"`
		}
		if err := json.Unmarshal(body, &keys); err != nil {
			t.Fatal(err)
		}
		for _, k := range keys.Keys {
			own[k.ID] = true
		}
		own["event of "+first] = true
	}
	var first string
	for id := range owned[mine] {
		if strings.HasPrefix(id, "sbx_") {
			first = id
		}
	}
	type list struct{ path, plural, id, cursor string }
	lists := []list{
		{"/v1/sandboxes?limit=1", "sandboxes", "id", "cursor"}, {"/v1/snapshots?limit=1", "snapshots", "id", "cursor"},
		{"/v1/api-keys?limit=1", "api_keys", "id", "cursor"}, {"/v1/templates?limit=1", "templates", "", "cursor"},
		{"/v1/sandboxes/" + first + "/events?limit=1", "events", "", "cursor"},
		{"/v2/sandboxes?limit=1", "", "sandboxID", "nextToken"}, {"/snapshots?limit=1", "", "snapshotID", "nextToken"},
	}
	as := func(tenant *server) func(*http.Request) {
		return func(r *http.Request) {
			r.Header.Set("Authorization", "Bearer "+tenant.key)
			r.Header.Set("X-API-Key", tenant.key)
		}
	}
	cursors := map[string]string{}
	for _, l := range lists {
		status, _, next := s.listed(l.path, l.plural, l.id, as(mine))
		if status != 200 || next == "" && l.plural != "templates" {
			t.Fatalf("%s: %d, next %q", l.path, status, next)
		}
		cursors[l.path] = next
	}
	for _, l := range lists {
		forged := map[string]string{"empty base64": "AA", "no base64": "%%%%", "huge": strings.Repeat("A", 20_000),
			"SQL": "' OR 1=1 --", "NUL": "\x00\x00"}
		for path, c := range cursors {
			forged["of "+path] = c
			if len(c) > 4 {
				forged["cut "+path], forged["longer "+path] = c[:len(c)-2], c+"AAAA"
				flipped := []byte(c)
				flipped[len(c)/2] ^= 1
				forged["flipped "+path] = string(flipped)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(forged)) {
			for _, tenant := range []*server{mine, other} {
				status, ids, _ := s.listed(l.path+"&"+l.cursor+"="+url.QueryEscape(forged[name]), l.plural, l.id, as(tenant))
				if strings.Contains(l.path, first) && tenant == other {
					if status != 403 {
						t.Errorf("%s of another with a cursor %s: %d", l.path, name, status)
					}
					continue
				}
				if status != 200 && status != 400 && status != 431 {
					t.Errorf("%s with a cursor %s: %d", l.path, name, status)
				}
				if l.id == "" {
					continue
				}
				for _, id := range ids {
					if !owned[tenant][id] {
						t.Errorf("%s with a cursor %s shows %s, which is another's", l.path, name, id)
					}
				}
			}
		}
	}
}

// TestReplays uses URLs, tokens and connections after the access that they gave has ended.
func TestReplays(t *testing.T) {
	s := attacked(t)
	id := s.persistent(nil)
	s.web(id)
	link, err := s.api().PortURL(t.Context(), id, webPort, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := url.Parse(link.URL)
	if err != nil {
		t.Fatal(err)
	}
	token := "?" + signed.RawQuery
	ask := func(id string, port int) int {
		resp, _ := s.page("GET", portPath(id, port)+"/x"+token, nil, withoutKey)
		return resp.StatusCode
	}
	if got := ask(id, webPort); got != 200 {
		t.Fatalf("the signed URL gives %d", got)
	}
	// A fork is another sandbox, and the signature is not valid for it.
	children := s.fork(id, object{"count": 1})
	child := children[0]
	snapshot := s.snapshot(id, nil)
	from := s.from(snapshot, nil)
	for what, id := range map[string]string{"a fork": child, "a sandbox from a snapshot": from} {
		if got := ask(id, webPort); got != 401 {
			t.Errorf("the signature opens %s: %d", what, got)
		}
		if got := s.want(id,
			"curl -sf http://169.254.169.254/v1/sandbox || curl -s http://169.254.169.254/"); strings.Contains(got, s.key) {
			t.Errorf("the metadata of %s is %s", what, got)
		}
		s.destroy(id)
	}
	// A woken sandbox is the same one, and the signature stays valid.
	s.suspend(id)
	if got := ask(id, webPort); got != 200 {
		t.Errorf("after a suspend the signed URL answers %d", got)
	}
	// A port that is private again refuses a caller with a connection from before.
	if _, err := s.api().SetPortPublic(t.Context(), id, webPort, true); err != nil {
		t.Fatal(err)
	}
	kept := &http.Client{Transport: &http.Transport{}}
	defer kept.CloseIdleConnections()
	anybody := func() int {
		resp, err := kept.Get(s.url + portPath(id, webPort) + "/x")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if got := anybody(); got != 200 {
		t.Errorf("the public port answers %d", got)
	}
	if _, err := s.api().SetPortPublic(t.Context(), id, webPort, false); err != nil {
		t.Fatal(err)
	}
	if got := anybody(); got != 401 {
		t.Errorf("the port that is private again answers %d over a kept connection", got)
	}
	if err := s.api().DeleteSnapshot(t.Context(), snapshot); err != nil {
		t.Error(err)
	}
	if _, err := s.api().CreateSandbox(t.Context(), cay.CreateSandboxRequest{Snapshot: snapshot},
		cay.CreateOptions{}); !isRefused(err, 404, "snapshot_not_found") {
		t.Errorf("from a snapshot that was deleted: %v", err)
	}
	s.destroy(id)
	for _, got := range []int{ask(id, webPort), anybody()} {
		if got == 200 || got >= 500 {
			t.Errorf("a destroyed sandbox answers %d", got)
		}
	}
	t.Run("E2B", func(t *testing.T) { s.in(t).replaysE2B() })
}

// replaysE2B does the same as TestReplays with the tokens and signatures of E2B's clients.
func (s *server) replaysE2B() {
	key := s.e2bKey()
	make := func() e2bSandbox {
		s.t.Helper()
		status, body := s.e2bCall(key, "POST", "/v2/sandboxes", `{"templateID":"python","timeout":600,"secure":true}`)
		if status != 201 || text(body, "envdAccessToken") == "" {
			s.t.Fatalf("create: %d %s", status, body)
		}
		return e2bSandbox{s, text(body, "sandboxID"), text(body, "envdAccessToken")}
	}
	envs := func(id, token string) int {
		resp, _ := s.page("GET", "/envs", nil, withoutKey, func(r *http.Request) {
			r.Header.Set("E2b-Sandbox-Id", id)
			r.Header.Set("E2b-Sandbox-Port", "49983")
			r.Header.Set("X-Access-Token", token)
		})
		return resp.StatusCode
	}
	one, two := make(), make()
	if got := envs(one.id, one.token); got != 200 {
		s.t.Fatalf("with its token the sandbox answers %d", got)
	}
	status, body := s.e2bCall(key, "POST", "/sandboxes/"+one.id+"/fork", `{"count":1,"timeout":600}`)
	var children []struct{ Sandbox struct{ SandboxID string } }
	if err := json.Unmarshal(body, &children); err != nil || status != 201 || len(children) != 1 {
		s.t.Fatalf("fork: %d %s", status, body)
	}
	child := children[0].Sandbox.SandboxID
	for what, got := range map[string]int{"another sandbox": envs(two.id, one.token), "a fork": envs(child, one.token),
		"no token": envs(one.id, "")} {
		if got != 401 {
			s.t.Errorf("the token at %s: %d", what, got)
		}
	}
	if status, body := s.e2bCall(key, "POST", "/sandboxes/"+one.id+"/pause", "{}"); status != 204 {
		s.t.Fatalf("pause: %d %s", status, body)
	}
	if got := envs(one.id, one.token); got != 502 {
		s.t.Errorf("the paused sandbox answers %d", got)
	}
	if status, body := s.e2bCall(key, "POST", "/sandboxes/"+one.id+"/connect", `{"timeout":600}`); status/100 != 2 {
		s.t.Fatalf("connect: %d %s", status, body)
	}
	if got := envs(one.id, one.token); got != 200 {
		s.t.Errorf("the woken sandbox answers %d to its token", got)
	}
	for _, id := range []string{one.id, two.id, child} {
		if status, body := s.e2bCall(key, "DELETE", "/sandboxes/"+id, ""); status != 204 {
			s.t.Errorf("kill: %d %s", status, body)
		}
	}
	if got := envs(one.id, one.token); got != 502 {
		s.t.Errorf("the killed sandbox answers %d", got)
	}
	if resp, b := s.page("GET", "/files?path=/etc/passwd&username=root&signature=v1_"+strings.Repeat("A", 43), nil,
		withoutKey); resp.StatusCode != 401 {
		s.t.Errorf("a forged signature: %s %s", resp.Status, b)
	}
	// A key with only the scope to read does not learn the tokens that open a sandbox.
	_, body = s.call("POST", "/v1/api-keys", object{"name": "reader", "scopes": []string{"sandboxes:read"},
		"format": "e2b"})
	reader, sandbox := text(body, "api_key"), make()
	for _, path := range []string{"/sandboxes/" + sandbox.id, "/v2/sandboxes", "/sandboxes"} {
		if status, body := s.e2bCall(reader, "GET", path, ""); status != 200 || bytes.Contains(body, []byte(sandbox.token)) {
			s.t.Errorf("a key that only reads is answered %s with %d %s", path, status, body)
		}
	}
	for method, path := range map[string]string{"POST": "/sandboxes/" + sandbox.id + "/connect",
		"DELETE": "/sandboxes/" + sandbox.id} {
		if status, body := s.e2bCall(reader, method, path, `{"timeout":60}`); status != 403 {
			s.t.Errorf("a key that only reads: %s %s: %d %s", method, path, status, body)
		}
	}
	s.e2bCall(key, "DELETE", "/sandboxes/"+sandbox.id, "")
}

// TestQuotaRaces makes many more requests at once than the quota allows, on every way that creates
// something. Exactly as many succeed as the quota allows.
func TestQuotaRaces(t *testing.T) {
	s := attacked(t)
	h := s.tenant("racers", object{"sandboxes": 4, "vcpus": 4, "memory_mb": 4 * 512})
	id := h.persistent(nil)
	h.suspend(id) // it gives its vCPU and memory back, but keeps its place
	count := func(path, plural string) int {
		t.Helper()
		_, body := h.call("GET", path, nil)
		var all map[string]json.RawMessage
		var rows []object
		if json.Unmarshal(body, &all) != nil || json.Unmarshal(all[plural], &rows) != nil {
			t.Fatalf("%s: %s", path, body)
		}
		return len(rows)
	}
	made := map[int]int{}
	var mu sync.Mutex
	race := func(n int, f func(i int) int) {
		at(n, func(i int) {
			status := f(i)
			mu.Lock()
			defer mu.Unlock()
			made[status/100*100]++
		})
	}
	race(16, func(i int) int {
		var status int
		switch i % 4 {
		case 0:
			// This one comes from the pool.
			status, _, _ = h.try(t.Context(), "POST", "/v1/sandboxes", object{"template": "python", "timeout": "10m"})
		case 1:
			status, _, _ = h.try(t.Context(), "POST", "/v1/sandboxes", object{"template": "python", "timeout": "10m",
				"disk_size_mb": 300})
		case 2:
			r, _ := http.NewRequest("POST", h.url+"/v2/sandboxes", strings.NewReader(`{"templateID":"python","timeout":600}`))
			r.Header.Set("X-API-Key", h.key)
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				return 0
			}
			resp.Body.Close()
			status = resp.StatusCode
		case 3:
			status, _, _ = h.try(t.Context(), "POST", "/v1/sandboxes/"+id+"/wake", nil)
		}
		return status
	})
	if n := count("/v1/sandboxes?limit=200", "sandboxes"); n != 4 || made[0]+made[500] > 0 {
		t.Errorf("there are %d sandboxes, want 4; answers by status: %v", n, made)
	}
	// Forks that ask for more than the one place that is left.
	sandboxes := h.sandboxes("running")
	race(4, func(int) int {
		status, _, _ := h.try(t.Context(), "POST", "/v1/sandboxes/"+sandboxes[0]+"/fork", object{"count": 3})
		return status
	})
	if n := count("/v1/sandboxes?limit=200", "sandboxes"); n != 4 {
		t.Errorf("there are %d sandboxes after the forks", n)
	}
	race(10, func(i int) int {
		status, _, _ := h.try(t.Context(), "POST", "/v1/sandboxes/"+sandboxes[i%2]+"/snapshots",
			object{"name": fmt.Sprintf("r%d", i)})
		return status
	})
	if n := count("/v1/snapshots?limit=200", "snapshots"); n > 3 || n == 0 {
		t.Errorf("there are %d snapshots, want 1 to 3", n)
	}
	race(10, func(i int) int {
		status, _, _ := h.try(t.Context(), "POST", "/v1/templates", object{"name": fmt.Sprintf("t%d", i),
			"dockerfile": "FROM python\n"})
		return status
	})
	_, body := h.call("GET", "/v1/templates?limit=200", nil)
	if n := strings.Count(string(body), `"name":"t`); n != 3 {
		t.Errorf("there are %d templates, want 3: %s", n, body)
	}
	race(130, func(i int) int {
		status, _, _ := h.try(t.Context(), "PUT", portPath(sandboxes[0], 2000+i), object{"public": true})
		return status
	})
	if n := count("/v1/sandboxes/"+sandboxes[0]+"/ports", "ports"); n != 100 {
		t.Errorf("there are %d public ports, want 100", n)
	}
	if made[0]+made[500] > 0 {
		t.Errorf("answers by status: %v", made)
	}
	for i := range 10 {
		h.call("POST", fmt.Sprintf("/v1/templates/t%d/cancel", i), nil)
		h.call("DELETE", fmt.Sprintf("/v1/templates/t%d?force=true", i), nil)
		h.call("DELETE", fmt.Sprintf("/v1/snapshots/r%d", i), nil)
	}
	(&hostile{server: h}).destroyAll()
}

// TestKeysOfOthersAreNoRepeats creates sandboxes in two organizations with the same
// Idempotency-Key.
func TestKeysOfOthersAreNoRepeats(t *testing.T) {
	s := attacked(t)
	ids := map[string]bool{}
	for _, name := range []string{"repeats-a", "repeats-b"} {
		h := s.tenant(name, nil)
		for range 2 {
			resp, body := h.page("POST", "/v1/sandboxes", strings.NewReader(`{"template":"python","timeout":"5m"}`),
				func(r *http.Request) {
					r.Header.Set("Idempotency-Key", "the same")
					r.Header.Set("Content-Type", "application/json")
				})
			if resp.StatusCode != 201 {
				t.Fatalf("%s %s", resp.Status, body)
			}
			ids[text(body, "id")] = true
		}
		defer (&hostile{server: h}).destroyAll()
	}
	if len(ids) != 2 {
		t.Errorf("four creates of two organizations with one key made %v", ids)
	}
}

// TestUploadsInTheWay uploads to a sandbox while it is suspended, sleeps, and is destroyed. Every
// file is whole or absent, and every call ends.
func TestUploadsInTheWay(t *testing.T) {
	onOneStore(t)
	s := attacked(t)
	id := s.persistent(nil)
	content := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for range 3 {
				status, body, err := s.try(t.Context(), "PUT", fmt.Sprintf("/v1/sandboxes/%s/files?path=/up/%d", id, i),
					strings.NewReader(content))
				if err != nil || status != 204 && status != 409 && status != 503 {
					t.Errorf("upload: %d %s %v", status, body, err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 3 {
			if status, body, err := s.try(t.Context(), "POST", "/v1/sandboxes/"+id+"/suspend", nil); err != nil ||
				status != 200 && status != 409 {
				t.Errorf("suspend: %d %s %v", status, body, err)
			}
		}
	})
	wg.Wait()
	if got := s.want(id,
		`for f in /up/*; do [ "$(stat -c %s $f)" = 4194304 ] || echo $f; done; ls /up | wc -l`); got != "6" {
		t.Errorf("after uploads during suspends the files are %s", got)
	}
	// Uploads that are cut in the middle, and whose sandbox is destroyed meanwhile.
	cut := make(chan error, 20)
	for i := range 20 {
		r, w := io.Pipe()
		go func() {
			_, _ = w.Write([]byte(content[:1<<20])) // the server may refuse it
			time.Sleep(time.Second)                 // the upload is under way when the sandbox is destroyed
			_ = w.CloseWithError(io.ErrUnexpectedEOF)
		}()
		go func() {
			status, body, err := s.try(t.Context(), "PUT", fmt.Sprintf("/v1/sandboxes/%s/files?path=/cut/%d", id, i), r)
			if err == nil && status/100 == 2 {
				err = fmt.Errorf("half an upload is answered %d %s", status, body)
			} else {
				err = nil
			}
			_ = r.Close() // ends the writer
			cut <- err
		}()
	}
	time.Sleep(200 * time.Millisecond) // some uploads have begun
	s.destroy(id)
	for range 20 {
		if err := <-cut; err != nil {
			t.Error(err)
		}
	}
	s.noLeases()
}
