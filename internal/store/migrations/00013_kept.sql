-- A suspend may keep the files of a sandbox alone. Suspends of before kept everything, which is ''.

-- +goose Up

ALTER TABLE sandboxes ADD COLUMN kept TEXT NOT NULL DEFAULT '';
ALTER TABLE snapshots ADD COLUMN kept TEXT NOT NULL DEFAULT '';
