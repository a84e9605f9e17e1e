-- Names, labels, cordons and drains of nodes. SQLite's migration explains them.

-- +goose Up

ALTER TABLE nodes ADD COLUMN name TEXT COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN about TEXT COLLATE "C" NOT NULL DEFAULT '{}';
ALTER TABLE nodes ADD COLUMN labels TEXT COLLATE "C" NOT NULL DEFAULT '{}';
ALTER TABLE nodes ADD COLUMN cordoned_at BIGINT;
ALTER TABLE nodes ADD COLUMN drain_by BIGINT;

CREATE UNIQUE INDEX nodes_name ON nodes (name) WHERE name <> '';
