-- Rows know the node that has the sandbox, and the fence of the server that has taken them over. A server that starts
-- takes a higher fence, so that one before it, which may still run, cannot write any more. All rows of before are of the
-- one node that there was, whose id is the server instance.
--
-- The cluster's id was the name under which the records own a bucket. Its generation rises when a restored state is
-- accepted.

-- +goose Up

CREATE TABLE cluster (
    one        BOOLEAN NOT NULL PRIMARY KEY CHECK (one), -- there is one row
    id         TEXT    NOT NULL,
    generation BIGINT  NOT NULL
);

INSERT INTO cluster (one, id, generation) SELECT TRUE, value, 1 FROM settings WHERE name = 'files_owner';
DELETE FROM settings WHERE name = 'files_owner';

CREATE TABLE nodes (
    id         TEXT   NOT NULL PRIMARY KEY,
    fence      BIGINT NOT NULL, -- of the newest server
    started_at BIGINT NOT NULL  -- of that server
);

ALTER TABLE sandboxes ADD COLUMN node_id TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN fence BIGINT NOT NULL DEFAULT 0;
UPDATE sandboxes SET node_id = COALESCE((SELECT value FROM settings WHERE name = 'instance'), '');

ALTER TABLE pool ADD COLUMN node_id TEXT NOT NULL DEFAULT '';
ALTER TABLE pool ADD COLUMN fence BIGINT NOT NULL DEFAULT 0;
UPDATE pool SET node_id = COALESCE((SELECT value FROM settings WHERE name = 'instance'), '');

ALTER TABLE snapshots ADD COLUMN node_id TEXT NOT NULL DEFAULT '';
ALTER TABLE snapshots ADD COLUMN fence BIGINT NOT NULL DEFAULT 0;
UPDATE snapshots SET node_id = COALESCE((SELECT value FROM settings WHERE name = 'instance'), '');

DROP INDEX sandboxes_live;
CREATE INDEX sandboxes_live ON sandboxes (node_id, created_at, id) WHERE ended_at IS NULL;
DROP INDEX snapshots_unready;
CREATE INDEX snapshots_unready ON snapshots (node_id, created_at, id) WHERE state <> 'ready';
