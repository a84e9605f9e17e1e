-- The first schema for PostgreSQL. It has the tables and columns of SQLite's schema, which the comments of
-- SQLite's migrations explain, and the table commits; TestSchemasAgree compares them.
--
-- Every text has the collation "C", so that order and comparison are those of bytes, as in SQLite and in Go, and
-- do not change when the operating system's locales do.

-- +goose Up

CREATE TABLE settings (
    name  TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    value TEXT COLLATE "C" NOT NULL
);

CREATE TABLE cluster (
    one        BOOLEAN NOT NULL PRIMARY KEY CHECK (one), -- there is one row
    id         TEXT COLLATE "C" NOT NULL,
    generation BIGINT NOT NULL -- rises when a restored state is accepted
);

CREATE TABLE nodes (
    id         TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    fence      BIGINT NOT NULL, -- of the newest server
    started_at BIGINT NOT NULL  -- of that server
);

CREATE TABLE orgs (
    id              TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    name            TEXT COLLATE "C" NOT NULL UNIQUE,
    quota_sandboxes BIGINT NOT NULL,
    quota_vcpus     BIGINT NOT NULL,
    quota_memory_mb BIGINT NOT NULL,
    created_at      BIGINT NOT NULL
);

CREATE INDEX orgs_page ON orgs (created_at, id);

CREATE TABLE api_keys (
    id           TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    org_id       TEXT COLLATE "C" NOT NULL REFERENCES orgs (id),
    name         TEXT COLLATE "C" NOT NULL,
    hash         TEXT COLLATE "C" NOT NULL UNIQUE, -- hex SHA-256 of the secret
    prefix       TEXT COLLATE "C" NOT NULL,
    scopes       TEXT COLLATE "C" NOT NULL,        -- JSON
    created_at   BIGINT NOT NULL,
    expires_at   BIGINT,
    revoked_at   BIGINT,
    last_used_at BIGINT
);

CREATE INDEX api_keys_page ON api_keys (org_id, created_at, id);

CREATE TABLE templates (
    id          TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    org_id      TEXT COLLATE "C" NOT NULL, -- '' is built in
    name        TEXT COLLATE "C" NOT NULL,
    description TEXT COLLATE "C" NOT NULL,
    status      TEXT COLLATE "C" NOT NULL,
    progress    TEXT COLLATE "C" NOT NULL,
    build_error TEXT COLLATE "C" NOT NULL, -- JSON
    version     BIGINT NOT NULL,
    image       TEXT COLLATE "C" NOT NULL,
    image_size  BIGINT NOT NULL,
    source      TEXT COLLATE "C" NOT NULL,
    inputs      TEXT COLLATE "C" NOT NULL,
    env         TEXT COLLATE "C" NOT NULL, -- JSON
    workdir     TEXT COLLATE "C" NOT NULL,
    run_as      TEXT COLLATE "C" NOT NULL,
    size        TEXT COLLATE "C" NOT NULL,
    disk_mb     BIGINT NOT NULL,
    egress      TEXT COLLATE "C" NOT NULL, -- JSON
    created_at  BIGINT NOT NULL,
    updated_at  BIGINT,
    built_at    BIGINT,
    build_id    TEXT COLLATE "C" NOT NULL,
    tries       BIGINT NOT NULL,
    queued_at   BIGINT, -- NULL: no build waits or runs
    start       TEXT COLLATE "C" NOT NULL, -- JSON
    ready_build TEXT COLLATE "C" NOT NULL, -- the build that gave the version, '' is not known
    UNIQUE (org_id, name)
);

CREATE INDEX templates_page ON templates (org_id, created_at, id);
CREATE INDEX templates_queued ON templates (queued_at, id) WHERE queued_at IS NOT NULL;
CREATE INDEX templates_image ON templates (image);

CREATE TABLE template_builds (
    template_id TEXT COLLATE "C" NOT NULL PRIMARY KEY REFERENCES templates (id) ON DELETE CASCADE,
    definition  TEXT COLLATE "C" NOT NULL, -- JSON
    context     TEXT COLLATE "C" NOT NULL, -- hex SHA-256 of the file, '' is none
    refresh     BOOLEAN NOT NULL,
    private     BOOLEAN NOT NULL,
    repairs     TEXT COLLATE "C" NOT NULL -- hex SHA-256 of an image that is gone, '' is none
);

