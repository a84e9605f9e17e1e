# make help lists the targets. `make run` and `make test` do all the set-up on a fresh machine with Go
# and root.

SHELL := /bin/bash
GO    ?= go
export CGO_ENABLED := 0
# Builds, checks and tests with the same flags, so that no package is compiled twice.
export GOFLAGS := $(strip $(GOFLAGS) -trimpath)
# The go.mod with the patched gVisor, which scripts/gvisor.sh writes.
PATCHED = -modfile=$(CURDIR)/bin/gvisor/go.mod
# A cache of finished template images, by content. It only saves time.
export CAY_IMAGES_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cay/images

TOOL     = $(GO) tool -modfile=tools/go.mod
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  = -s -w
PROGRAMS = internal/embedded/programs
# How long each fuzz test runs in `make test`, as -fuzztime. It is a number of tries that takes some
# seconds, since a run that the clock ends can fail on a busy machine for that reason alone.
FUZZTIME ?= 3000x

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: run
run: needs build ## install what the host lacks, start the server and run a first sandbox
	@scripts/run.sh

.PHONY: build
build: programs ## build bin/cay
	@$(GO) build -ldflags "$(LDFLAGS) -X main.version=$(VERSION)" -o bin/cay ./cmd/cay

.PHONY: programs
programs: ## build the programs that cay embeds
	@$(GO) build -ldflags "$(LDFLAGS)" -o bin/ ./cmd/cay-agent
	@scripts/gvisor.sh bin/gvisor
	@$(GO) build $(PATCHED) -ldflags "$(LDFLAGS) -E main.entry" -o bin/ ./cmd/cay-runsc
	@cd cmd/cay-buildkit && $(GO) build -ldflags "$(LDFLAGS)" -o ../../bin/ . # a module of its own
	@scripts/pack.sh bin/cay-agent bin/cay-runsc bin/cay-buildkit $(PROGRAMS)

.PHONY: needs
needs: ## install the Debian packages that the host lacks
	@scripts/needs.sh run

.PHONY: test
test: build ## run every test, the real ones included
	@scripts/needs.sh test
	@FUZZTIME=$(FUZZTIME) scripts/fuzz.sh
	@cd cmd/cay-buildkit && CAY_TEST_REQUIRE=1 $(GO) test ./... # a module of its own
	@cd sdk/go && $(GO) test ./... # a module of its own
	@$(GO) test $(PATCHED) -run '^$$' ./... >/dev/null # builds all before the first runs
	CAY_TEST_REQUIRE=1 $(GO) test $(PATCHED) -p 2 -timeout 60m ./...
	CAY_TEST_REQUIRE=1 CAY_TEST_STORE=postgres $(GO) test $(PATCHED) -timeout 60m ./e2e # those that depend on the records

# Which machines make test-hosts runs, all by default, and more of its flags: go run ./e2e/hosts -h
HOSTS      ?=
HOSTS_ARGS ?=

.PHONY: test-hosts
test-hosts: build ## run the tests in virtual machines, HOSTS="bookworm trixie" for some, and write docs/hosts.md; an hour or two where the processor is emulated
	@scripts/needs.sh hosts
	nice -n 10 $(GO) run ./e2e/hosts $(if $(HOSTS),-machines "$(HOSTS)") -doc docs/hosts.md $(HOSTS_ARGS)

.PHONY: soak
soak: build ## suspend and wake one sandbox 200 times and 20 at once, and check for losses and leaks
	@scripts/needs.sh test
	CAY_TEST_REQUIRE=1 $(GO) test -count=1 -timeout 60m ./e2e -run '^TestSoak$$' -v -soak.cycles=200 -soak.sandboxes=20 -soak.rounds=4

# How long the hostile tenants of `make soak-hostile` attack.
HOSTILE ?= 10m

.PHONY: soak-hostile
soak-hostile: build ## let 50 hostile tenants attack beside an honest one, for HOSTILE (10m), and print what each got
	@scripts/needs.sh test
	CAY_TEST_REQUIRE=1 $(GO) test -count=1 -timeout 60m ./e2e -run '^TestSoakHostile$$' -v -hostile.time=$(HOSTILE) -hostile.tenants=50 -hostile.spin

.PHONY: soak-programs
soak-programs: build ## build a template with the programs of docs/compatibility.md and try each: half an hour, 4 GB of disk
	@scripts/needs.sh test
	CAY_TEST_REQUIRE=1 $(GO) test -count=1 -timeout 3h ./e2e -run '^TestPrograms' -v -programs

.PHONY: check
check: build ## formatting, vet, staticcheck, locks, imports, prose, generated files, modules
	@scripts/check.sh

.PHONY: generate
generate: ## update the generated files
	@scripts/needs.sh generate
	internal/api/generate.sh
	internal/agentapi/generate.sh

.PHONY: bench
bench: build ## measure, and print a table and JSON
	@scripts/needs.sh run
	$(GO) run ./e2e/bench $(BENCH)
	$(GO) test -run "^$$" -bench Transfer -benchtime 3x ./internal/objects

# OLD is a cay of an older commit, built in a worktree of its own.
.PHONY: bench-pair
bench-pair: build ## measure an older cay, OLD=path, in turn with this one; fail if this one is slower
	@scripts/needs.sh run
	@test -x "$(OLD)" || { echo "bench-pair: OLD=path must name the older program" >&2; exit 2; }
	$(GO) run ./e2e/bench -old "$(OLD)" $(BENCH)

.PHONY: clean
clean: ## remove what was built
	rm -rf bin $(PROGRAMS)/*.gz
