-- The first schema. It keeps to what SQLite and PostgreSQL both understand.
--
-- Times are microseconds since 1970 UTC, durations microseconds, NULL is "not
-- yet" or "does not apply". Maps and lists that are only ever read whole are
-- JSON text. Rules that rows must keep are in the core rooms; here are only the
-- keys that concurrent writers could break.

-- +goose Up

CREATE TABLE settings (
    name  TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE orgs (
    id              TEXT   NOT NULL PRIMARY KEY,
    name            TEXT   NOT NULL UNIQUE,
    quota_sandboxes BIGINT NOT NULL,
    quota_vcpus     BIGINT NOT NULL,
    quota_memory_mb BIGINT NOT NULL,
    created_at      BIGINT NOT NULL
);

CREATE INDEX orgs_page ON orgs (created_at, id);

CREATE TABLE api_keys (
    id           TEXT   NOT NULL PRIMARY KEY,
    org_id       TEXT   NOT NULL REFERENCES orgs (id),
    name         TEXT   NOT NULL,
    hash         TEXT   NOT NULL UNIQUE, -- hex SHA-256 of the secret
    prefix       TEXT   NOT NULL,
    scopes       TEXT   NOT NULL,        -- JSON
    created_at   BIGINT NOT NULL,
    expires_at   BIGINT,
    revoked_at   BIGINT,
    last_used_at BIGINT
);

CREATE INDEX api_keys_page ON api_keys (org_id, created_at, id);

CREATE TABLE templates (
    id            TEXT    NOT NULL PRIMARY KEY,
    org_id        TEXT    NOT NULL, -- '' is built in
    name          TEXT    NOT NULL,
    description   TEXT    NOT NULL,
    status        TEXT    NOT NULL,
    progress      TEXT    NOT NULL,
    build_error   TEXT    NOT NULL,
    version       BIGINT  NOT NULL,
    image         TEXT    NOT NULL,
    image_size    BIGINT  NOT NULL,
    source        TEXT    NOT NULL,
    inputs        TEXT    NOT NULL,
    env           TEXT    NOT NULL, -- JSON
    workdir       TEXT    NOT NULL,
    run_as        TEXT    NOT NULL,
    start_command TEXT    NOT NULL,
    size          TEXT    NOT NULL,
    disk_mb       BIGINT  NOT NULL,
    egress        TEXT    NOT NULL, -- JSON
    created_at    BIGINT  NOT NULL,
    updated_at    BIGINT,
    built_at      BIGINT,
    UNIQUE (org_id, name)
);

CREATE INDEX templates_page ON templates (org_id, created_at, id);

CREATE TABLE template_logs (
    template_id TEXT   NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    seq         BIGINT NOT NULL,
    at          BIGINT NOT NULL,
    line        TEXT   NOT NULL,
    PRIMARY KEY (template_id, seq)
);

CREATE TABLE sandboxes (
    id                TEXT    NOT NULL PRIMARY KEY,
    org_id            TEXT    NOT NULL,
    mode              TEXT    NOT NULL,
    state             TEXT    NOT NULL,
    run               TEXT    NOT NULL,
    template          TEXT    NOT NULL,
    template_id       TEXT    NOT NULL,
    template_version  BIGINT  NOT NULL,
    image             TEXT    NOT NULL,
    size              TEXT    NOT NULL,
    vcpus             BIGINT  NOT NULL,
    memory_mb         BIGINT  NOT NULL,
    dedicated         BOOLEAN NOT NULL,
    disk_mb           BIGINT  NOT NULL,
    env               TEXT    NOT NULL, -- JSON
    metadata          TEXT    NOT NULL, -- JSON; sandbox_metadata is its index
    egress            TEXT    NOT NULL, -- JSON
    run_as            TEXT    NOT NULL,
    workdir           TEXT    NOT NULL,
    timeout           BIGINT  NOT NULL,
    idle_timeout      BIGINT  NOT NULL,
    recovery_interval BIGINT  NOT NULL,
    created_at        BIGINT  NOT NULL,
    started_at        BIGINT,
    expires_at        BIGINT,
    last_activity_at  BIGINT,
    suspended_at      BIGINT,
    destroyed_at      BIGINT,
    destroy_reason    TEXT    NOT NULL,
    error             TEXT    NOT NULL,
    source            TEXT    NOT NULL,
    token             TEXT    NOT NULL,
    -- When the sandbox came to a state that is over; NULL while it is in any
    -- other. Written with every transition, so that what is alive is a small
    -- index however many destroyed rows are kept.
    ended_at          BIGINT
);

CREATE INDEX sandboxes_page ON sandboxes (org_id, created_at, id);
CREATE INDEX sandboxes_live_page ON sandboxes (org_id, created_at, id) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_live ON sandboxes (created_at, id) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_ended ON sandboxes (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE sandbox_metadata (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    org_id     TEXT NOT NULL,
    name       TEXT NOT NULL,
    value      TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, name)
);

CREATE INDEX sandbox_metadata_search ON sandbox_metadata (org_id, name, value, sandbox_id);

CREATE TABLE sandbox_events (
    sandbox_id TEXT   NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    seq        BIGINT NOT NULL, -- counts up from 1 in each sandbox
    at         BIGINT NOT NULL,
    from_state TEXT   NOT NULL, -- '' for the first
    to_state   TEXT   NOT NULL,
    reason     TEXT   NOT NULL,
    PRIMARY KEY (sandbox_id, seq)
);

CREATE TABLE idempotency (
    org_id     TEXT   NOT NULL,
    name       TEXT   NOT NULL, -- the caller's key
    hash       TEXT   NOT NULL,
    sandbox_id TEXT   NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (org_id, name)
);

CREATE INDEX idempotency_sandbox ON idempotency (sandbox_id);
CREATE INDEX idempotency_age ON idempotency (created_at);