CREATE TABLE template_logs (
    template_id TEXT COLLATE "C" NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    seq         BIGINT  NOT NULL,
    at          BIGINT  NOT NULL,
    line        TEXT COLLATE "C" NOT NULL,
    step        BIGINT  NOT NULL,
    heading     BOOLEAN NOT NULL,
    dockerfile_line BIGINT NOT NULL, -- at which the step of the line is, 0 is unknown
    PRIMARY KEY (template_id, seq)
);

CREATE TABLE template_tags (
    template_id TEXT COLLATE "C" NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag         TEXT COLLATE "C" NOT NULL,
    build_id    TEXT COLLATE "C" NOT NULL,
    image       TEXT COLLATE "C" NOT NULL, -- hex SHA-256 of the EROFS file
    version     TEXT COLLATE "C" NOT NULL, -- JSON: what sandboxes are made from
    created_at  BIGINT NOT NULL,
    gone        BOOLEAN NOT NULL, -- the image was not found
    PRIMARY KEY (template_id, tag)
);

CREATE INDEX template_tags_image ON template_tags (image);

CREATE TABLE sandboxes (
    id                TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    org_id            TEXT COLLATE "C" NOT NULL,
    mode              TEXT COLLATE "C" NOT NULL,
    state             TEXT COLLATE "C" NOT NULL,
    run               TEXT COLLATE "C" NOT NULL,
    template          TEXT COLLATE "C" NOT NULL,
    template_id       TEXT COLLATE "C" NOT NULL,
    template_version  BIGINT NOT NULL,
    image             TEXT COLLATE "C" NOT NULL,
    vcpus             BIGINT NOT NULL,
    memory_mb         BIGINT NOT NULL,
    shape             TEXT COLLATE "C" NOT NULL, -- JSON
    metadata          TEXT COLLATE "C" NOT NULL, -- JSON; sandbox_metadata is its index
    timeout           BIGINT NOT NULL,
    idle_timeout      BIGINT NOT NULL,
    recovery_interval BIGINT NOT NULL,
    created_at        BIGINT NOT NULL,
    started_at        BIGINT,
    expires_at        BIGINT,
    last_activity_at  BIGINT,
    suspended_at      BIGINT,
    destroyed_at      BIGINT,
    destroy_reason    TEXT COLLATE "C" NOT NULL,
    error             TEXT COLLATE "C" NOT NULL,
    source            TEXT COLLATE "C" NOT NULL,
    origin            TEXT COLLATE "C" NOT NULL,
    token             TEXT COLLATE "C" NOT NULL,
    at_end            TEXT COLLATE "C" NOT NULL,
    surface           TEXT COLLATE "C" NOT NULL,
    ended_at          BIGINT, -- NULL in every state that is not over
    weight            BIGINT NOT NULL DEFAULT 1,
    kept              TEXT COLLATE "C" NOT NULL, -- what a suspend keeps, '' is everything
    node_id           TEXT COLLATE "C" NOT NULL,
    fence             BIGINT NOT NULL -- of the server that has taken the row over
);

