-- Joins, leases and the authority of a cluster. SQLite's migration explains them.

-- +goose Up

ALTER TABLE nodes ADD COLUMN key_sum TEXT COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN joined_at BIGINT;
ALTER TABLE nodes ADD COLUMN removed_at BIGINT;

DROP INDEX nodes_name;
CREATE UNIQUE INDEX nodes_name ON nodes (name) WHERE name <> '' AND removed_at IS NULL;

CREATE TABLE node_leases (
    node_id  TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    session  TEXT COLLATE "C" NOT NULL,
    began_at BIGINT NOT NULL,
    seen_at  BIGINT NOT NULL,
    until    BIGINT NOT NULL
) WITH (fillfactor = 50); -- so that an extension finds room beside the old row

CREATE TABLE node_tokens (
    hash       TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    node_id    TEXT COLLATE "C" NOT NULL,
    settings   TEXT COLLATE "C" NOT NULL,
    created_by TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    used_at    BIGINT,
    used_by    TEXT COLLATE "C" NOT NULL,
    used_key   TEXT COLLATE "C" NOT NULL
);

CREATE INDEX node_tokens_expired ON node_tokens (expires_at);

CREATE TABLE authorities (
    id          TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    certificate TEXT COLLATE "C" NOT NULL,
    sealed      TEXT COLLATE "C" NOT NULL,
    created_at  BIGINT NOT NULL
);
