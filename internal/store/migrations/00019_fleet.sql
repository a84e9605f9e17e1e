-- Machines join a cluster with tokens that work once, get certificates of the cluster's authority, and hold leases while
-- their servers run. A node that was removed keeps its row, so that its id is never given again.

-- +goose Up

ALTER TABLE nodes ADD COLUMN key_sum TEXT NOT NULL DEFAULT ''; -- hex SHA-256 of its public key; '' has never joined
ALTER TABLE nodes ADD COLUMN joined_at BIGINT;                 -- NULL: has never joined
ALTER TABLE nodes ADD COLUMN removed_at BIGINT;

DROP INDEX nodes_name;
CREATE UNIQUE INDEX nodes_name ON nodes (name) WHERE name <> '' AND removed_at IS NULL;

-- Leases are extended every few seconds. They are apart from nodes, whose rows every transaction reads.
CREATE TABLE node_leases (
    node_id  TEXT   NOT NULL PRIMARY KEY,
    session  TEXT   NOT NULL, -- of the server that has it
    began_at BIGINT NOT NULL,
    seen_at  BIGINT NOT NULL,
    until    BIGINT NOT NULL
);

CREATE TABLE node_tokens (
    hash       TEXT   NOT NULL PRIMARY KEY, -- hex SHA-256 of the secret
    node_id    TEXT   NOT NULL,             -- that it lets join again, '' is a new one
    settings   TEXT   NOT NULL,             -- JSON, of the new node
    created_by TEXT   NOT NULL,             -- id of an API key
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    used_at    BIGINT,
    used_by    TEXT   NOT NULL,             -- id of the node, '' is none
    used_key   TEXT   NOT NULL              -- its key_sum
);

CREATE INDEX node_tokens_expired ON node_tokens (expires_at);

CREATE TABLE authorities (
    id          TEXT   NOT NULL PRIMARY KEY,
    certificate TEXT   NOT NULL, -- PEM
    sealed      TEXT   NOT NULL, -- its key, which only the secret file of the replicas opens
    created_at  BIGINT NOT NULL
);