CREATE INDEX sandboxes_page ON sandboxes (org_id, created_at, id);
CREATE INDEX sandboxes_live_page ON sandboxes (org_id, created_at, id) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_live ON sandboxes (node_id, created_at, id) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_ended ON sandboxes (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX sandboxes_of_template ON sandboxes (template_id) WHERE ended_at IS NULL;
CREATE INDEX sandboxes_over ON sandboxes (org_id, ended_at, id, weight) WHERE ended_at IS NOT NULL;

CREATE TABLE sandbox_metadata (
    sandbox_id TEXT COLLATE "C" NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    org_id     TEXT COLLATE "C" NOT NULL,
    name       TEXT COLLATE "C" NOT NULL,
    value      TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (sandbox_id, name)
);

CREATE INDEX sandbox_metadata_search ON sandbox_metadata (org_id, name, value, sandbox_id);

CREATE TABLE public_ports (
    sandbox_id TEXT COLLATE "C" NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    port       BIGINT NOT NULL,
    PRIMARY KEY (sandbox_id, port)
);

CREATE TABLE idempotency (
    org_id     TEXT COLLATE "C" NOT NULL,
    name       TEXT COLLATE "C" NOT NULL, -- the caller's key
    hash       TEXT COLLATE "C" NOT NULL,
    sandbox_id TEXT COLLATE "C" NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (org_id, name)
);

CREATE INDEX idempotency_sandbox ON idempotency (sandbox_id);
CREATE INDEX idempotency_age ON idempotency (created_at);

CREATE TABLE pool (
    id               TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    run              TEXT COLLATE "C" NOT NULL,
    token            TEXT COLLATE "C" NOT NULL,
    org_id           TEXT COLLATE "C" NOT NULL,
    template         TEXT COLLATE "C" NOT NULL,
    template_id      TEXT COLLATE "C" NOT NULL,
    template_version BIGINT NOT NULL,
    image            TEXT COLLATE "C" NOT NULL,
    created_at       BIGINT NOT NULL,
    shape            TEXT COLLATE "C" NOT NULL, -- JSON
    node_id          TEXT COLLATE "C" NOT NULL,
    fence            BIGINT NOT NULL
);

CREATE TABLE snapshots (
    id               TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    org_id           TEXT COLLATE "C" NOT NULL,
    name             TEXT COLLATE "C" NOT NULL, -- '' is none
    state            TEXT COLLATE "C" NOT NULL,
    sandbox_id       TEXT COLLATE "C" NOT NULL, -- may be gone
    template         TEXT COLLATE "C" NOT NULL,
    template_id      TEXT COLLATE "C" NOT NULL, -- may be gone
    template_version BIGINT NOT NULL,
    image            TEXT COLLATE "C" NOT NULL,
    bytes            BIGINT NOT NULL,
    created_at       BIGINT NOT NULL,
    shape            TEXT COLLATE "C" NOT NULL, -- JSON
    kept             TEXT COLLATE "C" NOT NULL, -- as in sandboxes
    node_id          TEXT COLLATE "C" NOT NULL,
    fence            BIGINT NOT NULL
);

CREATE INDEX snapshots_page ON snapshots (org_id, created_at, id);
CREATE INDEX snapshots_unready ON snapshots (node_id, created_at, id) WHERE state <> 'ready';
CREATE UNIQUE INDEX snapshots_name ON snapshots (org_id, name) WHERE name <> '' AND state <> 'deleting';

-- seq is NULL until the event is numbered, after the commit of the transaction that wrote it: docs/decisions/0015.
-- written orders the events that are not numbered yet.
CREATE TABLE events (
    written    BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    seq        BIGINT UNIQUE,
    org_id     TEXT COLLATE "C" NOT NULL, -- '' is of no organization
    at         BIGINT NOT NULL,
    type       TEXT COLLATE "C" NOT NULL,
    sandbox_id TEXT COLLATE "C" NOT NULL, -- may be gone; '' is none
    number     BIGINT,
    from_state TEXT COLLATE "C" NOT NULL,
    to_state   TEXT COLLATE "C" NOT NULL,
    reason     TEXT COLLATE "C" NOT NULL,
    detail     TEXT COLLATE "C" NOT NULL,
    about      TEXT COLLATE "C" NOT NULL -- JSON
);

CREATE INDEX events_feed ON events (org_id, seq);
CREATE INDEX events_unnumbered ON events (written) WHERE seq IS NULL;
CREATE UNIQUE INDEX events_listing ON events (sandbox_id, number) WHERE number IS NOT NULL;

CREATE TABLE event_horizons (
    org_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    seq    BIGINT NOT NULL
);

CREATE TABLE event_consumers (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    seq  BIGINT NOT NULL
);

CREATE TABLE checkpoints (
    name        TEXT COLLATE "C" NOT NULL,
    node        TEXT COLLATE "C" NOT NULL,
    fence       BIGINT NOT NULL,
    number      BIGINT NOT NULL,
    made_at     BIGINT NOT NULL,
    bytes       BIGINT NOT NULL,
    cpu_class   TEXT COLLATE "C" NOT NULL,
    agent       TEXT COLLATE "C" NOT NULL,
    runsc       TEXT COLLATE "C" NOT NULL,
    sum         TEXT COLLATE "C" NOT NULL,
    uploaded_at BIGINT,
    PRIMARY KEY (name, fence, number)
);

-- Each transaction writes a row, whose presence says whether the transaction was committed when the answer to its commit
-- is lost: docs/decisions/0016. Old rows are dropped.
CREATE TABLE commits (
    at      BIGINT  NOT NULL,
    id      BIGINT  NOT NULL, -- random
    aborted BOOLEAN NOT NULL, -- written by another transaction, so that this one cannot be committed any more
    PRIMARY KEY (at, id)
);
