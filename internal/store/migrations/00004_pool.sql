-- The members of the pool that are ready: sandboxes that run and belong to nobody yet.
-- A claim deletes the row and inserts the sandbox's, with the same id, in one transaction.

-- +goose Up

CREATE TABLE pool (
    id               TEXT    NOT NULL PRIMARY KEY,
    run              TEXT    NOT NULL,
    token            TEXT    NOT NULL,
    org_id           TEXT    NOT NULL, -- one that may use the template
    template         TEXT    NOT NULL,
    template_id      TEXT    NOT NULL,
    template_version BIGINT  NOT NULL,
    image            TEXT    NOT NULL,
    size             TEXT    NOT NULL,
    vcpus            BIGINT  NOT NULL,
    memory_mb        BIGINT  NOT NULL,
    dedicated        BOOLEAN NOT NULL,
    disk_mb          BIGINT  NOT NULL,
    started          TEXT    NOT NULL, -- hash of what its start command began with; '' is none
    created_at       BIGINT  NOT NULL
);
