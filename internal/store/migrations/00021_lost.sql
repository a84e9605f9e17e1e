-- The time since which the other servers of a fleet count a node as lost; NULL for a node that they do not, and again
-- once its next server has started.

-- +goose Up

ALTER TABLE nodes ADD COLUMN lost_at BIGINT;
