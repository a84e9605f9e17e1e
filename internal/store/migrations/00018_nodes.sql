-- Nodes have names, labels and what their servers say about them, and operators can cordon and drain them. A node has
-- no name until a server of this version has started on it.

-- +goose Up

ALTER TABLE nodes ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN about TEXT NOT NULL DEFAULT '{}';  -- JSON
ALTER TABLE nodes ADD COLUMN labels TEXT NOT NULL DEFAULT '{}'; -- JSON
ALTER TABLE nodes ADD COLUMN cordoned_at BIGINT;                -- NULL: takes sandboxes
ALTER TABLE nodes ADD COLUMN drain_by BIGINT;                   -- NULL: is not drained

CREATE UNIQUE INDEX nodes_name ON nodes (name) WHERE name <> '';
