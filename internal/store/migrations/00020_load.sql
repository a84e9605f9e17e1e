-- What a node says about its machine with each extension of its lease, by which new sandboxes are placed. A node that
-- has said nothing yet counts as one without free memory, and comes last.

-- +goose Up

ALTER TABLE node_leases ADD COLUMN memory_free_mb BIGINT NOT NULL DEFAULT 0; -- MiB, beyond what the machine keeps free
ALTER TABLE node_leases ADD COLUMN sandboxes BIGINT NOT NULL DEFAULT 0;      -- on the machine, without pooled ones
ALTER TABLE node_leases ADD COLUMN starting BIGINT NOT NULL DEFAULT 0;       -- that are being made
