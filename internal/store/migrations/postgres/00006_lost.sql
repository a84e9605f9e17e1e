-- Nodes that are lost. SQLite's migration explains it.

-- +goose Up

ALTER TABLE nodes ADD COLUMN lost_at BIGINT;
