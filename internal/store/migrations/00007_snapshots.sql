-- Snapshots: sandboxes as they were at a time, which new ones start from. What a sandbox
-- was made from, if from one or from another sandbox, is its origin.

-- +goose Up

CREATE TABLE snapshots (
    id               TEXT    NOT NULL PRIMARY KEY,
    org_id           TEXT    NOT NULL,
    name             TEXT    NOT NULL, -- '' is none
    state            TEXT    NOT NULL,
    sandbox_id       TEXT    NOT NULL, -- may be gone
    template         TEXT    NOT NULL,
    template_id      TEXT    NOT NULL, -- may be gone
    template_version BIGINT  NOT NULL,
    image            TEXT    NOT NULL,
    size             TEXT    NOT NULL,
    vcpus            BIGINT  NOT NULL,
    memory_mb        BIGINT  NOT NULL,
    dedicated        BOOLEAN NOT NULL,
    disk_mb          BIGINT  NOT NULL,
    env              TEXT    NOT NULL, -- JSON
    egress           TEXT    NOT NULL, -- JSON
    run_as           TEXT    NOT NULL,
    workdir          TEXT    NOT NULL,
    bytes            BIGINT  NOT NULL,
    created_at       BIGINT  NOT NULL
);

CREATE INDEX snapshots_page ON snapshots (org_id, created_at, id);
CREATE INDEX snapshots_unready ON snapshots (created_at, id) WHERE state <> 'ready';
-- The name of one that is being deleted is free.
CREATE UNIQUE INDEX snapshots_name ON snapshots (org_id, name) WHERE name <> '' AND state <> 'deleting';

ALTER TABLE sandboxes ADD COLUMN origin TEXT NOT NULL DEFAULT '';
