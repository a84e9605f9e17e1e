-- Rows of sandboxes that are over lose their secrets, and their number is bounded. The weight of a
-- row is the number of rows that it counts for: one, and one more for each 4 KiB that its owner chose.

-- +goose Up

ALTER TABLE sandboxes ADD COLUMN weight BIGINT NOT NULL DEFAULT 1;

UPDATE sandboxes SET env = '{}', surface = '', token = '', weight = 1 + (2 * LENGTH(metadata) + LENGTH(egress) + LENGTH(error)) / 4096
    WHERE ended_at IS NOT NULL;

CREATE INDEX sandboxes_over ON sandboxes (org_id, ended_at, id, weight) WHERE ended_at IS NOT NULL;
