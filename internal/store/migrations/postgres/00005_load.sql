-- What nodes say about their machines. SQLite's migration explains it.

-- +goose Up

ALTER TABLE node_leases ADD COLUMN memory_free_mb BIGINT NOT NULL DEFAULT 0;
ALTER TABLE node_leases ADD COLUMN sandboxes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE node_leases ADD COLUMN starting BIGINT NOT NULL DEFAULT 0;
